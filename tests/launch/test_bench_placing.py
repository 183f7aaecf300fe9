"""What `launch/bench placement` foretells, by hand."""

from __future__ import annotations

import pytest

from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import balanced
from engine.ranks.planning.planner import Load, PeerLoad
from launch.bench.placing import comparison, foretold


def test_fewer_cores_than_ranks_show_less_than_the_busiest_rank() -> None:
    """A second a row and three, 48 rows, 4 ranks. Spread: 24 rows each, 72 s on the busiest rank; 3 : 1: 48 s on each.
    All work is 192 s in both, 96 s on two cores, whoever has it."""
    load = Load([PeerLoad("a", lambda n: (n / 3, 2 * n / 3), 0), PeerLoad("b", lambda n: (n, 2.0 * n), 0)], 48)
    spread = foretold(Placement.even(2, 1, 4, 0), load)
    uneven = foretold(balanced([1.0, 3.0], 4, 0), load)
    assert (spread.busiest, spread.whole) == pytest.approx((72, 192))
    assert (uneven.busiest, uneven.whole) == pytest.approx((48, 192))
    assert [each.on(2) for each in (spread, uneven)] == pytest.approx([96, 96])
    assert [each.on(4) for each in (spread, uneven)] == pytest.approx([72, 48])
    both = {"spread": spread, "balanced": uneven}
    text = comparison(both, {"spread": 75.0, "balanced": 54.0}, {"spread": 100.0, "balanced": 99.0}, 2, measured=True)
    first, *_, shared, why = text.splitlines()
    assert first == "  busiest rank, spread / balanced: foretold 1.500, measured 1.389 (+8%)"
    assert shared.startswith("  wall clock on 2 cores, spread / balanced: foretold 1.000")
    assert why.startswith("  ranks share cores")
