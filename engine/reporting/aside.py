"""What may take long without holding training up: a thread that does one thing after another."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable


class Aside:
    """Does what it is given in a thread of its own, in that order.

    Args:
        name: of the thread.
        room: how many things may wait.
    """

    def __init__(self, name: str, room: int) -> None:
        self._queue: queue.Queue[Callable[[], object]] = queue.Queue(room)
        self._since, self._over = math.inf, False
        # What never comes to its end must not keep the process from its own.
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def do(self, action: Callable[[], object]) -> bool:
        """Has something done, which must not raise, and returns at once. Returns: False, as too much is waiting."""
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            return False
        return True

    @property
    def busy(self) -> float:
        """Seconds since it began what it is doing; 0 where it does nothing."""
        return max(0.0, time.monotonic() - self._since)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until all that was given so far is done, or so long. Returns: whether it is."""
        done, deadline = threading.Event(), math.inf if seconds is None else time.monotonic() + seconds
        try:
            self._queue.put(done.set, timeout=seconds)
        except queue.Full:
            return False
        return done.wait(None if seconds is None else max(0.0, deadline - time.monotonic()))

    def end(self) -> None:
        """Ends the thread when all is done, however long that takes. Does not wait."""
        self._over = True
        self.do(lambda: None)

    def _work(self) -> None:
        while not (self._over and self._queue.empty()):
            action = self._queue.get()
            self._since = time.monotonic()
            action()
            self._since = math.inf
