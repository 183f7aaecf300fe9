"""The stages of a network, by one rule for all: what its feature maps are, how to tap them, and where to cut it.

A stage is the part of a network that works at one spatial size. Its output, the feature map of stage j = 1 .. S, comes
from the last module that gives maps of that size. Networks of ours name their stages themselves (`network.stages`); of
the libraries' networks, sizes above a quarter of the image belong to the stem.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.shapes_alone import dry_run


@dataclass(frozen=True)
class Stage:
    """One stage's output."""

    module: str
    """The submodule that gives it, for `network.get_submodule`."""
    channels: int
    side: int
    """Height and width of the map, in pixels."""


def stages(network: nn.Module, in_channels: int, image_size: int) -> list[Stage]:
    """The stages 1 .. S of a network for images of one size, found by a dry run without memory for its maps.

    Args:
        network: any network of `create`, on any device.
        in_channels: channels of its images.
        image_size: side of its images, in pixels.

    Raises:
        ValueError: the network has no maps that shrink from stage to stage, as a plain vision transformer.
    """
    declared = getattr(network, "stages", None)  # in some of timm's networks that is a module
    own: tuple[str, ...] = declared if isinstance(declared, tuple) else ()
    paths: Sequence[str] = own or [path for path, module in network.named_modules() if path and path.count(".") <= 1]
    maps = _dry_run(network, paths, in_channels, image_size)
    if own:
        return [Stage(path, maps[path][0], maps[path][1]) for path in own]
    last_of_size = {side: Stage(path, channels, side) for path, (channels, side) in maps.items() if side > 1}
    found = [stage for side, stage in last_of_size.items() if side <= image_size // 4]
    sides = [stage.side for stage in found]
    if len(found) < 2 or sides != sorted(sides, reverse=True):
        raise ValueError(f"{type(network).__name__} has no stages: no feature maps that shrink from one to the next")
    return found


def _dry_run(network: nn.Module, paths: Sequence[str], in_channels: int, image_size: int) -> dict[str, tuple[int, int]]:
    """(channels, side) of the square maps that submodules give, in the order in which they were done with."""
    outline = copy.deepcopy(network).to("meta").eval()
    maps: dict[str, tuple[int, int]] = {}

    def watch(path: str) -> None:
        def note(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] == output.shape[3]:
                maps.pop(path, None)
                maps[path] = output.shape[1], output.shape[2]

        outline.get_submodule(path).register_forward_hook(note)

    for path in paths:
        watch(path)
    dry_run(outline, torch.empty(1, in_channels, image_size, image_size, device="meta"))
    return maps


class Taps:
    """Keeps feature maps of a network's forward pass, by hooks: its weights, names and logits stay what they are.

    Args:
        network: any network.
        outputs: name -> submodule whose output is kept.
        inputs: name -> submodule whose input is kept.
    """

    def __init__(self, network: nn.Module, outputs: Mapping[str, str], inputs: Mapping[str, str]) -> None:
        self._kept: dict[str, Tensor] = {}
        for name, path in outputs.items():
            network.get_submodule(path).register_forward_hook(partial(self._keep_output, name))
        for name, path in inputs.items():
            network.get_submodule(path).register_forward_pre_hook(partial(self._keep_input, name))

    def _keep_output(self, name: str, _: nn.Module, __: object, output: Tensor) -> None:
        self._kept[name] = output

    def _keep_input(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._kept[name] = inputs[0]

    def take(self) -> dict[str, Tensor]:
        """What the last forward pass showed; asked a second time, nothing."""
        kept, self._kept = self._kept, {}
        return kept


def cut(network: nn.Module, after: str) -> tuple[nn.Module, nn.Module]:
    """Cuts a network in two: `branch(trunk(images))` gives the logits of the whole.

    Both keep the names of their weights, so the two state dicts together are that of the whole. The network's modules
    move into the parts; it must not be used afterwards.

    Args:
        network: a straight sequence of modules, each called once in the order of its definition.
        after: the last submodule of the trunk, such as a stage's; at most one level deep (`layer2`, `features.6`).

    Raises:
        ValueError: there is no such submodule, or it is deeper.
    """
    outer, _, inner = after.partition(".")
    children = dict(network.named_children())
    if outer not in children or (inner and inner not in dict(children[outer].named_children())):
        raise ValueError(
            f"{type(network).__name__} has no submodule {after!r} to cut after; it has {', '.join(children)}"
        )
    branch, trunk = network, nn.Sequential()
    for name, child in children.items():
        if name == outer and inner:
            head = nn.Sequential()
            for step, module in child.named_children():
                head.add_module(step, module)
                setattr(child, step, nn.Identity())
                if step == inner:
                    break
            trunk.add_module(name, head)
        else:
            trunk.add_module(name, child)
            setattr(branch, name, nn.Identity())
        if name == outer:
            break
    return trunk, branch


class Joined(nn.Module):
    """A shared trunk and one branch, as one network again. It owns neither: several may share a trunk."""

    def __init__(self, trunk: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.trunk, self.branch = trunk, branch

    def forward(self, images: Tensor) -> Tensor:
        return self.branch(self.trunk(images))


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the whole network, whether it is whole or `Joined`."""
    if isinstance(network, Joined):
        return {**network.trunk.state_dict(), **network.branch.state_dict()}
    return network.state_dict()


def load_plain_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Takes what `plain_state` gives. Raises: RuntimeError, naming weights that are missing or too many."""
    if not isinstance(network, Joined):
        network.load_state_dict(state)
        return
    for part in (network.trunk, network.branch):
        part.load_state_dict({name: state[name] for name in part.state_dict() if name in state})
    foreign = state.keys() - plain_state(network).keys()
    if foreign:
        raise RuntimeError(f"weights of another network: {', '.join(sorted(foreign))}")
