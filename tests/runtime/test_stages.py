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


NYSTROM = """
kernel a(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e]) -> o[b,h,i,e]:
    param landmarks: int = 8
    axis m = landmarks
    axis n = landmarks
    mq = mean[i where i * landmarks // size(i) == m](q)
    mk = mean[j where j * landmarks // size(j) == n](k)
    near = softmax[n](sum[d](q * mk) / sqrt(size(d)))
    between = softmax[n](sum[d](mq * mk) / sqrt(size(d)))
    far = sum[j](softmax[j](sum[d](mq * k) / sqrt(size(d))) * v)
    o = sum[n](near * sum[m](between * far))
"""


@pytest.mark.parametrize("length", [40, 131, 2048])
def test_gpus_hold_the_tiles_of_landmarks(length: int) -> None:
    """Short calls too, whose positions a tile would keep whole."""
    made = weft.loads(NYSTROM).a
    problem = pose(made.graph, {}, {}, Usual(length=length, feature=16))
    lowered = made.lowered("sm_80", dtype=torch.float32, extents=problem.extents, params=problem.params)
    assert lowered.forward is not None, lowered.reasons
    lowered.backward(frozenset(lowered.differentiable))
    assert not lowered.reasons


def test_an_element_that_is_not_finite_spoils_what_it_reaches_only() -> None:
    made = weft.loads(
        "kernel a(q[m,d], k[n,d], v[n,e], at[i]: int) -> o[i,e]:\n    c = sum[n](sigmoid(sum[d](q * k)) * v)\n    o = c[m -> at]\n"
    ).a
    torch.manual_seed(0)
    q, k, v, at = torch.randn(70, 8), torch.randn(90, 8), torch.randn(90, 8), torch.randint(0, 35, (40,))
    v[2, 1] = float("nan")  # where the gradient of the sums that nobody reads is 0

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        found = made(*leaves, at, backend=backend)
        return [found.detach(), *torch.autograd.grad(found.sin().sum(), leaves)]

    for x, y in zip(run("c", torch.float32), run("reference", torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_two_features_are_no_stage() -> None:
    """Attention between channels: a matrix of features for every head is left to PyTorch, whose products are faster."""
    made = weft.loads(
        "kernel a(q[b,h,i,d], k[b,h,i,c], v[b,h,i,c]) -> o[b,h,i,d]:\n    o = sum[c](softmax[c](sum[i](q * k) / sqrt(size(i))) * v)\n"
    ).a
    assert made.lowered("c").forward is None
    x = torch.randn(1, 2, 300, 4)
    torch.testing.assert_close(made(x, x, x), made.reference(x, x, x))
