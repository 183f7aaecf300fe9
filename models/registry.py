"""Networks by name: our own families, timm and torchvision.

A family of our own is one file of this package with one `@register` in it; nothing else has to know of it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from models.errors import UnknownNetwork, WeightsError, nearest_choices, unknown_option
from models.libraries import build_from_library, is_known, library_names, published_by_library
from models.pretrained import Pretrained, Published, check_file, check_value, load_file, load_published
from models.weightless import weightless

LIBRARIES = ("timm", "torchvision")

BuilderT = TypeVar("BuilderT", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Family:
    """Networks whose names match `pattern`; `build` takes its named groups, and the options as keyword-only."""

    pattern: re.Pattern[str]
    examples: tuple[str, ...]
    build: Callable[..., nn.Module]
    title: str = ""
    """What the literature calls them."""
    source: str = ""
    """The papers, and the methods here that train them."""
    published: Callable[..., Published] | None = None
    """Takes the pattern's named groups and says where pre-trained weights are, if there are any."""

    @property
    def options(self) -> list[str]:
        """The names of the keyword-only arguments of `build`."""
        parameters = inspect.signature(self.build).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


_families: list[Family] = []


def register(
    pattern: str,
    examples: Sequence[str],
    *,
    family: str = "",
    source: str = "",
    published: Callable[..., Published] | None = None,
) -> Callable[[BuilderT], BuilderT]:
    """Make the decorated function the builder of all networks whose whole name matches a regular expression.

    The builder is called with the pattern's named groups (integers where they are digits), `num_classes` and
    `in_channels` by keyword, and with the user's options, which are its keyword-only arguments. It raises
    `UnknownNetwork` for a name that matches but is impossible and `ValueError` for an option's wrong value; the
    network's name is added to the message.

    Args:
        pattern: regular expression of the names, without slashes.
        examples: representative names, listed by `names` and suggested for a name that is unknown.
        family: what the literature calls them.
        source: the papers, and the methods here that train them.
        published: takes the pattern's named groups and says where pre-trained weights are.

    Raises:
        ValueError: an example does not match the pattern, or another family has it already.
    """
    expression = re.compile(pattern)

    def add(build: BuilderT) -> BuilderT:
        for example in examples:
            if not expression.fullmatch(example):
                raise ValueError(f"example {example!r} does not match {pattern!r}")
            if any(other.pattern.fullmatch(example) for other in _families):
                raise ValueError(f"{example!r} belongs to another family already")
        _families.append(Family(expression, tuple(examples), build, family, source, published))
        return build

    return add


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "__main__":
            importlib.import_module(f"models.{module.name}")


def families() -> list[Family]:
    """All families of our own."""
    _discover()
    return _families


def create(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    *,
    pretrained: Pretrained = False,
    entire: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a network; nothing is ever downloaded without being asked for.

    Args:
        name: a name of our own families, `timm/NAME`, `torchvision/NAME`, or a bare name of timm.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        pretrained: False for random weights, True for those that the network's library publishes (this downloads them),
            or the path of a file of weights of this very network, see `models.weight_files`. A classifier of another
            number of classes stays at random, which is logged; all other tensors must fit or be made to.
        entire: nothing may stay at random.
        **options: keyword arguments of the network, such as `drop_path_rate` for timm's or `width` for ours.

    Returns:
        The network, [n, in_channels, h, w] to logits [n, num_classes], in training mode and with an attribute
        `num_classes`.

    Raises:
        UnknownNetwork: there is no network of that name.
        WeightsError: the weights cannot be had, or do not fit.
        ValueError: the network has no such option, or cannot have such a value, class or channel count.
    """
    with _naming(name):
        check_value(pretrained)
        network = _create(name, num_classes, in_channels, options)
        if pretrained is True:
            load_published(network, _published(name, in_channels, options), entire=entire)
        elif pretrained:
            load_file(network, pretrained, entire=entire)
    return network


def check(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    pretrained: Pretrained = False,
    entire: bool = False,
    read: bool = True,
) -> None:
    """Raise what `create` would raise, without memory for weights; the random state stays as it is.

    Nothing is downloaded: that a library publishes weights is checked, not that they arrive. Nor is a file of weights
    looked at where `read` is false: a run that goes on has its own.

    Raises:
        UnknownNetwork: there is no network of that name.
        WeightsError: there are no such weights, or those of the file do not fit.
        ValueError: the network has no such option, or cannot have such a value, class or channel count.
    """
    with _naming(name):
        check_value(pretrained)
        with weightless(name):
            network = _create(name, num_classes, in_channels, options or {})
        if pretrained is True:
            _published(name, in_channels, options or {})
        elif pretrained and read:
            check_file(network, pretrained, entire=entire)


def names(filter: str = "*") -> list[str]:
    """Names for `create` that match a shell pattern: representatives of our own families, then timm's, torchvision's.

    Families go on beyond their representatives: `cifar_resnet62_b` is valid though not listed.
    """
    own = [example for family in families() for example in family.examples]
    theirs = [f"{library}/{name}" for library in LIBRARIES for name in library_names(library)]
    return [name for name in own + theirs if fnmatchcase(name, filter)]


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (UnknownNetwork, WeightsError) as error:
        raise type(error)(f"network {name!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"network {name!r}: {error}") from error


def _create(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    for key, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} {value!r}; expected a positive integer")
    network = _build(name, num_classes, in_channels, options)
    if not hasattr(network, "num_classes"):
        # torchvision's do not say; `pooled_features` asks.
        network.num_classes = num_classes  # type: ignore[assignment]
    return network


def family_of(name: str) -> tuple[Family, dict[str, Any]] | None:
    """The family of our own that has the name, and the named groups of its pattern; None for a library's."""
    for family in families():
        match = family.pattern.fullmatch(name)
        if match:
            groups = match.groupdict().items()
            return family, {key: int(text) if text.isdecimal() else text for key, text in groups}
    return None


def _published(name: str, in_channels: int, options: Mapping[str, Any]) -> Published:
    own = family_of(name)
    if own is None:
        library, bare = _library_and_name(name)
        return published_by_library(library, bare, in_channels, options)
    family, groups = own
    if family.published is None:
        raise WeightsError("pretrained: true; nobody publishes weights of it; expected false or the path of a file")
    return family.published(**groups, in_channels=in_channels, options=options)


def _library_and_name(name: str) -> tuple[str, str]:
    library, slash, bare = name.partition("/")
    return (library, bare) if slash else ("timm", name)


def _build(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    own = family_of(name)
    if own is not None:
        family, groups = own
        for option in options:
            if option not in family.options:
                raise unknown_option(option, family.options)
        return family.build(**groups, num_classes=num_classes, in_channels=in_channels, **options)
    library, bare = _library_and_name(name)
    if library not in LIBRARIES or not is_known(library, bare):
        raise UnknownNetwork(
            "there is none of that name; expected timm/NAME, torchvision/NAME or one of ours, such as cifar_resnet8_a, "
            f"cifar_wrn_16_1{nearest_choices(_nearest(name))}"
        )
    return build_from_library(library, bare, num_classes, in_channels, options)


def _nearest(name: str) -> list[str]:
    """Up to three names for `create`, the ones whose part after the slash is most like that of `name`.

    Where `name` says a library they are the library's; the other one's only if it has that very name.
    """
    library, _, bare = name.rpartition("/")
    by_bare: dict[str, list[str]] = {}
    for candidate in names():
        where, _, key = candidate.rpartition("/")
        if library not in LIBRARIES or library == where or key == bare:
            by_bare.setdefault(key, []).append(candidate)
    close = difflib.get_close_matches(bare, by_bare, n=3)
    return [candidate for key in close for candidate in by_bare[key]][:3]
