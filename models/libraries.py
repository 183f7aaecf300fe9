"""timm and torchvision behind one interface: what networks they have, building one, and where its weights are.

Both are imported when first needed, so that importing our own networks stays quick.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.downloads import hub_url
from models.errors import UnknownNetwork, WeightsError, nearest_choices, unknown_option
from models.pretrained import Published
from models.weightless import weightless

# What `create` decides or what would fetch or load weights, so no option of a network.
_RESERVED = {
    "timm": {
        "num_classes",
        "in_chans",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
        "device",
        "dtype",
    },
    "torchvision": {"num_classes", "weights", "progress", "aux_logits"},
}

# Torchvision's builder of this class takes these itself.
_BUILDER_OPTIONS = {"MobileNetV3": ("width_mult", "reduced_tail", "dilated")}

_Build = Callable[[str, int, int, Mapping[str, Any]], nn.Module]


def library_names(library: str) -> list[str]:
    """The classifiers of "timm" or "torchvision", sorted, without the library's prefix."""
    if library == "timm":
        import timm

        return cast("list[str]", timm.list_models())
    from torchvision import models

    return cast("list[str]", models.list_models(module=models))


def is_known(library: str, name: str) -> bool:
    """Whether the library has a network of that name; timm's deprecated names and NAME.TAG count.

    Raises:
        UnknownNetwork: timm has the network but not the tag after its name.
    """
    if library == "torchvision":
        return name in library_names("torchvision")
    import timm

    if not timm.is_model(name):
        return False
    architecture, dot, _ = name.partition(".")
    tagged = timm.models.get_arch_pretrained_cfgs(architecture)
    if dot and name not in tagged:
        raise UnknownNetwork(f"timm has {architecture!r} without this tag{nearest_choices(sorted(tagged))}")
    return True


def build_from_library(
    library: str, name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]
) -> nn.Module:
    """Build a network that `is_known`, with random weights, on the current default device.

    Raises:
        ValueError: an option that the network does not have or does not accept, or images of `in_channels` channels
            that it cannot take.
    """
    build = _from_timm if library == "timm" else _from_torchvision
    reserved = sorted(_RESERVED[library] & options.keys())
    if reserved:
        raise unknown_option(reserved[0], _options(build, library, name))
    if not options:
        return build(name, num_classes, in_channels, options)
    try:
        network = build(name, num_classes, in_channels, options)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AssertionError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        unexpected = re.search(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'", str(error))
        if unexpected and unexpected[1] in options:
            raise unknown_option(unexpected[1], _options(build, library, name)) from error
        raise ValueError(f"options {dict(options)} are not accepted: {type(error).__name__}: {error}") from error
    ignored = sorted(_swallowed(network, options)) if library == "torchvision" else []
    if ignored:
        raise unknown_option(ignored[0], _options(build, library, name))
    return network


def published_by_library(library: str, name: str, in_channels: int, options: Mapping[str, Any]) -> Published:
    """Where the weights are that the library publishes of a network that `is_known`.

    Raises:
        WeightsError: there are none, or they expect images that these are not.
    """
    if library == "torchvision":
        expects_transform(name, in_channels, options)
        return Published(lambda network: torchvision_weights(name), torchvision_url(name))
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise WeightsError("pretrained: true; timm has no weights of it; expected false or the path of a file")

    def fetch(_: nn.Module) -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            # With its own number of classes, so that a classifier that does not fit is seen.
            network = timm.create_model(name, pretrained=True, in_chans=in_channels, **options)
        return cast("Mapping[str, Tensor]", network.state_dict())

    # timm asks the Hub first.
    on_hub = config.hf_hub_id and hub_url(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    first = () if in_channels == (config.input_size or (3,))[0] else config.first_conv or ()
    refitted = [f"{layer}.weight" for layer in ([first] if isinstance(first, str) else first)]
    return Published(fetch, on_hub or config.url or "", refitted=refitted)


def torchvision_url(name: str, weights: str = "DEFAULT") -> str:
    """Where the weights of one of torchvision's networks are."""
    from torchvision import models

    return str(models.get_model_weights(name)[weights].url)


def torchvision_weights(name: str, weights: str = "DEFAULT") -> Mapping[str, Tensor]:
    """Downloads the weights of one of torchvision's networks."""
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        network: nn.Module = models.get_model(name, weights=weights, progress=False)
    return network.state_dict()


def expects_transform(name: str, in_channels: int, options: Mapping[str, Any]) -> None:
    """Raise a WeightsError where torchvision's weights need an option that rescales the images, and it is not set.

    It is an option, and not set with the weights, because a network that is trained on has to be built with it again.
    """
    if name in ("googlenet", "inception_v3") and not options.get("transform_input"):
        channels = "" if in_channels == 3 else ", which is for images of 3 channels"
        raise WeightsError(
            f"pretrained: true; its weights expect rescaled images, and so the option transform_input: true{channels}"
        )


def _from_timm(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    import timm

    network = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options)
    return cast(nn.Module, network)


def _from_torchvision(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    if options.get("transform_input") and in_channels != 3:
        raise ValueError(f"option 'transform_input' is for images of 3 channels, not {in_channels}")
    if name in ("googlenet", "inception_v3"):
        # Left to themselves they return a tuple in training, and warn that the default of init_weights will change.
        options = {"aux_logits": False, "init_weights": True, **options}
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _take_channels(network, in_channels)
    return network


def _take_channels(network: nn.Module, in_channels: int) -> None:
    """Let the first convolution take `in_channels` channels instead of 3."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 3 or first.groups != 1:
        raise ValueError(
            f"in_channels {in_channels}: {type(network).__name__} has no first convolution of 3 channels to replace; "
            "expected 3"
        )
    # Drawn with replacement from the network's own initial weights: whatever its initialisation is, it stays.
    old = first.weight.detach()
    shape = (old.shape[0], in_channels, *old.shape[2:])
    draw = torch.randint(old.numel(), shape, device=old.device)
    first.in_channels = in_channels
    first.weight = nn.Parameter(old.flatten()[draw])


def _swallowed(network: nn.Module, options: Mapping[str, Any]) -> set[str]:
    """The options that went unseen into the `**kwargs` which torchvision's ConvNeXt and MobileNetV3 have."""
    seen = {*inspect.signature(type(network)).parameters, *_BUILDER_OPTIONS.get(type(network).__name__, ())}
    return options.keys() - seen


def _options(build: _Build, library: str, name: str) -> list[str]:
    """The optional arguments of the class that the network is of."""
    with weightless(f"{library}/{name}"):
        network = build(name, 1, 3, {})
    parameters = inspect.signature(type(network)).parameters.values()
    optional = [p.name for p in parameters if p.default is not p.empty and p.name not in _RESERVED[library]]
    return [*optional, *_BUILDER_OPTIONS.get(type(network).__name__, ())]
