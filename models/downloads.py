"""Whether weights that a library publishes can be had from here, found soon: libraries try for a minute, and more."""

from __future__ import annotations

import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch

SECONDS = 5.0
"""To wait for the place where weights are published."""


def hindrance(url: str) -> str | None:
    """Why a file cannot be had: nothing of it is cached and its host does not answer. None where it may be tried.

    Args:
        url: of the file, as a browser would fetch it.
    """
    host = urlsplit(url).hostname
    if host is None or urllib.request.getproxies() or os.environ.get("HF_HUB_OFFLINE") or _cached(url):
        return None
    try:
        socket.create_connection((host, 443), timeout=SECONDS).close()
    except OSError as error:
        return f"{host} does not answer: {error}"
    return None


def hub_url(repository: str, file: str) -> str:
    """Where a file of the Hugging Face Hub is."""
    from huggingface_hub import hf_hub_url

    return str(hf_hub_url(repository, file))


def _cached(url: str) -> bool:
    path = urlsplit(url).path
    if (Path(torch.hub.get_dir()) / "checkpoints" / Path(path).name).is_file():
        return True
    owner, _, rest = path.strip("/").partition("/")
    name, resolve, _ = rest.partition("/resolve/")
    if not resolve:
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{owner}--{name}" / "snapshots").is_dir()
