"""Weights as other trainers leave them: which of a file's tensors are the network's, and under which names.

Nothing that stands in a file is executed. A trainer's wrappers (DDP, torch.compile, Lightning) put a prefix before
every name; many keep the weights beside an optimiser, and timm and torchvision a moving average of them.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file as read_safetensors
from torch import Tensor, nn

from models.errors import WeightsError, first_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".pth.tar", ".bin", ".ckpt")

KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
"""Where trainers keep weights; the moving average goes first, as it does in timm."""

_WRAPPERS = ("module", "_orig_mod", "model", "network", "net")


def read_weights(path: str, names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file, under the names that the network has for them.

    Args:
        path: of the file.
        names: of the network's own tensors.

    Returns:
        The tensors, and what a person should know of how they were chosen.

    Raises:
        WeightsError: the file cannot be read without executing something in it, or holds no weights.
    """
    raw = _read(path)
    found: dict[str, tuple[dict[str, Tensor], list[str]]] = {}
    for key in KEYS:
        if isinstance(raw.get(key), Mapping) and (tensors := _tensors(raw[key])):
            found[key] = _unwrapped(tensors, names)
    if not found:
        tensors = _tensors(raw)
        if not tensors or len(tensors) < len(raw):
            holds = ", ".join(repr(str(key)) for key in list(raw)[:6]) or "nothing"
            raise WeightsError(
                f"pretrained {path!r}: holds no tensors by name; expected a network's state_dict, alone or as one of "
                f"{', '.join(KEYS)}; found {holds}"
            )
        return _unwrapped(tensors, names)
    # torchvision's average may be but a counter: then the weights themselves are meant.
    known = {key: len(tensors.keys() & set(names)) for key, (tensors, _) in found.items()}
    chosen = max(found, key=lambda key: (known[key], -KEYS.index(key)))
    tensors, remarks = found[chosen]
    if len(found) > 1 or chosen.endswith("ema"):
        remarks = [f"the weights are those of {chosen!r}; it holds {', '.join(map(repr, found))}", *remarks]
    return tensors, remarks


def _read(path: str) -> Mapping[str, Any]:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise WeightsError(f"pretrained {path!r}: there is no such file")
    try:
        state: Any
        if path.endswith(".safetensors"):
            state = read_safetensors(path)
        else:
            # A command line beside the weights is a bag of values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"pretrained {path!r}: cannot be read: {_what_it_wants(path, error)}") from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"pretrained {path!r}: cannot be read: {first_line(error)}") from None
    except safetensors.SafetensorError as error:
        raise WeightsError(f"pretrained {path!r}: cannot be read: {first_line(error)}") from None
    return state if isinstance(state, Mapping) else {}


def _what_it_wants(path: str, error: Exception) -> str:
    """Which objects a file would have to be given, which torch's message says in paragraphs."""
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # It is no such file, or one of an old format.
        named = re.search(r"GLOBAL (\S+)", str(error))
        wanted = [named[1]] if named else []
    wanted = [name for name in wanted if name != "argparse.Namespace"]
    if not wanted:
        return first_line(error)
    return (
        f"it holds objects ({', '.join(wanted[:3])}), and nothing in a file is executed; save the network's "
        "state_dict() alone, or as safetensors"
    )


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _unwrapped(tensors: Mapping[str, Tensor], names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without what wrappers have put before their names; those beside the network are left out, and said.

    A file of another network comes back as it is.
    """
    prefixes = {""} | {name[: -len(own)] for own in list(names)[:1] for name in tensors if name.endswith(f".{own}")}
    known = {prefix: sum(prefix + name in tensors for name in names) for prefix in prefixes}
    most = max(known.values())
    best = sorted(
        (prefix for prefix, count in known.items() if count == most),
        key=lambda prefix: (not set(prefix.split(".")[:-1]) <= set(_WRAPPERS), len(prefix)),
    )[0]
    if not best:
        return {name: x for name, x in tensors.items() if name != "n_averaged"}, []
    beside = [name for name in tensors if not name.startswith(best) and name != "n_averaged"]
    more = f" and {len(beside) - 3} more" if len(beside) > 3 else ""
    remarks = [f"not of the network, not used: {', '.join(beside[:3])}{more}"] if beside else []
    return {name.removeprefix(best): x for name, x in tensors.items() if name.startswith(best)}, remarks


def fitting_weights(network: nn.Module, path: str) -> tuple[dict[str, Tensor], list[str]]:
    """`read_weights` and `adapted` for a network."""
    tensors, remarks = read_weights(path, network.state_dict().keys())
    tensors, changed = adapted(network, tensors)
    return tensors, [*remarks, *([f"made to fit: {', '.join(changed)}"] if changed else [])]


def adapted(network: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights made to fit where only their shapes differ, as timm does it.

    A first convolution for colours is summed up for one channel, or repeated and scaled for others; position embeddings
    and patches of timm's transformers are resampled.

    Returns:
        The tensors, and the names of those that were changed.
    """
    own = network.state_dict()
    changed = dict(state)
    resample = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if resample is not None and any(own[name].shape != x.shape for name, x in state.items() if name in own):
        try:
            found = resample(dict(state), network)
        except Exception:  # Of a network that its author did not think of; what does not fit is named later.
            found = state
        changed = {**changed, **{name: found[name] for name in state if name in found}}
    first = next((f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d)), "")
    if first in changed and first in own and own[first].ndim == 4:
        from timm.models import adapt_input_conv

        wanted, given = own[first].shape, changed[first].shape
        if given[1:2] == (3,) and wanted[1] != 3 and (wanted[0], *wanted[2:]) == (given[0], *given[2:]):
            changed[first] = adapt_input_conv(wanted[1], changed[first])
    return changed, [name for name, x in changed.items() if x.shape != state[name].shape]
