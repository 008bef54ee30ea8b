"""What is masked is not read: nor what stands in front of a sum over nothing, such as the 0 / 0 of a row without keys, whose sum is 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weft
import weft.specs
from weft.runtime.check import check_in_subprocess, check_kernel, render

NORMALISED = """
kernel normalised(q[i,d], k[j,d], v[j,e], pad[i,j]: bool) -> y[i,e]:
    mask pad
    w = sigmoid(sum[d](q * k))
    y = sum[j](w / sum[j](w) * v)
"""
BEFORE = """
kernel before(q[i,d], k[j,d], v[j,e]) -> y[i,e]:
    mask j < i
    y = sum[j](log(i) * sigmoid(sum[d](q * k)) * v)
"""
GATED = """
kernel gated(q[i,d], k[j,d], g[j], v[j,e], pad[i,j]: bool) -> y[i,e], z[i]:
    mask pad
    p = softmax[j](sum[d](q * k))
    y = sum[j](p * g * v)
    z = sum[j](p * g)
"""
ENTROPY = """
kernel entropy(q[i,d], k[j,d]) -> h[i]:
    p = softmax[j](sum[d](q * k))
    h = -sum[j](p * log(p))
"""


def pulled(kernel: weft.Kernel, backend: str, *tensors: Tensor, **params: float) -> list[Tensor]:
    """The first output and all gradients of its sum."""
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    found = kernel(*leaves, backend=backend, strict=backend == "c", **params)
    y = found[0] if isinstance(found, tuple) else found
    return [y.detach(), *torch.autograd.grad(y.sum(), [t for t in leaves if t.is_floating_point()])]


def same(kernel: weft.Kernel, *tensors: Tensor, **params: int) -> list[Tensor]:
    """Outputs and gradients of the C kernel, after they were held to the reference's, NaN included."""
    got, want = (pulled(kernel, backend, *tensors, **params) for backend in ("c", "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    return got


def test_an_explicit_normaliser() -> None:
    torch.manual_seed(0)
    pad = torch.rand(5, 6) < 0.5
    pad[2] = False
    y, *_ = same(weft.loads(NORMALISED)["normalised"], torch.randn(5, 4), torch.randn(6, 4), torch.randn(6, 3), pad)
    assert bool((y[2] == 0).all())
    assert bool((y[[0, 1, 3, 4]] != 0).all())


def test_a_logarithm_of_the_position() -> None:
    """The first row has no key, and log 0 in front of it."""
    torch.manual_seed(0)
    y, d_q, *_ = same(weft.loads(BEFORE)["before"], torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 3))
    assert bool((y[0] == 0).all())
    assert bool((d_q[0] == 0).all())


@pytest.mark.parametrize("text", [NORMALISED, BEFORE])
def test_both_backends_pass_check(text: str) -> None:
    name = text.split()[1].partition("(")[0]
    report = check_kernel(weft.loads(text)[name], quick=True, dtypes=("float32", "float16"), strict=True)
    assert report.passed, render(report)
    interpreted = check_in_subprocess(text, "empty.weft", name, quick=True, strict=True, trials=3)
    assert interpreted.passed, render(interpreted)


def test_a_token_of_null_experts() -> None:
    """No true expert is chosen, so the chosen probabilities of true experts sum to 0."""
    torch.manual_seed(0)
    t, d, a, n, f = 3, 4, 8, 3, 6
    x, router = torch.randn(t, d), torch.randn(a, d)
    router[:n] = -20 * x[1]
    y, *_ = same(weft.specs.moe_null, x, router, torch.randn(n, d, f), torch.randn(n, d, f), torch.randn(n, f, d), k=3)
    assert bool((y[1] == 0).all())


@pytest.mark.parametrize(("n", "k", "capacity"), [(1, 1, 5), (2, 2, 3)])
def test_nan_in_a_dropped_token_changes_nothing(n: int, k: int, capacity: int) -> None:
    torch.manual_seed(0)
    t, d, f = 6, 4, 3
    x = torch.randn(t, d)
    x[5] = torch.nan
    y, d_x, *others = same(
        weft.specs.moe_capacity, x, torch.randn(n, d), torch.randn(n, d, f), torch.randn(n, f, d), k=k, capacity=capacity
    )
    assert bool((y[5] == 0).all() and (d_x[5] == 0).all())
    assert all(bool(g.isfinite().all()) for g in others)


def test_a_factor_of_a_masked_key() -> None:
    """Beside the weight of a softmax, which is 0 there."""
    torch.manual_seed(0)
    pad = torch.rand(5, 6) < 0.7
    pad[:, 3] = False
    g, v = torch.randn(6), torch.randn(6, 3)
    g[3] = torch.nan
    v[3] = torch.inf
    kernel = weft.loads(GATED)["gated"]
    inputs = (torch.randn(5, 4), torch.randn(6, 4), g, v, pad)
    got, want = (kernel(*inputs, backend=backend) for backend in ("c", "reference"))
    for a, b in zip(got, want, strict=True):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ours, theirs = (pulled(kernel, backend, *inputs)[1:3] for backend in ("c", "reference"))  # of q and k
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


FEATURES = """
def elu1(x) = where(x > 0, x + 1, exp(x))

kernel normed(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], gain[d]) -> o[b,h,i,e]:
    mask j <= i
    s = sum[d](q * k * rsqrt(mean[d](k * k) + 1e-5) * gain) / sqrt(size(d))
    o = sum[j](softmax[j](s) * v)

kernel linear(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], gain[d]) -> o[b,h,i,e]:
    fq = elu1(q)
    fk = elu1(gain * k)
    mask j <= i
    w = sum[d](fq * fk)
    o = sum[j](w * v) / (sum[j](w) + 1e-6)

kernel turned(q[b,h,i,(c f)], k[b,h,j,(c f)], v[b,h,j,e], gain[f]) -> o[b,h,i,e]:
    axis c = 2
    kr = k * cos(j * gain) + where(c == 0, -1, 1) * k[c -> 1 - c] * sin(j * gain)
    mask j <= i
    s = sum[c, f](q * kr)
    o = sum[j](softmax[j](s) * v)
"""


@pytest.mark.parametrize("name", ["normed", "linear", "turned", "hedgehog"])
def test_nan_in_keys_that_no_query_sees_reaches_no_gradient(name: str) -> None:
    """Neither theirs, by a derivative that is NaN times 0, nor that of a weight of all keys."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 20, 8), torch.randn(2, 1, 20, 5)
    k[:, :, 13:], v[:, :, 13:] = torch.nan, torch.nan
    kernel = weft.specs.hedgehog if name == "hedgehog" else weft.loads(FEATURES)[name]
    weights = [torch.randn(1, 8, 6), torch.randn(1, 8, 6)] if name == "hedgehog" else [torch.rand(4 if name == "turned" else 8) + 0.5]
    inputs = torch.randn(2, 1, 13, 8), k, v, *weights
    ours, theirs = (pulled(kernel, backend, *inputs) for backend in ("c", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_entropies_of_large_scores_keep_their_digits() -> None:
    """Scores of 300 that differ by 1: all that is lost is what float32 loses of a score."""
    torch.manual_seed(0)
    kernel = weft.loads(ENTROPY)["entropy"]
    q, k = torch.ones(4, 1), 300 + torch.randn(50, 1)
    wanted = kernel.reference(q.double(), k.double())
    assert float((kernel(q, k, strict=True).double() - wanted).abs().max()) < 1e-3


RATIO = """
kernel ratio(q[i,d], k[j,d], v[j,e]) -> o[i,e]:
    param shift: float = 0
    s = exp(sum[d](q * k) - shift)
    o = sum[j](s * v) / sum[j](s)
"""


@pytest.mark.parametrize("shift", [60.0, -60.0])
def test_sums_whose_squares_are_no_numbers(shift: float) -> None:
    """A ratio of sums near 1e-26 or 1e26: its gradient has the square of the lower one, which is not formed."""
    torch.manual_seed(0)
    inputs = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7, 3)
    kernel = weft.loads(RATIO)["ratio"]
    for got, want in zip(pulled(kernel, "c", *inputs, shift=shift), pulled(kernel, "reference", *inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


RECTIFIED = """
kernel rectified(q[h,i,d], k[h,j,d], v[h,j,e]) -> o[h,i,e]:
    mask j <= i
    s = sum[d](q * k)
    top = max[j](s)
    u = exp(s - top) - exp(-top)
    o = sum[j](relu(u) * v) / (sum[j](abs(u)) + 1e-6)
"""
"""Softpick (Zuhri et al., 2025, arXiv:2504.20966), whose exp(-top) leaves the range of float32."""


def test_nothing_comes_back_through_an_exp_that_overflows() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 3, 8).abs() * 30
    k, v = -q[:, :1] - 1, torch.randn(1, 1, 5)
    ours, theirs = (pulled(weft.loads(RECTIFIED)["rectified"], backend, q, k, v) for backend in ("c", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_weight_of_a_single_key_is_1_however_large_its_score_is() -> None:
    """The backward pass computes the score again, and rounds it as the forward pass did before it takes the logarithm of the sum off."""
    torch.manual_seed(0)
    q, k = 8 * torch.randn(2, 1, 40, 128), 8 * torch.randn(2, 1, 1, 128)
    v = torch.randn(2, 1, 1, 16, requires_grad=True)
    d_o = torch.randn(2, 1, 40, 16)
    (d_v,) = torch.autograd.grad(weft.specs.full(q, k, v, strict=True), v, d_o)
    torch.testing.assert_close(d_v, d_o.sum(2, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_a_root_of_nothing_passes_nothing_on(backend: str) -> None:
    """Equal logits deviate by 0, whose root has no slope: what is not asked for stays 0, as the language says. What is, is infinite."""
    text = (
        "kernel spec(z[t,n], w[n]) -> y[t]:\n    mu = mean[n](z)\n    std = sqrt(mean[n]((z - mu)**2))\n"
        "    y = sum[n](softmax[n]((z - mu) / (std + 1e-3)) * w)\n"
    )
    made = weft.loads(text).spec
    torch.manual_seed(1)
    z, w = torch.full((3, 16), 2.0), torch.randn(16)
    z[1] = torch.randn(16)
    leaves = [x.clone().requires_grad_() for x in (z, w)]
    wide = [x.double().requires_grad_() for x in (z, w)]
    got = torch.autograd.grad(made(*leaves, backend=backend).sum(), leaves)
    want = torch.autograd.grad(made.reference(*wide).sum(), wide)
    for a, b in zip(got, want, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    norm = weft.loads("kernel spec(x[t,d]) -> y[t]:\n    y = sqrt(sum[d](x * x))\n").spec
    x = torch.zeros(2, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(norm(x, backend=backend).sum(), x)
    assert slope.isnan().all()
