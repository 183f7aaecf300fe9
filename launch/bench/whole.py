"""`launch/bench methods` and `peers`: whole steps of every method."""

from __future__ import annotations

import argparse
import difflib
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from engine.config import ConfigError
from engine.ranks.collectives import Launch
from launch.bench.extras import extras
from launch.bench.gpu import methods as forms
from launch.bench.peers import Workload, bench_cohort, engine_step
from launch.bench.plain.comparing import CASES, peers
from launch.bench.turns import headline, in_turn, quartiles, ratio

FORMS = {**forms.FORMS, "codistillation": {"name": "codistillation", "burn_in": 1}}
_OWN_VIEWS = ("kdcl", "pcl")
"""Methods whose peers see an augmentation of the image each."""
_EXTRAS = "extra networks"


def whole_steps(options: argparse.Namespace, device: torch.device, launch: Launch) -> None:
    """Either command. Raises: ConfigError, for a name that is none of its cases."""
    known = FORMS if options.what == "methods" else CASES
    for name in options.cases or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"--cases {name!r}: expected {', '.join(known)}" + f"; nearest: {near[0]!r}" * bool(near))
    names = options.cases or list(known)
    rounds = 2 if options.quick else options.rounds
    if options.what == "peers":
        batch = 8 if options.quick else options.batch
        compiled = options.compile
        peers(names, batch, rounds, options.steps, options.workers, device, compiled=compiled, quick=options.quick)
        return
    work = Workload(
        options.network, options.size or 32, options.batch, options.amp, peers=options.peers, classes=options.classes
    )
    if options.quick:
        work = replace(work, network="cifar_resnet8_b", size=16, batch=8)
    print(headline("methods", work, device, launch) + f", {work.classes} classes")
    methods(names, work, rounds, 1 if options.quick else options.steps, device, launch)


def methods(
    names: Iterable[str], base: Workload, rounds: int, steps: int, device: torch.device, launch: Launch
) -> None:
    """A line for each method: its step over that of independent peers, and its extra networks apart."""
    for name in names:
        section = FORMS[name]
        work = replace(
            base,
            method={**section, "num_negatives": 8} if base.size < 32 and "num_negatives" in section else section,
            peers=max(base.peers, 3) if section["name"] == "okddip" else base.peers,
            views="per_peer" if section["name"] in _OWN_VIEWS else "shared",
        )
        apart = replace(work, method={"name": "independent"})
        cohort = bench_cohort(work, device, launch)
        variants: dict[str, Callable[[], object]] = {
            name: engine_step(cohort, work),
            "independent": engine_step(bench_cohort(apart, device, launch), apart),
        }
        variants[name]()  # after which copies of peers are there, where a method has some
        extra = extras(cohort, variants[name])
        if extra is not None:
            variants[_EXTRAS] = extra
        times = in_turn(variants, rounds, steps, device)
        low, middle, high = ratio(times, name, "independent")
        line = (
            f"  {name:28} {work.peers} peers {1000 * statistics.median(times[name]):9.1f} ms: {middle:.3f} of "
            f"independent (quartiles {low:.3f} to {high:.3f})"
        )
        if extra is not None:
            share = quartiles([a / b for a, b in zip(times[_EXTRAS], times["independent"], strict=True)])
            line += f"; extra networks {share.middle:.3f} ({share.low:.3f} to {share.high:.3f})"
        print(line, flush=True)
