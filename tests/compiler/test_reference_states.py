"""States: order of updates, one and two time axes, directions, masks, initial and final values, precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import weft.dsl
from weft.compiler import errors, extents, reference
from weft.compiler.build import build


def run(text: str, inputs: dict[str, Tensor], params: dict[str, Any] | None = None, **options: Any) -> Any:
    kernel = weft.dsl.parse(text).kernels[-1]
    bound = extents.bind(kernel, {n: t.shape for n, t in inputs.items()}, params or {}, options.pop("sizes", None))
    return reference.evaluate(build(kernel), inputs, extents.bind_params(kernel, params or {}), bound, **options)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_state_is_read_before_and_after_its_updates() -> None:
    text = """
kernel f(x[t]) -> before[t], between[t], after[t], S[]:
    state S[] along t
    before = S + 0
    S <- S + x
    between = S + 0
    S <- 2 * S
    after = S + 0
"""
    out = run(text, {"x": values(1, 2, 3)})
    assert out["before"].tolist() == [0, 2, 8]
    assert out["between"].tolist() == [1, 4, 11]
    assert out["after"].tolist() == [2, 8, 22]
    assert float(out["S"]) == 22


def test_an_output_with_the_time_axis_is_the_value_after_every_step() -> None:
    text = "kernel f(x[t]) -> S[t]:\n    state S[] along t\n    S <- S + x\n"
    assert run(text, {"x": values(1, 2, 3)})["S"].tolist() == [1, 3, 6]
    text = "kernel f(x[t]) -> S[]:\n    state S[] along t reverse\n    S <- 2 * S + x\n"
    assert float(run(text, {"x": values(1, 2, 3)})["S"]) == 1 + 2 * (2 + 2 * 3)


def test_reverse_runs_backwards() -> None:
    text = "kernel f(x[t]) -> S[t]:\n    state S[] along t reverse\n    S <- S + x * (t + 1)\n"
    assert run(text, {"x": values(1, 1, 1)})["S"].tolist() == [6, 5, 3]


TWO_AXES = """
kernel f(x[t,u], a[t], c[u]) -> S[t,u], last[t], y[], final[]:
    state S[] along (t u)
    S <- where(u == 0, a, 1) * S + c * x
    last = S[u -> size(u) - 1]
    y = sum[t, u](S)
    final = S[t -> size(t) - 1, u -> size(u) - 1]
"""


def test_two_time_axes_step_u_within_t() -> None:
    x, a, c = values(1, 2, 3, 4, 5, 6).reshape(2, 3), values(10, 100), values(1, 2, 3)
    out = run(TWO_AXES, {"x": x, "a": a, "c": c})
    expected, state = [], 0.0
    for t in range(2):
        for u in range(3):
            state = (float(a[t]) if u == 0 else 1) * state + float(c[u] * x[t, u])
            expected.append(state)
    assert out["S"].flatten().tolist() == expected
    assert out["last"].tolist() == [expected[2], expected[5]]
    assert float(out["y"]) == sum(expected)
    assert float(out["final"]) == expected[-1]


def test_two_time_axes_reversed() -> None:
    text = "kernel f(x[t,u]) -> S[t,u]:\n    state S[] along (t u) reverse\n    S <- 2 * S + x\n"
    out = run(text, {"x": torch.ones(2, 2, dtype=torch.float64)})
    assert out["S"].flatten().tolist() == [15, 7, 3, 1]


def test_masked_steps_are_skipped() -> None:
    text = "kernel f(x[b,t], keep[b,t]: bool) -> S[b,t], n[b]:\n    mask keep\n    state S[b] along t\n    state n[b] along t\n"
    text += "    S <- 2 * S + x\n    S <- S + 1\n    n <- n + 1\n"
    keep = torch.tensor([[True, False, True], [False, False, False]])
    x = torch.where(keep, 1.0, math.nan).double().requires_grad_()
    out = run(text, {"x": x, "keep": keep})
    assert out["S"].tolist() == [[2, 2, 6], [0, 0, 0]]
    assert out["n"].tolist() == [2, 0]
    out["S"].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[4, 0, 1], [0, 0, 0]]


def test_states_read_each_other_at_the_version_of_their_line() -> None:
    text = """
kernel f(x[t]) -> a[t], b[t]:
    state a[] along t
    state b[] = 1 along t
    a <- a + b
    b <- a * x
    a <- a - b
"""
    out = run(text, {"x": values(2, 3)})
    a, b, expected = 0.0, 1.0, []
    for x in (2, 3):
        a = a + b
        b = a * x
        a = a - b
        expected.append((a, b))
    assert list(zip(out["a"].tolist(), out["b"].tolist(), strict=True)) == expected


def test_a_state_along_another_axis_starts_from_the_trajectory_of_the_first() -> None:
    text = """
kernel f(x[t]) -> y[t]:
    param steps: int = 3
    axis it = steps
    state S[] along t
    S <- S + x
    state z[t] = S along it
    z <- (z + S / z) / 2
    y = z[it -> size(it) - 1]
"""
    y = run(text, {"x": values(1, 3, 12)}, {"steps": 8})["y"]
    torch.testing.assert_close(y, values(1, 2, 4), rtol=1e-12, atol=0)


def test_a_state_with_another_name_for_its_axis() -> None:
    text = "kernel f(x[t,n], w[m,n]) -> y[t,n]:\n    state y[n] along t\n    y <- tanh(x + sum[m](y[n -> m] * w))\n"
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    state, expected = torch.zeros(3, dtype=torch.float64), []
    for row in x:
        state = torch.tanh(row + state @ w)
        expected.append(state)
    torch.testing.assert_close(run(text, {"x": x, "w": w})["y"], torch.stack(expected))


LINEAR = """
kernel f(k[b,t,d], v[b,t,e], g[b,t,d], S0[b,d,e]) -> o[b,t,e], S[b,d,e]:
    state S[b,d,e] = S0 along t
    S <- exp(g) * S + k * v
    o = sum[d](k * S)
"""


def linear(steps: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {"k": (2, steps, 3), "v": (2, steps, 2), "g": (2, steps, 3), "S0": (2, 3, 2)}
    return {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}


def test_two_calls_with_the_state_passed_on_equal_one() -> None:
    inputs = linear(5)
    whole, final = run(LINEAR, inputs, return_final=True)
    first, middle = run(LINEAR, {n: t if n == "S0" else t[:, :2] for n, t in inputs.items()}, return_final=True)
    rest = {n: t if n == "S0" else t[:, 2:] for n, t in inputs.items()}
    second, last = run(LINEAR, rest, initial=middle, return_final=True, origin={"t": 2})
    torch.testing.assert_close(torch.cat([first["o"], second["o"]], 1), whole["o"])
    torch.testing.assert_close(last["S"], final["S"])
    torch.testing.assert_close(whole["S"], final["S"])


def test_gradients_of_initial_and_final_values() -> None:
    inputs = linear(3)
    start = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    names = list(inputs)
    tensors = tuple(t.requires_grad_() for t in inputs.values())

    def outputs(first: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        out, final = run(LINEAR, dict(zip(names, rest, strict=True)), initial={"S": first}, return_final=True)
        return out["o"], final["S"]

    assert torch.autograd.gradcheck(outputs, (start, *tensors))


def test_no_steps_leave_the_initial_value() -> None:
    inputs = linear(0)
    out = run(LINEAR, inputs)
    assert out["o"].shape == (2, 0, 2)
    assert torch.equal(out["S"], inputs["S0"])


def test_state_with_a_composite_axis() -> None:
    text = "kernel f(x[t,(g r)]) -> S[(g r)]:\n    axis r = 2\n    state S[(g r)] along t\n    S <- S + x\n"
    x = torch.arange(8.0).reshape(2, 4)
    out, final = run(text, {"x": x}, initial={"S": torch.ones(4)}, return_final=True)
    assert torch.equal(out["S"], x.sum(0) + 1)
    assert torch.equal(final["S"].flatten(), x.sum(0) + 1)


def test_states_are_float32_for_half_precision_inputs() -> None:
    text = "kernel f(x[t]) -> S[], y[t]:\n    state S[] along t\n    S <- S + x\n    y = S + 0\n"
    out = run(text, {"x": torch.full((3000,), 0.01, dtype=torch.bfloat16)})
    assert (out["S"].dtype, out["y"].dtype) == (torch.float32, torch.bfloat16)
    assert float(out["S"]) == pytest.approx(3000 * float(torch.tensor(0.01, dtype=torch.bfloat16)), rel=1e-5)


def test_running_maximum_from_minus_infinity() -> None:
    text = "kernel f(x[t]) -> m[t], z[]:\n    state m[] = -inf along t\n    state z[] along t\n    before = m\n    m <- max(m, x)\n"
    text += "    z <- exp(before - m) * z + exp(x - m)\n"
    x = values(1, 3, 2).requires_grad_()
    out = run(text, {"x": x})
    assert out["m"].tolist() == [1, 3, 3]
    (out["z"].log() + out["m"][2]).backward()
    torch.testing.assert_close(x.grad, torch.softmax(x.detach(), 0))


def test_final_value_of_a_state_that_nothing_reads() -> None:
    text = "kernel f(x[t]) -> y[t]:\n    state S[] along t\n    state R[] along t\n    S <- S + x\n    R <- R + S * x\n    y = x + 0\n"
    _, final = run(text, {"x": values(1, 2)}, return_final=True)
    assert (float(final["S"]), float(final["R"])) == (3, 7)


def test_wrong_initial_values_are_named() -> None:
    inputs = linear(2)
    with pytest.raises(errors.WrongShape, match=r"initial value of state 'S' has shape \[2, 3\] but b, d, e is \[2, 3, 2\]"):
        run(LINEAR, inputs, initial={"S": torch.zeros(2, 3)})
    with pytest.raises(errors.UnknownState, match=r"no state 'T'\. The states are S"):
        run(LINEAR, inputs, initial={"T": torch.zeros(2, 3)})
