"""What launch/evaluate.py does, once its words are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data_pipelines import DataError, open_validation
from data_pipelines.order import part
from engine.cohort.precision import set_precision
from engine.config import ConfigError
from engine.files import read_text, write_json
from engine.ranks.collectives import Launch, choose_device, group_of, start
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.planning.choosing import plan_scoring
from engine.reporting.predictions import write_classes, write_confusion, write_images
from engine.safety import loading
from engine.safety.checkpoint import Manifest
from engine.training.evaluation import score
from engine.training.predictions import Predictions
from launch.entry import require_torchrun, user_errors
from launch.run_folder import settings_of, use_together

EXPLAINED = """\
top1, top5: % of images; loss: mean cross-entropy in nats, of a peer (val/), its moving average (ema/) or the ensemble
spread: how much the probabilities depend on the image; 0 where all images get the same
apart: how far a peer's logits are from those of the peer nearest to it; 0 where the two compute the same
disagreement: % of images on which two peers name different classes, the mean over pairs"""


def run(options: argparse.Namespace, folder: Path, overrides: Sequence[str], files: Mapping[str, Path]) -> None:
    """Prints, and writes, the scores of a run.

    Args:
        options: of the command line.
        folder: of the run.
        overrides: `section.key=value`.
        files: those to be written, by the option that asks for each.
    """
    launch = Launch.from_environment()
    with user_errors():
        require_torchrun("launch/evaluate.py")
        _check(files)
        config = settings_of(folder, overrides)
        device = choose_device(config.device, launch)
        placement = plan_scoring(config, launch.world, launch.rank)
        set_precision(config, device)
        try:
            pipeline, remark = open_validation(config.data, _classes(folder), device)
        except (DataError, ImportError) as error:
            raise ConfigError(f"data{'.' if str(error).startswith('root:') else ': '}{error}") from None
        start(launch, device)
        networks: dict[str, dict[int, nn.Module]] = {}

        def take(found: Manifest) -> None:
            networks.clear()
            networks.update(loading.load_networks(folder, found, config, placement.residents, device))

        manifest = use_together(folder, options.checkpoint, take)
        if pipeline.num_classes != manifest.num_classes:
            raise ConfigError(
                f"data.root = {str(config.data.root)!r}: has {pipeline.num_classes} classes, and nobody knows which of "
                f"the {manifest.num_classes} of {folder} they are; expected a run with a classes.json"
            )
        exchange = Exchange(placement, group_of(placement.exchange_ranks))
        images = len(part(pipeline.eval_size, placement.replica, placement.replicas)) * len(networks)
        kept: dict[str, Predictions] = {}
        # In a terminal only: a log wants the scores.
        with tqdm(total=images, unit="image", disable=None if launch.rank == 0 else True, leave=False) as bar:
            values = score(networks, config, exchange, placement, pipeline, device, kept if files else None, bar.update)
        pipeline.close()
        dist.destroy_process_group()
        if launch.rank == 0:
            print(f"{folder}, step {manifest.step}, {pipeline.eval_size} images, {placement}")
            if remark:
                print(f"  {remark}")
            width = max(map(len, values))
            for key, value in values.items():
                print(f"  {key:{width}} {value:10.4f}")
            print(EXPLAINED)
            if options.json:
                write_json(options.json, {"step": manifest.step, "images": pipeline.eval_size, **values})
            about = [*(name for name, _ in config.trained), "ensemble"], pipeline.class_names
            if "predictions" in files:
                write_images(files["predictions"], kept, *about, pipeline.eval_path)
            if "per-class" in files:
                write_classes(files["per-class"], kept, *about, pipeline.num_classes)
            if "confusion" in files:
                write_confusion(files["confusion"], kept, *about, pipeline.num_classes)


def _check(files: Mapping[str, Path]) -> None:
    """Refuses files that cannot be written. Raises: ConfigError."""
    for name, path in files.items():
        if path.suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"--{name} {path}: expected a file that ends in .csv or .jsonl")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name} {path}: {path.absolute().parent} is not a folder; expected one that is there")


def _classes(run: Path) -> list[str] | None:
    """The classes that a run was trained on, in the order of its logits; None if it does not say."""
    try:
        found = json.loads(read_text(run / "classes.json"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None
