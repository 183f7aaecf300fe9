"""What the ranks of a run settle with each other before the first of them reads a checkpoint: whose the folder is, and
that they are of one mind about what is trained."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipelines import DataError, Pipeline, open_pipeline
from engine.config import ConfigError, RunConfig
from engine.files import move_aside
from engine.ranks.collectives import Launch
from engine.ranks.gathering import StoppedEarly
from engine.ranks.owner import FolderLostError, Owner, holds, take
from engine.ranks.roll_call import roll_call

PATIENCE = 10.0
"""Seconds until what one rank has written to a shared folder must be seen by the others."""


@dataclass(frozen=True)
class Claim:
    """A run's hold of its folder, and of its peer's place in a meeting, as one rank knows it."""

    owners: tuple[Owner, ...]
    """On rank 0."""
    mark: str
    """On all ranks; another one for each start."""

    def check(self) -> None:
        """On rank 0, before something is written. Raises: FolderLostError."""
        for owner in self.owners:
            try:
                owner.check()
            except FolderLostError:
                raise
            except OSError:  # A file server that is away: then what comes next cannot be written either, and is said.
                continue


@contextlib.contextmanager
def claim(config: RunConfig, launch: Launch, *, fresh: bool, asked: Callable[[], int]) -> Iterator[Claim]:
    """Takes the run's folder for this run, on rank 0, and sees to it that all ranks see the same one. All ranks call
    this.

    Args:
        fresh: a folder of an earlier run is moved aside.
        asked: the number of a signal that asks for the end, 0 without.

    Raises:
        ConfigError: on all ranks: another run has the folder and lives, it cannot be written to, or some rank does not
            see what rank 0 writes there.
        StoppedEarly: on all ranks: a signal to rank 0 has ended the wait for an owner that is gone.
    """
    owners: list[Owner] = []
    told: list[Any] = [None, None, None, 0]
    try:
        if launch.rank == 0:
            try:
                _take(config, owners, fresh, asked)
                told = [None, owners[0].path.name, owners[0].token, 0]
            except StoppedEarly as stopped:
                told[3] = int(stopped.signal)
            except ConfigError as error:
                told[0] = str(error)
            except OSError as error:
                told[0] = f"dir = {str(config.folder)!r}: cannot be written to: {error}"
        dist.broadcast_object_list(told, src=0)
        failure, number, token, signal = told
        if signal:
            raise StoppedEarly(signal)
        if failure:
            raise ConfigError(failure)
        _check_that_all_see(config.folder, config.folder / "owner" / number, token)
        yield Claim(tuple(owners), token[:8])
    finally:
        for owner in owners:
            owner.release()


def _take(config: RunConfig, owners: list[Owner], fresh: bool, asked: Callable[[], int]) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    what = f"dir = {str(config.folder)!r}"
    if fresh and config.folder.exists():
        before = take(config.folder, what, asked, say)
        aside = move_aside(config.folder)
        before.release()
        shutil.rmtree(aside / "owner", ignore_errors=True)
        say(f"the earlier run is now in {aside}")
    owners.append(take(config.folder, what, asked, say))
    meeting, peer = config.placement.meeting, config.placement.peer
    if meeting is not None and peer is not None:
        place = meeting.expanduser() / "owners" / peer
        try:
            owner = take(place, f"placement.meeting = {str(meeting)!r}, placement.peer = {peer}", asked, say)
            owner.may_vanish = True
            owners.append(owner)
        except OSError as error:  # A peer that can show nothing takes nobody's place.
            say(f"{place}: not taken: {error.strerror or error}; training goes on")


def open_together(config: RunConfig, device: torch.device) -> Pipeline:
    """Opens the data set, and compares all ranks. All ranks call this.

    Raises:
        ConfigError: on all ranks, see `engine.ranks.roll_call`.
    """
    pipeline, failure = None, None
    try:
        pipeline = open_pipeline(config.data, config.seed, device)
    except (DataError, OSError) as error:
        failure = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    try:
        roll_call(config, device, pipeline.contents if pipeline else {}, failure)
        assert pipeline is not None  # or some rank has failed
        return pipeline
    except BaseException:
        if pipeline:
            pipeline.close()
        raise


def _check_that_all_see(folder: Path, path: Path, token: str) -> None:
    seen = [_sees(path, token), socket.gethostname(), str(folder.absolute())]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    for rank, (sees, host, where) in enumerate(everyone):
        if not sees:
            raise ConfigError(
                f"dir = {str(folder)!r}: rank {rank} on {host} does not see in {where} what rank 0 on {everyone[0][1]} "
                f"has written to {everyone[0][2]}; expected a folder that all ranks share"
            )


def _sees(path: Path, token: str) -> bool:
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if holds(path, token):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
