"""Ending early: a signal to any rank makes all of them end after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""What a scheduler sends before it takes the machine away, a terminal that closes, and Ctrl-C."""


class Preemption:
    """What this rank was asked to do by a signal, and what the ranks have agreed on.

    A handler only takes a note. The note travels with a number that the ranks reduce in every step anyway, so agreeing
    costs nothing, and it is read after the same step everywhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._asked: int = 0
        self._since = 0.0

    @contextlib.contextmanager
    def listening(self, *, before: Sequence[int] = (), ends_process: bool = False) -> Iterator[None]:
        """SIGUSR1, SIGTERM, SIGHUP and SIGINT are noted instead of ending the process; a second Ctrl-C ends it at once.

        Args:
            before: signals that came before this.
            ends_process: nothing comes after the body but the end of the process, which no signal but Ctrl-C shall turn
                into a failure, unless the body has failed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Only the main thread may have handlers.
            return
        # Under nohup a terminal that closes is to be ignored.
        wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._note) for number in wanted}
        for number in before:
            self._note(number, None)
        well = False
        try:
            yield
            well = True
        finally:
            for number, handler in handlers.items():
                # A handler of ours would be taken away before the process has ended.
                ignored = ends_process and well and number != signal.SIGINT
                signal.signal(number, signal.SIG_IGN if ignored else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._asked:
            self._asked, self._since = number, now
            if number == signal.SIGINT and int(os.environ.get("RANK", 0)) == 0:
                os.write(2, b"\nSIGINT: saving after this step; once more to end without saving\n")
        elif (
            number == signal.SIGINT and now - self._since > 1
        ):  # A launcher may pass on what the terminal sent as well.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def asked(self) -> int:
        """The number of the signal that this rank got, 0 without."""
        return self._asked

    def ask(self, stop: Tensor) -> None:
        """Before a step: puts the number of the signal that this rank got, if any, into `stop` [1], on the device."""
        if self._asked:
            stop.fill_(self._asked)

    def agreed(self, stop: Tensor) -> signal.Signals | None:
        """After a step: the signal that some rank had got before it; on CUDA before the step before, so that the host
        need not wait for this one.

        Args:
            stop: [1], the maximum over all ranks of what `ask` made of it.
        """
        number = 0
        if not self._cuda:
            number = int(stop.item())
        else:
            pinned, event = torch.empty(1, pin_memory=True), torch.cuda.Event()
            pinned.copy_(stop, non_blocking=True)
            event.record()
            self._under_way.append((pinned, event))
            if len(self._under_way) > 1:
                pinned, event = self._under_way.popleft()
                event.synchronize()
                number = int(pinned.item())
        return signal.Signals(number) if number else None

    def seconds(self, device: torch.device) -> float:
        """Since the first rank that got a signal got it. To be called by all ranks together."""
        waited = torch.tensor([time.monotonic() - self._since if self._asked else 0.0], device=device)
        dist.all_reduce(waited, dist.ReduceOp.MAX)
        return waited.item()
