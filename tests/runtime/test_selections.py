"""Selections that kernels make: which elements, at ties, among NaN and infinities, and when they are PyTorch's instead."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import weft
from weft.compiler import ir
from weft.compiler.choices import watching

ROWS = """
kernel rows(x[t,v]) -> kept[t,v]: bool, y[t,v], mass[t]:
    param k: int
    kept = topk[v](x, k)
    y = where(kept, 2 * x, 0)
    mass = sum[v where kept](x)
"""
MASKED = """
kernel masked(x[t,v], pad[t,v]: bool) -> kept[t,v]: bool, y[t,v]:
    param k: int
    kept = topk[v where pad](x, k)
    y = where(kept, 2 * x, 0)
"""
PAIRS = """
kernel pairs(x[t,u,v]) -> kept[t,u,v]: bool, best[t]:
    param k: int
    kept = topk[v, u](x, k)
    best = sum[u, v where kept](x)
"""
NESTED = """
kernel nested(x[t,m,n], bias[m,n]) -> kept[t,m,n]: bool, y[t,m,n]:
    p = softmax[m, n](x)
    c = p + bias
    best = sum[n where topk[n](c, 2)](c)
    mask topk[m](best, 2)
    kept = topk[m, n](c, 3)
    y = where(kept, p, 0)
"""
INF, NAN = torch.inf, torch.nan
HARD = torch.tensor([
    [1, 1, 1, 1, 1, 1, 1],
    [0, -0.0, 0, -0.0, 0, 3, 3],
    [NAN, 1, INF, NAN, 2, -INF, INF],
    [-INF, -INF, -INF, -INF, -INF, -INF, -INF],
    [-INF, -INF, 5, -INF, -INF, -INF, -INF],
    [NAN, NAN, NAN, NAN, NAN, NAN, NAN],
    [3e38, INF, -3e38, 1e-45, -1e-45, 1e38, 0],
    [1, 2, 3, 4, 5, 6, 7],
])  # fmt: skip


def both(text: str, *tensors: Tensor, **params: int) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients, of the C kernel and of the reference."""
    kernel = weft.loads(text)[text.split()[1].partition("(")[0]]
    found = []
    for backend in ("c", "reference"):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
        outputs = kernel(*leaves, backend=backend, strict=backend == "c", **params)
        real = [o for o in outputs if o.is_floating_point()]
        total = sum((o * torch.arange(1, 1 + o.numel()).view(o.shape)).nan_to_num(0, 0, 0).sum() for o in real)
        assert isinstance(total, Tensor)
        total = total + sum(0 * t.nan_to_num(0, 0, 0).sum() for t in leaves if t.requires_grad)
        gradients = torch.autograd.grad(total, [t for t in leaves if t.is_floating_point()], allow_unused=True, materialize_grads=True)
        found.append([*(o.detach() for o in outputs), *gradients])
    return list(zip(*found, strict=True))


def agree(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("k", [-1, 0, 1, 2, 3, 6, 7, 8, 100])
def test_ties_infinities_and_nan(k: int) -> None:
    """The lower position wins a tie, NaN comes before any number, and a row of -inf has none."""
    agree(both(ROWS, HARD, k=k))


@pytest.mark.parametrize("k", [1, 3])
def test_of_what_a_condition_leaves(k: int) -> None:
    torch.manual_seed(0)
    pad = torch.rand(8, 7) < 0.6
    pad[0] = False
    agree(both(MASKED, HARD, pad, k=k))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 4), (70, 16, 16)])
@pytest.mark.parametrize("k", [1, 5])
def test_over_two_axes(shape: tuple[int, ...], k: int) -> None:
    """Rounded scores, so that many are equal: positions count in the order of the axes' names."""
    torch.manual_seed(1)
    agree(both(PAIRS, (4 * torch.randn(shape)).round(), k=k))


def test_one_of_another() -> None:
    torch.manual_seed(2)
    agree(both(NESTED, torch.randn(33, 4, 5), torch.randn(4, 5)))


@pytest.mark.parametrize(("length", "k", "made"), [(256, 16, True), (16, 16, True), (256, 17, False), (257, 2, False)])
def test_long_rows_and_many_are_left_to_pytorch(length: int, k: int, made: bool) -> None:
    kernel = weft.loads(ROWS)["rows"]
    lowered = kernel.lowered("c", dtype=torch.float32, extents={"t": 100, "v": length}, params={"k": k})
    assert lowered.forward is not None
    assert [type(step.node) for step in lowered.forward.library] == ([] if made else [ir.Select])
    assert (len(lowered.forward.kernels) == 1) == made


def test_one_call_after_another_of_other_lengths() -> None:
    """What fits 300 numbers is not taken for 30, nor the other way round."""
    torch.manual_seed(3)
    kernel = weft.loads(ROWS)["rows"]
    for length in (30, 300, 30, 257, 256):
        x = torch.randn(4, length)
        for got, want in zip(kernel(x, k=3), kernel(x, k=3, backend="reference"), strict=True):
            torch.testing.assert_close(got, want)


def test_softmax_and_selection_are_one_kernel_in_either_order() -> None:
    from weft.specs import cross_softmax_topk, topk_softmax

    for kernel in (topk_softmax, cross_softmax_topk):
        for target in ("c", "sm_90"):
            lowered = kernel.lowered(target, dtype=torch.float32, extents={"t": 4096, "v": 128}, params={"k": 8})
            assert lowered.forward is not None
            assert len(lowered.forward.kernels) == 1
            assert len(lowered.backward(frozenset(lowered.differentiable)).kernels) == 1


def test_the_router_of_a_mixture_chooses_where_it_normalises() -> None:
    """Nothing is left of the selection between kernels but the tables of pairs."""
    from weft.specs import moe_swiglu

    lowered = moe_swiglu.lowered("c", dtype=torch.float32, extents={"t": 512, "d": 64, "n": 32, "f": 64}, params={"k": 4})
    assert lowered.forward is not None
    assert {type(step.node).__name__ for step in lowered.forward.library} == {"Table"}
    assert [k.name for k in lowered.forward.kernels if "chosen" in k.name] == ["forward_t1_saved_2_chosen"]
    assert lowered.forward.selections == [("saved_2_chosen", ("n",))]


def test_what_a_kernel_chose_is_seen() -> None:
    from weft.specs import moe_swiglu

    torch.manual_seed(4)
    x, router = torch.randn(6, 8), torch.randn(5, 8)
    with watching() as choices:
        moe_swiglu(x, router, *(torch.randn(5, 8, 4) for _ in range(2)), torch.randn(5, 4, 8), k=2, backend="c", strict=True)
    (seen,) = choices.seen
    assert seen.node.over == ("n",)
    assert seen.node.axes == ("n", "t")
    best = (x @ router.T).topk(2).indices
    assert torch.equal(seen.data, torch.zeros(6, 5, dtype=torch.bool).scatter_(1, best, True).T)


INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, weft
from tests.interpreter import skip_unused_checks
from tests.runtime.test_selections import HARD, NESTED, ROWS
skip_unused_checks()
for k in (0, 1, 3, 7, 9):
    kernel = weft.loads(ROWS)["rows"]
    for got, want in zip(kernel(HARD, k=k, backend="triton", strict=True), kernel(HARD, k=k, backend="reference")):
        torch.testing.assert_close(got, want, equal_nan=True)
torch.manual_seed(0)
kernel = weft.loads(NESTED)["nested"]
tensors = torch.randn(9, 4, 5), torch.randn(4, 5)
for got, want in zip(kernel(*tensors, backend="triton", strict=True), kernel(*tensors, backend="reference")):
    torch.testing.assert_close(got, want)
"""


def test_in_tritons_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_choice_of_tokens_is_not_compiled_for_their_number() -> None:
    from weft.specs import moe_expert_choice

    lowered = moe_expert_choice.lowered("c", dtype=torch.float32, extents={"t": 64, "d": 32, "n": 4, "f": 32}, params={"capacity": 4})
    assert lowered.forward is not None
    assert "Select" in {type(step.node).__name__ for step in lowered.forward.library}
    assert "t" not in lowered.by_extent
