"""What torch is asked about shapes is answered alike with and without its algebra of symbols, which is not imported.

What is imported is asked in processes of their own, as what others have imported stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import create
from models.shapes_alone import dry_run
from models.weightless import weightless

ROOT = Path(__file__).parents[2]
HEAVY = ("sympy", "torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes")
PASS = """
import sys, torch
from torch import nn
from torch.nn import functional as F
from models.shapes_alone import shapes_alone

def made():
    head = nn.Flatten(), nn.Linear(72, 5), nn.LayerNorm(5)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.GELU(), *head)
    x = torch.zeros(4, 3, 8, 8, device="meta", requires_grad=True)
    y = net.to("meta")(x)
    z = torch.cat([y.half(), torch.zeros_like(y)], 1)
    (z.sum() + y[1:3].log_softmax(-1).mean() + F.dropout(y).pow(2).var()).backward()
    w = x.transpose(1, 3) * 2 + torch.ones(8, device="meta")[:, None, None, None][0]
    found = [y, z, w, w.sum((0, 2)), x.grad, y > 0, torch.where(y > 0, y, 0), torch.zeros_like(x.permute(0, 2, 3, 1))]
    return [(str(t.dtype), tuple(t.shape), t.stride()) for t in found + [p.grad for p in net.parameters()]]
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pass_is_the_same_and_imports_nothing() -> None:
    told = f"print(found); print(*({{*{HEAVY}}} & {{*sys.modules}}))"
    alone, imported = run(f"{PASS}\nwith shapes_alone():\n    found = made()\n{told}").splitlines()
    own, needed = run(f"{PASS}\nfound = made()\n{told}").splitlines()
    assert alone == own
    assert imported == ""
    assert needed, "there is something to save"


def test_symbols_are_torchs_own_matter() -> None:
    """Also for those who import it while something stands for it."""
    said = run("""
import sys
from models.shapes_alone import shapes_alone
name = "torch.fx.experimental.symbolic_shapes"
with shapes_alone():
    import torch.fx.experimental.symbolic_shapes
    early, sympy_then = sys.modules[name], __import__("sympy")
    from torch.fx.experimental.symbolic_shapes import guard_or_false, sym_eq, is_nested_int
    assert early.__class__.__name__ == "_StandIn"
    assert guard_or_false(True) is True and sym_eq((1, 2), (1, 2)) and not is_nested_int(3)
    assert "sympy.core" not in sys.modules
assert name not in sys.modules and "sympy" not in sys.modules
with shapes_alone():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    own = sys.modules[name]
    assert isinstance(ShapeEnv, type) and own.ShapeEnv is ShapeEnv
    size = ShapeEnv().create_unbacked_symint()
    assert guard_or_false(size == 4) is False and own.guard_or_true(size == 4) is True
    assert isinstance(size.node.expr, sympy_then.Basic)
import sympy
assert sys.modules[name] is own and early.ShapeEnv is ShapeEnv and early.guard_or_false is own.guard_or_false
assert sympy_then.Basic is sympy.Basic and sympy.core and sympy_then.core is sympy.core
print("alike")
""")
    assert said == "alike\n"


@pytest.mark.slow
def test_a_network_is_compiled_as_ever_afterwards() -> None:
    said = run(f"""{PASS}
with shapes_alone():
    made()
net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
x = torch.ones(2, 3)
print(torch.equal(torch.compile(net, backend="aot_eager", dynamic=True)(x), net(x)))
""")
    assert said == "True\n"


@pytest.mark.parametrize(("dtype", "training"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("name", ["cifar_resnet8_b", "timm/mobilenetv3_small_050", "torchvision/densenet121"])
def test_every_map_of_a_dry_run_is_that_of_a_pass(name: str, dtype: torch.dtype, training: bool) -> None:
    with weightless(name):
        network = create(name, 10, 3).to("meta", dtype, memory_format=torch.channels_last).train(training)
    images = torch.empty(2, 3, 64, 64, device="meta", dtype=dtype)
    assert _maps(network, dry_run, images) == _maps(network, lambda module, x: module(x), images)


def _maps(network: nn.Module, make: Any, images: torch.Tensor) -> list[Any]:
    found: list[Any] = []
    hooks = [
        part.register_forward_hook(lambda _, __, y: found.append((y.shape, y.stride(), y.dtype)))
        for part in network.modules()
    ]
    assert make(network, images).shape == (2, 10)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (2, 7)])
def test_a_batch_norm_says_in_a_dry_run_what_it_cannot_take(rows: int, channels: int) -> None:
    norm, images = nn.BatchNorm2d(8, device="meta"), torch.empty(rows, channels, 1, 1, device="meta")
    with pytest.raises((ValueError, RuntimeError)) as own:
        norm(images)
    with pytest.raises(own.type) as told:
        dry_run(norm, images)
    assert str(told.value) == str(own.value)
