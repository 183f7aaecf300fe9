"""What a run is: strict models of the YAML files, with errors that name the key and the nearest valid choice."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

import models
from data_pipelines import DataConfig
from data_pipelines.keys import AnyPath
from engine.config.frozen import check_frozen
from engine.config.precision import PrecisionConfig
from engine.config.sections import (
    AnyMethod,
    CheckpointConfig,
    EvaluationConfig,
    HealthConfig,
    LogConfig,
    OptimizerConfig,
    PeerConfig,
    PeerOptimizerConfig,
    PlacementConfig,
    ReportConfig,
    ScheduleConfig,
    Section,
    TrainConfig,
)
from engine.config.targets import check_targets
from losses import METHODS
from losses.capabilities import (
    ActsAfterStep,
    HeldOutSurveys,
    MeetsAsJobs,
    OuterProblem,
    SharedTrunk,
    Teachers,
    trunk_of,
    turns_of,
)


class ConfigError(ValueError):
    """Something a user wrote cannot be run. The message is for that user."""


class RunConfig(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the run's name")
    dir: AnyPath | None = Field(
        None, description="the run's folder; null: runs/NAME; the folder PEER in it where peers are jobs"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, data order, augmentation and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    method: AnyMethod = Field(description="a section with a name, that of the method")
    peers: list[PeerConfig] = Field(
        min_length=1, description="a list of networks, such as [{network: timm/resnet18, copies: 2}]"
    )
    data: DataConfig = Field(description="a section with at least dataset and global_batch")
    train: TrainConfig = Field(description="a section with epochs, or max_steps")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    placement: PlacementConfig = PlacementConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    report: ReportConfig = ReportConfig()

    @property
    def folder(self) -> Path:
        """Where the run lives; where peers are jobs, where this one does."""
        return (self.dir.expanduser() if self.dir else Path("runs") / self.name) / (self.placement.peer or "")

    @property
    def title(self) -> str:
        """The run's name; where peers are jobs, with that of this one's peer."""
        return f"{self.name}/{self.placement.peer}" if self.placement.peer else self.name

    @property
    def deployed(self) -> str:
        """Which network stands for the run: one of the choices of `report.deployed`."""
        return self.report.deployed or METHODS[self.method.name].deployed

    @functools.cached_property
    def cohort(self) -> list[tuple[str, PeerConfig]]:
        """(unique name, config) of each of the K peers, `copies` written out."""
        wanted = [
            (p.name or re.sub(r"[^A-Za-z0-9_.-]", "_", p.network), p) for p in self.peers for _ in range(p.copies)
        ]
        bases = [base for base, _ in wanted]
        return [
            (base if bases.count(base) == 1 else f"{base}-{bases[:i].count(base)}", peer)
            for i, (base, peer) in enumerate(wanted)
        ]

    def optimizer_of(self, peer: PeerConfig) -> OptimizerConfig:
        """The optimiser of a peer."""
        return peer.optimizer.over(self.optimizer)

    @property
    def trained(self) -> list[tuple[str, PeerConfig]]:
        """Those of the cohort that this run trains: all, or one where peers are jobs of their own."""
        return [(name, peer) for name, peer in self.cohort if self.placement.peer in (None, name)]

    @property
    def learners(self) -> list[str]:
        """The names of those that learn: all but frozen ones."""
        return [name for name, peer in self.trained if peer.learns]

    def _check_ranks(self, names: list[str]) -> None:
        given = self.placement.ranks
        if given is None:
            return
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"placement.ranks.{name}: expected one of the peers {', '.join(names)}{hint}")
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"placement.ranks.{missing[0]}: missing; expected the ranks of each peer, at least 1")

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        if self.health.rollback and self.checkpoint.keep < 2:
            raise ValueError(
                "checkpoint.keep = 1: the only checkpoint may be from after a step that went wrong; with "
                "health.rollback = true expected at least 2"
            )
        names = [name for name, _ in self.cohort]
        taken = sorted({"ensemble", "cohort"} & set(names))
        if taken:
            raise ValueError(f"peers: name {taken[0]!r} stands for all peers together; expected another name")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"peers: name {twice[0]!r} is used twice; expected a different name for each peer")
        for index, peer in enumerate(self.peers):
            try:
                models.check(
                    peer.network,
                    peer.options,
                    num_classes=self.data.num_classes or 1000,
                    in_channels=self.data.channels,
                    pretrained=peer.pretrained,
                    read=False,
                )
            except ValueError as error:
                raise ValueError(f"peers.{index}: {error}") from None
        method = METHODS[self.method.name]
        check_frozen(self.peers, method, self.method)
        try:
            method.check(self.method, len(names))
        except ValueError as error:
            raise ValueError(f"method.name = {self.method.name}: {error}") from None
        check_targets(self.data, self.train, self.method)
        if self.placement.kind == "jobs" and not issubclass(method, MeetsAsJobs):
            able = [name for name, other in METHODS.items() if issubclass(other, MeetsAsJobs)]
            raise ValueError(
                f"placement.kind = jobs: the peers of {self.method.name} cannot train apart from each other; expected "
                f"another kind, or method.name = {' or '.join(able)}"
            )
        if self.placement.peer is not None and self.placement.peer not in names:
            near = difflib.get_close_matches(self.placement.peer, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"placement.peer = {self.placement.peer!r}: expected one of the peers {', '.join(names)}{hint}"
            )
        self._check_ranks(names)
        if issubclass(method, SharedTrunk) and method.one_view and self.data.views != "shared":
            raise ValueError(
                f"data.views = {self.data.views}: {self.method.name} needs one augmentation for all peers; "
                "expected shared"
            )
        if trunk_of(method, self.method, 3) is not None:
            kinds = {(peer.network, repr(peer.options)) for peer in self.peers}
            if len(kinds) > 1:
                raise ValueError(
                    f"peers: {self.method.name} shares a trunk between peers of one network; found "
                    f"{', '.join(sorted(network for network, _ in kinds))}"
                )
            if len({tuple(peer.frozen_parts) for peer in self.peers}) > 1:
                raise ValueError(f"peers: {self.method.name} shares a trunk; expected the same frozen for all peers")
        if issubclass(method, ActsAfterStep) and method.alike:
            found = {f"{peer.network} {peer.options}" if peer.options else peer.network for peer in self.peers}
            if len(found) > 1:
                raise ValueError(
                    f"peers: {self.method.name} needs peers of one network with the same options; found "
                    f"{', '.join(sorted(found))}"
                )
        if issubclass(method, ActsAfterStep) and method.alike and any(peer.frozen for peer in self.peers):
            raise ValueError(f"peers: {self.method.name} mixes the peers' weights; expected none of them frozen")
        outer = issubclass(method, OuterProblem) and method.has_outer_problem(self.method)
        own = any(peer.frozen or peer.optimizer != PeerOptimizerConfig() for peer in self.peers)
        if outer and (own or "layer_decay" in self.optimizer.options):
            raise ValueError(
                f"peers: the outer problem of {self.method.name} looks ahead with one rate for all weights; expected "
                "neither peers.N.optimizer, peers.N.frozen nor optimizer.options.layer_decay"
            )
        surveys = issubclass(method, HeldOutSurveys) and method.held_out(self.method)
        if surveys and not self.data.held_out:
            raise ValueError(
                f"data.held_out = {self.data.held_out}: {self.method.name} as configured looks at images that are not "
                "trained on; expected a part of the training samples, such as 0.1"
            )
        teaches = issubclass(method, Teachers)
        if teaches and self.train.ema_decay:
            raise ValueError(
                f"train.ema_decay = {self.train.ema_decay}: {self.method.name} keeps moving averages of its own; "
                "expected null"
            )
        if self.deployed == "ema" and not (teaches or self.train.ema_decay):
            raise ValueError("report.deployed = 'ema': there are no moving averages; expected train.ema_decay")
        if self.deployed == "leader" and method.deployed != "leader":
            raise ValueError(f"report.deployed = 'leader': {self.method.name} has none; expected first, best or mean")
        in_turn = len(turns_of(method, self.method, len(names))) > 1
        if in_turn and self.precision.amp == "fp16":
            raise ValueError(
                "precision.amp = fp16: peers that are updated in turn (method.order = sequential) would scale their "
                "losses differently from rank to rank; expected bf16 or float32"
            )
        if in_turn and self.train.accumulation > 1:
            raise ValueError(
                f"train.accumulation = {self.train.accumulation}: peers that are updated in turn (method.order = "
                "sequential) need a whole batch at once; expected 1"
            )
        if self.train.max_steps is None and self.train.epochs is not None:
            self.schedule.check_within(self.train.epochs, f"train.epochs = {self.train.epochs}")
        return self
