"""A rank does not outlive the torchrun that started it: imported before all else, since importing torch takes seconds
in which torchrun may be killed. Ranks without it would train on, beside those that are started in their place."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Has the kernel kill this process as soon as the one that started it is dead; ends it if that is so already."""
    with contextlib.suppress(AttributeError):  # only Linux can
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if _is_orphan(os.getppid()):
        sys.exit("error: the process that started this rank is gone")


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
