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


def test_what_is_read_and_cancels_is_not_read_along_a_diagonal() -> None:
    """Rows beyond the tile do not exist."""
    spec = SPEC.replace("slope[h]", "shift[i]: int").replace("{far}", "table[n -> clamp((i + shift) - (j + shift), 0, 9)]")
    assert not re.search(r"shift_data\[.*along", weft.loads(spec).biased.source("c"))


def test_an_axis_called_once() -> None:
    """The word stands for a condition in plans."""
    spec = SPEC.replace("h,", "once,").replace("[h]", "[once]").replace("mask j <= i", "mask j < 9 or j == i").replace("{far}", "slope")
    given = _inputs(150)
    torch.testing.assert_close(weft.loads(spec).biased(*given), weft.loads(spec).biased.reference(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [3, 7, 2147483647])
def test_division_by_a_number_rounds_down(by: int) -> None:
    kernel = _kernel(f"slope * ((i - j - 2147483000) // {by} % 3 + (i - j) // {by} + (j - i) % {by} % 5)")
    given = _inputs(5)
    torch.testing.assert_close(kernel(*given), kernel.reference(*given), rtol=1e-4, atol=1e-5)
