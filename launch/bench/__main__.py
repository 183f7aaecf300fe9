"""Measures the engine against what one would write instead, both timed in turn in one run.

    python launch/bench step                     the engine's step against a bare loop in plain PyTorch
    torchrun --nproc-per-node=2 launch/bench exchange    spread peers against the same peers uncoupled
    python launch/bench checkpoint               saving beside training, against waiting for the disk
    python launch/bench bytes                    not timed: what each method sends, from its signals' shapes
    python launch/bench lmcl                     L-MCL's objective with memory banks against one pair after another
    python launch/bench lmcl-step                a step of L-MCL against two networks alone, and its outer step

Absolute times belong to the machine; the ratio is the result. Machines wander, so variants take turns, and the median
of the ratios of neighbours is printed with its quartiles.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from engine.ranks.collectives import Launch, choose_device, start
from launch.bench import contrast
from launch.bench.bytes import bytes_a_step
from launch.bench.peers import bare_step, bench_cohort, engine_step
from launch.bench.saving import saving
from launch.bench.turns import compare
from launch.entry import parser, user_errors
from losses import METHODS


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_argument("what", choices=["step", "exchange", "checkpoint", "bytes", "lmcl", "lmcl-step"])
    arguments.add_argument("--network", default="torchvision/resnet18", help="of both peers (default: %(default)s)")
    arguments.add_argument("--size", type=int, default=32, help="side of the images (default: %(default)s)")
    arguments.add_argument("--batch", type=int, default=64, help="rows of a step (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=15, help="timed pairs (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=3, help="steps in one timing (default: %(default)s)")
    arguments.add_argument("--amp", choices=["float32", "bf16", "fp16"], default="float32")
    arguments.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="lmcl: rows (default: 8 32)")
    arguments.add_argument("--folder", type=Path, help="checkpoint: where to write (default: a temporary folder)")
    arguments.add_argument("--threads", type=int, help="CPU threads; torch's choice if absent")
    options = arguments.parse_args()
    launch = Launch.from_environment()
    if options.threads:
        torch.set_num_threads(options.threads)
    with user_errors(launch):
        if options.what in ("lmcl", "lmcl-step"):
            contrast.objective(options) if options.what == "lmcl" else contrast.training_step(options)
            dist.destroy_process_group()
            return
        device = choose_device("auto", launch)
        start(launch, device)
        if options.what == "bytes":
            for method in METHODS:
                print(f"  {method:16} {bytes_a_step(method):>12,}")
            dist.destroy_process_group()
            return
        if options.what == "checkpoint":
            saving(options, device, launch)
            dist.destroy_process_group()
            return
        if options.what == "step":
            engine = engine_step(bench_cohort(options, "dml", device, launch), options)
            variants = {"engine": engine, "bare loop": bare_step(options, device)}
        else:
            cohorts = {name: bench_cohort(options, name, device, launch) for name in ("dml", "independent")}
            variants = {name: engine_step(cohort, options) for name, cohort in cohorts.items()}
        compare(variants, options, device, launch)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
