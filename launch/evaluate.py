"""Scores a cohort on the validation split: each peer, its moving average and the ensemble.

Alone:           python launch/evaluate.py runs/quickstart-dml
On 8 ranks:      torchrun --nproc-per-node=8 launch/evaluate.py runs/imagenet-dml --checkpoint best
On other files:  python launch/evaluate.py runs/imagenet-dml data.root=/mnt/imagenet-v2

With every image:  python launch/evaluate.py runs/imagenet-dml --predictions predictions.csv

Every image is counted exactly once, whatever the number of ranks. Other files are ROOT/val/CLASS/* or ROOT/CLASS/*,
or with data.dataset= any other form of docs/data.md, of which nothing but the validation split need be there; their
classes are those of the run by name, or folders 0, 1, 2, ... as ImageNetV2 has them.
"""

from __future__ import annotations

import launch.with_parent  # noqa: F401  # isort: skip

import argparse
import json
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
from engine.ranks.exchange import Exchange
from engine.ranks.planning.choosing import plan_scoring
from engine.reporting.predictions import write_classes, write_confusion, write_images
from engine.safety import loading
from engine.safety.checkpoint import Manifest
from engine.training.evaluation import score
from engine.training.predictions import Predictions
from launch.entry import parser, require_torchrun, user_errors
from launch.run_folder import settings_of, use_together

_FILES = {
    "predictions": "what each network names for each image, and with which probability",
    "per-class": "the accuracy of each class",
    "confusion": "how many images of which class were taken for which",
}
EXPLAINED = """\
top1, top5: % of images; loss: mean cross-entropy in nats, of a peer (val/), its moving average (ema/) or the ensemble
spread: how much the probabilities depend on the image; 0 where all images get the same
apart: how far a peer's logits are from those of the peer nearest to it; 0 where the two compute the same
disagreement: % of images on which two peers name different classes, the mean over pairs"""


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_words("RUN", "a run's folder")
    arguments.add_argument("--checkpoint", default="newest", metavar="WHICH", help="newest (default), best or a step")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the scores there as well")
    for name, what in _FILES.items():
        arguments.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}: .csv or .jsonl")
    options, chosen, overrides = arguments.parse_words()
    launch = Launch.from_environment()
    if chosen is None:
        arguments.error("RUN is missing; expected the folder of a run")
    run = Path(chosen)
    with user_errors(launch):
        require_torchrun("launch/evaluate.py")
        files = _files(options)
        config = settings_of(run, overrides)
        device = choose_device(config.device, launch)
        placement = plan_scoring(config, launch.world, launch.rank)
        set_precision(config, device)
        try:
            pipeline, remark = open_validation(config.data, _classes(run), device)
        except (DataError, ImportError) as error:
            raise ConfigError(f"data{'.' if str(error).startswith('root:') else ': '}{error}") from None
        start(launch, device)
        networks: dict[str, dict[int, nn.Module]] = {}

        def take(found: Manifest) -> None:
            networks.clear()
            networks.update(loading.load_networks(run, found, config, placement.residents, device))

        manifest = use_together(run, options.checkpoint, take)
        if pipeline.num_classes != manifest.num_classes:
            raise ConfigError(
                f"data.root = {str(config.data.root)!r}: has {pipeline.num_classes} classes, and nobody knows which of "
                f"the {manifest.num_classes} of {run} they are; expected a run with a classes.json"
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
            print(f"{run}, step {manifest.step}, {pipeline.eval_size} images, {placement}")
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


def _files(options: argparse.Namespace) -> dict[str, Path]:
    """Where what was asked for is written. Raises: ConfigError, where it cannot be."""
    files = {name: path for name in _FILES if (path := getattr(options, name.replace("-", "_"))) is not None}
    for name, path in files.items():
        if path.suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"--{name} {path}: expected a file that ends in .csv or .jsonl")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name} {path}: {path.absolute().parent} is not a folder; expected one that is there")
    return files


def _classes(run: Path) -> list[str] | None:
    """The classes that a run was trained on, in the order of its logits; None if it does not say."""
    try:
        found = json.loads(read_text(run / "classes.json"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None


if __name__ == "__main__":
    main()
