"""Which training samples an epoch shows, and in which batches: what every pipeline does with `data.sampler`."""

import numpy as np
from numpy.typing import NDArray

from data_pipelines import order
from data_pipelines.config import DataConfig
from data_pipelines.contract import DataError
from data_pipelines.weights import class_weights


class Sampling:
    """The training split, cut into samples that are trained on and samples that are held out.

    Args:
        config: how batches are drawn, and how much is held out.
        seed: of both.
        labels: class of each sample of the training split, int64 [size].
        class_names: of all classes.

    Attributes:
        trained_on: the samples that are trained on, ascending, int64.
        held_out: the samples that are not, ascending, int64.
        targets: class of each sample of the split, -1 for those that are not trained on, int64 [size].
        weights: how much each class counts in the loss, float32 [K]; None: all alike.
        steps: global batches of an epoch, the same in every epoch.

    Raises:
        DataError: a class has fewer samples to be trained on than a batch takes of it.
    """

    def __init__(self, config: DataConfig, seed: int, labels: NDArray[np.int64], class_names: tuple[str, ...]) -> None:
        self._config, self._seed = config, seed
        used = order.fraction(seed, labels, config.fraction) if config.fraction < 1 else np.arange(len(labels))
        trained_on, held_out = order.hold_out(seed, len(used), config.held_out_of(len(used)))
        self.trained_on, self.held_out = used[trained_on], used[held_out]
        self._labels = labels[self.trained_on]
        self.targets = np.full_like(labels, -1)
        self.targets[self.trained_on] = self._labels
        self.weights = None
        if config.class_weights is not None:
            self.weights = class_weights(config.class_weights, self._labels, class_names)
        self.steps = len(self._labels) // config.global_batch
        if config.sampler == "shuffle":
            return
        counts = np.bincount(self._labels, minlength=len(class_names))
        rarest = int(counts.argmin())
        if counts[rarest] < config.images_per_class:
            left = left_by(config)
            raise DataError(
                f"images_per_class: {config.images_per_class} are more than the {counts[rarest]} training samples of "
                f"class {class_names[rarest]!r}{left}; expected "
                + (f"at most {counts[rarest]}" if counts[rarest] > 1 else "sampler = shuffle")
            )
        if config.sampler == "class_tuples":
            self.steps = order.class_tuples_steps(self._labels, config.tuples, config.images_per_class)

    def epoch(self, epoch: int, steps: int) -> NDArray[np.int64]:
        """Returns the samples of an epoch, positions in the training split: int64 [steps, global_batch].

        An epoch of more steps than the samples fill, which is that of a run that has lost some, shows all of them in
        another order when it has shown them once; but for `class_tuples`, which has no more than `self.steps`.
        """
        config = self._config
        if config.sampler == "class_balanced":
            drawn = order.class_balanced(self._seed, epoch, self._labels, steps, config.tuples, config.images_per_class)
        elif config.sampler == "class_tuples":
            drawn = order.class_tuples(self._seed, epoch, self._labels, config.tuples, config.images_per_class)[:steps]
        else:
            different, size = config.global_batch // config.repeats, len(self._labels)
            turns = range(-(-steps * different // size))
            shuffled = np.concatenate([order.epoch_order(self._seed, epoch, size, turn) for turn in turns])
            drawn = shuffled[: steps * different].reshape(steps, different)
            # The repeats of a batch one after another: an image's neighbour, with which it may be mixed, is another.
            drawn = np.tile(drawn, (1, config.repeats))
        return self.trained_on[drawn]


def left_by(config: DataConfig) -> str:
    """What of the training samples is not trained on, for a message."""
    kept = {"fraction": config.fraction if config.fraction < 1 else None, "held_out": config.held_out or None}
    said = " and ".join(f"{key} = {value}" for key, value in kept.items() if value is not None)
    return f" that {said} leave{'s' * (' and ' not in said)}" if said else ""
