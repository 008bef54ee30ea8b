"""The meaning of every word of the language that has no state: values, gradients, empty ranges, masked NaN, ties."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

import weft.dsl
from weft.compiler import errors, extents, ir, reference, reference_ops
from weft.compiler.build import build

NAN, INF = math.nan, math.inf
REDUCES = re.compile(r"(sum|mean|prod|max|min|lse)\[")
"""What an expression begins with whose result has lost its axis."""


def run(
    text: str, inputs: dict[str, Tensor], params: dict[str, object] | None = None, sizes: dict[str, int] | None = None, **options: object
) -> dict[str, Tensor]:
    """Evaluates the one kernel of a text."""
    kernel = weft.dsl.parse(text).kernels[-1]
    bound = extents.bind(kernel, {n: t.shape for n, t in inputs.items()}, params or {}, sizes)
    return reference.evaluate(build(kernel), inputs, extents.bind_params(kernel, params or {}), bound, **options)


def rule(expr: str, x: list[float] | Tensor, axis: str = "j", *, mask: str | None = None, **more: Tensor) -> tuple[Tensor, Tensor]:
    """``y = expr`` of ``x[axis]`` and more inputs, and the gradient of the sum of y with respect to x."""
    data = torch.as_tensor(x, dtype=torch.float64).clone().requires_grad_()
    declared = "".join(f", {n}[{axis}]: bool" for n in more)
    lines = ([f"    mask {mask}"] if mask else []) + [f"    y = {expr}"]
    text = f"kernel f(x[{axis}]{declared}) -> y[{'' if REDUCES.match(expr) else axis}]:\n" + "\n".join(lines) + "\n"
    y = run(text, {"x": data, **more})["y"]
    if not y.requires_grad:
        return y, torch.zeros_like(data)
    y.sum().backward()
    assert data.grad is not None
    return y.detach(), data.grad


def same(got: Tensor, wanted: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), rtol=1e-12, atol=1e-12, equal_nan=True)


# Empty ranges ---------------------------------------------------------------------------------------------------------

EMPTY = {"sum": 0, "mean": 0, "prod": 1, "max": -INF, "min": INF, "lse": -INF}


@pytest.mark.parametrize(("op", "value"), EMPTY.items())
def test_reduction_over_nothing(op: str, value: float) -> None:
    keep = torch.tensor([False, False, False])
    y, gradient = rule(f"{op}[j where keep](x)", [1.0, NAN, 3.0], keep=keep)
    same(y, value)
    same(gradient, [0, 0, 0])


@pytest.mark.parametrize(("op", "value"), EMPTY.items())
def test_reduction_along_an_axis_without_positions(op: str, value: float) -> None:
    y, gradient = rule(f"{op}[j](x)", [])
    same(y, value)
    assert gradient.shape == (0,)


@pytest.mark.parametrize(("op", "value"), [("any", False), ("all", True)])
def test_logical_reduction_over_nothing(op: str, value: bool) -> None:
    text = f"kernel f(x[j]: bool, keep[j]: bool) -> y[]:\n    y = {op}[j where keep](x)\n"
    y = run(text, {"x": torch.tensor([True, False]), "keep": torch.tensor([False, False])})["y"]
    assert y.dtype == torch.bool
    assert bool(y) is value


def test_softmax_over_nothing_is_0_and_passes_nothing() -> None:
    y, gradient = rule("softmax[j where keep](x)", [1.0, NAN], keep=torch.tensor([False, False]))
    same(y, [0, 0])
    same(gradient, [0, 0])


def test_topk_over_nothing_keeps_nothing() -> None:
    text = "kernel f(x[j], keep[j]: bool) -> y[j]:\n    y = topk[j where keep](x, 2)\n"
    assert not run(text, {"x": torch.ones(3), "keep": torch.zeros(3, dtype=torch.bool)})["y"].any()


def test_argmax_over_nothing_is_no_position() -> None:
    text = "kernel f(x[j], keep[j]: bool) -> y[], z[]:\n    y = argmax[j where keep](x)\n    z = x[j -> y]\n"
    out = run(text, {"x": torch.ones(3), "keep": torch.zeros(3, dtype=torch.bool)})
    assert int(out["y"]) == -1
    assert float(out["z"]) == 0


def test_int_extremes_over_nothing_do_not_wrap() -> None:
    text = "kernel f(x[j]: int, keep[j]: bool) -> y[], z[]:\n    y = max[j where keep](x) < -5\n    z = min[j where keep](x) > 5\n"
    out = run(text, {"x": torch.ones(3, dtype=torch.int64), "keep": torch.zeros(3, dtype=torch.bool)})
    assert bool(out["y"])
    assert bool(out["z"])


@pytest.mark.parametrize("expr", ["lse[j](x)", "max[j](x)", "softmax[j](x)", "cumlse[j](x)", "cummax[j](x)"])
def test_range_of_minus_infinity_is_empty(expr: str) -> None:
    y, gradient = rule(expr, [-INF, -INF])
    assert ((y == -INF) | (y == 0)).all()
    same(gradient, [0, 0])


def test_topk_of_minus_infinity() -> None:
    text = "kernel f(x[i,j]) -> y[i,j]:\n    y = topk[j](x, 2)\n"
    y = run(text, {"x": torch.tensor([[-INF, -INF, -INF], [-INF, 1.0, -INF]])})["y"]
    assert y.tolist() == [[False, False, False], [True, True, False]]


def test_mean_of_an_int_is_real() -> None:
    text = "kernel f(x[j]: int) -> y[]:\n    y = mean[j](x)\n"
    assert float(run(text, {"x": torch.tensor([1, 2])})["y"]) == 1.5


# Masked NaN -----------------------------------------------------------------------------------------------------------

SINGULAR = {
    "sum[j where keep](log(x))": (0.0, [1, 0, 0]),
    "sum[j where keep](rsqrt(x))": (1.0, [-0.5, 0, 0]),
    "sum[j where keep](1 / x)": (1.0, [-1, 0, 0]),
    "sum[j where keep](x ** 0.5)": (1.0, [0.5, 0, 0]),
    "sum[j where keep](x ** -3)": (1.0, [-3, 0, 0]),
    "sum[j where keep](exp(1000 * (1 - x) * (1 - x)))": (1.0, [0, 0, 0]),
    "sum[j where keep](abs(x) * x)": (1.0, [2, 0, 0]),
    "lse[j where keep](x * x)": (1.0, [2, 0, 0]),
    "prod[j where keep](x / x)": (1.0, [0, 0, 0]),
    "max[j where keep](x)": (1.0, [1, 0, 0]),
    "mean[j where keep](x * x)": (1.0, [2, 0, 0]),
    "sum[j where keep](where(x == 1, x, x / 0))": (1.0, [1, 0, 0]),
    "sum[j where keep](logaddexp(x, x))": (1 + math.log(2), [1, 0, 0]),
    "sum[j where keep](tanh(x) / tanh(x))": (1.0, [0, 0, 0]),
    "sum[j where keep](silu(x) / silu(x))": (1.0, [0, 0, 0]),
    "sum[j where keep](cumsum[j where keep](x) * x)": (1.0, [2, 0, 0]),
}


@pytest.mark.parametrize("expr", SINGULAR)
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0])
def test_masked_singularity_changes_nothing(expr: str, bad: float) -> None:
    value, wanted = SINGULAR[expr]
    y, gradient = rule(expr, [1.0, bad, NAN], keep=torch.tensor([True, False, False]))
    same(y, value)
    same(gradient, wanted)


def test_unmasked_singularity_is_seen() -> None:
    _, gradient = rule("sum[j](sqrt(x - 1))", [1.0])
    assert gradient.isinf().all()


def test_branch_not_taken_passes_nothing() -> None:
    y, gradient = rule("where(x > 0, log(x), 0)", [1.0, -1.0, 0.0])
    same(y, [0, 0, 0])
    same(gradient, [1, 0, 0])


ATTENTION = """
kernel f(q[i,d], k[j,d], v[j,e], pad[j]: bool) -> o[i,e], l[i], mass[j]:
    mask pad
    mask j <= i
    s = sum[d](q * k) / sqrt(size(d))
    w = softmax[j](s)
    o = sum[j](w * v)
    l = lse[j](s)
    mass = sum[i](w)
"""


def attention(bad: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {n: torch.randn(5, 3, dtype=torch.float64) for n in "qkv"}
    pad = torch.tensor([False, True, True, False, True])
    for name in "kv":
        inputs[name][~pad] = bad
        inputs[name].requires_grad_()
    inputs["q"].requires_grad_()
    out = run(ATTENTION, {**inputs, "pad": pad})
    (out["o"].sin().sum() + out["l"][1:].cos().sum() + (out["mass"] ** 2).sum()).backward()
    return {n: t.detach() for n, t in out.items()}, {n: t.grad for n, t in inputs.items() if t.grad is not None}


@pytest.mark.parametrize("bad", [NAN, INF, 1e300])
@pytest.mark.parametrize("large", [0, reference_ops.LARGE_PRODUCT])
def test_masked_keys_do_not_leak_through_matrix_products(bad: float, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_ops, "LARGE_PRODUCT", large)
    wanted, wanted_gradients = attention(0.0)
    got, gradients = attention(bad)
    for name, tensor in wanted.items():
        same(got[name], tensor)
    for name, tensor in wanted_gradients.items():
        same(gradients[name], tensor)
    same(got["o"][0], [0, 0, 0])
    assert float(got["l"][0]) == -INF


@pytest.mark.parametrize("large", [0, reference_ops.LARGE_PRODUCT])
def test_kept_nan_is_seen_in_the_rows_that_keep_it(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_ops, "LARGE_PRODUCT", large)
    text = "kernel f(w[i,j], v[j,e]) -> o[i,e]:\n    mask j <= i\n    o = sum[j](w * v)\n"
    v = torch.tensor([[1.0, 1.0], [NAN, 1.0]], dtype=torch.float64)
    same(run(text, {"w": torch.zeros(2, 2, dtype=torch.float64), "v": v})["o"], [[0, 0], [NAN, 0]])


def test_masked_value_is_0_as_an_output_and_when_read() -> None:
    text = "kernel f(x[t]) -> y[t], z[t], c[t]:\n    mask x > 0\n    y = log(x)\n    z = y[t -> t - 1]\n    c = x > 1\n"
    out = run(text, {"x": torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)})
    same(out["y"], [math.log(3), 0, math.log(2)])
    same(out["z"], [0, 0, 0])  # z has the mask's axis as well: log(3) is read at a masked position
    assert out["c"].tolist() == [True, False, True]


# Ties, bounds and what has no gradient -----------------------------------------------------------------------------------

GRADIENTS = [
    ("relu(x)", [-1, 0, 2], [0, 0, 2], [0, 0, 1]),
    ("abs(x)", [-1, 0, 2], [1, 0, 2], [-1, 0, 1]),
    ("clamp(x, 0, 2)", [-1, 0, 1, 2, 3], [0, 0, 1, 2, 2], [0, 1, 1, 1, 0]),
    ("clamp(x, 3, 2)", [1, 4], [2, 2], [0, 0]),
    ("max(x, x * x)", [1, 2], [1, 4], [1, 4]),
    ("min(x * x, x)", [1, 2], [1, 2], [2, 1]),
    ("max[j](x)", [1, 3, 3], 3, [0, 1, 0]),
    ("min[j](x)", [3, 1, 1], 1, [0, 1, 0]),
    ("cummax[j](x)", [2, 1, 2, 3, 3], [2, 2, 2, 3, 3], [3, 0, 0, 2, 0]),
    ("cummax[j, reverse](x)", [2, 1, 2, 3, 3], [3, 3, 3, 3, 3], [0, 0, 0, 4, 1]),
    ("x * stopgrad(x)", [3], [9], [3]),
    ("x + floor(x) + ceil(x) + round(x) + sign(x)", [1.25], [6.25], [1]),
    ("clipgrad(x, 0.5) * 3", [2, -2], [6, -6], [0.5, 0.5]),
    ("x ** 0", [0, 2], [1, 1], [0, 0]),
    ("x ** 2", [0, 3], [0, 9], [0, 6]),
    ("x ** 1", [0], [0], [1]),
    ("2.0 ** x", [0, 1], [1, 2], [math.log(2), 2 * math.log(2)]),
    ("softplus(x)", [0, 800, -800], [math.log(2), 800, 0], [0.5, 1, 0]),
    ("logsigmoid(x)", [0, 800, -800], [-math.log(2), 0, -800], [0.5, 0, 1]),
]


@pytest.mark.parametrize(("expr", "x", "value", "gradient"), GRADIENTS)
def test_value_and_gradient(expr: str, x: list[float], value: object, gradient: object) -> None:
    y, got = rule(expr, x)
    same(y, value)
    same(got, gradient)


def test_topk_prefers_the_lower_position() -> None:
    text = "kernel f(x[j]) -> y[j], n[j], all[j]:\n    y = topk[j](x, 2)\n    n = topk[j](x, -1)\n    all = topk[j](x, 9)\n"
    out = run(text.replace("all", "e"), {"x": torch.tensor([1.0, 2.0, 2.0, 2.0])})
    assert out["y"].tolist() == [False, True, True, False]
    assert not out["n"].any()
    assert out["e"].all()


def test_topk_over_several_axes_with_k_that_varies() -> None:
    text = "kernel f(x[a,b,c], k[a]: int) -> y[a,b,c]:\n    y = topk[c, b](x, k)\n"
    x = torch.tensor([[[1.0, 5.0], [5.0, 2.0]], [[1.0, 5.0], [5.0, 2.0]]])
    y = run(text, {"x": x, "k": torch.tensor([1, 3])})["y"]
    assert y.tolist() == [[[False, True], [False, False]], [[False, True], [True, True]]]


def test_argmax_prefers_the_lower_position_and_counts_from_the_origin() -> None:
    text = "kernel f(x[i,j]) -> y[i]:\n    y = argmax[j](x)\n"
    x = torch.tensor([[1.0, 2.0, 2.0], [0.0, -1.0, 0.0]])
    assert run(text, {"x": x})["y"].tolist() == [1, 0]
    assert run(text, {"x": x}, origin={"j": 10})["y"].tolist() == [11, 10]


POINTWISE = [
    "exp(x)", "log(x)", "log1p(x)", "expm1(x)", "sqrt(x)", "rsqrt(x)", "sin(x)", "cos(x)", "tanh(x)", "sigmoid(x)", "logsigmoid(x)",
    "softplus(x)", "silu(x)", "gelu(x)", "gelu_tanh(x)", "erf(x)", "logaddexp(x, 2 * x)", "x / (1 + x)", "x ** x", "x * x * x",
    "softmax[j](x)", "lse[j](x)", "prod[j](x)", "cumsum[j](x * x)", "cumsum[j, reverse, exclusive](x * x)", "cumprod[j](x)",
    "cumprod[j, exclusive](x)", "cumlse[j](x)", "cumlse[j, reverse](3 * x)", "mean[j](x ** 3)", "x[j -> j - 1] * x",
    "x[j -> size(j) - 1 - j] * x", "sum[j](x * x[j -> 0])", "softmax[j where j > 1](x)", "cumlse[j where j != 2](x)",
    "cummax[j, exclusive](max(x, 0.5))[j -> max(j, 1)]",
]  # fmt: skip


@pytest.mark.parametrize("expr", POINTWISE)
def test_gradient_against_finite_differences(expr: str) -> None:
    text = f"kernel f(x[j]) -> y[{'' if REDUCES.match(expr) else 'j'}]:\n    y = {expr}\n"
    x = torch.tensor([0.7, 0.3, 1.9, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: run(text, {"x": t})["y"], (x,))


# Ints -------------------------------------------------------------------------------------------------------------------


def ints(expr: str, a: list[int], b: list[int]) -> Tensor:
    text = f"kernel f(a[j]: int, b[j]: int) -> y[j]:\n    y = {expr}\n"
    return run(text, {"a": torch.tensor(a), "b": torch.tensor(b)})["y"]


def test_int_arithmetic() -> None:
    assert ints("a // b", [7, -7, 7], [2, 2, -2]).tolist() == [3, -4, -4]
    assert ints("a % b", [7, -7, 7], [2, 2, -2]).tolist() == [1, 1, -1]
    assert ints("a ** b", [3, -2, 0], [39, 3, 0]).tolist() == [3**39, -8, 1]
    assert ints("a / b", [1], [2]).tolist() == [0.5]
    assert ints("round(a / b)", [1, 3, 5], [2, 2, 2]).tolist() == [0, 2, 2]
    assert ints("floor(a / b) + ceil(a / b)", [-1], [2]).tolist() == [-1]
    assert ints("a // b", [7], [0]).tolist() == [0]


def test_int_to_a_negative_power_raises() -> None:
    with pytest.raises(errors.NegativePower, match=r"write 2.0 \*\* x"):
        ints("a ** b", [2], [-1])


def test_bools_count() -> None:
    text = "kernel f(x[j]) -> n[], c[j], m[]:\n    n = sum[j](x > 0)\n    c = cumsum[j](x > 0)\n    m = mean[j](x > 0)\n"
    out = run(text, {"x": torch.tensor([1.0, -1.0, 2.0, 3.0])})
    assert out["n"].dtype == torch.int64
    assert (int(out["n"]), out["c"].tolist(), float(out["m"])) == (3, [1, 1, 2, 3], 0.75)


def test_rounding_of_what_no_int_holds_is_harmless_when_masked() -> None:
    text = "kernel f(x[j]) -> y[]:\n    y = sum[j where x > 0](floor(log(x)))\n"
    assert int(run(text, {"x": torch.tensor([NAN, -1.0, 0.0, 8.0])})["y"]) == 2


# Positions and reads ------------------------------------------------------------------------------------------------------


def test_reads_are_0_outside() -> None:
    text = """
kernel f(x[t], m[t]: bool, p[n]: int) -> early[t], late[t], at[n], far[t], flag[t], window[t,w]:
    axis w = 3
    early = x[t -> t - 2]
    late = x[t -> t + 1]
    at = x[t -> p]
    far = x[t -> t - 9]
    flag = m[t -> t - 1]
    window = x[t -> t - w]
"""
    x = torch.tensor([1.0, 2.0, 3.0])
    out = run(text, {"x": x, "m": torch.tensor([True, True, True]), "p": torch.tensor([-1, 2, 0, 3])})
    assert out["early"].tolist() == [0, 0, 1]
    assert out["late"].tolist() == [2, 3, 0]
    assert out["at"].tolist() == [0, 3, 1, 0]
    assert out["far"].tolist() == [0, 0, 0]
    assert out["flag"].tolist() == [False, True, True]
    assert out["window"].tolist() == [[1, 0, 0], [2, 1, 0], [3, 2, 1]]


def test_read_aligns_shared_axes() -> None:
    text = "kernel f(h[b,c,d], p[b,i]: int) -> diagonal[b,d], picked[b,i,d], both[b,i]:\n"
    text += "    diagonal = h[c -> d]\n    picked = h[c -> p]\n    both = h[c -> p, d -> p - i]\n"
    h = torch.arange(24.0).reshape(2, 3, 4)
    p = torch.tensor([[0, 2], [1, 5]])
    out = run(text, {"h": h, "p": p})
    assert out["diagonal"].tolist() == [[0, 5, 10, 0], [12, 17, 22, 0]]
    assert torch.equal(out["picked"][0, 1], h[0, 2])
    assert torch.equal(out["picked"][1, 1], torch.zeros(4))
    assert out["both"].tolist() == [[0, float(h[0, 2, 1])], [float(h[1, 1, 1]), 0]]


def test_renamed_axis_of_another_extent_is_cut_or_padded() -> None:
    text = "kernel f(x[t], y[i]) -> z[i]:\n    z = y + x[t -> i]\n"
    assert run(text, {"x": torch.ones(2), "y": torch.zeros(3)})["z"].tolist() == [1, 1, 0]
    assert run(text, {"x": torch.ones(4), "y": torch.zeros(3)})["z"].tolist() == [1, 1, 1]


def test_gather_adds_up_gradients() -> None:
    text = "kernel f(x[n], p[j]: int) -> y[j]:\n    y = x[n -> p]\n"
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    run(text, {"x": x, "p": torch.tensor([1, 1, -1, 2, 3])})["y"].sum().backward()
    assert x.grad is not None
    same(x.grad, [0, 2, 1])


def test_origin_moves_positions_and_reads() -> None:
    text = "kernel f(x[t], y[i]) -> p[i], z[i]:\n    p = y + i\n    z = x[t -> i]\n"
    out = run(text, {"x": torch.arange(4.0), "y": torch.zeros(2)}, origin={"i": 2})
    assert out["p"].tolist() == [2, 3]
    assert out["z"].tolist() == [2, 3]
    out = run(text, {"x": torch.arange(4.0), "y": torch.zeros(2)}, origin={"i": 2, "t": 1})
    assert out["z"].tolist() == [1, 2]


def test_queries_with_an_origin_are_the_last_rows() -> None:
    torch.manual_seed(0)
    inputs = {n: torch.randn(5, 3, dtype=torch.float64) for n in "qkv"} | {"pad": torch.tensor([True] * 5)}
    whole = run(ATTENTION, inputs)
    last = run(ATTENTION, {**inputs, "q": inputs["q"][3:]}, origin={"i": 3})
    same(last["o"], whole["o"][3:])
    same(last["l"], whole["l"][3:])


# Scans ----------------------------------------------------------------------------------------------------------------------


def scanned(op: str, flags: str = "", keep: list[bool] | None = None) -> list[float]:
    text = f"kernel f(x[j], keep[j]: bool) -> y[j]:\n    y = {op}[j{flags} where keep](x)\n"
    mask = torch.tensor(keep or [True, True, True, True])
    return [float(v) for v in run(text, {"x": torch.tensor([1.0, 3.0, 2.0, 4.0]), "keep": mask})["y"]]


def test_scans() -> None:
    assert scanned("cumsum") == [1, 4, 6, 10]
    assert scanned("cumsum", ", reverse") == [10, 9, 6, 4]
    assert scanned("cumsum", ", exclusive") == [0, 1, 4, 6]
    assert scanned("cumsum", ", reverse, exclusive") == [9, 6, 4, 0]
    assert scanned("cumprod") == [1, 3, 6, 24]
    assert scanned("cumprod", ", exclusive") == [1, 1, 3, 6]
    assert scanned("cummax") == [1, 3, 3, 4]
    assert scanned("cummax", ", exclusive") == [-INF, 1, 3, 3]
    assert scanned("cumlse", ", exclusive")[0] == -INF


def test_scans_skip_what_is_masked_and_show_the_running_value() -> None:
    keep = [False, True, False, True]
    assert scanned("cumsum", "", keep) == [0, 3, 3, 7]
    assert scanned("cumsum", ", exclusive", keep) == [0, 0, 3, 3]
    assert scanned("cumsum", ", reverse", keep) == [7, 7, 4, 4]
    assert scanned("cumprod", "", keep) == [1, 3, 3, 12]
    assert scanned("cummax", "", keep) == [-INF, 3, 3, 4]
    assert scanned("cumlse", "", keep)[:3] == [-INF, 3, 3]


# Dtypes ---------------------------------------------------------------------------------------------------------------------


def test_half_precision_keeps_running_sums_in_float32() -> None:
    text = "kernel f(x[t]) -> y[t]: float32:\n    y = cumsum[t](x)\n"
    x = torch.full((3000,), 0.01, dtype=torch.bfloat16)
    y = run(text, {"x": x})["y"]
    torch.testing.assert_close(y, x.float().cumsum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_close_to_the_meaning(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = {n: torch.randn(7, 16).to(dtype) for n in "qkv"} | {"pad": torch.tensor([True] * 7)}
    low, high = run(ATTENTION, inputs), run(ATTENTION, inputs, dtype=torch.float64)
    assert low["o"].dtype == dtype
    assert high["o"].dtype == torch.float64
    torch.testing.assert_close(low["o"].double(), high["o"], rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_declared_output_dtype() -> None:
    text = "kernel f(x[t]) -> y[t]: float32, n[t]:\n    y = x * 2\n    n = t + 1\n"
    out = run(text, {"x": torch.ones(2, dtype=torch.float16)})
    assert (out["y"].dtype, out["n"].dtype) == (torch.float32, torch.int64)
    assert run(text, {"x": torch.ones(2, dtype=torch.float64)}, declared_dtypes=False)["y"].dtype == torch.float64


def test_scalars_are_exact_in_half_precision() -> None:
    text = "kernel f(x[t]) -> y[t]:\n    param c: float = 1.001\n    y = x * c * 1000 / 1000\n"
    y = run(text, {"x": torch.full((1,), 1.0, dtype=torch.float64)}, {"c": 1.001})["y"]
    assert float(y) == pytest.approx(1.001, rel=1e-15)


# Graphs -------------------------------------------------------------------------------------------------------------------


def test_deep_graphs_do_not_exhaust_the_stack() -> None:
    kernel = weft.dsl.parse("kernel f(x[t]) -> y[t]:\n    y = x\n").kernels[0]
    graph = build(kernel)
    node = graph.outputs["y"]
    for _ in range(20_000):
        node = ir.pointwise("add", node, ir.const(1))
    value = reference.evaluate_nodes(graph, [node], {"x": torch.zeros(2)}, {}, {"t": 2})[0]
    assert value.tolist() == [20_000, 20_000]


def test_input_of_a_derived_graph_has_sorted_axes() -> None:
    kernel = weft.dsl.parse("kernel f(x[t,d]) -> y[t,d]:\n    y = x\n").kernels[0]
    graph = build(kernel)
    g = ir.make(ir.Input, ("t", "d"), "real", "g")
    graph.outputs = {"dx": ir.pointwise("mul", g, graph.outputs["y"])}
    x, given = torch.ones(2, 3), torch.arange(6.0).reshape(3, 2)
    out = reference.evaluate(graph, {"x": x, "g": given}, {}, {"t": 2, "d": 3})
    assert torch.equal(out["dx"], given)


def test_default_of_an_input() -> None:
    text = "kernel f(x[n], bias[n] = 2) -> y[n]:\n    y = x + bias\n"
    assert run(text, {"x": torch.ones(3)})["y"].tolist() == [3, 3, 3]
    assert run(text, {"x": torch.ones(3), "bias": torch.zeros(3)})["y"].tolist() == [1, 1, 1]


def test_strided_and_expanded_inputs() -> None:
    text = "kernel f(x[(a b),c]) -> y[c,(b a)]:\n    axis b = 2\n    y = x\n"
    x = torch.arange(12.0).reshape(3, 4).t()
    y = run(text, {"x": x})["y"]
    assert torch.equal(y, x.reshape(2, 2, 3).permute(2, 1, 0).reshape(3, 4))
    assert torch.equal(run(text, {"x": torch.ones(1, 1).expand(4, 3)})["y"], torch.ones(3, 4))
