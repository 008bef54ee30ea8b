"""Layers with more features than a tile of rows keeps: matrix products in tiles, with what follows fused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weft
from tests.evidence.library import kernel
from tests.runtime.test_routed import both, close, drawn
from weft.runtime.problem import Usual, pose

NAMES = ("swiglu", "geglu", "reglu", "relu2_mlp", "cats", "ksparse", "bitlinear", "bitlinear_glu", "fake_quant")


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_float64(name: str) -> None:
    made = kernel(name)
    extents = pose(made.graph, {"t": 37, "d": 300, "f": 270}, {}, Usual()).extents
    for quantity, found, wanted in both(made, drawn(made, extents), {}):
        close(quantity, found, wanted)


def test_outputs_that_are_read_again_lie_as_declared() -> None:
    """Its output has its axes the other way round than they lie in the other tensors' order."""
    made = kernel("attention_residual")
    extents = pose(made.graph, {"t": 60, "l": 5, "d": 300}, {}, Usual()).extents
    inputs = {name: x * 0.2 for name, x in drawn(made, extents).items()}
    for quantity, found, wanted in both(made, inputs, {}):
        close(quantity, found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_planned_for_gpus(name: str) -> None:
    made = kernel(name)
    extents = pose(made.graph, {"t": 4096, "d": 1024, "f": 4096}, {}, Usual()).extents
    lowered = made.lowered("sm_90", dtype=torch.bfloat16, extents=extents)
    assert lowered.forward is not None and not lowered.reasons and lowered.in_products


def test_scores_are_never_stored() -> None:
    for name in ("softmax_attention", "full", "retention", "multi_token"):
        made = kernel(name)
        extents = pose(made.graph, {"d": 512}, {}, Usual(512)).extents
        lowered = made.lowered("c", extents=extents)
        plans = [] if lowered.forward is None else [lowered.forward, lowered.backward(frozenset(lowered.differentiable))]
        assert not any({"i", "j"} <= set(b.axes) for plan in plans for b in plan.buffers.values()), name


MIXED = """
kernel mixed(x[t,d], r[n,d], w1[n,d,f], w2[n,f,e]) -> y[t,e]:
    p = softmax[n](sum[d](x * r))
    y = sum[n](p * sum[f](relu(sum[d](x * w1)) * w2))
"""
PLANE = """
kernel plane(q[t,d], k[n,f,d], v[n,f,e]) -> y[t,e]:
    y = sum[n,f](relu(sum[d](q * k)) * v)
"""


@pytest.mark.parametrize(("text", "products"), [(MIXED, True), (PLANE, False)])
def test_experts_of_all_tokens_are_products_and_keys_of_two_axes_are_not(text: str, products: bool) -> None:
    """Scores of a plane of keys look like hidden units of experts that nothing mixes, and are not stored."""
    made = weft.loads(text)[text.split()[1].partition("(")[0]]
    lowered = made.lowered("c", extents={"t": 100, "d": 16, "n": 8, "f": 24, "e": 16}, params={})
    assert lowered.forward is not None
    stored = any({"t", "n", "f"} <= set(b.axes) for b in lowered.forward.buffers.values())
    assert stored == products


def test_weights_of_units_that_no_token_keeps_are_not_read() -> None:
    """NaN in them changes nothing, forward and backward: they are masked."""
    made = kernel("cats")
    torch.manual_seed(0)
    t, d, f = 5, 300, 270
    x, gate, up, down = torch.randn(t, d), torch.randn(d, f) / 17, torch.randn(d, f) / 17, torch.randn(f, d)
    gate[:, 7] = 0
    up[:, 7] = down[7] = torch.nan
    for quantity, found, wanted in both(made, {"x": x, "w_gate": gate, "w_up": up, "w_down": down}, {"threshold": 0.1}):
        assert bool(wanted.isfinite().all()), quantity
        close(quantity, found, wanted)


CALL = """
import sys
import torch
from tests.evidence.library import kernel
from tests.runtime.test_routed import drawn

made = kernel(sys.argv[1])
sizes = {"t": int(sys.argv[2]), "d": 300, "f": 270, "n": 5}
inputs = drawn(made, {a.name: sizes[a.name] for a in made.typed.axes})
leaves = [x.float().requires_grad_() for x in inputs.values()]
found = []
for backend in ("c",) if sys.argv[3] == "forward" else ("c", "reference"):
    y = made(*leaves, backend=backend)
    y = y if isinstance(y, torch.Tensor) else y[0]
    found.append(torch.autograd.grad(y.square().sum(), leaves) if sys.argv[3] == "backward" else ())
for got, want in zip(*found) if len(found) == 2 else ():
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
print("fine")
"""


@pytest.mark.parametrize(("name", "tokens"), [("cats", 3), ("cats", 300), ("moe_swiglu", 40)])
def test_gradients_after_the_forward_came_from_the_cache(name: str, tokens: int, tmp_path: Path) -> None:
    """Another process made the forward, and asked for no gradients: these are planned for the same extents, on which plans depend."""
    for part in ("forward", "backward"):
        done = subprocess.run(
            [sys.executable, "-c", CALL, name, str(tokens), part],
            env={**os.environ, "WEFT_CACHE": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        assert done.stdout == "fine\n", done.stderr


def test_stores_go_along_memory() -> None:
    """A weight's gradient that lies the other way round than the rest of its kernel is summed as it lies: no store crosses rows."""
    made = kernel("moe_swiglu")
    extents = pose(made.graph, {"t": 64, "d": 128, "f": 192, "n": 8}, {}, Usual()).extents
    source = made.source("c", "backward", extents=extents)
    stores = re.findall(r"for \(int (\w+) = 0;[^\n]*\{\n +d_w_\w+_data\[([^\]]*)\] = acc\w*\[(\w+)\]\[(\w+)\];", source)
    assert len(stores) >= 2
    for inner, address, _, column in stores:
        assert inner == column and address.endswith(f" + {inner}"), address
    assert "product_ahead(next_tile(w_down_data" in source


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (17, 41), (64, 64), (70, 130), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transposed_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Tiles that are turned while they are loaded, with edges: inputs in both orders of memory, and gradients."""
    d, f = shape
    made = weft.loads("kernel spec(x[t,d], w[d,f], u[f,d]) -> y[t,f], z[t,d]:\n    y = sum[d](x * w)\n    z = sum[f](gelu(y) * u)\n").spec
    torch.manual_seed(3)
    leaves = [torch.randn(s, dtype=dtype) / 4 for s in ((19, d), (d, f), (f, d))]
    for turned in (False, True):
        given = [(x.mT.contiguous().mT if turned else x).requires_grad_() for x in (x.detach().clone() for x in leaves)]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        found, right = made(*given), made.reference(*wide)
        got, want = (torch.autograd.grad(sum(o.sum() for o in os), xs) for os, xs in ((found, given), (right, wide)))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for a, b in zip((*found, *got), (*right, *want), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.square().mean().sqrt()) + 1e-7)
