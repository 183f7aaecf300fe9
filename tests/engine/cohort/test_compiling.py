"""torch.compile of networks and objectives: the same numbers, and a word about whatever stays plain PyTorch."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.cohort.compiling import Compiler, compiled_so_far, set_compiler
from engine.config import RunConfig
from losses import METHODS, Method, MethodOptions, Progress, Signals, Terms
from tests.engine.stepping import CPU, cohort_of, config_of, do_steps
from tests.gpu.cases import CASES
from tests.runs import small_run, train_here
from tests.worlds import run_ranks, run_world

STEPS = range(3, 10)
"""In which no ReLU is so near to its kink that a rounding moves a gradient, as one is in step 1 of `ffl`."""

LEFT = "precision.compile = true: {} is not compiled, training goes on without: {}"


def both_ways(config: RunConfig, backend: Any, method: type[Method] | None = None) -> Any:
    """The terms and norms of seven steps, over two epochs, eager and with a compiled objective; what was said; and the
    graphs that were made."""
    set_compiler(2, CPU)
    said: list[str] = []
    found = []
    for on in (False, True):
        cohort = cohort_of(config, method=method)
        Compiler(CPU, on, said.append, backend).objective(cohort.method)
        found.append(do_steps(cohort, STEPS))
    told = compiled_so_far()
    return *found, said, told.graphs if told else 0


def config_with(name: str) -> RunConfig:
    case = CASES[name]
    return config_of(case.method, case.networks or case.peers, **case.sections)


RAMPS: dict[str, Any] = {
    "dml": {"name": "dml", "ramp": 2},
    "pcl, paper": {"name": "pcl", "ramp_up_epochs": 2},
    "pcl, repository": {"name": "pcl", "ramp_up": "repository"},
}


def assert_close(compiled: Any, eager: Any) -> None:
    """Within rounding, and what seven steps make of it."""
    for (terms, _), (expected, _) in zip(compiled, eager, strict=True):
        assert terms == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_terms_are_those_of_an_eager_objective(name: str) -> None:
    config = config_with(name)
    [(eager, compiled, said, graphs)] = run_world(1, both_ways, config, "aot_eager")
    assert_close(compiled, eager)
    hindrance = METHODS[config.method.name].compile_hindrance(config.method)
    assert said == ([] if hindrance is None else [LEFT.format("the objective", hindrance)])
    # One for each learner where peers take turns, and one more where copies of others come to be there.
    assert graphs <= (0 if hindrance is not None else 2)


@pytest.mark.parametrize("ramp", ["dml", *(pytest.param(name, marks=pytest.mark.slow) for name in list(RAMPS)[1:])])
def test_a_ramp_is_followed_and_compiles_nothing_anew(ramp: str) -> None:
    [(eager, compiled, said, graphs)] = run_world(1, both_ways, config_of(RAMPS[ramp]), "aot_eager")
    assert_close(compiled, eager)
    assert (said, graphs) == ([], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dml", "ffl", "pcl"])
def test_modules_that_all_peers_share_average_their_gradients_as_ever(name: str) -> None:
    for eager, compiled, said, graphs in run_world(2, both_ways, config_with(name), "aot_eager"):
        assert_close(compiled, eager)
        assert (said, graphs) == ([], 1)


# -- what stays plain PyTorch -----------------------------------------------------------------------------------------


class Deciding(Method):
    """The host decides by a number of the device."""

    name = "deciding"
    Options = MethodOptions

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        terms = {(k, "ce"): self.classify(signals[k]["logits"], targets) for k in residents}
        return {key: 2 * term if term > 1 else term for key, term in terms.items()}


def test_an_objective_that_is_no_graph_is_left_alone() -> None:
    config = config_of({"name": "independent"}).model_copy(update={"method": MethodOptions(name="deciding")})
    [(eager, compiled, said, _)] = run_world(1, both_ways, config, "aot_eager", Deciding)
    assert compiled == eager
    [line] = said
    assert line.startswith(LEFT.format("the objective", "Unsupported: Data-dependent branching"))
    assert "\n" not in line


def without_cxx(config: RunConfig) -> Any:
    import torch._inductor.config

    torch._inductor.config.cpp.cxx = (None, "/nowhere/g++")
    return both_ways(config, "inductor")


def pages_taken(compiles: bool) -> int:
    """By buffers of 64 MiB that are written to and freed ten times."""
    if compiles:
        set_compiler(1, CPU)
    for _ in range(20):  # What Python keeps lies between them in the end.
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_what_a_compiled_network_frees_is_there_for_its_next_call() -> None:
    assert run_world(1, pages_taken, False)[0] > 10_000  # Else there is nothing to be mended.
    assert run_world(1, pages_taken, True)[0] < 1_000


def said_while_it_is_off() -> tuple[list[str], bool]:
    said: list[str] = []
    cohort = cohort_of(config_with("dml"))
    compiler = Compiler(CPU, True, said.append)
    with torch._dynamo.config.patch(disable=True):
        compiler.objective(cohort.method)
        return said, bool(do_steps(cohort, range(2)))


def test_a_compiler_that_is_switched_off_says_so_and_leaves_the_objective_alone() -> None:
    told = "precision.compile = true: nothing is compiled, training goes on without: TORCHDYNAMO_DISABLE is set"
    assert run_world(1, said_while_it_is_off)[0] == ([told], True)


def test_a_machine_without_a_compiler_says_so_once() -> None:
    [(eager, compiled, said, _)] = run_world(1, without_cxx, config_of())
    assert compiled == eager
    reason = "this machine has no C++ compiler, tried ['/nowhere/g++']; install g++, or name one in CXX"
    assert said == [f"precision.compile = true: nothing is compiled, training goes on without: {reason}"]


class Network(nn.Module):
    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x * 2) + 1


def compiled_network(what: Callable[[Tensor], Tensor], backend: Any, sizes: Sequence[int]) -> Any:
    said: list[str] = []
    network = Network(what)
    Compiler(CPU, True, said.append, backend).network(network, "peer0")
    shown = [network(torch.ones(size, requires_grad=True)) for size in sizes]
    for x in shown:
        x.sum().backward()
    return [x.tolist() for x in shown], said, compiled_so_far()


def refuse(graph: Any, inputs: Any) -> Any:
    raise NotImplementedError("no such kernel\nand more of it")


def break_here(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


def one_after_another() -> Any:
    refused = compiled_network(torch.relu, refuse, [2, 2])
    broken = compiled_network(break_here, "aot_eager", [2])
    with pytest.raises(RuntimeError, match=r"^shape '\[3, 5\]' is invalid"):
        compiled_network(lambda x: x.view(3, 5), "aot_eager", [2])
    set_compiler(1, CPU)
    torch._dynamo.config.recompile_limit = 1
    return refused, broken, compiled_network(torch.relu, "aot_eager", [2, 3, 3])


def test_what_the_compiler_fails_at_is_said_once_and_done_without() -> None:
    """A kernel that is not there, a break in a graph, a fault of the network's own, and too many sizes."""
    [(refused, broken, too_many)] = run_world(1, one_after_another)
    assert refused[:2] == ([[3, 3], [3, 3]], [LEFT.format("peer0", "NotImplementedError: no such kernel")])
    assert broken[:2] == ([[3, 3]], [])
    told = broken[2]
    assert told.graphs == 2
    assert told.seconds > 0
    assert str(told).endswith(f"; plain PyTorch between graphs: {told.broken}")
    assert "graph_break" in told.broken
    shown, [line], _ = too_many
    assert shown == [[3] * 2, [3] * 3, [3] * 3]
    assert line.startswith(LEFT.format("peer0", ""))
    assert "recompile" in line


# -- the compiler itself ----------------------------------------------------------------------------------------------

NEEDS_CXX = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")


@pytest.mark.slow
@NEEDS_CXX
@pytest.mark.parametrize("name", ["dml", "ffl", "pcl", "mcl_batch"])
def test_the_compilers_own_code_gives_the_terms_of_an_eager_objective(name: str) -> None:
    [(eager, compiled, said, graphs)] = run_world(1, both_ways, config_with(name), "inductor", timeout=500)
    assert_close(compiled, eager)
    assert (said, graphs) == ([], 1)


def started(config: RunConfig, cache: Path) -> int:
    """Trains; gives how many pieces of code were found on disk."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    train_here(config)
    told = compiled_so_far()
    assert told is not None
    return told.found


@pytest.mark.slow
@NEEDS_CXX
def test_a_second_start_finds_what_the_first_has_compiled(tiny: Path, tmp_path: Path) -> None:
    sections = {"precision": {"compile": True}, "evaluation": {"every_epochs": None}}
    found = []
    for epochs in (1, 2):
        config = small_run(tiny, tmp_path / "run", train={"epochs": epochs}, schedule={"name": "constant"}, **sections)
        found += run_ranks(1, started, config, tmp_path / "code", timeout=500)
    assert found[0] < found[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["speed/compiled_s"] > 0 for line in lines if "speed/images_per_second" in line)
