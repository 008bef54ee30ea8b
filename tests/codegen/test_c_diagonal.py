"""Values that depend on a distance alone are computed once for every diagonal of a tile."""

from __future__ import annotations

import re

import pytest
import torch

import weft

SPEC = '''"""A bias by distance."""

kernel biased(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], table[h,n], slope[h]) -> o[b,h,i,e]:
    mask j <= i
    far = {far}
    s = sum[d](q * k) + far
    o = sum[j](softmax[j](s) * v)
'''


def _kernel(far: str) -> weft.Kernel:
    return weft.loads(SPEC.replace("{far}", far)).biased


def _inputs(length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s) for s in ((1, 2, length, 16), (1, 2, length, 16), (1, 2, length, 16), (2, 12), (2,))]


@pytest.mark.parametrize(
    ("far", "kept"),
    [
        ("table[n -> clamp(i - j, 0, size(n) - 1)]", 1),
        ("table[n -> i - j]", 1),
        ("slope * sqrt(abs(i - j) + 1)", 1),
        ("slope * sqrt(abs(i - j) + 1) * table[n -> (i - j) // 4]", 1),
        ("slope * (j - i)", 0),
        ("slope * sqrt(i + j + 1)", 0),
        ("table[n -> i % size(n)]", 0),
        ("slope * sqrt(2 * i - j + 1)", 0),
    ],
)
def test_what_depends_on_the_distance_alone(far: str, kept: int) -> None:
    kernel = _kernel(far)
    text = kernel.source("c")
    assert len(set(re.findall(r"(\w+)\[along\w*\] =", text))) == kept
    for length in (1, 65, 150):
        given = _inputs(length)
        torch.testing.assert_close(kernel(*given), kernel.reference(*given), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_table_by_distance() -> None:
    kernel = _kernel("table[n -> i - j]")
    given = [t.requires_grad_() for t in _inputs(150)]
    found = torch.autograd.grad(kernel(*given).square().sum(), given[:4])
    wanted = torch.autograd.grad(kernel.reference(*given).square().sum(), given[:4])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
