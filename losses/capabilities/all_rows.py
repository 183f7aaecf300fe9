"""For a method that looks at the rows of all ranks, not at those of its own alone: contrast with the global batch.

Had by: lmcl, mcl.
"""

from __future__ import annotations


class AllRows:
    """Sees signals of the whole global batch."""

    everywhere: tuple[str, ...] = ()
    """Those of `Method.signals` that come for all rows of the global batch as well, as `all_NAME` [G, ...], and with
    them `all_targets` and `all_ids`, int64 [G], the position of each image in the training split. This rank's rows come
    first, in their order. Nothing more is sent than the signals, the targets and the ids. A method whose options decide
    sets it as it is built; () asks for none."""
