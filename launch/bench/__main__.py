"""Measures the engine against what one would write instead, both timed in turn in one run.

    python launch/bench step                     the engine's step against a bare loop in plain PyTorch
    torchrun --nproc-per-node=2 launch/bench exchange    spread peers against the same peers uncoupled
    torchrun --nproc-per-node=2 launch/bench decode --folder DIR    photos decoded once for all peers, against by each
    torchrun --nproc-per-node=4 launch/bench placement   ranks in proportion to what peers cost, against as many each
    python launch/bench checkpoint               saving beside training, against waiting for the disk
    python launch/bench bytes                    not timed: what each method sends, from its signals' shapes
    python launch/bench operations               not timed: operations that a step of each method dispatches
    python launch/bench data --folder DIR        images/s of folders, shards, ... and decoders, against other loaders
    python launch/bench resident                 small images with AutoAugment and Cutout, against other loaders
    python launch/bench lmcl                     L-MCL's objective with memory banks against one pair after another
    python launch/bench lmcl-step                a step of L-MCL against two networks alone, and its outer step
    python launch/bench gpu --out DIR            all that a GPU has to show, in parts that fail alone; see docs/gpu.md

Absolute times belong to the machine; the ratio is the result. Machines wander, so variants take turns, and the median
of the ratios of neighbours is printed with its quartiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipelines.sources.sections import PHOTOS
from engine.config import ConfigError
from engine.ranks.collectives import Launch, choose_device, start
from launch.bench import contrast
from launch.bench.bytes import bytes_a_step
from launch.bench.gpu.methods import operations_of_methods
from launch.bench.gpu.running import PARTS, run_parts
from launch.bench.host import host_seconds, operations
from launch.bench.loading.photos import photos
from launch.bench.loading.shared import decode
from launch.bench.loading.small import small
from launch.bench.peers import Workload, bare_step, bench_cohort, engine_step
from launch.bench.placing import placing
from launch.bench.saving import saving
from launch.bench.turns import headline, in_turn, print_comparison
from launch.entry import parser, user_errors
from losses import METHODS

WHAT = ("step", "exchange", "placement", "checkpoint", "bytes", "operations", "lmcl", "lmcl-step", "gpu")
LOADING = ("data", "resident", "decode")


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_argument("what", choices=(*WHAT, *LOADING))
    arguments.add_argument("--network", default="torchvision/resnet18", help="of both peers (default: %(default)s)")
    arguments.add_argument("--size", type=int, help="side of the images (default: 32, data: 224)")
    arguments.add_argument("--batch", type=int, default=64, help="rows of a step (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=15, help="timed pairs (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=3, help="steps in one timing (default: %(default)s)")
    arguments.add_argument("--amp", choices=["float32", "bf16", "fp16"], default="float32")
    arguments.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="lmcl: rows (default: 8 32)")
    arguments.add_argument("--folder", type=Path, help="data, decode: train/ and val/; checkpoint: where to write")
    arguments.add_argument("--also", nargs="+", default=[], metavar="FORM=DIR", help="data: it as webdataset, hub")
    arguments.add_argument("--threads", type=int, help="CPU threads; torch's choice if absent")
    arguments.add_argument("--out", type=Path, metavar="DIR", help="gpu: where rows.jsonl and gpu.md are written")
    arguments.add_argument("--quick", action="store_true", help="gpu, resident, placement: only to try the command")
    arguments.add_argument("--minutes", type=float, default=8.0, help="gpu: limit of all parts (default: 8)")
    arguments.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"gpu: of {', '.join(PARTS)}")
    options = arguments.parse_args()
    launch = Launch.from_environment()
    if options.threads:
        torch.set_num_threads(options.threads)
    with user_errors(launch):
        if options.what == "gpu":
            if options.out is None:
                raise ConfigError("--out: missing; expected a folder for rows.jsonl and gpu.md")
            sys.exit(run_parts(options.out, options.only, quick=options.quick, seconds=60 * options.minutes))
        if options.what in ("lmcl", "lmcl-step"):
            contrast.objective(options) if options.what == "lmcl" else contrast.training_step(options)
        else:
            device = choose_device("auto", launch)
            start(launch, device)
            _measure(options, device, launch)
        dist.destroy_process_group()


def _measure(options: argparse.Namespace, device: torch.device, launch: Launch) -> None:
    if options.what in LOADING:
        _load(options, launch)
        return
    work = Workload(options.network, options.size or 32, options.batch, options.amp)
    if options.what == "bytes":
        for method in METHODS:
            print(f"  {method:16} {bytes_a_step(method):>12,}")
    elif options.what == "operations":
        print(headline("operations", work, device, launch))
        for name, found, alone in operations_of_methods(work, device, launch):
            print(f"  {name:28} {found:8,} {found / alone:8.2f} times independent peers")
    elif options.what == "placement":
        placing(options.batch, 3 if options.quick else options.rounds, options.steps, launch, device)
    elif options.what == "checkpoint":
        saving(work, options.rounds, options.steps, options.folder, device, launch)
    elif options.what == "step":
        engine = engine_step(bench_cohort(work, device, launch), work)
        variants = {"engine": engine, "bare loop": bare_step(work, device)}
        times = in_turn(variants, options.rounds, options.steps, device)
        print(headline("step", work, device, launch))
        print_comparison(times, *variants)
        for name, step in variants.items():
            busy = statistics.median(host_seconds(step, device) for _ in range(5))
            print(f"  {name:12} {operations(step):6} operations dispatched, the host busy for {1000 * busy:.2f} ms")
    else:
        both = {name: replace(work, method={"name": name}) for name in ("dml", "independent")}
        variants = {name: engine_step(bench_cohort(each, device, launch), each) for name, each in both.items()}
        times = in_turn(variants, options.rounds, options.steps, device)
        if launch.rank == 0:
            print(headline("exchange", work, device, launch))
            print_comparison(times, *variants)


def _load(options: argparse.Namespace, launch: Launch) -> None:
    threads = options.threads or os.cpu_count() or 1
    if options.what == "resident":
        small(1_000 if options.quick else 10_000, options.batch, threads, options.rounds)
        return
    if options.folder is None:
        raise ConfigError("--folder: missing; expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    if options.what == "decode":
        decode(options.folder, options.batch, options.rounds, options.threads or 1, launch)
        return
    roots = {"image_folder": options.folder}
    for word in options.also:
        form, equals, folder = word.partition("=")
        if not equals or form not in PHOTOS:
            raise ConfigError(f"--also {word}: expected FORM=DIR, FORM one of {', '.join(PHOTOS[1:])}")
        roots[form] = Path(folder)
    photos(roots, options.size or 224, options.batch, threads, options.rounds, options.network)


if __name__ == "__main__":
    main()
