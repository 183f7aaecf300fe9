"""The methods: how the peers of a cohort teach each other. One file a method, all on the contract in `contract.py`."""

from losses.contract import AfterStep, Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.dml import DML
from losses.independent import Independent

__all__ = [
    "METHODS",
    "AfterStep",
    "Method",
    "MethodOptions",
    "PeerInfo",
    "Progress",
    "Signals",
    "Terms",
]

METHODS: dict[str, type[Method]] = {method.name: method for method in (Independent, DML)}
