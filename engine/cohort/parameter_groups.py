"""Parameter groups: which parameters decay, and how the learning rate falls towards the first layers.

A network of timm says both of itself (`no_weight_decay`, `group_matcher`), by the names that its parameters have in it.
It is asked before it becomes part of a peer, and before a trunk is cut off it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn

from engine.config import ConfigError, OptimizerConfig

GROUPING = ("layer_decay", "layer_decay_min_scale")
"""Those of `optimizer.options` that are about groups, not about the optimiser's rule."""

Said = Mapping[nn.Parameter, Mapping[str, Any]]
"""What belongs to a parameter's group: `weight_decay`, and with layer decay `lr_scale`."""


def says_its_layers(network: nn.Module) -> bool:
    """Whether a network's parameters can be told apart by layer, as those of timm's can."""
    config = getattr(network, "pretrained_cfg", None) or {}
    return hasattr(network, "group_matcher") or bool(config.get("classifier"))


def check_grouping(network: nn.Module, name: str, config: OptimizerConfig) -> None:
    """Refuses layer decay for a network that it would do nothing for. Raises: ConfigError."""
    if "layer_decay" in config.options and not says_its_layers(network):
        raise ConfigError(
            f"optimizer.options.layer_decay = {config.options['layer_decay']!r}: {name} does not say which layer a "
            "weight belongs to, only networks of timm do; expected no layer_decay"
        )


def said_by(network: nn.Module, config: OptimizerConfig) -> Said:
    """The groups of a whole network, as timm makes them.

    Args:
        network: with all its layers, under the names that it gives them.
        config: `decay_norm_and_bias`, `weight_decay` and `options`.
    """
    asked = getattr(network, "no_weight_decay", None)
    never = asked() if callable(asked) else ()
    if "layer_decay" in config.options and says_its_layers(network):
        # A network that says its layers is timm's, which takes long to import where none is.
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(
            network,
            weight_decay=config.weight_decay,
            weight_decay_exclude_1d=not config.decay_norm_and_bias,
            no_weight_decay_list=never,
            layer_decay=config.options["layer_decay"],
            min_scale=config.options.get("layer_decay_min_scale", 0.0),
        )
        return {p: {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]}
    said = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            left_out = not config.decay_norm_and_bias and (p.ndim <= 1 or name.endswith(".bias"))
            left_out = left_out or any(fnmatch(name, pattern) for pattern in never)
            said[p] = {"weight_decay": 0.0 if left_out else config.weight_decay}
    return said


def parameter_groups(module: nn.Module, config: OptimizerConfig, said: Said) -> list[dict[str, Any]]:
    """The groups of what of a module learns: those that do not decay come first.

    Args:
        module: a peer, or what peers share.
        config: for the parameters that nobody has spoken for (heads, a method's modules), which are the last layer.
        said: of the networks in it.
    """
    unsaid = said_by(module, config)
    last = {"lr_scale": 1.0} if "layer_decay" in config.options else {}
    groups: dict[str, dict[str, Any]] = {}
    for p in module.parameters():
        if p.requires_grad:
            about = {**last, **(said[p] if p in said else unsaid[p])}
            groups.setdefault(repr(sorted(about.items())), {**about, "params": []})["params"].append(p)
    return sorted(groups.values(), key=lambda group: group["weight_decay"] > 0)
