"""Gradients of biases that are as large as the scores, or as those of one sample: products of tiles, like what attends."""

from __future__ import annotations

import pytest
import torch

import weft
from weft.runtime.problem import Usual, pose

SPECS = {
    "every score": ("bias[b,h,i,j]", "softmax[j](s) * v"),
    "every score of a sample": ("bias[h,i,j]", "softmax[j](s) * v"),
    "every score of a head": ("bias[i,j]", "softmax[j](s) * v"),
    "every score, without a softmax": ("bias[b,h,i,j]", "sigmoid(s) * v"),
    "every score of a sample, without a softmax": ("bias[h,i,j]", "sigmoid(s) * v"),
}
TEXT = """
kernel spec(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], BIAS) -> o[b,h,i,e]:
    mask j <= i + 3
    s = sum[d](q * k) / sqrt(size(d)) + bias
    o = sum[j](WEIGHTED)
"""


def _made(name: str) -> weft.Kernel:
    bias, weighted = SPECS[name]
    found: weft.Kernel = weft.loads(TEXT.replace("BIAS", bias).replace("WEIGHTED", weighted)).spec
    return found


@pytest.mark.parametrize("target", ["c", "sm_90"])
@pytest.mark.parametrize("name", SPECS)
def test_are_products_of_tiles(name: str, target: str) -> None:
    """No program makes one score, or one row of them, by itself."""
    made = _made(name)
    problem = pose(made.graph, {}, {}, Usual(feature=16))
    lowered = made.lowered(target, dtype=torch.float32, extents=problem.extents, params={})
    assert lowered.forward is not None
    for k in lowered.backward(frozenset(t.name for t in made.typed.inputs)).kernels:
        assert not {"i", "j"} & set(k.grid), (k.name, k.grid)


@pytest.mark.parametrize("sizes", [(2, 2, 70, 67), (1, 1, 1, 5), (3, 1, 40, 33)])
@pytest.mark.parametrize("name", SPECS)
def test_agree_with_float64(name: str, sizes: tuple[int, int, int, int]) -> None:
    made = _made(name)
    b, h, i, j = sizes
    generator = torch.Generator().manual_seed(0)
    extents = {"b": b, "h": h, "i": i, "j": j, "d": 16, "e": 16}
    given = [torch.randn([extents[a] for a in t.axes], generator=generator) for t in made.typed.inputs]
    leaves, wide = ([x.to(d).requires_grad_() for x in given] for d in (torch.float32, torch.float64))
    found, right = made(*leaves, strict=True), made.reference(*wide)
    assert isinstance(found, torch.Tensor) and isinstance(right, torch.Tensor)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    for x, y in zip(torch.autograd.grad(found.cos().sum(), leaves), torch.autograd.grad(right.cos().sum(), wide), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
