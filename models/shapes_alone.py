"""Passes over tensors that have shapes and no numbers, without torch's compiler.

torch works such shapes out in Python. The functions that do ask, in each call, its algebra of unknown sizes, which
brings sympy along, and the compiler to leave them out: twice as long to import as torch itself. Where all sizes are
numbers the one has nothing to work out, and where nothing is compiled the other has nothing to leave out. So what is
asked about numbers is answered here, and all else as ever. No answer differs; where a version of torch is written in
another way, passes take longer, and that is all.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch._compile
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_OF_SHAPES = ("torch._refs", "torch._decomp", "torch._prims", "torch._meta_registrations")
_NUMBERS = {bool, int, float}
_EMPTY = CellType()
_T = TypeVar("_T")


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Make passes without numbers within this context."""
    stand_ins = [_StandIn(name) for name in _HERE if name not in sys.modules and _is_there(name)]
    if "torch._dynamo" not in sys.modules:
        _call_as_they_are()
    sys.modules.update({each.__name__: each for each in stand_ins})
    try:
        yield
    finally:
        for each in stand_ins:
            each.leave()


def dry_run(network: Callable[..., _T], *inputs: Any) -> _T:
    """What a network, or what calls one, gives on the meta device, by shapes alone and without gradients."""
    with shapes_alone(), torch.no_grad(), _NormAtOnce():
        return network(*inputs)


class _NormAtOnce(TorchFunctionMode):
    """Of a BatchNorm torch works out each mean, root and quotient: most of the time of a pass."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.batch_norm and _is_plain(*args, **(kwargs or {})):
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _is_plain(x: Tensor, mean: Tensor | None, var: Tensor | None, *rest: Any, **named: Any) -> bool:
    """Whether a BatchNorm has nothing to complain of, and changes no type."""
    known = [each for each in (mean, var, *rest, *named.values()) if isinstance(each, Tensor)]
    several = x.numel() > x.shape[1]
    return x.is_meta and several and all(each.shape == x.shape[1:2] and each.dtype == x.dtype for each in known)


class _StandIn(ModuleType):
    """Stands for a module until it is asked for something else than what is known of it here."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = find_spec(name)
        vars(self).update({key: _answer(self, key) for key in _HERE[name]})

    def __getattr__(self, name: str) -> Any:
        if name == "__path__" and self.__spec__ and self.__spec__.submodule_search_locations is None:
            raise AttributeError(name)
        return getattr(self.itself(), name)

    def itself(self) -> ModuleType:
        """The module that this stands for, imported."""
        self.leave()
        return importlib.import_module(self.__name__)

    def leave(self) -> None:
        """Knows nothing any longer: whoever has imported this meanwhile is told what the module itself has."""
        for name in _HERE[self.__name__]:
            vars(self).pop(name, None)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _answer(module: _StandIn, name: str) -> Any:
    here = _HERE[module.__name__][name]
    if isinstance(here, type):
        return here

    def answer(*args: Any) -> Any:
        for x in args:
            if type(x) is not bool and not _is_known(x):
                return getattr(module.itself(), name)(*args)
        return here(*args)

    return answer


def _is_known(x: object) -> bool:
    """Whether nothing in it is a symbol."""
    if type(x) in _NUMBERS:
        return True
    if isinstance(x, Tensor):
        return _is_known((*x.shape, *x.stride(), x.storage_offset()))
    return isinstance(x, tuple | list) and all(map(_is_known, x))


def _is_equal(x: Any, y: Any) -> bool:
    return list(x) == list(y) if isinstance(x, tuple | list) else bool(x == y)


def _itself(x: Any) -> Any:
    return x


class _Symbol:
    """Of which there are none."""


_HERE: dict[str, dict[str, Callable[..., Any]]] = {
    "torch.fx.experimental.symbolic_shapes": {
        "expect_true": _itself,
        "free_unbacked_symbols": lambda x: set(),
        "guard_or_false": _itself,
        "guard_or_true": _itself,
        "guard_size_oblivious": _itself,
        "guarding_hint_or_throw": _itself,
        "has_guarding_hint": lambda x: True,
        "is_nested_int": lambda x: False,
        "statically_known_true": _itself,
        "sym_and": lambda *x: functools.reduce(operator.and_, x),
        "sym_eq": _is_equal,
        "sym_or": lambda *x: functools.reduce(operator.or_, x),
    },
    "torch.utils._sympy.functions": {"Max": lambda *x: max(x)},
    "sympy": {"Basic": _Symbol},
}
"""What some functions of a module answer where nothing is a symbol, and the class of what is one."""


@functools.cache
def _call_as_they_are() -> None:
    """Has torch's functions of shapes called without asking the compiler to leave them out."""
    rest = [x for name in [*sys.modules] if name.startswith(_OF_SHAPES) for x in vars(sys.modules[name]).values()]
    seen: set[int] = set()
    while rest:
        function = rest.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        within = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
        if function.__code__.co_filename == torch._compile.__file__:
            for each in within:
                if isinstance(each, FunctionType):
                    # Where torch keeps what the compiler has made of it.
                    vars(each).setdefault("__dynamo_disable", each)
        rest += within
