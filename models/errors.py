"""The error for a name that is no network, and the wording of nearest choices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UnknownNetwork(ValueError):  # noqa: N818 - the name is part of the public interface
    """A network's name that no family and no library knows, or that asks for an impossible depth."""


class WeightsError(ValueError):
    """Pre-trained weights that cannot be had, or that belong to another network."""


def first_line(error: BaseException) -> str:
    """The first line of what a library says, without the terminal's escape codes."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", str(error).strip()).partition("\n")[0].strip()


def nearest_choices(choices: Iterable[str]) -> str:
    """`; nearest: a, b`, or nothing where there is no choice near enough."""
    listed = ", ".join(choices)
    return f"; nearest: {listed}" if listed else ""


def unknown_option(option: str, valid: Iterable[str]) -> ValueError:
    """The error for an option that a network does not have; names the option, the nearest and all the valid ones."""
    valid = sorted(valid)
    nearest = nearest_choices(difflib.get_close_matches(option, valid, n=1))
    return ValueError(f"unknown option {option!r}{nearest}; valid: {', '.join(valid) or 'none'}")


def blocks_per_stage(depth: int, layers: int, step: int = 6) -> int:
    """The n of a depth `step` n + `layers`: blocks in each of three stages of blocks of `step` / 3 convolutions.

    Raises:
        UnknownNetwork: the depth has no such n >= 1; names the nearest depths that have.
    """
    blocks, remainder = divmod(depth - layers, step)
    if blocks >= 1 and remainder == 0:
        return blocks
    nearest = sorted({step * max(n, 1) + layers for n in (blocks, blocks + 1)})
    raise UnknownNetwork(f"depth {depth} is not {step}n+{layers} with n >= 1{nearest_choices(str(d) for d in nearest)}")
