"""Whether an exchange in two levels pays."""

from __future__ import annotations

from typing import Literal

from engine.ranks.exchanging.hierarchy import Hierarchy
from engine.ranks.exchanging.levels import Judge, Verdict
from engine.ranks.exchanging.routes import Widths
from engine.ranks.exchanging.traffic import Traffic, in_one_level, in_two_levels
from engine.ranks.planning.planner import Cluster


def judge_of(wanted: Literal["auto", "flat", "hierarchical"], cluster: Cluster) -> Judge | None:
    """Who decides, for what `placement.exchange` asks for; `auto` reckons with the links of a cluster, whatever there
    is."""

    def reckons(levels: Hierarchy, widths: Widths, itemsize: int, back: bool) -> Verdict:
        one = in_one_level(levels.way, levels.nodes, widths, itemsize)
        two = in_two_levels(levels, widths, itemsize)
        before, after = _across(one), _across(two)
        times = (1 + back) * cluster.exchange(one), (1 + back) * cluster.exchange(two, twice=True)
        pays = after < before and times[1] < times[0]
        sizes = [f"{(1 + back) * size / 2**20:.2f}" for size in (after, before)]
        foretold = f"{1e6 * times[1]:.0f} in place of {1e6 * times[0]:.0f} µs foretold on {cluster.gpu.name}"
        said = f"exchange in {'two levels' if pays else 'one level'}: two {'take' if pays else 'would take'}"
        return Verdict(pays, f"{said} {sizes[0]} MiB between nodes in place of {sizes[1]}, {foretold}")

    def always(levels: Hierarchy, widths: Widths, itemsize: int, back: bool) -> Verdict:
        return Verdict(True, "")

    return {"auto": reckons, "flat": None, "hierarchical": always}[wanted]


def _across(each: list[Traffic]) -> int:
    return sum(got.across for got in each)
