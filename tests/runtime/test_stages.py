"""Attention in stages: what one stage hands to the next is stored, and never are scores."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.runtime.stages import STAGES
from weft.runtime.check import check_kernel, render
from weft.runtime.kernel import Kernel
from weft.runtime.problem import Usual, pose

LONG = 300
"""More than a tile keeps whole."""


def _kernel(name: str) -> Kernel:
    return weft.loads(STAGES[name]).a


@pytest.mark.parametrize("name", STAGES)
def test_kernels_agree_with_the_reference(name: str) -> None:
    report = check_kernel(_kernel(name), backend="c", trials=3, quick=True, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("name", STAGES)
def test_lengths_that_no_tile_keeps_whole(name: str) -> None:
    made = _kernel(name)
    problem = pose(made.graph, {}, {}, Usual(LONG, 16, 2, 1))
    given = list(problem.inputs(seed=1).values())
    exact = [t.double().requires_grad_() for t in given]
    found = [made(*[t.requires_grad_() for t in given], **problem.params, strict=True)]
    expected = [made.reference(*exact, **problem.params)]
    torch.manual_seed(1)
    cotangent = torch.randn(found[0].shape)
    found += torch.autograd.grad(found[0], given, cotangent)
    expected += torch.autograd.grad(expected[0], exact, cotangent.double())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5 * float(y.detach().abs().max()))


@pytest.mark.parametrize("name", STAGES)
def test_nothing_is_as_large_as_scores(name: str) -> None:
    lowered = _kernel(name).lowered("c")
    assert lowered.forward is not None
    plans = [lowered.forward, lowered.backward(frozenset(lowered.differentiable))]
    scores = [{"i", "j"}, {"i", "l"}, {"j", "l"}]
    assert not [b for plan in plans for b in plan.buffers.values() for pair in scores if pair <= set(b.axes)]


@pytest.mark.parametrize("name", STAGES)
def test_one_program_for_every_length(name: str) -> None:
    """A short call is planned like a long one, and positions are not compiled in."""
    made = _kernel(name)
    positions = {a.name for a in made.typed.axes} & {"i", "j", "l"}
    lengths = [made.lowered("c", extents=dict.fromkeys(positions, n)) for n in (40, 2048)]
    assert str(lengths[0].forward) == str(lengths[1].forward)
    assert not positions & {a for k in lengths[0].forward.kernels for a in k.whole}  # type: ignore[union-attr]


def test_two_features_are_no_stage() -> None:
    """Attention between channels: a matrix of features for every head is left to PyTorch, whose products are faster."""
    made = weft.loads(
        "kernel a(q[b,h,i,d], k[b,h,i,c], v[b,h,i,c]) -> o[b,h,i,d]:\n    o = sum[c](softmax[c](sum[i](q * k) / sqrt(size(i))) * v)\n"
    ).a
    assert made.lowered("c").forward is None
    x = torch.randn(1, 2, 300, 4)
    torch.testing.assert_close(made(x, x, x), made.reference(x, x, x))
