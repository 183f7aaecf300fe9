"""For a method whose peers may be jobs of their own, which meet in a folder (`placement.kind: jobs`).

Had by: codistillation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from losses.capabilities.after_step import ActsAfterStep


class MeetsAsJobs(ActsAfterStep):
    """Lets peers be jobs of their own, which exchange nothing but what they show after a step (`exchange = "none"`) and
    must do with what has come."""

    @abstractmethod
    def shapes_shown(self) -> Sequence[Mapping[str, tuple[int, ...]]]:
        """The shapes, by name, of what each of the K peers shows the others in `after_step`.

        What another job has left is used only if it is of these shapes.
        """
