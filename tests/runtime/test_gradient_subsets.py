"""Gradients of some inputs are what they are among the gradients of all: each subset has a plan of its own."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import weft
from weft.specs import deberta

SIGMOID = '''"""A softmax less a sigmoid: the query's gradient takes two stages."""

kernel mixed(q[b,h,i,d], k[{heads},j,d], w[{heads},j,e]) -> u[b,h,i,e]:
    mask j <= i
    s = sum[d](q * k)
    u = sum[j]((softmax[j](s) - 0.5 * sigmoid(s)) * w)
'''
RELATIVE = '''"""Keys and values by distance (Shaw et al., 2018)."""

kernel relative(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], rel[h,n,d], rv[h,n,e]) -> o[b,h,i,e]:
    s = sum[d](q * (k + rel[n -> clamp(i - j + 4, 0, size(n) - 1)]))
    o = sum[j](softmax[j](s) * (v + rv[n -> clamp(i - j + 4, 0, size(n) - 1)]))
'''


def _check_all_subsets(kernel: weft.Kernel, given: list[Tensor]) -> None:
    for count in range(1, len(given) + 1):
        for chosen in combinations(range(len(given)), count):
            inputs = [t.detach().requires_grad_(n in chosen) for n, t in enumerate(given)]
            wanted = [inputs[n] for n in chosen]
            found = torch.autograd.grad(kernel(*inputs).square().sum(), wanted)
            doubles = [t.detach().double().requires_grad_(n in chosen) for n, t in enumerate(given)]
            expected = torch.autograd.grad(kernel.reference(*doubles).square().sum(), [doubles[n] for n in chosen])
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=f"gradients of {chosen}")


@pytest.mark.parametrize("heads", ["b", "b,h"])
def test_a_gradient_in_two_stages(heads: str) -> None:
    kernel = weft.loads(SIGMOID.replace("{heads}", heads)).mixed
    keys = (2, 21, 8) if heads == "b" else (2, 2, 21, 8)
    torch.manual_seed(0)
    _check_all_subsets(kernel, [torch.randn(2, 2, 21, 8), torch.randn(keys), torch.randn(keys)])


def test_an_axis_that_only_some_gradients_keep_whole() -> None:
    torch.manual_seed(0)
    shapes = ((1, 2, 17, 8), (1, 2, 17, 8), (1, 2, 17, 8), (2, 9, 8), (2, 9, 8))
    _check_all_subsets(weft.loads(RELATIVE).relative, [torch.randn(s) for s in shapes])


def test_what_is_masked_everywhere_does_not_reach_a_table() -> None:
    """A sequence that is all padding may hold anything."""
    torch.manual_seed(0)
    clean = [torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 63, 8), torch.randn(2, 63, 8)]
    pad = torch.tensor([[True] * 20, [False] * 20])
    spoiled = [t.clone() for t in clean]
    for t in spoiled[:3]:
        t[1] = float("nan")
    tables = []
    for given in (clean, spoiled):
        inputs = [t.requires_grad_() for t in given]
        tables.append(torch.autograd.grad(deberta(*inputs, pad)[:1].square().sum(), inputs[3:]))
    for a, b in zip(*tables, strict=True):
        torch.testing.assert_close(a, b)


def test_what_a_contraction_sums_may_be_masked_by_what_is_swept() -> None:
    text = "kernel masked(q[i,d], k[j,d], v[j,e]) -> o[i,e]:\n    o = sum[j](sum[d where j <= d](q * k) * v)\n"
    torch.manual_seed(0)
    _check_all_subsets(weft.loads(text).masked, [torch.randn(5, 6), torch.randn(9, 6), torch.randn(9, 7)])
