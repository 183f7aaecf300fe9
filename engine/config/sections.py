"""The sections of a config, each strict and with the meaning of its keys."""

from __future__ import annotations

import functools
import math
import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from data_pipelines.keys import ON_OFF, AnyPath
from losses import METHODS, MethodOptions


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


if TYPE_CHECKING:
    AnyMethod = MethodOptions
else:
    _options = [method.Options for method in METHODS.values()]
    AnyMethod = Annotated[functools.reduce(operator.or_, _options), Field(discriminator="name")]


class OptimizerConfig(Section):
    """A timm optimiser; one for each peer."""

    name: str = Field("sgd", description="timm's name: sgd is SGD with Nesterov momentum, momentum is without")
    lr: float = Field(0.1, gt=0, description="learning rate, for the global batch as it is: never rescaled")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, for optimisers that have one")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    decay_norm_and_bias: bool = Field(
        True,
        description="whether biases and normalisation weights decay too; what a "
        "network itself asks to leave out (position embeddings) never does",
    )
    options: dict[str, Any] = Field(
        {},
        description="further arguments of the optimiser, such as betas; "
        "layer_decay, for networks of timm: the rate of a layer is that of the next one times this",
    )


class PeerOptimizerConfig(Section):
    """What of the optimiser is different for one peer."""

    name: str | None = Field(None, description="as optimizer.name; null, here and below: that of the run")
    lr: float | None = Field(None, gt=0, description="learning rate; the schedule is the run's")
    momentum: float | None = Field(None, ge=0, lt=1, description="momentum")
    weight_decay: float | None = Field(None, ge=0, description="weight decay")
    decay_norm_and_bias: bool | None = Field(None, description="whether biases and normalisation weights decay too")
    options: dict[str, Any] | None = Field(
        None, description="further arguments; null: those of the run, or none where the name differs"
    )

    def over(self, whole: OptimizerConfig) -> OptimizerConfig:
        """The optimiser of the run with what is different."""
        own = {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}
        if own.get("name", whole.name) != whole.name:
            own.setdefault("options", {})
        return whole.model_copy(update=own)


class PeerConfig(Section):
    """One network of the cohort, or several alike."""

    network: str = Field(
        description="a name of ours (cifar_resnet32_b, cifar_wrn_28_10), timm/NAME or torchvision/NAME"
    )
    copies: int = Field(
        1, ge=1, le=1024, description="how many peers have this network, each with its own initialisation"
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="name in logs and files; made from the network if absent",
    )
    options: dict[str, Any] = Field({}, description="arguments of the network, such as width or drop_path_rate")
    pretrained: bool | str = Field(
        False,
        description="true: start from the weights that timm or torchvision publish, which downloads them; or the path "
        "of a file of weights (.safetensors, .pt, .pth, .pth.tar, .bin, .ckpt), of this or another trainer",
    )
    optimizer: PeerOptimizerConfig = PeerOptimizerConfig()
    frozen: bool | list[str] = Field(
        [],
        description="parts of the network that do not learn: submodules (layer1) or shell patterns of names of weights "
        "(blocks.[01].*); their normalisation keeps its statistics too. true: the whole peer, a trained network "
        "(pretrained) that teaches and learns nothing",
    )

    @property
    def learns(self) -> bool:
        """Whether anything of it does."""
        return self.frozen is not True

    @property
    def frozen_parts(self) -> list[str]:
        """What of a peer that learns does not."""
        return self.frozen if isinstance(self.frozen, list) else []


class ScheduleConfig(Section):
    """A timm schedule of the learning rate, stepped at every update."""

    name: Literal["step", "cosine", "constant"] = Field("cosine", description="step falls by gamma at each milestone")
    milestones: list[Annotated[float, Field(gt=0)]] = Field([], description="step: epochs done when the rate falls")
    every: float | None = Field(
        None, gt=0, description="step: it falls after every so many epochs, in the place of milestones"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor of each fall")
    min_lr: float = Field(0.0, ge=0, description="cosine: where it ends")
    warmup_epochs: float = Field(0, ge=0, description="epochs of linear warm-up at the start")
    warmup_lr: float = Field(1e-5, ge=0, description="where the warm-up starts")
    warmup_prefix: bool = Field(
        False,
        description="cosine: whether it falls from the end of the warm-up on, as torchvision and ConvNeXt have it; "
        "false: the warm-up joins it where it would be by then, as in timm and DeiT",
    )

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> ScheduleConfig:
        if self.name == "step" and not self.milestones and self.every is None:
            raise ValueError("milestones = []: name = step needs at least one epoch, such as [60, 120, 180]")
        if self.every is not None and (self.name != "step" or self.milestones):
            raise ValueError(
                f"every = {self.every}: only name = step without milestones falls so, found name = {self.name}, "
                f"milestones = {self.milestones}"
            )
        if self.name != "step" and self.milestones:
            raise ValueError(
                f"milestones = {self.milestones}: only name = step has milestones, found name = {self.name}"
            )
        if self.name != "cosine" and self.warmup_prefix:
            raise ValueError(f"warmup_prefix = True: has a meaning for name = cosine, found name = {self.name}")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones = {self.milestones}: expected ascending epochs, each once")
        return self

    def falls(self, epochs: float) -> list[float]:
        """Epochs done when the rate falls, in a run of so many."""
        if self.every is None:
            return self.milestones
        return [self.every * fall for fall in range(1, math.ceil(epochs / self.every))]

    def check_within(self, epochs: float, end: str) -> None:
        """Refuses a warm-up or a milestone beyond the end of training, which is called `end`. Raises: ValueError."""
        if self.warmup_epochs > epochs:
            raise ValueError(f"schedule.warmup_epochs = {self.warmup_epochs}: expected at most {end}")
        if self.milestones and self.milestones[-1] >= epochs:
            raise ValueError(
                f"schedule.milestones = {self.milestones}: the last lies at or after the end of training, expected "
                f"epochs below {end}"
            )


class TrainConfig(Section):
    """The loop."""

    epochs: int | None = Field(None, ge=1, description="passes over the training data")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="updates of the run, in the place of epochs: it ends within an epoch if it must, and the schedule "
        "with it",
    )
    accumulation: int = Field(1, ge=1, description="micro-batches of one global batch, one after another on a rank")
    peer_threads: int = Field(
        1,
        ge=1,
        description="threads that compute the peers of one rank at the same time on a CPU, each with one core; 1: one "
        "peer after another, each with all cores. The same numbers but for rounding",
    )
    batch_peers: Annotated[Literal["auto", "on", "off"], ON_OFF] = Field(
        "off",
        description="on: peers of one network that live on a rank are computed as one of K groups: 1/K of the "
        "operations, for small networks on a GPU; auto: where it is measured to be faster as the run starts. The same "
        "numbers but for rounding",
    )
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm of each peer; null: no clipping")
    clip_factor: float | None = Field(
        None,
        gt=0,
        description="adaptive gradient clipping: the largest gradient of each unit as a part of the "
        "norm of its weights, such as 0.01; the classifier is left alone; null: no such clipping",
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of each peer's moving average; null: none")
    ema_warmup: bool = Field(
        True,
        description="the decay before update t is at most 1 - (1 + t)^(-2/3), as in timm, so that initial weights "
        "are soon forgotten; false: the same from the start",
    )
    drop_path: tuple[Annotated[tuple[int, float], Strict(False)], ...] = Field(
        (),
        strict=False,
        description="[epoch, factor] pairs: what the networks' drop path rates are multiplied by from an epoch on, "
        "counted from 0, such as [[0, 1.0], [50, 0.0]] for early stochastic depth (arXiv 2303.01500); []: nothing",
    )
    sync_bn: bool = Field(False, description="BatchNorm statistics over the replica group instead of one rank's rows")
    loss: Literal["cross_entropy", "binary_cross_entropy"] = Field(
        "cross_entropy", description="how a peer's logits are held against the targets"
    )
    bce_threshold: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="binary_cross_entropy: targets above it count as 1, others as 0; null: neither",
    )
    bce_sum: bool = Field(False, description="binary_cross_entropy: the sum over classes, not their mean")
    max_skipped: int = Field(20, ge=1, description="non-finite updates in a row that end the run")
    timeout: float = Field(
        300.0,
        gt=0,
        le=2_000_000,  # Milliseconds are counted in 32 bits.
        description="seconds, after the first step, that ranks wait for one that does not answer before the run fails; "
        "more than writing a checkpoint takes",
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("epochs: missing; expected a number of epochs, or of updates as max_steps")
        if self.clip_norm is not None and self.clip_factor is not None:
            raise ValueError(f"clip_factor = {self.clip_factor}: clip_norm = {self.clip_norm} clips too; expected one")
        epochs = [epoch for epoch, _ in self.drop_path]
        if epochs != sorted(set(epochs)) or any(epoch < 0 or not 0 <= factor <= 1 for epoch, factor in self.drop_path):
            raise ValueError(
                "drop_path: expected [epoch, factor] pairs, epochs ascending from 0 and factors from 0 to 1, "
                f"found {[list(pair) for pair in self.drop_path]}"
            )
        return self

    def steps(self, steps_per_epoch: int) -> int:
        """Updates of the whole run."""
        return self.max_steps or (self.epochs or 0) * steps_per_epoch

    def epochs_of(self, steps_per_epoch: int) -> int:
        """Epochs of the whole run, the last of which `max_steps` may cut short."""
        return -(-self.steps(steps_per_epoch) // steps_per_epoch)


class PlacementConfig(Section):
    """Which rank computes which peer."""

    kind: Literal["auto", "colocated", "spread", "hybrid", "balanced", "jobs"] = Field(
        "auto",
        description="colocated: all peers on every rank; spread: one peer a rank; hybrid: peers_per_rank on each; "
        "balanced: ranks for each peer in proportion to what it costs; "
        "auto: as few a rank as the number of ranks allows, or for unequal peers what would be clearly faster; "
        "jobs: one peer in each of K jobs, which meet in a folder",
    )
    peers_per_rank: int | None = Field(None, ge=1, description="hybrid: peers on each rank, a divisor of their number")
    ranks: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="balanced: how many ranks each peer gets, by its name, such as {small: 2, large: 6}; null: by the "
        "operations that its network takes for an image",
    )
    order: Literal["contiguous", "interleaved"] = Field(
        "contiguous",
        description="contiguous: the ranks of a peer one after another, and whole nodes first, so that gradients stay "
        "within nodes and signals cross; interleaved: those of all peers in turn, the opposite",
    )
    exchange: Literal["auto", "flat", "hierarchical"] = Field(
        "auto",
        description="of signals, where ranks are uneven and on several nodes: hierarchical: a row goes to a node once, "
        "and from there to its ranks; flat: to each rank by itself; auto: what is foretold to be faster",
    )
    exchange_dtype: Literal["float32", "bf16"] = Field("float32", description="number format of signals under way")
    meeting: AnyPath | None = Field(
        None, description="jobs: the folder, seen by all of them, where peers leave their weights"
    )
    peer: str | None = Field(None, description="jobs: the name of the peer that this job trains")

    @model_validator(mode="after")
    def _peers_per_rank_belongs_to_hybrid(self) -> PlacementConfig:
        if (self.kind == "hybrid") != (self.peers_per_rank is not None):
            raise ValueError(
                f"peers_per_rank = {self.peers_per_rank}: kind = hybrid needs a number of peers, other kinds have "
                f"none; found kind = {self.kind}"
            )
        if self.ranks is not None and self.kind != "balanced":
            raise ValueError(f"ranks = {self.ranks}: only kind = balanced has them; found kind = {self.kind}")
        return self

    @model_validator(mode="after")
    def _meeting_belongs_to_jobs(self) -> PlacementConfig:
        if (self.kind == "jobs") != (self.meeting is not None):
            raise ValueError(
                f"meeting = {self.meeting and str(self.meeting)!r}: kind = jobs needs a folder where peers meet, other "
                f"kinds have none; found kind = {self.kind}"
            )
        if self.peer is not None and self.kind != "jobs":
            raise ValueError(f"peer = {self.peer!r}: only a job of kind = jobs has one; found kind = {self.kind}")
        return self


class EvaluationConfig(Section):
    """When and how the validation images are counted."""

    every_epochs: int | None = Field(
        1, ge=1, description="epochs between evaluations; null: only every_steps counts; the end is always evaluated"
    )
    every_steps: int | None = Field(None, ge=1, description="also every so many steps; null: only at ends of epochs")
    batch: int = Field(500, ge=1, description="validation images in one forward on a rank")
    topk: list[Annotated[int, Field(ge=2)]] = Field(
        [], description="further k, beside 1 and 5: topK is the % of images whose class is among the k most probable"
    )
    per_class: bool = Field(
        False, description="whether each evaluation leaves the accuracy of every class in per_class.csv"
    )
    confusion: bool = Field(
        False, description="whether each evaluation leaves which class was taken for which in confusion.csv"
    )

    @model_validator(mode="after")
    def _each_k_once(self) -> EvaluationConfig:
        if len({1, 5, *self.topk}) < 2 + len(self.topk):
            raise ValueError(f"topk = {self.topk}: expected numbers other than 1 and 5, each once")
        return self


class CheckpointConfig(Section):
    """What is kept on disk."""

    every_epochs: int = Field(1, ge=1, description="epochs between checkpoints; the last epoch is always saved")
    every_steps: int | None = Field(None, ge=1, description="also every so many steps; null: only at ends of epochs")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best; 2 or more while it trains")
    data_may_change: bool = Field(
        False, description="go on where images of the same classes were added or lost; an epoch keeps its steps"
    )
    recipe_may_change: bool = Field(
        False,
        description="going on with another optimizer.lr, schedule, train.clip_norm, train.ema_warmup or (where there "
        "are averages) train.ema_decay than before is meant, from the checkpoint's step on",
    )


class HealthConfig(Section):
    """Numbers that go wrong, and what is done about it."""

    spike_factor: float | None = Field(
        2.5,
        gt=1,
        description="a step whose loss is this many times the median of those before may be a spike; null: none is",
    )
    spike_deviations: float = Field(
        15.0,
        ge=0,
        description="it is one if it is as many median absolute deviations above: losses of small batches scatter",
    )
    spike_floor: float = Field(
        0.5, gt=0, description="smallest median reckoned with: batches of a nearly learned set differ by many times"
    )
    spike_window: int = Field(
        100, ge=2, description="steps before, of which the median is; nothing is a spike until half of them are there"
    )
    rollback: bool = Field(
        False,
        description="at a spike, or instead of ending at train.max_skipped: go back to the last checkpoint from before "
        "and leave out the steps that went wrong",
    )
    max_rollbacks: int = Field(3, ge=1, description="rollbacks of a run; the next one ends it")


class ReportConfig(Section):
    """Which network stands for the run."""

    deployed: Literal["first", "best", "mean", "leader", "ema", "ensemble"] | None = Field(
        None,
        description="whose accuracy is the run's in a report: the first peer, the one that is best at the last "
        "evaluation, the mean of all peers, the leader (okddip), the moving average of the first peer, or the mean of "
        "all peers' probabilities; null: what the method's paper reports",
    )


class LogConfig(Section):
    """What is reported, where."""

    every_steps: int = Field(
        50, ge=1, description="steps of an epoch between lines of metrics; the host waits for the device there"
    )
    progress: bool = Field(True, description="a progress bar with the time that is left")
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="wandb's mode; only online uses a network"
    )
    wandb_project: str = Field("cohort", description="wandb's project")
    wandb_timeout: float = Field(30.0, gt=0, description="seconds to wait for wandb before going on without it")
    tensorboard: bool = Field(
        False, description="whether the same numbers go to event files in tensorboard/ of the run's folder"
    )
