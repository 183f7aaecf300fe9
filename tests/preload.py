"""What the fork server imports once for all ranks of all worlds.

A rank imports the module of the function that it calls, and with it pytest; some runs want timm and the compiler.
"""

import gc

import pytest  # noqa: F401
import timm.optim  # noqa: F401
import torch._dynamo  # noqa: F401

import engine.trainer  # noqa: F401

# What is here stays: a rank that looks for garbage shall not touch, and so copy, all of it.
gc.collect()
gc.freeze()
