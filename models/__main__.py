"""The table of networks: `python -m models`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.errors import UnknownNetwork
from models.features import parameter_count
from models.registry import create, families, family_of, names
from models.stages import stages
from models.weightless import weightless

IMAGENET = {
    "torchvision/resnet18": "ResNet",
    "torchvision/resnet34": "ResNet",
    "torchvision/resnet50": "ResNet",
    "torchvision/resnext50_32x4d": "ResNeXt",
    "torchvision/shufflenet_v2_x0_5": "ShuffleNetV2",
    "torchvision/shufflenet_v2_x1_0": "ShuffleNetV2",
    "timm/mobilenetv1_100": "MobileNet",
    "torchvision/mobilenet_v2": "MobileNet",
}
"""The ImageNet networks that the methods' papers train, and their families."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    family: str
    input: str
    classes: str
    stages: str
    parameters: str
    multiply_adds: str
    source: str


def describe(name: str) -> Row:
    """What a network is and costs, for one image of 3 channels; nothing is computed, and no memory taken for weights.

    Raises:
        UnknownNetwork: there is no network of that name.
    """
    own = family_of(name)
    side, classes = (32, 100) if own else (224, 1000)
    with weightless(name):
        network = create(name, classes).to("meta").eval()
    if own is None:
        config = getattr(network, "default_cfg", None)
        side = config["input_size"][-1] if isinstance(config, dict) else side
    library = name.rpartition("/")[0]
    title, source = (own[0].title, own[0].source) if own else (_title(name, network), library or "timm")
    try:
        maps = " ".join(f"{stage.channels}x{stage.side}" for stage in stages(network, 3, side))
    except (ValueError, RuntimeError):
        maps = "-"
    cost = multiply_adds(network, torch.empty(1, 3, side, side, device="meta"))
    return Row(name, title, f"3x{side}x{side}", str(classes), maps, f"{parameter_count(network):,}", cost, source)


def _title(name: str, network: nn.Module) -> str:
    return IMAGENET.get(name, type(network).__name__)


def multiply_adds(network: nn.Module, images: Tensor) -> str:
    """Of convolutions and matrix products, in millions; "-" where the network runs on real numbers only."""
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(images)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return "-"
    return f"{counter.get_total_flops() / 2e6:,.2f} M"


def table(rows: Sequence[Row], markdown: bool) -> str:
    """The rows under a heading, in aligned columns."""
    heading = tuple(field.name.replace("_", "-") for field in fields(Row))
    cells = [heading, *(astuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    right = {heading.index("parameters"), heading.index("multiply-adds"), heading.index("classes")}
    lines = [
        [text.rjust(widths[i]) if i in right else text.ljust(widths[i]) for i, text in enumerate(line)]
        for line in cells
    ]
    rule = ["-" * (width - 1) + (":" if i in right else "-") for i, width in enumerate(widths)]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m models",
        description="Prints the networks that can be trained here: name, family, size of the images, classes, feature "
        "maps of the stages (channels x side), parameters, multiply-adds of one image (convolutions and matrix "
        "products), and where the network comes from.",
        epilog="Without PATTERN: all families of our own, and the ImageNet networks of the methods' papers. Names of "
        "our own go on beyond what is listed, as cifar_resnet62_b or cifar_wrn_22_3; timm and torchvision have many.",
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="a name, or a shell pattern in quotes: 'cifar_*', 'timm/resnet*', torchvision/vit_b_16",
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    if options.pattern is None:
        wanted = [example for family in families() for example in family.examples] + list(IMAGENET)
    else:
        wanted = names(options.pattern) or [options.pattern]
    try:
        rows = [describe(name) for name in wanted]
    except UnknownNetwork as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
