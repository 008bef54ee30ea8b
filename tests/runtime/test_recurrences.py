"""Recurrences step by step: any length, states in and out of calls, segments of the backward pass, names of one axis."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weft
from tests.evidence.library import RECURRENT, kernel
from weft.compiler.errors import CallError
from weft.runtime.check import check_kernel, render
from weft.runtime.chunked import posed_in_chunks
from weft.runtime.costs import buffer_bytes, plan_cost, totals
from weft.runtime.errors import NotFused
from weft.runtime.kernel import Kernel
from weft.runtime.problem import Usual, pose


def _problem(name: str, length: int, seed: int = 1) -> tuple[Kernel, list[Tensor], dict[str, Tensor], dict[str, object]]:
    """A kernel with inputs and initial states of its recurrences that need gradients, and its params."""
    made = kernel(name)
    problem = pose(made.graph, {}, {}, Usual(length, 8, 2, 2))
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in problem.inputs(seed=seed).values()]
    torch.manual_seed(seed)
    states = {s.name: torch.rand([problem.extents[a] for a in s.axes]).requires_grad_() for s in made.graph.states.values()}
    if name == "mesa_net":  # conjugate gradients are for symmetric, positive matrices, and amplify rounding where one is nearly singular
        h = states["H"].detach()
        states["H"] = (h @ h.mT + torch.eye(h.shape[-1])).requires_grad_()
    return made, inputs, states, dict(problem.params)


def _run(
    made: Kernel, inputs: list[Tensor], states: dict[str, Tensor], params: dict[str, object], **how: object
) -> tuple[list[Tensor], dict[str, Tensor]]:
    result, final = made(*inputs, **params, initial=states, return_final=True, **how)
    return ([result] if isinstance(result, Tensor) else list(result)), final


def _gradients(values: list[Tensor], wanted: list[Tensor], seed: int = 3) -> tuple[Tensor | None, ...]:
    torch.manual_seed(seed)
    cotangents = [torch.randn(v.shape).to(v.dtype) for v in values]
    reached = [n for n, v in enumerate(values) if v.requires_grad]
    return torch.autograd.grad([values[n] for n in reached], wanted, [cotangents[n] for n in reached], allow_unused=True)


def _scale(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt()) + 1e-6


ILL_CONDITIONED = {"mesa_net": 5}
"""Times the usual tolerance: conjugate gradients amplify rounding. PyTorch's own float32 is off by 1.3e-3 of values and RMS here."""


@pytest.mark.parametrize("name", RECURRENT)
def test_states_go_in_and_come_out_with_their_gradients(name: str) -> None:
    made, inputs, states, params = _problem(name, 37)
    if not states:
        pytest.skip("no states")
    found, final = _run(made, inputs, states, params, strict=not made.lowered("c").outside)
    wanted = [t for t in (*inputs, *states.values()) if t.requires_grad]
    doubles = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    began = {n: t.detach().double().requires_grad_() for n, t in states.items()}
    expected, ended = _run(made, doubles, began, params, backend="reference")
    for a, b in zip([*found, *final.values()], [*expected, *ended.values()], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4 * _scale(b))
    twins = [t for t in (*doubles, *began.values()) if t.requires_grad]
    pairs = zip(_gradients([*found, *final.values()], wanted), _gradients([*expected, *ended.values()], twins), strict=True)
    tolerance = 1e-3 * ILL_CONDITIONED.get(name, 1)
    for a, b in pairs:
        assert (a is None or not a.any()) if b is None else a is not None
        if a is not None and b is not None:
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * _scale(b))


@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 33, 63, 64, 65, 97])
def test_any_length(length: int) -> None:
    """Segments of the backward pass have 32 steps."""
    for name in ("gla", "lstm", "gated_delta", "gla_bidirectional"):
        made, inputs, _, params = _problem(name, length)
        twins = [t.detach().double().requires_grad_() for t in inputs]
        (found,) = [made(*inputs, **params, strict=True)] if name != "lstm" else [made(*inputs, **params, strict=True).y]
        (expected,) = [made.reference(*twins, **params)] if name != "lstm" else [made.reference(*twins, **params).y]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        for a, b in zip(_gradients([found], inputs), _gradients([expected], twins), strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * _scale(b), msg=f"{name}, {length}")


@pytest.mark.parametrize("name", ["gla", "lstm_np", "mlstm", "rwkv7", "slstm"])
def test_a_sequence_in_parts_is_the_sequence(name: str) -> None:
    """Decoding step by step, and any split in between, to float32 rounding."""
    made, inputs, states, params = _problem(name, 12)
    times = [t.axes.index("t") if "t" in t.axes else None for t in made.typed.inputs]
    whole, end = _run(made, inputs, states, params)
    for parts in ([1] * 12, [5, 7], [4, 1, 7]):
        now, pieces, begin = states, [], 0
        for length in parts:
            some = [t if at is None else t.narrow(at, begin, length) for t, at in zip(inputs, times, strict=True)]
            result, now = _run(made, some, now, params)
            pieces.append(result)
            begin += length
        for n, output in enumerate(made.typed.outputs):
            if "t" in output.axes:
                joined = torch.cat([p[n] for p in pieces], output.axes.index("t"))
                torch.testing.assert_close(joined, whole[n], rtol=1e-5, atol=1e-5)
        for s in end:
            torch.testing.assert_close(now[s], end[s], rtol=1e-5, atol=1e-5)


def test_half_precision_keeps_states_in_float32() -> None:
    made, inputs, states, params = _problem("gla", 9)
    halves = [t.detach().bfloat16().requires_grad_() for t in inputs]
    found, final = _run(made, halves, states, params, strict=True)
    assert found[0].dtype == torch.bfloat16
    assert final["S"].dtype == torch.float32
    gradients = _gradients([*found, *final.values()], [*halves, *states.values()])
    assert [g.dtype for g in gradients if g is not None] == [torch.bfloat16] * 4 + [torch.float32]


def test_two_runs_are_equal_to_the_last_bit() -> None:
    made, inputs, states, params = _problem("gated_delta", 70)
    first, second = (_run(made, inputs, states, params, strict=True) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    for a, b in zip(_gradients(first[0], inputs), _gradients(second[0], inputs), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_compiled_as_one_graph() -> None:
    made, inputs, states, params = _problem("gla", 17)

    def loss(*tensors: Tensor) -> Tensor:
        result, final = made(*tensors[:-1], initial={"S": tensors[-1]}, return_final=True, **params)
        return result.square().sum() + final["S"].sum()

    expected = torch.autograd.grad(loss(*inputs, states["S"]), [*inputs, states["S"]])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs, states["S"]), [*inputs, states["S"]]), expected, strict=True):
        torch.testing.assert_close(a, b)


SHORTER = '''"""A state read under the name of an axis that is shorter or longer than its own."""

kernel renamed(x[b,t,n], r[m,n]) -> y[b,t,n]:
    sample r = normal() / sqrt(size(n))
    state h[b,n] along t
    h <- tanh(x + sum[m](h[n -> m] * r))
    y = h
'''


@pytest.mark.parametrize("other", [3, 8, 13])
def test_a_state_under_another_name_may_be_shorter_or_longer(other: int) -> None:
    renamed = weft.loads(SHORTER).renamed
    report = check_kernel(renamed, backend="c", sizes={"n": 8, "m": other}, trials=2, quick=True, strict=True)
    assert report.passed, render(report)


def test_an_initial_value_of_another_shape_is_refused() -> None:
    made, inputs, _, params = _problem("gla", 5)
    with pytest.raises(CallError, match="initial value of state 'S'"):
        made(*inputs, **params, initial={"S": torch.zeros(3, 3)})


UNSEEN = {
    "masked": '''"""A state that skips steps."""

kernel a(x[b,t,d], keep[b,t]: bool, g[b,t]) -> y[b,t,d], h[b,d]:
    sample g = logsigmoid(normal())
    mask keep
    state h[b,d] along t
    h <- exp(g) * h + x
    y = h
''',
    "every third": '''"""A mask by position."""

kernel a(q[b,h,t,d], k[b,h,t,d], v[b,h,t,e]) -> o[b,h,t,e]:
    state S[b,h,d,e] along t
    S <- where(t % 3 == 0, S / 2 + k * v, S)
    o = sum[d](q * S)
''',
    "start": '''"""A start that is an input's."""

kernel a(x[b,t,d], s0[b,d], w[d]) -> y[b,t,d]:
    state h[b,d] = tanh(s0 * w) along t reverse
    h <- h / 2 + sin(x) * w
    y = h * x
''',
    "sum over time": '''"""What follows the steps sums them."""

kernel a(x[b,t,d], u[b,d]) -> y[b,d], z[b,t]:
    state h[b,d] along t
    h <- h / 2 + x
    y = sum[t](h * x) + u
    z = sum[d](h * u)
''',
    "attention over states": '''"""Softmax over a trajectory."""

kernel a(x[b,t,d], q[b,i,d]) -> o[b,i,d]:
    state h[b,d] along t
    h <- h / 2 + x
    s = sum[d](q * h)
    o = sum[t](softmax[t](s) * h)
''',
    "shift": '''"""Token shift in front, and the state of the step before read after."""

kernel a(x[b,t,d], m[d]) -> y[b,t,d]:
    z = x + m * x[t -> t - 1]
    state h[b,d] along t
    past = h
    h <- tanh(h + z)
    y = h - past
''',
    "two clocks": '''"""Steps in steps, with an output of the outer clock."""

kernel a(x[b,(t u),d], g[b,t]) -> y[b,t,d]:
    param n: int = 3
    axis u = n
    sample g = logsigmoid(normal())
    state h[b,d] along (t u)
    h <- where(u == 0, exp(g), 1) * h + x
    y = h[u -> size(u) - 1]
''',
    "norm": '''"""A step that normalises keys and its state's read."""

kernel a(q[b,h,t,d], k[b,h,t,d], v[b,h,t,e], w[e]) -> o[b,h,t,e]:
    kn = k * rsqrt(sum[d](k * k) + 1e-6)
    state S[b,h,d,e] along t
    S <- S + kn * (v - sum[d](kn * S)) / 2
    r = sum[d](q * S)
    o = w * r * rsqrt(mean[e](r * r) + 1e-6)
''',
    "projected": '''"""Inputs are projected in front of the steps."""

kernel a(x[b,t,c], wk[h,c,d], wv[h,c,e], wq[h,c,d]) -> o[b,t,h,e]:
    sample wk = normal() / sqrt(size(c))
    k = sum[c](x * wk)
    v = sum[c](x * wv)
    q = sum[c](x * wq)
    state S[b,h,d,e] along t
    S <- S / 2 + k * v
    o = sum[d](q * S)
''',
    "max": '''"""A running maximum and what it is of."""

kernel a(x[b,t,d]) -> y[b,t,d], m[b,d]:
    state m[b,d] = -inf along t
    m <- max(m, x)
    y = exp(x - m)
''',
}
"""Recurrences that no spec of the library looks like."""


@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_library_has_not(name: str) -> None:
    report = check_kernel(weft.loads(UNSEEN[name]).a, backend="c", trials=3, quick=True, strict=True)
    assert report.passed, render(report)


def test_an_origin_along_a_renamed_axis_runs_as_the_reference() -> None:
    renamed = weft.loads(SHORTER).renamed
    x, r = torch.randn(1, 3, 8), torch.randn(8, 8)
    with pytest.raises(NotFused, match="by whose other name a state is read"):
        renamed(x, r, origin={"m": 2}, strict=True)
    torch.testing.assert_close(renamed(x, r, origin={"m": 2}), renamed.reference(x, r, origin={"m": 2}))


MADE_OF_WEIGHTS = """
kernel a(x[b,t,m], u[n,k], r[n,m]) -> y[b,t,n]:
    axis k = size(n)
    state h[b,n] along t
    h <- tanh(sum[k](u * exp(-u * u) * h[n -> k]) + sum[m](x * r))
    y = h
"""

LOADED_AGAIN = """
import weft
from weft.compiler import emit_steps
from weft.runtime.check import check_kernel, render

emit_steps.HELD_LIMIT = 0
report = check_kernel(weft.load("made.weft").a, backend="triton", trials=3, quick=True, strict=True)
print(render(report))
raise SystemExit(not report.passed)
"""


def test_what_is_made_of_weights_that_every_step_loads(tmp_path: Path) -> None:
    """A value of weights alone varies with no step, but is made in the step, after its weights are loaded."""
    pytest.importorskip("triton")
    (tmp_path / "made.weft").write_text(MADE_OF_WEIGHTS, encoding="utf-8")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "WEFT_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LOADED_AGAIN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


PROJECTIONS = """
    sample wq = normal() / sqrt(size(c))
    sample wk = normal() / sqrt(size(c))
    sample wv = normal() / sqrt(size(c))
    q = sum[c](x * wq)
    k = sum[c](x * wk)
    v = sum[c](x * wv)
"""

GATED_LAYER = f"""
kernel a(x[b,t,c], wq[h,d,c], wk[h,d,c], wv[h,e,c], wg[h,d,c], wo[h,e,c]) -> y[b,t,c]:
{PROJECTIONS}
    g = logsigmoid(sum[c](x * wg)) / 16
    state S[b,h,d,e] along t
    S <- exp(g) * S + k * v
    o = sum[d](q * S) / sqrt(size(d))
    y = sum[h, e](o * wo)
"""
"""A whole layer of gated linear attention."""

STABILISED_LAYER = f"""
kernel a(x[b,t,c], wq[h,d,c], wk[h,d,c], wv[h,e,c], wi[h,c], wf[h,c], wo[h,e,c]) -> y[b,t,c]:
{PROJECTIONS}
    i = sum[c](x * wi)
    f = logsigmoid(sum[c](x * wf))
    state m[b,h] = -inf along t
    state C[b,h,d,e] along t
    state n[b,h,d] along t
    m_prev = m
    m <- max(f + m, i)
    C <- exp(f + m_prev - m) * C + exp(i - m) * k * v
    n <- exp(f + m_prev - m) * n + exp(i - m) * k
    o = sum[d](q * C) / max(abs(sum[d](q * n)), exp(-m))
    y = sum[h, e](o * wo)
"""
"""What is divided by a normaliser of the steps is projected: an mLSTM."""

CORRECTED = f"""
kernel a(x[b,t,c], wq[h,d,c], wk[h,d,c], wv[h,e,c], wb[h,c]) -> o[b,h,t,e]:
{PROJECTIONS}
    n = k * rsqrt(sum[d](k * k) + 1e-6)
    beta = sigmoid(sum[c](x * wb))
    state S[b,h,d,e] along t
    S <- S + n * beta * (v - sum[d](n * S))
    o = sum[d](q * S)
"""
"""The delta rule on projections."""


@pytest.mark.parametrize("text", [GATED_LAYER, STABILISED_LAYER, CORRECTED])
def test_layers_project_all_steps_at_once(text: str) -> None:
    """And a head is a program of steps, as it is where queries, keys and values are given."""
    made: Kernel = weft.loads(text).a
    problem = pose(made.graph, {}, {}, Usual())
    lowered = made.lowered("c", extents=problem.extents, params=problem.params)
    assert lowered.forward is not None, lowered.reasons
    most = 6 * 2 * 2048 * 8 * 64 * 64  # five products of rows with weights and one of queries with states, or about as much
    for plan, passes in ((lowered.forward, 1), (lowered.backward(frozenset(lowered.differentiable)), 4)):
        costs = plan_cost(plan, problem.extents, problem.params, "float32")
        assert totals(costs).flops <= 1.5 * passes * most
        made_between = [buffer_bytes(plan, n, problem.extents, "float32") for n, b in plan.buffers.items() if b.role == "temporary"]
        assert sum(made_between) <= 64 * 2**20
        assert {c.programs for c in costs if "steps" in c.note} == {8}
    report = check_kernel(made, backend="c", trials=2, quick=True, strict=True)
    assert report.passed, render(report)


GATED = GATED_LAYER.replace(", wo[h,e,c]) -> y[b,t,c]", ") -> o[b,h,t,e]").replace("    y = sum[h, e](o * wo)\n", "")


@pytest.mark.parametrize("text", [GATED, CORRECTED])
def test_layers_in_chunks_make_each_product_once(text: str) -> None:
    """What is projected has features, which a program has side by side: no product of positions is made again for every one of them."""
    made: Kernel = weft.loads(text).a
    problem = pose(made.graph, {}, {}, Usual())
    steps = made.lowered("c", extents=problem.extents, params=problem.params)
    chunked, cut = posed_in_chunks(made, problem)
    chunks = chunked.lowered("sm_90", extents=cut.extents, params=cut.params)
    assert steps.forward is not None and chunks.forward is not None, chunks.reasons
    for step, chunk in (
        (steps.forward, chunks.forward),
        (steps.backward(frozenset(steps.differentiable)), chunks.backward(frozenset(chunks.differentiable))),
    ):
        fewest = totals(plan_cost(step, problem.extents, problem.params, "float32")).flops
        assert totals(plan_cost(chunk, cut.extents, cut.params, "float32")).flops <= 3.5 * fewest
