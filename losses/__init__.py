"""The methods: how the peers of a cohort teach each other. One file a method, all on the contract in `contract.py`.

What few of them need beyond it is in `capabilities/`.
"""

from losses.cl_ilr import CLILR
from losses.codistillation import Codistillation
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.dcl import DCL
from losses.dcm import DCM
from losses.dml import DML
from losses.ffl import FFL
from losses.independent import Independent
from losses.kdcl import KDCL
from losses.lmcl import LMCL
from losses.mcl import MCL
from losses.okddip import OKDDip
from losses.one import ONE
from losses.pcl import PCL

__all__ = [
    "METHODS",
    "Method",
    "MethodOptions",
    "PeerInfo",
    "Progress",
    "Signals",
    "Terms",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Independent, DML, CLILR, ONE, FFL, OKDDip, DCM, DCL, Codistillation, KDCL, PCL, MCL, LMCL)
}
