"""torch.compile of networks and of the objective: what of it stays plain PyTorch, why, and how long compiling took."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from losses import Method, Progress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ALWAYS = 2**31 - 1


def set_compiler(networks: int, device: torch.device) -> None:
    """For all that this process compiles, of so many networks on a device."""
    from torch._functorch import config as functorch

    # The limit counts what all networks of one class are compiled to: every peer, its average or teacher, and the copy
    # of it that a method keeps, each in training and in evaluation, and for a last batch that is smaller.
    limit = 16 * networks
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(256, limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # Which is then said, as any other failure is.
    if hasattr(functorch, "force_non_lazy_backward_lowering"):
        # With the forward pass, where a failure is met: in the middle of a backward pass other ranks wait.
        functorch.force_non_lazy_backward_lowering = True
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Compiled code takes a buffer for all of a graph's results at each call. From glibc it would be new pages of the
    system each time, which take a fifth of the time of a small network's step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _ALWAYS)
        mallopt(_M_MMAP_THRESHOLD, _ALWAYS)


@dataclass
class Compiler:
    """Compiles modules in place when they are first called, and leaves those as they are that cannot be.

    Attributes:
        device: of the modules.
        on: whether anything is to be compiled.
        say: told which module stays plain PyTorch, and why.
        backend: of torch.compile.
    """

    device: torch.device
    on: bool
    say: Callable[[str], None]
    backend: str | Callable[..., Any] = "inductor"
    _missing: str | None = None
    _looked: bool = False

    def network(self, module: nn.Module, name: str) -> None:
        """Of a network or a part of one: whatever of it is no graph stays plain PyTorch between those that are."""
        if self.on:
            module._compiled_call_impl = _Compiled(self, module, name)

    def objective(self, method: Method) -> None:
        """Of a method's forward, as one graph; see `Method.compile_hindrance`."""
        if self.on:
            hindrance = type(method).compile_hindrance(method.options)
            method._compiled_call_impl = _Compiled(self, method, "the objective", hindrance, fullgraph=True)

    def missing(self) -> bool:
        """Whether this machine has no compiler, which is said once."""
        if not self._looked:
            self._looked, self._missing = True, _missing(self.device)
            if self._missing is not None:
                self.say(f"precision.compile = true: nothing is compiled, training goes on without: {self._missing}")
        return self._missing is not None


class _Compiled:
    """Called in the place of a module's forward until the compiler fails, or once where there is a hindrance."""

    def __init__(
        self,
        compiler: Compiler,
        module: nn.Module,
        name: str,
        hindrance: str | None = None,
        *,
        fullgraph: bool = False,
    ) -> None:
        self._compiler, self._module, self._name, self._hindrance = compiler, module, name, hindrance
        self._compiled = torch.compile(module._call_impl, fullgraph=fullgraph, backend=compiler.backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._compiler.missing():
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

            reason = self._hindrance
            if reason is None:
                try:
                    return self._compiled(*map(self._varying, args), **kwargs)
                except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                    reason = _reason(error)
            self._compiler.say(
                f"precision.compile = true: {self._name} is not compiled, training goes on without: {reason}"
            )
        # A fault of the module's own shows here again, as what it is.
        self._module._compiled_call_impl = None
        return self._module(*args, **kwargs)

    def _varying(self, argument: Any) -> Any:
        """A number of the host would be taken for a constant, and a graph be compiled for each step of a run."""
        if not isinstance(argument, Progress):
            return argument
        step = torch.full((), argument.step, dtype=torch.int64, device=self._compiler.device)
        return argument._replace(step=cast(int, step))


def _missing(device: torch.device) -> str | None:
    """What of a compiler for a device this machine lacks; None where it is there."""
    if torch._dynamo.config.disable:
        return "TORCHDYNAMO_DISABLE is set"
    if device.type == "cpu":
        from torch._inductor import config, cpp_builder
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            cpp_builder.get_cpp_compiler()
        except InvalidCxxCompiler:
            tried = config.cpp.cxx if isinstance(config.cpp.cxx, str) else [name for name in config.cpp.cxx if name]
            return f"this machine has no C++ compiler, tried {tried}; install g++, or name one in CXX"
        return None
    from torch.utils._triton import has_triton

    return None if has_triton() else "there is no Triton that works with this GPU"


def _reason(error: Exception) -> str:
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [""]
    return f"{type(inner).__name__}: {lines[0]}"


@dataclass(frozen=True)
class Compiled:
    """What this process has compiled so far."""

    seconds: float
    graphs: int
    found: int
    """Of them, pieces of code that a start before had left on disk."""
    broken: str
    """Why plain PyTorch runs between two graphs, at the first such place; nothing where it does not."""

    def __str__(self) -> str:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        told = f"{self.graphs} graphs in {self.seconds:.1f} s, {self.found} pieces of code found in {cache_dir()}"
        if self.broken:
            told += f"; plain PyTorch between graphs: {self.broken}"
        return f"precision.compile = true: {told}"


def compiled_so_far() -> Compiled | None:
    """None where nothing was compiled, or torch's compiler was not even imported."""
    if "torch._dynamo.utils" not in sys.modules:
        return None
    from torch._dynamo import utils

    seconds = utils.calculate_time_spent()["total_wall_time"]
    if not seconds:
        return None
    broken = next(iter(utils.counters["graph_break"]), "").strip().partition("\n")[0]
    graphs, found = utils.counters["stats"]["unique_graphs"], utils.counters["inductor"]["fxgraph_cache_hit"]
    return Compiled(seconds, graphs, found, broken)
