"""Recurrences in chunks: which they are, that nothing changes but the time, and what is left over at the end of a sequence."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import weft
from tests.evidence.library import OTHERS, REQUIRED, every, kernel
from tests.evidence.test_gates import LEVELS, LOGS, gated
from weft.compiler import ir
from weft.compiler.chunks import Unchunkable, find_chunks, in_blocks
from weft.runtime.check import check_kernel, render
from weft.runtime.chunked import BLOCK, LENGTH, ChunkedKernel, chunks_of
from weft.runtime.explain import explain
from weft.runtime.flat import FlatKernel, flattened, taken
from weft.runtime.packed import PackedKernel
from weft.runtime.problem import Usual, pose

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from weft.runtime.kernel import Kernel

SHIPPED = {
    **dict.fromkeys("linear_attn linear_plain lightning lightning_alibi simple_gla ssd mlstm_sigmoid".split(), LENGTH),
    **dict.fromkeys("delta_rule gated_delta comba iplr".split(), LENGTH),
    **dict.fromkeys("gla gla_bidirectional hgrn2 rwkv5 rwkv6 gsa".split(), LENGTH),
    **dict.fromkeys("kda gdn2 rwkv7 selective_scan".split(), BLOCK),
    **dict.fromkeys("hgrn min_gru min_lstm mlgru mlgru_released rg_lru rwkv4 mlstm".split(), LENGTH),
}

HEAD = "kernel spec(q[b,h,t,d], k[b,h,t,d], v[b,h,t,e], g[b,h,t], f[b,h,t,d], u[h,d]) -> o[b,h,t,e]:\n    state S[b,h,d,e] along t\n"
SPELT = {
    "a decay before the write": "    S <- exp(-abs(g)) * S\n    S <- S + k * v\n    o = sum[d](q * S)",
    "a decay after the write": "    S <- S + k * v\n    o = sum[d](q * S)\n    S <- exp(-abs(g)) * S",
    "a write that decays": "    S <- exp(-abs(g)) * (S + k * v)\n    o = sum[d](q * S)",
    "read before the write": "    o = sum[d](q * S)\n    S <- exp(-abs(g)) * S + k * v",
    "read between": "    S <- exp(-abs(g)) * S\n    o = sum[d](q * S)\n    S <- S + k * v",
    "a bonus": "    o = sum[d](q * (S + u * k * v))\n    S <- exp(-abs(f)) * S + k * v",
    "a sigmoid": "    S <- sigmoid(g) * S + (1 - sigmoid(g)) * k * v\n    o = sum[d](q * S)",
    "two gates": "    S <- exp(-abs(g)) * sigmoid(f) * S + k * v\n    o = sum[d](q * S)",
    "what a sigmoid leaves": "    S <- (1 - sigmoid(g)) * S + k * v\n    o = sum[d](q * S)",
    "a decay by the number of the head": "    S <- (1 - 2.0 ** (-5 - h)) * S + k * v\n    o = sum[d](q * S)",
    "a root, a power and a fraction": "    S <- sqrt(sigmoid(g)) ** 2.5 / (1 + exp(-f)) * S + k * v\n    o = sum[d](q * S)",
    "a decay that is never below a fifth": "    S <- (0.2 + 0.8 * sigmoid(f)) * S + k * v\n    o = sum[d](q * S)",
    "by feature, and what is written twice as an exponential": (
        "    S <- exp(-abs(f)) * S + exp(f / 8) * exp(f / 8) * k * v\n    o = sum[d](q * S)"
    ),
    "a constant by feature": "    S <- exp(-abs(u)) * S + k * v\n    o = sum[d](q * S)",
    "by feature, with the number of the step": "    S <- exp(-abs(f)) * S + t * k * v / 64\n    o = sum[d](q * S) / size(t)",
    "by feature of the values": "    S <- exp(-abs(v)) * S + k * v\n    o = sum[d](q * S)",
    "a constant": "    S <- 0.9 * S + k * v\n    o = sum[d](q * S)",
    "a difference": "    S <- exp(-abs(g)) * S - k * v\n    o = sum[d](q * S) - v",
    "a correction": "    S <- S + k * (v - sum[d](k * S)) / 8\n    o = sum[d](q * S)",
    "a correction after the decay": "    S <- exp(-abs(g)) * S\n    S <- S + k * (v - sum[d](k * S)) / 8\n    o = sum[d](q * S)",
    "a correction of what was before the decay": "    S <- exp(-abs(g)) * S + k * (v - sum[d](k * S)) / 8\n    o = sum[d](q * S)",
    "a correction multiplied out": "    S <- exp(-abs(g)) * (S - sum[d](k * S) * k / 8) + k * v\n    o = sum[d](q * S)",
    "a correction on the other side": "    S <- S + v * (k - sum[e](v * S)) / 8\n    o = sum[d](q * S)",
    "a correction by other vectors": "    S <- exp(-abs(f)) * S + sum[d](q * S) * k / 8 + k * v\n    o = sum[d](q * S)",
    "a correction read before it is written": "    o = sum[d](q * S)\n    S <- S + k * (v - sum[d](k * S)) / 8",
    "two corrections": "    S <- exp(-abs(g)) * S - k * sum[d](k * S) / 16 + q * sum[d](k * S) / 8 + k * v\n    o = sum[d](q * S)",
    "two corrections by different vectors": "    S <- S - k * sum[d](k * S) / 16 - q * sum[d](q * S) / 16 + k * v\n    o = sum[d](q * S)",
    "one correction after the other": (
        "    S <- S - k * sum[d](k * S) / 16\n    S <- S - q * sum[d](q * S) / 16 + k * v\n    o = sum[d](q * S)"
    ),
    "a state that corrects another one": (
        "    state R[b,h,d,e] along t\n    R <- exp(-abs(g)) * R + q * (v - sum[d](q * R)) / 8\n"
        "    S <- S + k * (sum[d](k * R) - sum[d](k * S)) / 8\n    o = sum[d](q * S)"
    ),
    "corrections in both directions": (
        "    state R[b,h,d,e] along t reverse\n    R <- exp(-abs(g)) * R + q * (v - sum[d](q * R)) / 8\n"
        "    S <- S + k * (v - sum[d](k * S)) / 8\n    o = sum[d](q * S) + sum[d](k * R)"
    ),
    "a state that is lost": "    S <- where(g > 1, 0, exp(-abs(g))) * S + k * v\n    o = sum[d](q * S)",
    "a state that is lost before it decays": "    S <- exp(-abs(g)) * where(g > 1, 0, S) + k * v\n    o = sum[d](q * S)",
    "a lost state read before the write": "    S <- where(g < -1, 0, S)\n    o = sum[d](q * S)\n    S <- exp(-abs(f)) * S + k * v",
    "a lost state read before it is lost": "    o = sum[d](q * S)\n    S <- where(abs(g) < 1, S * exp(-abs(g)), 0) + k * v",
    "a correction of a state that is lost": "    S <- where(g > 1, 0, S)\n    S <- S + k * (v - sum[d](k * S)) / 8\n    o = sum[d](q * S)",
    "a state that begins with something else": "    S <- where(g > 1, u * v, exp(-abs(g)) * S) + k * v\n    o = sum[d](q * S)",
    "a position": "    S <- exp(-abs(g)) * S + t * k * v / 64\n    o = sum[d](q * S)",
    "how many steps there are": "    S <- exp(-abs(g)) * S + k * v / size(t)\n    o = sum[d](q * S)",
    "a running maximum": (
        "    state m[b,h] along t\n    old = m\n    m <- max(m - abs(g), g)\n"
        "    S <- exp(old - abs(g) - m) * S + exp(g - m) * k * v\n    o = sum[d](q * S) * exp(m) / (1 + exp(m))"
    ),
    "a running maximum that is lost": (
        "    state m[b,h] = -inf along t\n    m <- max(where(g > 1, -inf, m) - abs(g), g)\n    S <- S + k * v\n    o = sum[d](q * S) + m"
    ),
    "element by element": "    state y[b,h,d] along t\n    y <- f * y / 4 + k\n    S <- S + y * v\n    o = sum[d](q * S) / 8",
    "element by element, with any sign": (
        "    state y[b,h,e] along t\n    y <- tanh(g) * (y - v) + y / 2\n    S <- S + k * v\n    o = sum[d](q * S) + y"
    ),
    "element by element, read before the write": (
        "    state y[b,h,e] along t\n    old = y\n    y <- sigmoid(g) * y + v\n    S <- S + k * v\n    o = sum[d](q * S) * old + y"
    ),
    "element by element, read between": (
        "    state y[b,h,e] along t\n    y <- where(g > 1, 0, y)\n    mid = y\n    y <- (1 - sigmoid(g)) * y + v\n"
        "    S <- S + k * v\n    o = sum[d](q * S) + mid * y"
    ),
    "element by element, backwards": (
        "    state y[b,h,e] along t reverse\n    y <- sigmoid(g) * y + v\n    S <- S + k * v\n    o = sum[d](q * S) + y"
    ),
    "the step before": (
        "    state y[b,h,d] along t\n    old = y\n    y <- k\n    S <- exp(-abs(g)) * S + (k - old) * v\n    o = sum[d](q * S) / 8"
    ),
    "one state by another, element by element": (
        "    state y[b,h,e] along t\n    state z[b,h,e] along t\n    y <- sigmoid(g) * y + v\n    z <- sigmoid(y) * z + y\n"
        "    S <- S + k * v\n    o = sum[d](q * S) + z"
    ),
    "reads of two": (
        "    state z[b,h,d] along t\n    S <- S + exp(k) * v\n    z <- z + exp(k)\n    o = sum[d](exp(q) * S) / sum[d](exp(q) * z)"
    ),
}
NOT = {
    "a decay that may be negative": ("    S <- g * S + k * v\n    o = sum[d](q * S)", "a decay (input) may be negative or 0"),
    "a correction along all axes": ("    S <- S + u * sum[d](k * v * S)\n    o = sum[d](q * S)", "differs along all of its axes"),
    "corrections from both sides": (
        "    S <- S - k * sum[d](k * S) / 8 - v * sum[e](v * S) / 8\n    o = sum[d](q * S)",
        "by the other axes",
    ),
    "a product of the state with itself": ("    S <- S * S + k * v\n    o = sum[d](q * S)", "depends on states"),
    "a decay from the state": ("    S <- sigmoid(sum[d](q * S)) * S + k * v\n    o = sum[d](q * S)", "depends on states"),
    "a write from the state": ("    S <- exp(-abs(g)) * S + k * tanh(S)\n    o = sum[d](q * S)", "depends on states"),
    "a nonlinear step": ("    S <- tanh(S + k * v)\n    o = sum[d](q * S)", "is not what it was times a decay"),
    "other steps": ("    S <- exp(-abs(g)) * S + k[t -> t - 1] * v\n    o = sum[d](q * S)", "other steps are read"),
    "a matrix element by element": (
        "    S <- exp(-abs(g)) * S + k * v\n    o = sum[d](q * exp(S))",
        "in another way than by a contraction",
    ),
    "two states that need each other": (
        "    state y[b,h,e] along t\n    state z[b,h,e] along t\n    y <- sigmoid(g) * y + z\n    z <- sigmoid(g) * z + y + v\n"
        "    S <- S + k * v\n    o = sum[d](q * S) + z",
        "is not what it was times a decay",
    ),
    "a minimum of a state and a product with it": (
        "    state y[b,h,e] along t\n    y <- min(y * g, v)\n    S <- S + k * v\n    o = sum[d](q * S) + y",
        "is not what it was times a decay",
    ),
    "a correction by a state that goes the other way": (
        "    state R[b,h,d,e] along t reverse\n    R <- R + q * v\n    S <- S + k * (v - sum[d](k * R)) / 8\n    o = sum[d](q * S)",
        "goes the other way",
    ),
    "a product of corrections": (
        "    S <- exp(-abs(g)) * S + k * sum[d](k * S) * sum[d](q * S) / 64 + k * v\n    o = sum[d](q * S)",
        "a product of what is read",
    ),
    "a correction by a maximum": ("    S <- S + k * (v - max[d](k * S))\n    o = sum[d](q * S)", "in another way than by a contraction"),
    "a correction by a part of a sum": (
        "    S <- S + k * (v - sum[d where d < 3](k * S))\n    o = sum[d](q * S)",
        "in another way than by a contraction",
    ),
    "a maximum": ("    S <- exp(-abs(g)) * S + k * v\n    o = max[d](q * S)", "read by max"),
}


def posed(
    made: Kernel, length: int, feature: int = 8, seed: int = 3, **params: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
    problem = pose(made.graph, {}, params, Usual(length, feature, 2, 1))
    torch.manual_seed(seed)
    states = {s.name: torch.rand([problem.extents[a] for a in s.axes]) for s in made.graph.states.values()}
    return problem.inputs(seed=seed), states, dict(problem.params)


def agree(base: Kernel, made: Kernel, length: int, tolerance: float = 2e-4) -> None:
    """``made`` agrees with ``base`` in float64: outputs, final states, and gradients through both."""
    inputs, states, params = posed(base, length)

    def run(which: Kernel, dtype: torch.dtype, **how: object) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        leaves = {n: x.to(dtype).requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
        began = {n: x.to(dtype).requires_grad_() for n, x in states.items()}
        result, final = which(**leaves, **params, initial=began, return_final=True, **how)
        values = [*(result if isinstance(result, tuple) else [result]), *final.values()]
        torch.manual_seed(5)
        cotangents = [torch.randn(v.shape, dtype=torch.float64).to(v.dtype) for v in values]
        wanted = [x for x in (*leaves.values(), *began.values()) if x.requires_grad]
        return [v.detach() for v in values], torch.autograd.grad(values, wanted, cotangents, allow_unused=True)

    (found, gradients), (right, exact) = run(made, torch.float32, strict=True), run(base, torch.float64, backend="reference")
    for a, b in [*zip(found, right, strict=True), *((x, y) for x, y in zip(gradients, exact, strict=True) if y is not None)]:
        assert a is not None
        size = b.square().mean().sqrt()
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=float(tolerance * size) + 1e-6)


def agree_exactly(base: Kernel, made: Kernel, length: int) -> None:
    """What ``made`` computes is what ``base`` does: their references agree in float64, gradients included, up to its rounding."""
    inputs, states, params = posed(base, length)

    def run(which: Kernel) -> list[Tensor | None]:
        leaves = {n: x.double().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
        began = {n: x.double().requires_grad_() for n, x in states.items()}
        result, final = which(**leaves, **params, initial=began, return_final=True, backend="reference")
        values = [*(result if isinstance(result, tuple) else [result]), *final.values()]
        torch.manual_seed(5)
        cotangents = [torch.randn(v.shape, dtype=torch.float64) for v in values]
        wanted = [x for x in (*leaves.values(), *began.values()) if x.requires_grad]
        return [*(v.detach() for v in values), *torch.autograd.grad(values, wanted, cotangents, allow_unused=True)]

    for a, b in zip(run(made), run(base), strict=True):
        if b is not None:
            assert a is not None
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * float(b.square().mean().sqrt()) + 1e-12)


def in_chunks(made: Kernel) -> ChunkedKernel:
    found = ChunkedKernel.of(made)
    assert isinstance(found, ChunkedKernel), found
    return found


def test_these_go_in_chunks() -> None:
    found = {name: ChunkedKernel.of(kernel(name)) for name in (*REQUIRED, *OTHERS)}
    assert {name: made.length for name, made in found.items() if isinstance(made, ChunkedKernel)} == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_chunks_agree_with_the_steps(name: str) -> None:
    made = in_chunks(kernel(name))
    agree(kernel(name), made, 3 * made.length)


@pytest.mark.parametrize("spelling", SPELT)
def test_spellings_go_in_chunks(spelling: str) -> None:
    made: Kernel = weft.loads(HEAD + SPELT[spelling] + "\n").spec
    chunks = in_chunks(made)
    agree_exactly(made, chunks, 2 * chunks.length)


@pytest.mark.parametrize("spelling", every(4, SPELT))
def test_kernels_of_spellings(spelling: str) -> None:
    made: Kernel = weft.loads(HEAD + SPELT[spelling] + "\n").spec
    chunks = in_chunks(made)
    agree(made, chunks, 2 * chunks.length)


@pytest.mark.parametrize("spelling", NOT)
def test_what_does_not_go_in_chunks_says_why(spelling: str) -> None:
    body, why = NOT[spelling]
    found = ChunkedKernel.of(weft.loads(HEAD + body + "\n").spec)
    assert isinstance(found, str)
    assert why in found, found


@pytest.mark.parametrize("name", ["gla", "gla_bidirectional", "hgrn2", "rwkv5", "rwkv6", "gsa"])
def test_decays_by_feature_go_in_blocks(name: str) -> None:
    """States from chunk to chunk only, and steps of blocks that meet those of other blocks."""
    graph = in_chunks(kernel(name)).graph
    assert {s.along for s in graph.states.values()} == {("t.chunk.chunk",)}
    nodes = list(ir.topological([*graph.outputs.values(), *(u for s in graph.states.values() for u in s.updates)]))
    pairs = [n for n in nodes if isinstance(n, ir.Reduce) and set(n.over) == {"t.chunk.in4.2", f"t.in{BLOCK}.2"}]
    assert len(pairs) == len(graph.states)


NOT_IN_BLOCKS = {
    "along all axes": ("    S <- exp(-abs(f) - abs(v)) * S + k * v\n    o = sum[d](q * S)", "decays vary along all axes"),
    "solved": ("    S <- exp(-abs(f)) * S\n    S <- S + k * (v - sum[d](k * S)) / 8\n    o = sum[d](q * S)", "is solved or scanned"),
    "lost": ("    S <- where(g > 1, 0, exp(-abs(f)) * S) + k * v\n    o = sum[d](q * S)", "only some steps of a block write S"),
}


@pytest.mark.parametrize("spelling", NOT_IN_BLOCKS)
def test_what_does_not_go_in_blocks_says_why_and_goes_in_shorter_chunks(spelling: str) -> None:
    body, why = NOT_IN_BLOCKS[spelling]
    made: Kernel = weft.loads(HEAD + body + "\n").spec
    with pytest.raises(Unchunkable, match=why):
        in_blocks(find_chunks(made.graph, BLOCK), LENGTH // BLOCK)
    chunks = in_chunks(made)
    assert chunks.length == BLOCK
    agree(made, chunks, 2 * BLOCK)


@pytest.mark.parametrize("name", ["simple_gla", "gla", "mlstm_sigmoid", "hgrn2", "hgrn"])
def test_check_passes(name: str) -> None:
    """Strides, empty and poisoned inputs, as for any other kernel."""
    report = check_kernel(in_chunks(kernel(name)), backend="c", dtypes=("float32", "bfloat16"), trials=1, quick=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["simple_gla", "gla", "hgrn2", "rwkv6", "ssd", "mlstm_sigmoid", "gated_delta", "kda", "rwkv7"])
def test_gradients_of_gates_are_exact_for_their_size(name: str, level: float) -> None:
    base = gated(name)
    made = in_chunks(base)
    inputs, _, params = posed(base, 2 * made.length, 16, level=level)
    gate = LOGS.get(name) or {"ssd": "dt", "mlstm_sigmoid": "fg"}[name]
    exact = {n: x.double() for n, x in inputs.items()}
    leaf, wide = inputs[gate].requires_grad_(), exact[gate].requires_grad_()
    got, want = made(**inputs, **params, strict=True), base.reference(**exact, **params)
    first, right = (o[0] if isinstance(o, tuple) else o for o in (got, want))
    cotangent = torch.randn(right.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (found,) = torch.autograd.grad(first, [leaf], cotangent.float())
    (reference,) = torch.autograd.grad(right, [wide], cotangent)
    error, size = (found - reference).square().mean().sqrt(), reference.square().mean().sqrt()
    assert error <= 1e-4 * size + 1e-30, (float(error), float(size))


def test_a_gate_that_forgets_everything() -> None:
    """exp(-inf) is 0: nothing before such a step is seen, and nothing becomes NaN."""
    base = kernel("simple_gla")
    made = in_chunks(base)
    inputs, _, _ = posed(base, 128)
    inputs["g"][..., 10] = inputs["g"][..., 100] = -torch.inf
    found, right = made(**inputs, strict=True), base.reference(**{n: x.double() for n, x in inputs.items()})
    torch.testing.assert_close(found.double(), right, rtol=5e-4, atol=5e-4)


def test_a_constant_decay_that_forgets_everything() -> None:
    """The same where the decay is one for all steps: exp(-exp(w)) with a large w."""
    base = kernel("rwkv5")
    made = in_chunks(base)
    inputs, _, _ = posed(base, 2 * made.length)
    inputs["w"][0] = 100.0
    leaf = inputs["w"].requires_grad_()
    found, right = made(**inputs, strict=True), base.reference(**{n: x.detach().double() for n, x in inputs.items()})
    torch.testing.assert_close(found.double(), right, rtol=5e-4, atol=5e-4)
    (gradient,) = torch.autograd.grad(found.sum(), [leaf])
    assert gradient.isfinite().all()


PACKED = tuple("hgrn rwkv4 mlstm rg_lru simple_gla gla gated_delta comba gsa".split())


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_go_in_chunks(name: str) -> None:
    """Sequences that end within chunks, of a step, of several chunks: outputs and gradients, and no nan comes in from a neighbour."""
    base = kernel(name)
    packed = PackedKernel(base, "t")
    made = in_chunks(packed)
    length = 3 * made.length
    inputs, _, params = posed(base, length)
    bounds = [0, 5, 5 + made.length // 2, 2 * made.length, 2 * made.length + 1, length]
    places = torch.cat([torch.arange(stop - start) for start, stop in pairwise(bounds)])

    def run(which: Kernel, given: dict[str, Tensor], **how: object) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        leaves = {n: x.clone().requires_grad_() for n, x in given.items()}
        result = which(**leaves, **{"place.t": places}, **params, **how)
        values = [*(result if isinstance(result, tuple) else [result])]
        torch.manual_seed(5)
        cotangents = [torch.randn(v.shape, dtype=torch.float64).to(v.dtype) for v in values]
        return [v.detach() for v in values], torch.autograd.grad(values, [*leaves.values()], cotangents, allow_unused=True)

    found, gradients = run(made, inputs, strict=True)
    right, exact = run(packed, {n: x.double() for n, x in inputs.items()}, backend="reference")
    for a, b in [*zip(found, right, strict=True), *((x, y) for x, y in zip(gradients, exact, strict=True) if y is not None)]:
        assert a is not None
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4 * float(b.square().mean().sqrt()) + 1e-6)
    dims = {t.name: t.dims for t in (*base.typed.inputs, *base.typed.outputs)}
    for n, x in inputs.items():
        if ("t",) not in dims[n]:
            continue
        x.select(dims[n].index(("t",)), 6).fill_(torch.nan)
        spoilt, _ = run(made, inputs, strict=True)
        for output, a, b in zip(base.output_names, spoilt, found, strict=True):
            along = dims[output].index(("t",))
            assert a.narrow(along, 5, bounds[2] - 5).isnan().any(), n
            for start, stop in ((0, 5), (bounds[2], length)):
                torch.testing.assert_close(a.narrow(along, start, stop - start), b.narrow(along, start, stop - start))
        break


def test_names_of_a_spec_are_not_taken() -> None:
    text = "    state solved_0_0[b,h,d,e] along t\n    solved_0_0 <- 0.9 * solved_0_0 + k * (v - sum[d](k * solved_0_0)) / 8\n"
    made: Kernel = weft.loads(HEAD + text + "    S <- S + k * v\n    o = sum[d](q * (S + solved_0_0))\n").spec
    agree(made, in_chunks(made), 2 * LENGTH)


def test_gradients_of_heads_that_are_summed() -> None:
    """Rewriting makes two operands of the solve one: its gradient counts once."""
    made: Kernel = weft.loads(HEAD + "    S <- exp(-abs(g)) * S + k * (v - sum[d,h](k * S)) / 16\n    o = sum[d](q * S)\n").spec
    agree(made, in_chunks(made), 2 * LENGTH)


def test_corrections_with_an_axis_that_is_summed_elsewhere_go_step_by_step() -> None:
    head = HEAD.replace("u[h,d]", "p[b,h,t,x]").replace(
        "    state", "    state R[b,h,d,x,e] along t\n    state T[b,h,d,e] along t\n    state"
    )
    text = "    S <- exp(-abs(g)) * S + k * (v - sum[d](k * S)) / 8\n    R <- R + q * p * sum[d](k * S) / 8\n"
    made: Kernel = weft.loads(head + text + "    T <- T + sum[x](p * R) / 8\n    o = sum[d](q * T)\n").spec
    found = ChunkedKernel.of(made)
    assert isinstance(found, str)
    assert "has an axis that is summed in it" in found


def test_gradients_of_a_sum_of_several_rows_a_step() -> None:
    text = "kernel spec(k[t,r,c,d], v[t,r,e]) -> S[d,e]:\n    state S[d,e] along t\n    S <- S + sum[r,c](k * v) / 8\n"
    made: Kernel = weft.loads(text).spec
    torch.manual_seed(1)
    k, v, final = torch.randn(5, 2, 3, 4, requires_grad=True), torch.randn(5, 2, 6, requires_grad=True), torch.randn(4, 6)
    got = torch.autograd.grad(made(k, v, strict=True), (k, v), final)
    want = torch.autograd.grad(torch.einsum("trcd,tre->de", k, v) / 8, (k, v), final)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_state_whose_rows_are_all_written_at_every_step_is_no_history() -> None:
    text = "kernel spec(v[t,e], w[j]) -> o[t,e]:\n    state u[j,e] along t\n"
    text += "    u <- where(j == j, sum[j](w * u) / 4 + v, u)\n    o = sum[j](w * u)\n"
    made: Kernel = weft.loads(text).spec
    torch.manual_seed(2)
    v, w = torch.randn(5, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    found, right = made(v, w, strict=True), made.reference(v.double(), w.double())
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(o.sum(), (v, w)) for o in (found, right))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_states_that_begin_with_the_length_go_step_by_step() -> None:
    text = HEAD.replace("u[h,d]", "u[d,e]").replace("[b,h,d,e] along", "[b,h,d,e] = u / size(t) along")
    found = ChunkedKernel.of(weft.loads(text + "    S <- exp(-abs(g)) * S + k * v\n    o = sum[d](q * S)\n").spec)
    assert found == "what S begins with depends on the steps"


WITHIN = "kernel spec(q[b,h,t,d], k[b,h,(t u),d], v[b,h,(t u),e], g[b,h,t], w[b,h,(t u)]{more}) -> {out}:\n    axis u = 3\n"
WITHIN_STEPS = {
    "read after the last": ("", "o[b,h,t,e]", "    state S[b,h,d,e] along (t u)\n{step}    o = sum[d](q * S[u -> size(u) - 1])"),
    "backwards, read after the first": (
        "", "o[b,h,t,e]", "    state S[b,h,d,e] along (t u) reverse\n{step}    o = sum[d](q * S[u -> 0])",
    ),
    "read at every step": ("", "o[b,h,(t u),e]", "    state S[b,h,d,e] along (t u)\n{step}    o = sum[d](q * S) * w"),
    "counted tokens": (
        "", "o[b,h,t,e]", "    state S[b,h,d,e] along (t u)\n{step}    o = sum[d](q * S[u -> size(u) - 1]) * (t + 1) / size(t)",
    ),
    "a state that is given": ("", "S[b,h,d,e]", "    state S[b,h,d,e] along (t u)\n{step}"),
}  # fmt: skip
STEP = "    S <- where(u == 0, exp(-abs(g)), 1) * S\n    S <- S + k * (v - sum[d](k * S)) / 8\n"
NOT_WITHIN = {
    "several steps of a token are read": (
        "", "o[b,h,t,e]", "    state S[b,h,d,e] along (t u)\n{step}    o = sum[d](q * (S[u -> 0] + S[u -> size(u) - 1]))",
        "o reads several steps of u",
    ),
    "a step in the middle": (
        "", "o[b,h,t,e]", "    state S[b,h,d,e] along (t u)\n{step}    o = sum[d](q * S[u -> 1])", "neither the first nor the last",
    ),
    "steps are added up": (
        "", "o[b,h,t,e]", "    state S[b,h,d,e] along (t u)\n{step}    o = sum[d,u](q * S)", "steps are reduced",
    ),
    "a dimension of its own": (
        ", x[b,t,u]", "o[b,h,t,e]",
        "    state S[b,h,d,e] along (t u)\n    S <- sigmoid(x) * S\n{step}    o = sum[d](q * S[u -> size(u) - 1])",
        "u is a dimension of x by itself",
    ),
}  # fmt: skip


def _within(more: str, out: str, body: str) -> Kernel:
    made: Kernel = weft.loads(WITHIN.format(more=more, out=out) + body.format(step=STEP) + "\n").spec
    return made


def _of_tokens(base: Kernel, made: ChunkedKernel) -> Callable[..., object]:
    """The chunks of the steps within tokens, called as the kernel of tokens is."""
    flat = FlatKernel.of(base)
    assert isinstance(flat, FlatKernel)

    def run(strict: bool, initial: dict[str, Tensor], return_final: bool, **given: Tensor) -> object:
        inputs = {n: x for n, x in given.items() if n in base.input_names}
        bound = base.prepare(inputs, {n: x for n, x in given.items() if n not in inputs})
        call = flattened(bound, flat)
        assert call is not None
        result, final = made(**call.inputs, **call.bound.params, strict=strict, initial=initial, return_final=return_final)
        return tuple(taken(bound, [*(result if isinstance(result, tuple) else [result])])), final

    return run


@pytest.mark.parametrize("spelling", [*WITHIN_STEPS, "gated_delta_product"])
def test_steps_within_steps_go_in_chunks(spelling: str) -> None:
    base = kernel(spelling) if spelling not in WITHIN_STEPS else _within(*WITHIN_STEPS[spelling])
    made = chunks_of(base)
    assert isinstance(made, ChunkedKernel), made
    agree(base, _of_tokens(base, made), made.length)


@pytest.mark.parametrize("spelling", NOT_WITHIN)
def test_steps_within_steps_that_do_not_say_why(spelling: str) -> None:
    *text, why = NOT_WITHIN[spelling]
    found = chunks_of(_within(*text))
    assert isinstance(found, str)
    assert why in found, found


def test_explain_tells() -> None:
    pytest.importorskip("triton")
    made = kernel("simple_gla")
    text = str(explain(made, pose(made.graph, {}, {}, Usual(256, 16, 2, 1)), "sm_90", "float16"))
    assert "chunks    of 64 steps along t, from 128 steps on" in text
    other = kernel("gla")
    text = explain(other, pose(other.graph, {}, {}, Usual(256, 16, 2, 1)), "sm_90", "float16").chunks
    assert text.startswith("of 64 steps along t, in blocks of 16, from 128 steps on")
    other = kernel("gru")
    assert "none, every step by itself" in explain(other, pose(other.graph, {}, {}, Usual(16, 16, 2, 1)), "sm_90", "float16").chunks
    assert not explain(made, pose(made.graph, {}, {}, Usual(256, 64, 2, 1))).chunks


CALLS = """
import torch

from tests.evidence.library import kernel
from tests.interpreter import skip_unused_checks
from tests.runtime.test_chunked import agree, posed
from weft.runtime import chunked, dual, execute
from weft.runtime.check import check_kernel, render

skip_unused_checks()
done = []
for name in ("_in_chunks", "_in_linear_time"):
    inner = getattr(execute, name)
    setattr(execute, name, lambda *given, inner=inner: done.append(inner(*given)) or done[-1])

def check(name, length, chunks):
    made = kernel(name)
    done.clear()
    agree(made, lambda **given: made(**given, backend="triton"), length)
    assert any(found is not None for found in done) == chunks, name

for name, length in (("simple_gla", 137), ("gla_bidirectional", 128), ("rg_lru", 131), ("rwkv4", 128)):
    check(name, length, True)
report = check_kernel(kernel("simple_gla"), backend="triton", dtypes=("float16",), trials=1)
assert report.passed, render(report)
assert [result.case.sizes["t"] for result in report.results][-1] == 133  # two chunks and five steps
dual.GPU_COST = 0.1
for length in (128, 150):  # the queries that are left are pairs
    done.clear()
    made, inputs = kernel("retention"), [torch.randn(1, 1, length, 8) for _ in range(3)]
    leaves, wide = ([x.to(d).requires_grad_() for x in inputs] for d in (torch.float32, torch.float64))
    found, right = made(*leaves, backend="triton"), made(*wide, backend="reference")
    assert any(f is not None for f in done), length
    for a, b in [(found, right), *zip(*(torch.autograd.grad(o.cos().sum(), xs) for o, xs in ((found, leaves), (right, wide))))]:
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5)
check("simple_gla", 127, False)  # too short
check("gla_bidirectional", 37, False)  # steps would be left over in both directions
chunked.LENGTH = 16  # the interpreter is slow
check("gated_delta_product", 19, True)  # two steps a token: 38
check("gated_delta_product", 15, False)  # too short
check("mlstm", 35, True)
check("gla", 37, True)
for name in ("hgrn", "simple_gla"):
    made = kernel(name)
    inputs, _, _ = posed(made, 37)
    packed = {"cu_seqlens": {"t": torch.tensor([0, 5, 21, 21, 35, 37])}}
    done.clear()
    leaves, wide = ([x.to(d).requires_grad_() for x in inputs.values()] for d in (torch.float32, torch.float64))
    found, right = made(*leaves, **packed, backend="triton"), made(*wide, **packed, backend="reference")
    assert any(f is not None for f in done), name
    for a, b in [(found, right), *zip(*(torch.autograd.grad(o.sum(), xs) for o, xs in ((found, leaves), (right, wide))))]:
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5)
"""


def test_calls_on_gpus_go_in_chunks() -> None:
    """Whole calls, in the interpreter: chunks, the steps that are left, states in and out, and their gradients."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", CALLS], env=environment, cwd=root, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
