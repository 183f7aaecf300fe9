"""Starts ranks as torchrun does, with its options, and with what a run needs of it.

    python launch/ranks.py --nproc-per-node=8 launch/train.py CONFIG

On one machine nobody else can reach them: what the ranks meet in listens on the loopback interface alone, where
`torchrun --standalone` listens on all, and executes what is sent to it. SIGUSR1 to this process goes to the ranks,
which save and end, where torchrun would die of it and take them along. With --rdzv-endpoint it is one of several
machines, says that it waits while others are missing, and ends at once on SIGTERM or Ctrl-C until they have come.

    --nproc-per-node=N     ranks of this machine, one a GPU
    --max-restarts=N       how often all ranks are started again after one has failed (0)
    --nnodes=N --rdzv-backend=c10d --rdzv-endpoint=FIRST_MACHINE:29500      the same on each of several machines

All others: torchrun --help.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

DEFAULTS = {
    # Seconds between the signal that ends a run and SIGKILL: more than an evaluation and writing a checkpoint take.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",
    # One of several cores, as torchrun has it, without its warning.
    "OMP_NUM_THREADS": "1",
}


PATIENCE = 10.0
"""Seconds without ranks until it is said; then twice as many, and so on."""

DELIVERY = 60.0
"""Seconds until ranks that are being started listen to signals, at most."""


def main() -> None:
    """The command."""
    options = sys.argv[1:]
    if options[:1] in (["-h"], ["--help"]):
        print(f"usage: {Path(sys.argv[0]).name} [OPTION...] SCRIPT [WORD...]\n\n{__doc__}", end="")
        return
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGUSR1, _pass_on)
    # Until there are ranks torch looks at no signal; then it sets handlers of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_tell_of_waiting, args=(options,), daemon=True).start()
    # Not before: torch takes seconds to import.
    from torch.distributed import run

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
    import torch.distributed as dist

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


def _tell_of_waiting(options: list[str]) -> None:
    where = " ".join(o for o in options if o.startswith(("--nnodes", "--rdzv-endpoint", "--rdzv_endpoint", "--master")))
    since, said = time.monotonic(), PATIENCE
    while True:
        time.sleep(1)
        if _children():
            since, said = time.monotonic(), PATIENCE
        elif (waited := time.monotonic() - since) > said:
            said *= 2
            print(f"launch/ranks.py: waiting for other machines: {where}, {waited:.0f} s", file=sys.stderr, flush=True)


def _pass_on(number: int, frame: FrameType | None) -> None:
    threading.Thread(target=_deliver, args=(number,), daemon=True).start()


def _deliver(number: int) -> None:
    """Sends a signal to all ranks, as soon as each has a handler for it: before, they would die of it."""
    told, deadline = set[int](), time.monotonic() + DELIVERY
    while not (children := set(_children())) or children - told:
        for child in children - told:
            if _catches(child, number):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
                told.add(child)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _children() -> list[int]:
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (thread / "children").read_text().split())
    return found


def _catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal, or has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1) or any(line.startswith("State:\tZ") for line in lines)


if __name__ == "__main__":
    main()
