"""`launch/bench data`: images a second of each form of a data set and each decoder, and of other loaders."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipelines import DataError, open_pipeline
from data_pipelines.decoding.choice import dali_installed
from engine.config import ConfigError
from engine.config.loading import validate
from launch.bench.loading import rivals
from launch.bench.loading.rivals import Epoch
from launch.bench.peers import Workload, bare_step
from launch.bench.turns import in_turn, quartiles


def photos(roots: Mapping[str, Path], side: int, batch: int, threads: int, rounds: int, network: str) -> None:
    """Times whole epochs over the training images in turn, and prints the ratios.

    Args:
        roots: the data set's folder by form: `image_folder`, and other forms of the same images, such as `webdataset`.
        side: of the crops, in pixels.
        batch: rows of a batch.
        threads: that decode, or processes of a loader that has processes.
        rounds: timings of each.
        network: whose step tells how long training would wait.

    Raises:
        ConfigError: no such folder, or too few images for a batch.
    """
    ours = {
        f"{form}, {decoder}": _ours(form, root, decoder, side, batch, threads)
        for form, root in roots.items()
        for decoder in (("cpu", "torchvision") if dali_installed() else ("torchvision",))
    }
    folder = roots["image_folder"] / "train"
    theirs: dict[str, Epoch] = {"torchvision (PIL)": rivals.torchvision_folder(folder, side, batch, threads)}
    theirs["timm (PIL)"] = rivals.timm_folder(folder, side, batch, threads)
    if dali_installed():
        theirs["DALI's reader"] = rivals.dali_folder(folder, side, batch, threads)
    print(
        f"data: crops of {side} pixels, batches of {batch}, {threads} threads or processes, torch {torch.__version__}"
    )
    rates = compare(ours, theirs, batch, rounds)
    _waiting(network, side, batch, {name: statistics.median(rates[name]) for name in ours})


def compare(ours: Mapping[str, Epoch], theirs: Mapping[str, Epoch], batch: int, rounds: int) -> dict[str, list[float]]:
    """Prints images a second of each, in turn, and the ratio of our fastest to each of theirs.

    Returns:
        Images a second, round by round.
    """
    batches = dict.fromkeys((*ours, *theirs), 0)

    def through(name: str, epoch: Epoch) -> None:
        batches[name] = sum(1 for _ in epoch())

    every = {name: lambda name=name, epoch=epoch: through(name, epoch) for name, epoch in {**ours, **theirs}.items()}
    times = in_turn(every, rounds, 1, torch.device("cpu"))
    rates = {name: [batches[name] * batch / seconds for seconds in measured] for name, measured in times.items()}
    for name, measured in rates.items():
        low, middle, high = quartiles(measured)
        whose = "ours  " if name in ours else "theirs"
        print(f"  {whose} {name:28} {middle:9,.0f} images/s (quartiles {low:,.0f} to {high:,.0f})")
    best = max(ours, key=lambda name: statistics.median(rates[name]))
    for other in theirs:
        low, middle, high = quartiles([a / b for a, b in zip(rates[best], rates[other], strict=True)])
        print(f"  {best} / {other}: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")
    return rates


def epochs_of(raw: Mapping[str, Any]) -> Epoch:
    """Epochs of a section `data:`, one after another. Raises: ConfigError."""
    config = validate(
        {
            "name": "data",
            "method": {"name": "independent"},
            "peers": [{"network": "cifar_resnet8_b"}],
            "data": dict(raw),
            "train": {"epochs": 1},
        }
    )
    try:
        pipeline = open_pipeline(config.data, 0, torch.device("cpu"))
    except DataError as error:
        raise ConfigError(f"data: {error}") from None
    count = itertools.count()
    return lambda: pipeline.train(next(count), 0, slice(0, config.data.global_batch))


def _ours(form: str, root: Path, decoder: str, side: int, batch: int, threads: int) -> Epoch:
    return epochs_of(
        {
            "dataset": form,
            "root": str(root),
            "global_batch": batch,
            "image": {"size": side},
            "decoding": {"decoder": decoder, "threads": threads},
        }
    )


def _waiting(network: str, side: int, batch: int, rates: Mapping[str, float]) -> None:
    """What share of the time a network would wait for its images."""
    step = bare_step(Workload(network, side, batch, peers=1, method={"name": "independent"}), torch.device("cpu"))
    step()
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    print(f"  a step of {network} on {batch} images takes {seconds:.2f} s, {batch / seconds:,.0f} images/s:")
    for name, rate in rates.items():
        # Each of the two alone on these cores; a GPU has its network's step beside the cores' decoding.
        print(f"  {name:28} would have it wait {100 * max(0.0, 1 - seconds * rate / batch):.0f} % of the time")
