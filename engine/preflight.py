"""What is looked at before anything is started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data_pipelines
import models
from data_pipelines import DataConfig, Sizes
from data_pipelines.decoding.choice import choose
from engine.cohort import side_by_side
from engine.cohort.drop_path import drop_paths
from engine.cohort.optim import check_optimizer
from engine.cohort.outline import looks_at_stages, outline
from engine.cohort.parameter_groups import check_grouping
from engine.cohort.together import hindrance
from engine.config import ConfigError, PeerConfig, RunConfig
from engine.config.identity import completed, differences, identity, is_doubtful
from engine.config.loading import load_run
from engine.ranks.collectives import Launch, choose_device
from engine.ranks.meeting import foreign, path_of
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import plan
from engine.safety import checkpoint, rollback
from engine.training import graphs
from losses import METHODS, PeerInfo
from losses.capabilities import OuterProblem
from losses.contrast import ContrastiveOptions
from models.freezing import freeze
from models.shapes_alone import dry_run
from models.weightless import weightless


class Checked(NamedTuple):
    """A run that nothing speaks against."""

    placement: Placement
    """Of this rank."""
    sizes: Sizes
    """Of its data."""


def check_run(config: RunConfig, launch: Launch, *, fresh: bool = False) -> Placement:
    """The placement of a run that nothing speaks against, see `look_at`."""
    return look_at(config, launch, fresh=fresh).placement


def look_at(config: RunConfig, launch: Launch, *, fresh: bool = False, device: torch.device | None = None) -> Checked:
    """Everything that can be refused before a process group exists or a device is touched.

    Args:
        fresh: the run's folder is about to be moved aside, so it does not matter what lies there.

    Raises:
        ConfigError: naming the key, the value, what was expected and the nearest valid choice.
        CheckpointError: the run has gone back, and what it left out cannot be read.
    """
    device = device or choose_device(config.device, launch)
    check_optimizer(config.optimizer)
    for index, peer in enumerate(config.peers):
        if config.optimizer_of(peer) != config.optimizer:
            with _of_peer(index):
                check_optimizer(config.optimizer_of(peer))
    if config.train.sync_bn and device.type != "cuda":
        raise ConfigError("train.sync_bn = True: works on CUDA devices only, this rank runs on the CPU; expected false")
    method = METHODS[config.method.name]
    if config.train.sync_bn and issubclass(method, OuterProblem) and method.has_outer_problem(config.method):
        raise ConfigError(
            f"train.sync_bn = True: {method.name}'s outer problem differentiates twice, which SyncBatchNorm cannot; "
            "expected false, or method.meta_interval = null"
        )
    if config.data.decoding.decoder == "mixed" and device.type != "cuda":
        raise ConfigError(
            "data.decoding.decoder = mixed: decodes on CUDA devices, this rank runs on the CPU; expected auto or cpu"
        )
    if config.log.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard = True: needs the tensorboard library, which is not installed; pip install "
            "cohort[tensorboard]"
        )
    _check_shared_decode(config, cuda=device.type == "cuda")
    placement = plan(config, launch.world, launch.rank, launch.per_node)
    if config.train.peer_threads > 1 and (reason := side_by_side.hindrance(config, placement, device)) is not None:
        raise ConfigError(f"train.peer_threads = {config.train.peer_threads}: {reason}; expected 1")
    if config.train.batch_peers == "on" and (reason := hindrance(config, placement)) is not None:
        raise ConfigError(f"train.batch_peers = on: {reason}; expected off or auto")
    if config.precision.graphs == "on" and (reason := graphs.hindrance(config)) is not None:
        raise ConfigError(f"precision.graphs = on: {reason}; expected off")
    _check_reading(config, placement)
    sizes = check_data(config)
    _check_schedule(config, sizes)
    _check_stages(config)
    _check_networks(config, placement)
    _check_sizes(config)
    _check_drop_path(config)
    _check_folder("dir", config.folder, "the run's folder")
    if config.placement.meeting is not None:
        _check_folder("placement.meeting", config.placement.meeting.expanduser(), "the folder where peers meet")
    _check_weights(config, going_on=not fresh and bool(checkpoint.steps_on_disk(config.folder)))
    if not fresh:
        _check_same_run(config)
        rollback.read(config.folder)
        _check_same_meeting(config)
    return Checked(placement, sizes)


def _check_schedule(config: RunConfig, sizes: Sizes) -> None:
    """What of it lies beyond the last step, where only the data say how many epochs those are."""
    steps, per_epoch = config.train.max_steps, (sizes.train - sizes.held_out) // config.data.global_batch
    if steps is None:
        return
    try:
        config.schedule.check_within(steps / per_epoch, f"train.max_steps = {steps}, {steps / per_epoch:.2f} epochs")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_shared_decode(config: RunConfig, *, cuda: bool) -> None:
    data = config.data
    if data.shared_decode != "on":
        return
    if data.views == "per_peer":
        raise ConfigError(
            "data.shared_decode = on: with data.views = per_peer each peer sees pixels of its own, so there is nothing "
            "to share; expected auto or off"
        )
    if choose(data.decoding.decoder, cuda=cuda).name == "mixed":
        raise ConfigError(
            "data.shared_decode = on: what a GPU decodes is not passed on; expected data.decoding.decoder = cpu or "
            "torchvision, or data.shared_decode = auto"
        )


def _check_reading(config: RunConfig, placement: Placement) -> None:
    """Ranks read a bank that lies in shards equally often, and so in equally many pieces."""
    method = config.method
    if not isinstance(method, ContrastiveOptions) or not method.bank_sharded or method.chunk is None:
        return
    batch, parts, unit = config.data.global_batch, config.train.accumulation, config.data.tuple_size
    if not placement.is_even or batch // unit % (parts * placement.replicas):
        raise ConfigError(
            f"method.chunk = {method.chunk}: with method.bank_sharded = true all ranks must have as many rows; "
            "expected null, or a placement and a batch that divide evenly"
        )


def _check_networks(config: RunConfig, placement: Placement) -> None:
    """Whether the networks take the images, and what the optimiser wants of them."""
    data, parts = config.data, config.train.accumulation
    # Each peer may be on another number of ranks.
    ranks = {k: len(group.ranks) for group in placement.groups for k in group.peers}
    names = [(peer.network, repr(peer.options)) for _, peer in config.cohort]
    tried: set[tuple[str, str]] = set()
    for index, peer in enumerate(config.peers):
        optimizer = config.optimizer_of(peer)
        if (kind := (peer.network, repr(peer.options))) not in tried:
            tried.add(kind)
            most = max(ranks.get(k, 1) for k, name in enumerate(names) if name == kind)
            count = data.global_batch // data.tuple_size // parts // (1 if config.train.sync_bn else most)
            count *= data.tuple_size
            sizes = {"num_classes": 2, "in_channels": data.channels, "side": data.side, "count": count}
            try:
                models.try_images(peer.network, peer.options, **sizes)
            except ValueError as error:
                raise ConfigError(f"peers.{index}: network {peer.network!r}: {error}") from None
        if peer.learns and (peer.frozen_parts or "layer_decay" in optimizer.options):
            with weightless(peer.network):
                network = models.create(peer.network, 2, data.channels, **peer.options)
            with _of_peer(index):
                check_grouping(network, peer.network, optimizer)
                freeze(network, peer.frozen_parts)


@contextmanager
def _of_peer(index: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"peers.{index}.{error}") from None


def _check_stages(config: RunConfig) -> None:
    """Methods that look at feature maps need networks that have those, and that their heads can go on from."""
    method, options, data = METHODS[config.method.name], config.method, config.data
    if not looks_at_stages(method, options):
        return
    infos: list[PeerInfo] = []
    for index, (_, peer) in enumerate(config.cohort):
        with _refusal(config, peer):
            network = partial(models.create, peer.network, 2, data.channels, **peer.options)
            infos.append(outline(config, index, 2, data.channels, data.side, network).info)
    with weightless(""):
        built = method(options, infos)
    for info, (_, peer) in zip(infos, config.cohort, strict=True):
        with _refusal(config, peer), weightless(peer.network):
            built.head(info)


def _check_sizes(config: RunConfig) -> None:
    """A network that takes images of one size only would end a run at the epoch at which they get another."""
    sizes = sorted({size for _, size in config.data.image.training_sizes} - {config.data.side})
    for peer in config.peers if sizes else ():
        with weightless(peer.network):
            network = models.create(peer.network, 2, config.data.channels, **peer.options)
            for size in sizes:
                try:
                    dry_run(network, torch.empty(2, config.data.channels, size, size, device="meta"))
                except (RuntimeError, ValueError, AssertionError) as error:
                    reason = str(error).strip().partition("\n")[0]
                    raise ConfigError(
                        f"data.image.training_sizes: {peer.network} cannot be shown images of {size} pixels: {reason}; "
                        "expected sizes that it takes, or options that let it (dynamic_img_size of timm's transformers)"
                    ) from None


def _check_drop_path(config: RunConfig) -> None:
    """A schedule of what no network does would be one that nobody notices to be missing."""
    for peer in config.peers if config.train.drop_path else ():
        with weightless(peer.network):
            if peer.learns and any(drop_paths(models.create(peer.network, 2, config.data.channels, **peer.options))):
                break
    else:
        if config.train.drop_path:
            raise ConfigError(
                f"train.drop_path = {[list(pair) for pair in config.train.drop_path]}: no network that learns drops "
                "paths; expected [], or a rate in the options of one (timm's drop_path_rate, torchvision's "
                "stochastic_depth_prob)"
            )


@contextmanager
def _refusal(config: RunConfig, peer: PeerConfig) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            f"method.name = {config.method.name}: cannot train {peer.network} on images of {config.data.side} pixels: "
            f"{error}"
        ) from None


def check_data(config: RunConfig) -> Sizes:
    """Looks at what is on disk, before any device is touched. Raises: ConfigError."""
    try:
        return data_pipelines.check_files(config.data)
    except (data_pipelines.DataError, ImportError) as error:
        word = str(error).partition(":")[0]
        raise ConfigError(f"data{'.' if word in DataConfig.model_fields else ': '}{error}") from None


def _check_weights(config: RunConfig, *, going_on: bool) -> None:
    """The files of weights that peers start from; a run that goes on has its own, but for those of frozen peers."""
    for index, peer in enumerate(config.peers):
        if not isinstance(peer.pretrained, str) or (going_on and peer.learns):
            continue
        try:
            models.check(
                peer.network,
                peer.options,
                num_classes=config.data.num_classes or 1000,
                in_channels=config.data.channels,
                pretrained=peer.pretrained,
                entire=not peer.learns,
            )
        except ValueError as error:
            kept = "; a run keeps no copy of a frozen peer's weights" if going_on else ""
            raise ConfigError(f"peers.{index}: {error}{kept}") from None


def _check_folder(key: str, folder: Path, wanted: str) -> None:
    # A link that leads nowhere, or in a circle, is there too.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "may not be written to"
        raise ConfigError(f"{key} = {str(folder)!r}: {there} {what}; expected a place for {wanted}")


def _check_same_run(config: RunConfig) -> None:
    if not checkpoint.steps_on_disk(config.folder):
        return
    for key, (before, now) in differences(_identity_on_disk(config), identity(config)).items():
        doubtful = is_doubtful(key, before, now)
        if doubtful and config.checkpoint.recipe_may_change:
            continue
        meant = "; if that is meant, checkpoint.recipe_may_change=true goes on with it" if doubtful else ""
        raise ConfigError(
            f"{key} = {now!r}: the run in {config.folder} was started with {before!r}; give this one another name= or "
            f"dir=, or start over with --fresh, which moves that folder aside{meant}"
        )


def _identity_on_disk(config: RunConfig) -> dict[str, Any]:
    """Of the run in the folder: by its newest checkpoint that says it, else by its config.yaml, else of this one."""
    for step in reversed(checkpoint.steps_on_disk(config.folder)):
        with suppress(checkpoint.CheckpointError):
            found = checkpoint.read_manifest(checkpoint.folder_of(config.folder, step)).config
            if found:
                return completed(found, config)
    if (config.folder / "config.yaml").exists():
        return identity(load_run(config.folder))
    return identity(config)


def _check_same_meeting(config: RunConfig) -> None:
    """Two runs that meet in one folder would take each other's places."""
    name = config.placement.peer
    if name is not None and (found := foreign(config, name)):
        key, before = found
        raise ConfigError(
            f"placement.meeting = {str(config.placement.meeting)!r}: {path_of(config, name)} is of a run with {key} = "
            f"{before!r}; give this one another folder, or start over with --fresh, which replaces that file"
        )
