"""What a method adds to the peers' networks, measured apart: heads, teachers and the modules that peers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.cohort.cohort import Cohort
from engine.cohort.teacher import Teacher


def extras(cohort: Cohort, step: Callable[[], object]) -> Callable[[], None] | None:
    """Runs a step, and gives what goes through its extra modules forward, backward and through the optimiser again, on
    the inputs that they had then and without anything else; None where there are none.

    An upper bound where a module's inputs are the signals of peers, whose gradient the step would need anyway.
    """
    modules = list(_modules(cohort))
    calls: list[tuple[nn.Module, tuple[Any, ...], bool]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append((module, inputs, torch.is_grad_enabled()))

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    step()
    for hook in hooks:
        hook.remove()
    calls = [(module, _apart(inputs), graph) for module, inputs, graph in calls]
    if not calls:
        return None
    learned = [p for module in {id(m): m for m, _, graph in calls if graph}.values() for p in module.parameters()]
    moving = [p for p in learned if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=0.0, momentum=0.9, nesterov=True, fused=True) if moving else None

    def again() -> None:
        for module, inputs, graph in calls:
            with torch.set_grad_enabled(graph):
                outputs = [x for x in _tensors(module(*inputs)) if x.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return again


def _modules(cohort: Cohort) -> Iterator[nn.Module]:
    for resident in cohort.residents.values():
        if resident.peer.head is not None:
            yield resident.peer.head
        if isinstance(resident.ema, Teacher):
            yield resident.ema
    for child in cohort.method.children():
        yield from child if isinstance(child, nn.ModuleList) else [child]


def _apart(x: Any) -> Any:
    """The same numbers without the graph that led to them; what had a gradient still gets one."""
    if isinstance(x, Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    if isinstance(x, Mapping):
        return {name: _apart(value) for name, value in x.items()}
    if isinstance(x, Sequence):
        return tuple(_apart(value) for value in x)
    return x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping | Sequence):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors(value)
