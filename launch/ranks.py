"""Starts ranks as torchrun does, with its options, and with what a run needs of it.

    python launch/ranks.py --nproc-per-node=8 launch/train.py CONFIG

On one machine nobody else can reach them: what the ranks meet in listens on the loopback interface alone, where
`torchrun --standalone` listens on all, and executes what is sent to it. SIGUSR1 to this process goes to the ranks,
which save and end, where torchrun would die of it and take them along. With --rdzv-endpoint it is one of several
machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import run

DEFAULTS = {
    # Seconds between the signal that ends a run and SIGKILL: more than an evaluation and writing a checkpoint take.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",
    # One of several cores, as torchrun has it, without its warning.
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    """The command."""
    options = sys.argv[1:]
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGUSR1, _pass_on)
    if any(option.startswith(("--rdzv", "--rdzv_", "--master", "--node", "--standalone")) for option in options):
        # Or ranks that are started a second time on several machines are given the addresses of those that died.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        run.main(options)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, port = _store()
    # With any other backend than the static one torchrun opens a store of its own, at all interfaces.
    run.main(["--nnodes=1", "--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={port}", *options])
    del store


def _store() -> tuple[Any, int]:
    """What the ranks of this machine meet in, and its port."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    port: int = listening.getsockname()[1]
    # The store closes what it listens at.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
    )
    return store, port


def _pass_on(number: int, frame: FrameType | None) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (thread / "children").read_text().split():
                os.kill(int(child), number)


if __name__ == "__main__":
    main()
