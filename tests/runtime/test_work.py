"""How much plans compute: nothing again for every feature, no scores in memory, and a backward pass of a few forward passes."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.evidence.library import OTHERS, REQUIRED, every, kernel
from weft.compiler.plan import Plan
from weft.runtime.check import check_kernel, render
from weft.runtime.costs import plan_cost, totals
from weft.runtime.kernel import Kernel
from weft.runtime.problem import Usual, pose

MOST = 10
"""Forward passes that a backward pass may cost; forgetting attention and what recurrences are attended to in come to 7."""

RELATIVE = """
kernel a(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], table[r,d]) -> o[b,h,i,e]:
    param reach: int = 4
    mask j <= i
    at = clamp(j - i, -reach, reach) + reach
    s = sum[d](q * (k + table[r -> at])) / sqrt(size(d))
    o = sum[j](softmax[j](s) * v)
"""
"""Shaw et al. (2018, arXiv:1803.02155), equation 4, as it is written."""

HISTOGRAM = """
kernel a(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], table[r,e]) -> o[b,h,i,e]:
    param reach: int = 4
    mask j <= i
    at = clamp(j - i, -reach, reach) + reach
    p = softmax[j](sum[d](q * k) / sqrt(size(d)))
    o = sum[j](p * v) + sum[r](sum[j where at == r](p) * table)
"""
"""The rows of a table of values, weighed by how much attention falls on each distance."""

SMOOTHED = """
kernel a(q[b,h,i,d], k[b,h,t,d], v[b,h,t,e], decay[h,d]) -> o[b,h,i,e]:
    axis j = size(t)
    state K[b,h,d] along t
    K <- sigmoid(decay) * K + (1 - sigmoid(decay)) * k
    mask j <= i
    o = sum[j](softmax[j](sum[d](q * K[t -> j]) / sqrt(size(d))) * v[t -> j])
"""
"""Attention to a running mean of keys (Ma et al., 2022, arXiv:2209.10655)."""

LAYER = """
kernel a(x[b,t,c], wq[h,d,c], wk[h,d,c], wv[h,e,c], wo[h,e,c]) -> y[b,i,c]:
    axis i = size(t)
    axis j = size(t)
    sample wq = normal() / sqrt(size(c))
    sample wk = normal() / sqrt(size(c))
    q = sum[c](x[t -> i] * wq)
    k = sum[c](x[t -> j] * wk)
    v = sum[c](x[t -> j] * wv)
    mask j <= i
    o = sum[j](softmax[j](sum[d](q * k) / sqrt(size(d))) * v)
    y = sum[h, e](o * wo)
"""
"""A whole layer: what heads make is projected, too. Weights lie as those of `torch.nn.Linear`, outputs first."""

PROJECTED = (
    LAYER.replace("[h,d,c]", "[h,c,d]")
    .replace("wv[h,e,c], wo[h,e,c]) -> y[b,i,c]", "wv[h,c,e]) -> o[b,h,i,e]")
    .replace("    y = sum[h, e](o * wo)\n", "")
)
"""Its attention alone, with weights inputs first."""

READ = LAYER.replace("x[t -> i]", "x").replace("x[t -> j]", "x").replace("q * k)", "q[t -> i] * k[t -> j])").replace("* v)", "* v[t -> j])")
"""Projected first, and then read as queries and keys."""

CONVOLVED = (
    READ.replace("wo[h,e,c])", "wo[h,e,c], taps[h,d,r])")
    .replace("axis i", "axis r = 4\n    axis i")
    .replace("k = sum[c](x * wk)", "k0 = sum[c](x * wk)\n    k = sum[r](k0[t -> t - r] * taps)")
)
"""A short convolution goes over the keys, as in Mega and in layers of linear attention."""

CROSSED = """
kernel a(x[b,i,c], context[b,j,m], pad[b,j]: bool, wq[h,d,c], bq[h,d], wk[h,d,m], wv[h,d,m]) -> o[b,h,i,d]:
    sample wq = normal() / sqrt(size(c))
    sample wk = normal() / sqrt(size(m))
    mask not pad and j <= i
    q = sum[c](x * wq) + bq
    k = sum[m](context * wk)
    v = sum[m](context * wv)
    o = sum[j](softmax[j](sum[d](q * k) / sqrt(size(d))) * v)
"""
"""To the tokens of another sequence, with padding."""

SHIFTED = """
kernel a(x[b,t,h,d], mk[h,d], mv[h,d]) -> o[b,i,h,d]:
    axis i = size(t)
    axis j = size(t)
    k = x + mk * (x[t -> t - 1] - x)
    v = x + mv * (x[t -> t - 1] - x)
    mask j <= i
    o = sum[j](softmax[j](sum[d](x[t -> i] * k[t -> j]) / sqrt(size(d))) * v[t -> j])
"""
"""Keys and values are mixed with those of the token before (token shift, as in RWKV)."""

ALONE = LAYER.replace("[b,", "[")
"""One sample, without an axis for it."""

ONE_HEAD = LAYER.replace("[h,", "[").replace("sum[h, e]", "sum[e]")
"""Without an axis of heads."""

SPECS = {
    "relative": RELATIVE,
    "histogram": HISTOGRAM,
    "smoothed": SMOOTHED,
    "projected": PROJECTED,
    "layer": LAYER,
    "alone": ALONE,
    "one head": ONE_HEAD,
    "read": READ,
    "convolved": CONVOLVED,
    "crossed": CROSSED,
    "shifted": SHIFTED,
}

SHARE = {
    "relative": 1,
    "histogram": 1,
    "smoothed": 1.5,
    "projected": 0.7,
    "layer": 0.7,
    "alone": 0.9,
    "one head": 0.15,
    "read": 0.7,
    "convolved": 0.7,
    "crossed": 1.2,
    "shifted": 1,
}
"""Of what attention without a mask costs; a causal mask leaves half of that."""


def _plans(
    made: Kernel, sizes: dict[str, int] | None = None, target: str = "c", feature: int = 64
) -> tuple[Plan, Plan | None, tuple[int, int]]:
    """Forward and backward, and their FLOPs at usual sizes."""
    problem = pose(made.graph, sizes or {}, {}, Usual(feature=feature))
    lowered = made.lowered(target, extents=problem.extents, params=problem.params)
    if lowered.forward is None:
        pytest.skip("not fused")
    backward = lowered.backward(frozenset(lowered.differentiable)) if lowered.differentiable else None
    flops = [
        totals(plan_cost(p, problem.extents, problem.params, "float32")).flops if p is not None else 0 for p in (lowered.forward, backward)
    ]
    return lowered.forward, backward, (flops[0], flops[1])


@pytest.mark.parametrize(
    "name", ["mixture_of_attention_heads", *every(2, [n for n in (*REQUIRED, *OTHERS) if n != "mixture_of_attention_heads"])]
)
def test_a_backward_pass_costs_a_few_forward_passes(name: str) -> None:
    _, _, (forward, backward) = _plans(kernel(name))
    assert backward <= MOST * forward


@pytest.mark.parametrize("name", ["vsa", "dmc", "linformer", "t5_bias"])
def test_scores_are_not_computed_again_for_every_feature(name: str) -> None:
    _, _, (plain, _) = _plans(kernel("full"))
    _, _, (forward, _) = _plans(kernel(name))
    assert forward <= 2 * plain


@pytest.mark.parametrize("name", SPECS)
def test_no_scores_in_memory(name: str) -> None:
    _, _, (plain, plain_backward) = _plans(kernel("full"))
    made: Kernel = weft.loads(SPECS[name]).a
    assert made.plan(backend="c"), "raises where nothing is fused"
    forward, backward, flops = _plans(made, {"r": 9} if "table" in SPECS[name] else {"t": 2048} if "size(t)" in SPECS[name] else {})
    assert backward is not None
    assert flops[0] <= SHARE[name] * plain and flops[1] <= SHARE[name] * plain_backward
    pairs = ({"i", "j"}, {"i", "t"})
    assert not [b for p in (forward, backward) for b in p.buffers.values() for pair in pairs if pair <= set(b.axes)]


@pytest.mark.parametrize("name", ["projected", "layer", "alone", "one head", "read", "convolved", "crossed"])
def test_projections_are_made_once_on_gpus(name: str) -> None:
    """At features where tiles hold few rows, and projected values would be made again for every one of them."""
    _, _, plain = _plans(kernel("full"), target="sm_90", feature=128)
    made: Kernel = weft.loads(SPECS[name]).a
    assert made.plan(backend="triton"), "raises where nothing is fused"
    _, _, flops = _plans(made, {"t": 2048} if "size(t)" in SPECS[name] else {}, "sm_90", 128)
    assert 0 < flops[0] <= SHARE[name] * plain[0] and flops[1] <= SHARE[name] * plain[1]


def test_projected_queries_share_tiles_of_keys() -> None:
    """Rows of one head, and not the heads of one row: every key meets all of them."""
    made: Kernel = weft.loads(
        "kernel a(x[b,i,c], k[b,h,j,d], v[b,h,j,d], w[h,d,c]) -> o[b,h,i,d]:\n"
        "    q = sum[c](x * w)\n    o = sum[j](softmax[j](sum[d](q * k) / sqrt(size(d))) * v)\n"
    ).a
    for target in ("c", "sm_90"):
        forward, _, _ = _plans(made, target=target)
        assert [k.rows for k in forward.kernels] == ["i"]


@pytest.mark.parametrize("name", SPECS)
def test_kernels_agree_with_the_reference(name: str) -> None:
    report = check_kernel(weft.loads(SPECS[name]).a, backend="c", trials=2, quick=True, strict=True)
    assert report.passed, render(report)


HASHED = """
kernel a(x[t,d], number[t]: int, up[n,d,f], down[n,f,d]) -> y[t,d]:
    sample number = randint(0, 1000)
    mask number % size(n) == n
    y = sum[n](sum[f](relu(sum[d](x * up)) * down))
"""
"""A token's expert by a hash of its number (Roller et al., 2021, arXiv:2106.04426)."""

GRID = """
kernel a(x[t,d], number[t]: int, up[n,m,d,f], down[n,m,f,d]) -> y[t,d]:
    sample number = randint(0, 1000)
    mask number // size(m) % size(n) == n
    mask number % size(m) == m
    y = sum[n, m](sum[f](relu(sum[d](x * up)) * down))
"""

BOTH = """
kernel a(x[t,d], number[t]: int, router[n,d], up[n,d,f], down[n,f,d]) -> y[t,d]:
    sample number = randint(0, 1000)
    p = sigmoid(sum[d](x * router))
    mask topk[n](p, 2) or number % size(n) == n
    y = sum[n](p * sum[f](silu(sum[d](x * up)) * down))
"""


@pytest.mark.parametrize("text", [HASHED, GRID, BOTH])
def test_experts_by_number_are_routed(text: str) -> None:
    made: Kernel = weft.loads(text).a
    forward, _, _ = _plans(made)
    assert any("route.pair" in b.axes for b in forward.buffers.values())
    report = check_kernel(made, backend="c", trials=3, quick=True, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("text", [HASHED, GRID])
def test_there_are_as_many_pairs_as_tokens_with_a_number(text: str) -> None:
    made: Kernel = weft.loads(text).a
    (routing,) = made.lowered("c").routings
    assert routing.bound(()) is routing.bound(routing.experts)


def test_a_token_goes_to_the_expert_of_its_number() -> None:
    torch.manual_seed(0)
    x, number, up, down = torch.randn(64, 8), torch.randint(0, 1000, (64,)), torch.randn(4, 8, 16), torch.randn(4, 16, 8)
    expected = torch.stack([torch.relu(row @ up[n % 4]) @ down[n % 4] for row, n in zip(x, number.tolist(), strict=True)])
    torch.testing.assert_close(weft.loads(HASHED).a(x, number, up, down, strict=True), expected, rtol=1e-4, atol=1e-4)
