"""For a method whose peers are branches of one network: they share its first stages.

Had by: cl_ilr, ffl, mcl, okddip, one, pcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from losses.contract import Method


class SharedTrunk(ABC):
    """Makes the first stages a module that all peers share. Only peers of one network, which has stages, will do.

    The trunk's map is there for the residents as the signal `trunk` [N, channels, side, side]; it is not exchanged.
    """

    trunk_gradient: ClassVar[Literal["sum", "mean"]] = "sum"
    """Whether the trunk follows the sum of the peers' gradients or their mean."""

    one_view: ClassVar[bool] = False
    """Whether all peers must see one augmentation of an image, as where a module that they share looks at `trunk`."""

    @classmethod
    @abstractmethod
    def trunk(cls, options: Any, num_stages: int) -> int | None:
        """The last stage, 1 .. S, that all peers share; None where they share none with these options."""


def trunk_of(method: type[Method], options: Any, num_stages: int) -> int | None:
    """The last stage that the peers of any method share, None where they share none."""
    return method.trunk(options, num_stages) if issubclass(method, SharedTrunk) else None
