"""A recurrence is classified by its Jacobian: however it is spelt, it lands in its class and computes what it says."""

from __future__ import annotations

import pytest

import weft
from weft.compiler import classify as classes
from weft.compiler import ir
from weft.compiler.classify import classify
from weft.runtime.check import check_kernel, render

MATRIX = '''"""A matrix state."""

kernel spelt(q[b,h,t,d], k[b,h,t,d], v[b,h,t,e], g[b,h,t], w[b,h,t,d], beta[b,h,t], a[b,h,t,d]) -> o[b,h,t,e]:
    sample k = normal() / sqrt(size(d))
    sample a = normal() / sqrt(size(d))
    sample g = logsigmoid(normal())
    sample w = logsigmoid(normal())
    sample beta = sigmoid(normal())
    state S[b,h,d,e] along t
    {step}
    o = sum[d](q * S)
'''
VECTOR = '''"""A vector state."""

kernel spelt(x[b,t,n], f[b,t,n], i[b,t,n], c[n], r[m,n], z[m,n]) -> y[b,t,n]:
    sample f = sigmoid(normal())
    sample r = normal() / sqrt(size(n))
    sample z = normal() / sqrt(size(n))
    state h[b,n] along t
    {step}
    y = h
'''
STABILISED = '''"""A matrix state behind a running maximum."""

kernel spelt(q[b,h,t,d], k[b,h,t,d], v[b,h,t,e], ig[b,h,t], fg[b,h,t]) -> o[b,h,t,e]:
    state m[b,h] = -inf along t
    state S[b,h,d,e] along t
    {step}
    o = sum[d](q * S)
'''

SPELLINGS: dict[tuple[str, str], tuple[str, ...]] = {
    (MATRIX, classes.SCALAR): (
        "S <- exp(g) * S + k * v",
        "S <- v * k + S * exp(g)",
        "S <- exp(g) * S; S <- S + k * v",
        "S <- S + k * v; S <- exp(g) * S",
        "S <- (S + k * v) * exp(g)",
        "f = sigmoid(g); S <- f * S + (1 - f) * k * v",
        "f = sigmoid(g); S <- S - (1 - f) * S + k * v",
        "S <- S / (1 + exp(-g)) + k * v",
        "S <- exp(-softplus(g)) * S + beta * k * v",
        "S <- where(g > -1, exp(g), 1) * S + k * v",
        "S <- where(beta > 0.3, exp(g) * S, S) + k * v",
        "past = S; S <- k * v - past * (-exp(g))",
    ),
    (MATRIX, classes.VECTOR): (
        "S <- exp(w) * S + k * v",
        "S <- k * v + S * exp(w)",
        "S <- exp(w) * S; S <- S + k * v",
        "S <- S + k * v; S <- exp(w) * S",
        "S <- exp(w) * (S + k * v)",
        "f = exp(w); S <- f * S + (1 - f) * v",
        "S <- S - (1 - exp(w)) * S + k * v",
        "S <- exp(g) * S; S <- exp(w) * S + k * v",
        "S <- exp(w + g) * S + k * v",
        "S <- S / (1 + exp(-w)) + k * v",
        "S <- sigmoid(w) * beta * S + k * v",
    ),
    (MATRIX, classes.DELTA): (
        "S <- S + k * beta * (v - sum[d](k * S))",
        "S <- S - beta * k * sum[d](k * S) + beta * k * v",
        "r = sum[d](S * k); S <- S + beta * k * (v - r)",
        "e_ = beta * (v - sum[d](k * S)); S <- S + e_ * k",
        "S <- exp(g) * S; S <- S + k * beta * (v - sum[d](k * S))",
        "S <- S + k * beta * (v - sum[d](k * S)); S <- exp(g) * S",
        "S <- exp(w) * S; S <- S + k * beta * (v - sum[d](k * S))",
        "S <- exp(g) * S - beta * k * sum[d](k * exp(g) * S) + beta * k * v",
        "S <- exp(g) * (S - beta * k * sum[d](k * S)) + beta * k * v",
        "S <- S - (k * beta) * (sum[d](k * S) - v)",
        "S <- S - k * sum[d](k * beta * S) + k * v",
    ),
    (MATRIX, classes.LOW_RANK): (
        "S <- S + a * sum[d](k * S) + k * v",
        "S <- exp(g) * S + a * sum[d](k * S) + k * v",
        "S <- exp(w) * S + a * sum[d](k * S) + k * v",
        "S <- exp(w) * S + k * v + beta * a * sum[d](S * k)",
        "r = sum[d](a * S); S <- S - k * r + k * v",
        "S <- S - k * beta * sum[d](a * S); S <- S + k * v",
        "S <- exp(w) * S; S <- S - a * sum[d](k * S) + k * v",
        "S <- exp(w) * S - a * sum[d](k * exp(w) * S) + k * v",
        "S <- S + a * sum[d](-k * S); S <- exp(g) * S + k * v",
        "S <- S + k * (v - sum[d](a * S))",
    ),
    (MATRIX, classes.SEQUENTIAL): (
        "S <- tanh(exp(g) * S + k * v)",
        "S <- exp(g) * tanh(S) + k * v",
        "S <- exp(g) * S + k * tanh(v - sum[d](k * S))",
        "S <- S + k * sigmoid(sum[d](k * S)) * v",
        "S <- exp(g) * S * sigmoid(S) + k * v",
        "S <- max(exp(g) * S, k * v)",
        "S <- S / sqrt(1 + sum[d](S * S)) + k * v",
        "S <- where(S > 0, exp(g), 1) * S + k * v",
        "r = relu(sum[d](k * S)); S <- exp(g) * S + k * (v - r)",
        "S <- exp(g - abs(S)) * S + k * v",
    ),
    (VECTOR, classes.ELEMENTWISE): (
        "h <- f * h + (1 - f) * x",
        "h <- f * h + x",
        "h <- x + h * f",
        "h <- f * h; h <- h + x",
        "h <- (h + x) * f",
        "h <- h - (1 - f) * h + (1 - f) * x",
        "h <- h + (1 - f) * (x - h)",
        "h <- exp(-softplus(i)) * h + sqrt(1 - exp(-2 * softplus(i))) * x",
        "h <- sigmoid(c) * h + x",
        "h <- h / (1 + exp(-i)) + tanh(i) * x",
    ),
    (VECTOR, classes.SEQUENTIAL): (
        "h <- tanh(x + sum[m](h[n -> m] * r))",
        "h <- f * h + (1 - f) * tanh(x + sum[m](h[n -> m] * r))",
        "h <- sigmoid(i + sum[m](h[n -> m] * r)) * h + x",
        "h <- tanh(x + c * h)",
        "past = h[n -> m]; h <- tanh(x + sum[m](past * r)) * sigmoid(sum[m](past * z))",
        "gate = sigmoid(i + sum[m](h[n -> m] * r)); h <- gate * h + (1 - gate) * tanh(x)",
        "h <- relu(x + sum[m](h[n -> m] * r))",
        "h <- f * h + x * sigmoid(h)",
        "h <- tanh(sum[m](tanh(h)[n -> m] * r) + x)",
        "h <- f * sin(h) + x",
    ),
    (VECTOR, classes.DENSE): (
        "h <- x + sum[m](h[n -> m] * r)",
        "h <- sum[m](r * h[n -> m]) + f * x",
        "h <- f * sum[m](h[n -> m] * r) + x",
        "h <- f * h + sum[m](h[n -> m] * r) + x",
        "past = h[n -> m]; h <- x - sum[m](past * r)",
        "h <- sum[m](h[n -> m] * r); h <- h + x",
        "h <- sum[m]((f * h)[n -> m] * r) + x",
        "h <- sum[m](h[n -> m] * r) / 2 + x",
        "h <- 0.5 * (x + sum[m](h[n -> m] * r))",
        "h <- sum[m](h[n -> m] * (r + z)) + x",
    ),
    (STABILISED, classes.STABILISER): (
        "p = m; m <- max(fg + m, ig); S <- exp(fg + p - m) * S + exp(ig - m) * k * v",
        "p = m; m <- max(ig, m + fg); S <- exp(fg + p - m) * S + exp(ig - m) * k * v",
        "p = m; m <- max(logsigmoid(fg) + m, ig); S <- exp(logsigmoid(fg) + p - m) * S + exp(ig - m) * k * v",
        "x = fg + m; m <- max(x, ig); S <- exp(x - m) * S + exp(ig - m) * k * v",
        "n_ = max(fg + m, ig); S <- exp(fg + m - n_) * S + exp(ig - n_) * k * v; m <- n_",
        "p = m; m <- max(m, ig); S <- exp(p - m) * S + exp(ig - m) * k * v",
        "p = m; m <- max(m + fg / 2, ig); S <- exp(fg / 2 + p - m) * S + exp(ig - m) * v * k",
        "p = m; m <- max(m - softplus(fg), ig); S <- exp(p - softplus(fg) - m) * S + exp(ig - m) * k * v",
        "p = m; m <- max(m - abs(fg), tanh(ig)); S <- exp(p - abs(fg) - m) * S + exp(tanh(ig) - m) * k * v",
        "p = m; m <- max(ig, fg + m); S <- exp(ig - m) * v * k + S * exp(p + fg - m)",
    ),
}
CASES = [(template, name, step) for (template, name), steps in SPELLINGS.items() for step in steps]


def _kernel(template: str, step: str) -> weft.Kernel:
    return weft.loads(template.replace("{step}", "\n    ".join(step.split("; ")))).spelt


@pytest.mark.parametrize(("template", "name", "step"), CASES, ids=[f"{name}: {step}" for _, name, step in CASES])
def test_spellings_land_in_their_class(template: str, name: str, step: str) -> None:
    fused = _kernel(template, step).lowered("c").fused
    assert fused is not None
    (found,) = {n for n in ir.topological(fused.outputs.values()) if isinstance(n, ir.Recurrence)}
    assert classify(found.body)[0].name == name


@pytest.mark.parametrize(("template", "name", "step"), CASES[::3], ids=[f"{name}: {step}" for _, name, step in CASES[::3]])
def test_spellings_compute_what_they_say(template: str, name: str, step: str) -> None:
    report = check_kernel(_kernel(template, step), backend="c", trials=1, quick=True, strict=True)
    assert report.passed, render(report)


def test_a_reason_is_given() -> None:
    fused = _kernel(MATRIX, "S <- exp(w) * S; S <- S + k * beta * (v - sum[d](k * S))").lowered("c").fused
    assert fused is not None
    (found,) = {n for n in ir.topological(fused.outputs.values()) if isinstance(n, ir.Recurrence)}
    text = "S: rank-one corrected (the decay varies along d, plus 1 of rank one, along the direction that is read)"
    assert str(classify(found.body)[0]) == text
