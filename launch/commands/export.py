"""What launch/export.py does, once its words are read."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from typing import Any

import torch

import models
from engine.config import ConfigError, PeerConfig, RunConfig
from engine.files import read_text
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from launch.entry import user_errors
from launch.run_folder import settings_of, use


def run(options: argparse.Namespace) -> None:
    """Writes the peers that were asked for."""
    with user_errors():
        config = settings_of(options.run)
        cohort = {name: peer for name, peer in config.trained if peer.learns}
        frozen = {name: peer for name, peer in config.trained if not peer.learns}
        if options.peer in frozen:
            given = frozen[options.peer].pretrained
            where = given if isinstance(given, str) else f"the published ones of {frozen[options.peer].network}"
            raise ConfigError(f"--peer {options.peer}: is frozen, so its weights are still {where}; expected another")
        if options.peer and options.peer not in cohort:
            near = difflib.get_close_matches(options.peer, cohort, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--peer {options.peer}: {options.run} has the peers {', '.join(cohort)}{hint}")
        out = options.out or options.run / "export"
        out.mkdir(parents=True, exist_ok=True)

        def write(manifest: checkpoint.Manifest) -> None:
            for name in [options.peer] if options.peer else cohort:
                path = export(options.run, config, manifest, name, cohort[name], out, ema=options.ema)
                with_it = path.with_suffix(".safetensors").name
                print(f"{path} and {with_it}: step {manifest.step}, logits compared, equal")

        use(options.run, options.checkpoint, write)


def export(
    run: Path,
    config: RunConfig,
    manifest: checkpoint.Manifest,
    name: str,
    peer: PeerConfig,
    out: Path,
    *,
    ema: bool,
) -> Path:
    """Writes one peer of a checkpoint. Returns: the path of its JSON.

    Raises:
        ConfigError: the run keeps no moving averages.
        RuntimeError: what was written does not give the peer's logits.
    """
    states = loading.read_state(checkpoint.folder_of(run, manifest.step), f"peer_{name}.pt")
    state = states["ema" if ema else "network"]
    if state is None:
        raise ConfigError(f"--ema: {run} keeps no moving averages; expected a run with train.ema_decay")
    network = models.create(peer.network, manifest.num_classes, manifest.channels, **peer.options)
    network.load_state_dict(state)
    mean, std = config.data.normalisation
    scores = [line for line in read_metrics(run) if line["step"] == manifest.step]
    key = f"{'ema' if ema else 'val'}/{name}/top1"
    classes = run / "classes.json"
    path = out / f"{name}{'-ema' if ema else ''}.json"
    models.save_network(
        network,
        path,
        architecture={
            "name": peer.network,
            "num_classes": manifest.num_classes,
            "in_channels": manifest.channels,
            "options": peer.options,
        },
        about={
            "input": {"size": config.data.side, **_shown(config), "mean": list(mean), "std": list(std)},
            "classes": json.loads(read_text(classes)) if classes.exists() else None,
            "trained": {
                "run": config.name,
                "method": config.method.name,
                "peer": name,
                "moving_average": ema,
                "step": manifest.step,
                "top1": next((line[key] for line in scores if key in line), None),
            },
        },
    )
    images = torch.randn(2, manifest.channels, config.data.side, config.data.side)
    if not models.same_outputs(network.eval(), models.load_network(path), images):
        raise RuntimeError(f"{path}: the network that was written does not give the peer's logits")
    return path


def _shown(config: RunConfig) -> dict[str, Any]:
    """How validation images of any size were brought to that of the network."""
    if not config.data.photos:
        return {}
    # What DALI and torchvision call linear, with antialiasing; the middle is cut out of it.
    return {"resize": config.data.image.resize, "interpolation": "bilinear", "antialias": True, "crop": "centre"}
