"""Where the time of a step goes, without stopping the device to ask."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Clock:
    """Splits the time between calls of `mark` by name: device events on CUDA, the host's clock elsewhere.

    On CUDA a part is the time between two points of the stream, so waiting for the host shows in the part that waited.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.parts = 0
        """Parts of the step under way that are over, as far as the host is concerned."""
        self.restart()

    @property
    def last(self) -> str:
        """The part that was over last, as far as the host is concerned."""
        return self._marks[-1][0]

    def mark(self, name: str) -> None:
        """The part `name` ends here."""
        self.parts += 1
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        parts: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) and isinstance(after, float):
                parts[name] += after - before
            elif isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                parts[name] += before.elapsed_time(after) / 1000
        del self._marks[:-1]
        return dict(parts)

    def restart(self) -> None:
        """What has passed since the last mark (an evaluation, a checkpoint) belongs to no part of a step."""
        self.mark("start")
        self.parts = 0
        del self._marks[:-1]

    def next_step(self) -> None:
        """What comes is of another step."""
        self.parts = 0
