"""What `launch/bench` does, once its words are read."""

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
from launch.bench import LOADING, contrast
from launch.bench.bytes import bytes_a_step
from launch.bench.gpu.methods import operations_of_methods
from launch.bench.gpu.running import run_parts
from launch.bench.host import host_seconds, operations
from launch.bench.layout import layout
from launch.bench.loading.listing import listing
from launch.bench.loading.photos import photos
from launch.bench.loading.shared import decode
from launch.bench.loading.small import small
from launch.bench.loading.training import training
from launch.bench.objective import objective
from launch.bench.peers import Workload, bare_step, bench_cohort, engine_step
from launch.bench.placing import placing
from launch.bench.saving import saving
from launch.bench.starting import starting
from launch.bench.together import together
from launch.bench.turns import headline, in_turn, print_comparison
from launch.bench.whole import whole_steps
from launch.entry import user_errors
from losses import METHODS


def run(options: argparse.Namespace) -> None:
    """Measures what was asked for, and prints it."""
    launch = Launch.from_environment()
    if options.threads:
        torch.set_num_threads(options.threads)
    with user_errors():
        if options.what == "gpu":
            if options.out is None:
                raise ConfigError("--out: missing; expected a folder for rows.jsonl and gpu.md")
            sys.exit(run_parts(options.out, options.only, quick=options.quick, seconds=60 * options.minutes))
        if options.what == "start":
            starting(options.rounds, options.threads or 1)
            return
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
    elif options.what in ("methods", "peers"):
        whole_steps(options, device, launch)
    elif options.what == "objective":
        objective(options.rounds, options.steps, device)
    elif options.what == "layout":
        layout(options.rounds, options.steps, device, launch, quick=options.quick)
    elif options.what == "together":
        together(work, options.rounds, options.steps, device, launch)
    elif options.what == "placement":
        placing(options, launch, device)
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
    if options.what == "listing":
        listing(options.images, options.rounds, options.folder)
        return
    if options.folder is None:
        raise ConfigError("--folder: missing; expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    if options.what == "decode":
        decode(options.folder, options.batch, options.rounds, options.threads or 1, launch)
        return
    if options.what == "trainer":
        size, rounds, steps = options.size or 224, options.rounds, options.steps
        training(options.folder, size, options.batch, threads, rounds, steps, options.network, options.classes)
        return
    roots = {"image_folder": options.folder}
    for word in options.also:
        form, equals, folder = word.partition("=")
        if not equals or form not in PHOTOS:
            raise ConfigError(f"--also {word}: expected FORM=DIR, FORM one of {', '.join(PHOTOS[1:])}")
        roots[form] = Path(folder)
    photos(roots, options.size or 224, options.batch, threads, options.rounds, options.network)
