"""Pre-trained weights: a library's, which are downloaded, or a file's.

Only a classifier may differ, and only in its number of classes: it stays as it was initialised and all else is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from models.downloads import hindrance
from models.errors import WeightsError, first_line
from models.weight_files import SUFFIXES, adapted, fitting_weights

Pretrained: TypeAlias = bool | str
"""False for none, True for the library's, or the path of a file."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """Weights that a library publishes."""

    fetch: Callable[[nn.Module], Mapping[str, Tensor]]
    """Downloads them; takes the network that they are for."""
    url: str
    """Where they are."""
    fresh: Collection[str] = ()
    """Tensors of the network that they have nothing for and that stay at random."""
    refitted: Collection[str] = ()
    """Tensors that the library itself makes fit, so that `fetch` gives others than are published."""


def check_value(pretrained: object) -> None:
    """Raise a ValueError for a value that is neither a bool nor a path."""
    if isinstance(pretrained, bool):
        return
    if not isinstance(pretrained, str) or not pretrained.endswith(SUFFIXES):
        raise ValueError(
            f"pretrained {pretrained!r}; expected true, false or the path of a file that ends in {', '.join(SUFFIXES)}"
        )


def load_published(network: nn.Module, published: Published, *, entire: bool = False) -> None:
    """Downloads a network's weights into it.

    Raises:
        WeightsError: they did not arrive; says how to do without a download. Or they do not fit, or where they must be
            `entire`, leave something at random.
    """
    hint = (
        f"without a network, fetch {published.url} elsewhere and give `pretrained` the path of that file "
        f"({', '.join(SUFFIXES)})"
    )
    if (reason := hindrance(published.url)) is not None:
        raise WeightsError(f"pretrained: true; its weights cannot be downloaded: {reason}; {hint}")
    try:
        state = published.fetch(network)
    except Exception as error:  # urllib's, requests', httpx', the hub's own: whatever a download may fail with
        raise WeightsError(
            f"pretrained: true; its weights cannot be downloaded: {type(error).__name__}: {first_line(error)}; {hint}"
        ) from error
    where = "the published weights"
    state, changed = adapted(network, state)
    if refitted := [*published.refitted, *changed]:
        _tell(network, where, f"made to fit: {', '.join(refitted)}")
    _load(network, state, where, published.fresh, entire=entire)


def load_file(network: nn.Module, path: str, *, entire: bool = False) -> None:
    """Loads a file's weights into the network that they are of.

    Raises:
        WeightsError: the file cannot be read or its weights do not fit, or where they must be `entire`, leave something
            at random.
    """
    state, remarks = fitting_weights(network, path)
    for remark in remarks:
        _tell(network, path, remark)
    _load(network, state, path, entire=entire)


def check_file(network: nn.Module, path: str, *, entire: bool = False) -> None:
    """Raises what `load_file` would raise; the network is only looked at."""
    _, left = _fitting(network, fitting_weights(network, path)[0], path, ())
    _check_entire(left, path, entire)


def _tell(network: nn.Module, where: str, remark: str) -> None:
    _log.warning("%s from %s: %s", type(network).__name__, where, remark)


def _load(
    network: nn.Module, state: Mapping[str, Tensor], where: str, fresh: Collection[str] = (), *, entire: bool
) -> None:
    fitting, left = _fitting(network, state, where, fresh)
    _check_entire(left, where, entire)
    network.load_state_dict(fitting, strict=False)
    if left:
        _tell(network, where, f"{', '.join(left)} stay at their random initialisation")


def _check_entire(left: Collection[str], where: str, entire: bool) -> None:
    if left and entire:
        raise WeightsError(
            f"pretrained: {where} would leave {', '.join(left)} at random; expected weights of the whole network, for "
            "as many classes as the data have, as it does not learn"
        )


def _fitting(
    network: nn.Module, state: Mapping[str, Tensor], where: str, fresh: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors to load, and the names of those that are left as they are."""
    own = network.state_dict()
    left = [name for name in own if name in fresh]
    resized = [
        f"{classifier}.{kind}"
        for classifier in _classifiers(network)
        for kind in ("weight", "bias")
        if _differ_in_classes(own.get(f"{classifier}.{kind}"), state.get(f"{classifier}.{kind}"))
    ]
    wrong = [
        f"{name} is {list(state[name].shape)} and should be {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and name not in (*left, *resized) and state[name].shape != tensor.shape
    ]
    # Batch norm counts its batches in files of newer versions of torch only.
    expected = [name for name in own if name not in left and not name.endswith("num_batches_tracked")]
    wrong += [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is no tensor of this network" for name in state if name not in own]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise WeightsError(f"pretrained: {where} belong to another network: {'; '.join(wrong[:3])}{more}")
    left += resized
    return {name: tensor for name, tensor in state.items() if name not in left}, left


def _classifiers(network: nn.Module) -> list[str]:
    """The names of the layers that give logits."""
    config = getattr(network, "default_cfg", None)  # timm's
    if isinstance(config, dict) and config.get("classifier"):
        named = config["classifier"]
        return [named] if isinstance(named, str) else list(named)
    return [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1:]


def _differ_in_classes(own: Tensor | None, given: Tensor | None) -> bool:
    return own is not None and given is not None and own.shape[0] != given.shape[0] and own.shape[1:] == given.shape[1:]
