"""Printed kernels run in Triton's interpreter against PyTorch. ``test_triton_numbers.py`` runs this file in a process of its own,
since Triton decides at import whether it interprets."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import sample_plans as samples
from weft.codegen.print_triton import print_triton
from weft.codegen.source import Specialization
from weft.compiler import ir
from weft.compiler import plan as p
from weft.runtime.triton_loader import load_triton


def run(plan: p.Plan, spec: Specialization, tensors: dict[str, torch.Tensor], extents: dict[str, int], folder: Path, origins: dict[str, int] | None = None, params: dict[str, float] | None = None) -> None:
    """Launch every kernel of a plan on tensors that have one dimension for each axis of their buffer."""
    module = print_triton(plan, spec)
    launchers = load_triton(module, folder)
    for entry in module.entries:
        launchers[entry.name](
            [tensors[name] for name in entry.buffers],
            [stride for name in entry.buffers for stride in tensors[name].stride()],
            [extents[axis] for axis in entry.extents],
            [(origins or {}).get(axis, 0) for axis in entry.origins],
            [(params or {})[name] for name in entry.params],
        )


def reference(q, k, v, scale, origin):  # type: ignore[no-untyped-def]
    scores = torch.einsum("bgrid,bgjd->bgrij", q, k) * scale
    keep = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[3])[:, None] + origin
    scores = scores.masked_fill(~keep, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    return torch.einsum("bgrij,bgje->bgrie", weights, v), lse


SHAPES = {
    "square": dict(b=1, g=2, r=1, i=64, j=64, d=16, e=16, origin=0),
    "ragged": dict(b=2, g=1, r=2, i=45, j=45, d=24, e=20, origin=0),
    "decoding": dict(b=1, g=1, r=2, i=3, j=70, d=16, e=33, origin=67),
    "empty rows": dict(b=1, g=1, r=1, i=40, j=20, d=8, e=16, origin=-10),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_attention(shape: str, dtype: str, tmp_path: Path) -> None:
    extents = dict(SHAPES[shape])
    origin = extents.pop("origin")
    kind = getattr(torch, dtype)
    torch.manual_seed(0)

    def draw(axes: str) -> torch.Tensor:
        return torch.randn([extents[a] for a in axes]).to(kind)

    tensors = {"q": draw("bgrid"), "k": draw("bgjd").transpose(2, 3).contiguous().transpose(2, 3), "v": draw("bgje")}
    tensors["o"], tensors["lse"] = torch.full_like(draw("bgrie"), math.nan), torch.full_like(draw("bgri"), math.nan, dtype=torch.float32)
    params = {"scale": extents["d"] ** -0.5}
    forward = samples.attention_forward(16, 32)
    run(forward, samples.specialization(forward, dtype, extents), tensors, extents, tmp_path, {"i": origin}, params)

    exact = {n: tensors[n].double().requires_grad_() for n in "qkv"}
    o, lse = reference(exact["q"], exact["k"], exact["v"], params["scale"], origin)
    tolerance = 3e-3 if dtype == "float16" else 2e-6
    torch.testing.assert_close(tensors["o"].double(), o.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(tensors["lse"].double(), lse.detach(), atol=tolerance, rtol=tolerance)

    d_o = draw("bgrie")
    tensors |= {"d_o": d_o, "delta": torch.full_like(tensors["lse"], math.nan)}
    for name in "qkv":
        tensors[f"d_{name}"] = torch.full(tensors[name].shape, math.nan, dtype=kind)
    backward = samples.attention_backward(32, 16)
    run(backward, samples.specialization(backward, dtype, extents), tensors, extents, tmp_path, {"i": origin}, params)
    gradients = torch.autograd.grad(o, [exact[n] for n in "qkv"], d_o.double())
    for name, expected in zip("qkv", gradients, strict=True):
        torch.testing.assert_close(tensors[f"d_{name}"].double(), expected, atol=5 * tolerance, rtol=5 * tolerance, msg=lambda m, n=name: f"d_{n}: {m}")
