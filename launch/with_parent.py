"""What a process has to settle before it imports torch, which takes seconds: imported before all else.

A rank does not outlive the torchrun that started it, or it would train on, beside those that are started in its place.
And a signal that asks a run to end is not lost, and loses nothing, while the run is only starting.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Has the kernel kill this process as soon as the one that started it is dead; ends it if that is so already."""
    with contextlib.suppress(AttributeError):  # only Linux can
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if _is_orphan(os.getppid()):
        sys.exit("error: the process that started this rank is gone")


noted: list[int] = []
"""Signals that came before the run listened, see `note_signals`."""


def note_signals() -> None:
    """Has SIGUSR1, SIGTERM and SIGHUP noted instead of ending the process, until somebody else listens to them. Ctrl-C
    ends it at once, as nothing has begun."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # Under nohup SIGHUP is to be ignored.
            signal.signal(number, lambda received, _: noted.append(received))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def obey_signals() -> None:
    """Takes that back: there will be no run. What was noted ends the process now."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for received in noted:
        signal.raise_signal(received)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import torch within this context, if nobody has yet. All of it stays until the process ends; Python would look
    400 times for something to let go of meanwhile, a tenth of the time, and among all that ever again afterwards."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _is_orphan(parent: int) -> bool:
    """Whether a parent is the one that takes in orphans; in a container that may be the launcher itself."""
    if parent != 1:
        return False
    with contextlib.suppress(OSError):
        command = Path("/proc/1/cmdline").read_bytes()
        return not any(name in command for name in (b"torch", b"ranks.py"))
    return False


if "TORCHELASTIC_RUN_ID" in os.environ:
    end_with_parent()
