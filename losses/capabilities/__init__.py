"""What a few methods need beyond the contract: one file each, which says when a method needs it and who has it.

A method adds a capability to itself by inheriting from it, before `Method`: `class PCL(Teachers, SharedTrunk, Method)`.
The engine asks for it by its class.
"""

from losses.capabilities.after_step import ActsAfterStep, AfterStep, ExchangeAfterStep
from losses.capabilities.all_rows import AllRows
from losses.capabilities.early_exits import EarlyExits
from losses.capabilities.held_out import HeldOutSurveys
from losses.capabilities.look import LooksAtImages
from losses.capabilities.meeting import MeetsAsJobs
from losses.capabilities.outer_problem import OuterProblem, OuterStep
from losses.capabilities.stages import StageTaps
from losses.capabilities.tables import MakeTable, Table, Tables
from losses.capabilities.teachers import Teachers
from losses.capabilities.trunk import SharedTrunk, trunk_of
from losses.capabilities.turns import Turns, turns_of
from losses.capabilities.unsynchronised import Unsynchronised
from losses.capabilities.weight_decay import OwnWeightDecay

__all__ = [
    "ActsAfterStep",
    "AfterStep",
    "AllRows",
    "EarlyExits",
    "ExchangeAfterStep",
    "HeldOutSurveys",
    "LooksAtImages",
    "MakeTable",
    "MeetsAsJobs",
    "OuterProblem",
    "OuterStep",
    "OwnWeightDecay",
    "SharedTrunk",
    "StageTaps",
    "Table",
    "Tables",
    "Teachers",
    "Turns",
    "Unsynchronised",
    "trunk_of",
    "turns_of",
]
