"""The measurements of `launch/bench lmcl` and `lmcl-step`."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.ranks.collectives import Launch, choose_device, start
from engine.ranks.tables import make_table
from engine.training.step import train_step
from engine.training.timing import Clock
from launch.bench.peers import STEPS_PER_EPOCH, Workload, bench_cohort, rows_of
from launch.bench.turns import headline
from losses import PeerInfo, Progress
from losses.lmcl import LMCL, LMCLOptions
from losses.memory import Memory
from models.heads import Projection

_PEERS, _STAGES, _FEATURES, _WIDTH, _NEGATIVES, _IMAGES, _CLASSES = 2, 4, 512, 128, 8192, 100_000, 100
_GIB = 1 << 30
_TEMPERATURE = 3.0

Objective = Callable[[], Tensor]
"""Makes the loss and its gradients anew."""


class Shapes(nn.Module):
    """What both implementations start from: features of every exit, heads, projections of the weights, and banks."""

    def __init__(
        self, batch: int, tau: float, device: torch.device, images: int = _IMAGES, negatives: int = _NEGATIVES
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options = LMCLOptions(
            negatives="memory", alpha=0.01, beta=0.01, tau=tau, num_negatives=negatives, width=_WIDTH
        )
        exits = range(_PEERS * _STAGES)
        self.features = nn.ParameterList([torch.rand(batch, _FEATURES, device=device) for _ in exits])
        self.heads = nn.ModuleList([Projection(_FEATURES, _WIDTH) for _ in exits]).to(device)
        self.match = nn.ModuleList([nn.Linear(_FEATURES, _WIDTH) for _ in exits]).to(device)
        self.classes = torch.arange(images, device=device) % _CLASSES
        self.ids = torch.randperm(images)[:batch].to(device)
        self.targets = self.classes[self.ids]
        self.memory = Memory(self.options, _PEERS, self.classes, partial(make_table, device), (1, 2))


def ours(shapes: Shapes) -> Objective:
    """The objective of `losses/lmcl.py`, draws of positives and negatives included."""
    method = LMCL(shapes.options, [PeerInfo(k, _CLASSES, _FEATURES, (), *[None] * 3) for k in range(_PEERS)])  # type: ignore[arg-type]
    method.memory = shapes.memory

    def step() -> Tensor:
        signals = []
        for k in range(_PEERS):
            mine = slice(k * _STAGES, (k + 1) * _STAGES)
            features = list(shapes.features)[mine]
            embeddings = [head(f) for head, f in zip(shapes.heads[mine], features, strict=True)]
            with torch.no_grad():
                match = [F.normalize(m(f), dim=1) for m, f in zip(shapes.match[mine], features, strict=True)]
            signals.append(
                {"embeddings": torch.stack(embeddings, 1), "match": torch.stack(match, 1), "all_ids": shapes.ids}
            )
        everyone = range(_PEERS)
        weights = method.weights(everyone, signals)
        terms = method.contrast(everyone, signals, shapes.targets, Progress(7, 1000, 1), weights)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        return loss.detach()

    return step


def pair_by_pair(shapes: Shapes) -> Objective:
    """The published algorithm as one would write it down: for each ordered pair of peers and each pair of exits, gather
    the rows of both banks, multiply, and take the eight losses. The images are those that `ours` draws; its one
    deviation, the bank of a peer's own VCL, is that of `ours` too, so that the values must agree."""
    options = shapes.options
    banks = shapes.memory.banks
    ids = shapes.memory.images(shapes.ids, shapes.targets, 7)

    def hard(z: Tensor, positives: int, w: Tensor) -> Tensor:
        exponentials = torch.exp(z)
        log_probabilities = z - torch.log(exponentials.sum(1, keepdim=True))
        return -(log_probabilities[:, :positives].mean(1) * w).mean()

    def soft(student: Tensor, teacher: Tensor, w: Tensor) -> Tensor:
        p = F.softmax(teacher.detach() / _TEMPERATURE, dim=1)
        log_q = F.log_softmax(student / _TEMPERATURE, dim=1)
        kl = F.kl_div(log_q, p, reduction="none").sum(1)
        return _TEMPERATURE**2 * (kl * w).mean()

    def logits(bank: int, columns: Tensor, e: Tensor) -> Tensor:
        rows = torch.index_select(banks[bank].rows, 0, columns.reshape(-1)).view(*columns.shape, _WIDTH)  # type: ignore[attr-defined]
        return torch.bmm(rows, e.unsqueeze(2)).squeeze(2) / options.tau

    def step() -> Tensor:
        embeddings = [head(f) for head, f in zip(shapes.heads, shapes.features, strict=True)]
        with torch.no_grad():
            match = [F.normalize(m(f), dim=1) for m, f in zip(shapes.match, shapes.features, strict=True)]
        loss = torch.zeros((), device=ids.device)
        for i in range(_PEERS):
            for j in range(_PEERS):
                if i == j:
                    continue
                for k in range(_STAGES):
                    for z in range(_STAGES):
                        one, other = i * _STAGES + k, j * _STAGES + z
                        w = torch.sigmoid((match[one] * match[other]).sum(1))
                        c_ij, c_ji = logits(i, ids, embeddings[other]), logits(j, ids, embeddings[one])
                        v_i, v_j = logits(i, ids[:, 1:], embeddings[one]), logits(j, ids[:, 1:], embeddings[other])
                        positives = options.positives
                        vcl = hard(v_i, positives, w) + hard(v_j, positives, w)
                        icl = hard(c_ij, 1 + positives, w) + hard(c_ji, 1 + positives, w)
                        soft_vcl = soft(v_i, v_j, w) + soft(v_j, v_i, w)
                        soft_icl = soft(c_ij, c_ji, w) + soft(c_ji, c_ij, w)
                        loss = (
                            loss
                            + options.alpha * vcl
                            + options.gamma * soft_vcl
                            + options.beta * icl
                            + options.lam * soft_icl
                        )
        loss.backward()
        return loss.detach()

    return step


_VARIANTS: dict[str, Callable[[Shapes], Objective]] = {"ours": ours, "pair by pair": pair_by_pair}


def objective(options: argparse.Namespace) -> None:
    """Prints time, memory and agreement of both at batches of 8 and 32 rows."""
    device = choose_device("auto", Launch(0, 0, 1))
    start(Launch(0, 0, 1), device)
    print(
        f"L-MCL's contrastive objective, forward and backward, float32: {_PEERS} peers, {_STAGES} stages, "
        f"{_FEATURES} -> {_WIDTH}, {_NEGATIVES} negatives a row, banks of {_IMAGES} rows, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for batch in options.batches:
        memory = {name: _in_a_process(name, batch, options.threads) for name in _VARIANTS if _fits(name, batch, device)}
        names = list(memory)
        shapes = Shapes(batch, 0.07, device)
        steps = {name: _VARIANTS[name](shapes) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        values: dict[str, tuple[Tensor, list[Tensor]]] = {}
        for done in range(options.rounds + 1):
            for name in names[:: 1 if done % 2 else -1]:
                shapes.zero_grad(set_to_none=True)
                seconds, loss = _timed(steps[name], device)
                values[name] = loss, [p.grad.clone() for p in shapes.parameters() if p.grad is not None]
                if done or options.rounds == 0:
                    times[name].append(seconds)
        for name in names:
            print(
                f"  batch {batch:3}  {name:12} {statistics.median(times[name]):8.3f} s (median of {len(times[name])}), "
                f"peak memory above what the inputs take {memory[name] / _GIB:6.2f} GiB"
            )
        if len(names) == 2:
            ratios = [b / a for a, b in zip(*times.values(), strict=True)]
            (one, grads), (other, others) = (values[name] for name in names)
            apart = max(((x - y).norm() / y.norm().clamp(min=1e-12)).item() for x, y in zip(grads, others, strict=True))
            print(
                f"  batch {batch:3}  {statistics.median(ratios):.0f} times faster, "
                f"{memory[names[1]] / memory[names[0]]:.0f} times less memory; values agree to "
                f"{abs((one - other) / other).item():.1e}, gradients to {apart:.1e}"
            )
        else:
            print(f"  batch {batch:3}  pair by pair not run: it would need about {_needed(batch) / _GIB:.0f} GiB")


def _needed(batch: int) -> float:
    """Gathered rows of four matrices for each of the pairs, which autograd keeps, and a tenth more."""
    return 1.1 * 4 * _PEERS * (_PEERS - 1) * _STAGES**2 * batch * (_NEGATIVES + 2) * _WIDTH * 4


def _fits(name: str, batch: int, device: torch.device) -> bool:
    if name == "ours":
        return True
    if device.type == "cuda":
        return _needed(batch) < torch.cuda.mem_get_info(device)[0]
    return _needed(batch) < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _timed(step: Objective, device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, loss


def _in_a_process(name: str, batch: int, threads: int | None) -> int:
    """Peak memory in a process of its own, in bytes above what was taken before the step."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, batch, threads))


def _peak(name: str, batch: int, threads: int | None) -> int:
    if threads:
        torch.set_num_threads(threads)
    device = choose_device("auto", Launch(0, 0, 1))
    start(Launch(0, 0, 1), device)
    step = _VARIANTS[name](Shapes(batch, 0.07, device))
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# -- the whole step ---------------------------------------------------------------------------------------------------


def training_step(options: argparse.Namespace) -> None:
    """Prints what a step of L-MCL costs against two networks that train alone, with and without the outer step."""
    device = choose_device("auto", Launch(0, 0, 1))
    start(Launch(0, 0, 1), device)
    work = Workload("cifar_resnet32_b", method={"name": "independent"})
    variants = {
        "two alone": stepper(work, device),
        "lmcl": stepper(replace(work, method={"name": "lmcl", "meta_interval": None}), device),
        "lmcl, outer step every time": stepper(replace(work, method={"name": "lmcl", "meta_interval": 1}), device),
    }
    print(headline("a training step", work, device, Launch(0, 0, 1)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(options.rounds + 1):
        for name in list(variants)[:: 1 if done % 2 else -1]:
            seconds = _timed(variants[name][0], device)[0]
            if done:
                times[name].append(seconds)
    alone, plain, outer = times.values()
    for name, measured in times.items():
        parts = variants[name][1].read()
        total = sum(parts.values())
        shares = ", ".join(f"{part} {100 * value / total:.0f} %" for part, value in parts.items())
        print(f"  {name:28} {1000 * statistics.median(measured):9.1f} ms (median of {len(measured)}): {shares}")
    once = statistics.median([b / a for a, b in zip(alone, plain, strict=True)])
    every = statistics.median([(c - b) / b for b, c in zip(plain, outer, strict=True)])
    print(f"  lmcl / two alone: {once:.2f}")
    print(f"  an outer step costs {every:.1f} steps of lmcl: every 50 steps {100 * every / 50:.0f} %, every 500")
    print(f"  {100 * every / 500:.1f} %; with one every 50: {once * (1 + every / 50):.2f} of two alone")
    _print_kernels(variants["lmcl, outer step every time"][0])


def _print_kernels(step: Objective) -> None:
    """Where an outer step spends its time: the operators that take most, and the nodes of the backward passes."""
    with torch.profiler.profile() as profile:
        step()
    events = profile.key_averages()
    cuda = torch.cuda.is_available()
    own = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    total = sum(own.values())
    largest = sorted(own, key=own.__getitem__, reverse=True)[:6]
    print("  with an outer step: " + ", ".join(f"{key} {100 * own[key] / total:.0f} %" for key in largest))
    whole = {e.key: e.device_time_total if cuda else e.cpu_time_total for e in events if e.key.endswith("Backward0")}
    nodes = sorted((key for key in whole if not key.startswith("autograd::")), key=whole.__getitem__, reverse=True)[:4]
    print("  of it in: " + ", ".join(f"{key} {100 * whole[key] / total:.0f} %" for key in nodes))


def stepper(work: Workload, device: torch.device) -> tuple[Objective, Clock]:
    """A step that gives its flag of a skip, and the clock that it keeps."""
    cohort = bench_cohort(work, device, Launch(0, 0, 1))
    batch = rows_of(work, device)
    clock = Clock(device)
    count = iter(range(1 << 62))

    def step() -> Tensor:
        clock.restart()
        return train_step(cohort, [batch], Progress(next(count), STEPS_PER_EPOCH, 1), clock).skipped

    return step, clock
