"""Kernels whose sums separate, as recurrences: which they are, that nothing changes but the time, and when they are chosen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

import weft
from tests.evidence.library import OTHERS, REQUIRED, kernel
from weft.runtime import dual as duals
from weft.runtime.dual import DualKernel
from weft.runtime.execute import _as_recurrence
from weft.runtime.explain import explain
from weft.runtime.problem import Usual, pose

if TYPE_CHECKING:
    from weft.runtime.kernel import Kernel
    from weft.runtime.problem import Problem

SHIPPED = frozenset("retention based rebased ssd_dual hedgehog performer".split())

SEPARABLE = {
    "linear attention": "    mask j <= i\n    o = sum[j](sum[d](q * k) * v)",
    "the other way round": "    mask i >= j\n    o = sum[j](v * sum[d](k * q))",
    "a feature map": "    o = sum[j where j <= i](sum[d](softplus(q) * softplus(k)) * v)",
    "a normaliser": "    mask j <= i\n    w = sum[d](exp(q) * exp(k))\n    o = sum[j](w * v) / (sum[j](w) + 1e-6)",
    "a polynomial": "    mask j <= i\n    s = sum[d](q * k)\n    o = sum[j]((2 - s / 3 + s**2 / 7) * v)",
    "a third power": "    mask j <= i\n    o = sum[j](sum[d](q * k)**3 / 50 * v)",
    "a product of sums": "    mask j <= i\n    o = sum[j]((1 + sum[d](q * k)) * (2 - sum[d](q * abs(k))) * v)",
    "a constant decay": "    mask j <= i\n    o = sum[j](0.9**(i - j) * sum[d](q * k) * v)",
    "a decay by rate": "    mask j <= i\n    o = sum[j](exp(-abs(c) * (i - j)) * sum[d](q * k) * v)",
    "a decay of every other step": "    mask j <= i\n    o = sum[j](0.9**(2 * (i - j)) * sum[d](q * k) * v)",
    "a cumulated gate": "    a = cumsum[t](logsigmoid(g))\n    mask j <= i\n    o = sum[j](exp(a[t -> i] - a[t -> j]) * sum[d](q * k) * v)",
    "gates on both sides": "    mask j <= i\n    o = sigmoid(c) * sum[j](sum[d](q * k) * tanh(v)) + sum[d](q)",
}
INSEPARABLE = {
    "softmax": ("    mask j <= i\n    o = sum[j](softmax[j](sum[d](q * k)) * v)", "of a weight"),
    "no mask": ("    o = sum[j](sum[d](q * k) * v)", "no sum over the positions"),
    "a window": ("    mask j <= i\n    mask i - j < 8\n    o = sum[j](sum[d](q * k) * v)", "no sum over the positions"),
    "a sigmoid": ("    mask j <= i\n    o = sum[j](sigmoid(sum[d](q * k)) * v)", "sigmoid of a weight"),
    "a distance that does not decay": ("    mask j <= i\n    o = sum[j]((i - j) * sum[d](q * k) * v)", "grows with i - j"),
    "a decay by squared distance": ("    mask j <= i\n    o = sum[j](0.9**((i - j) * (i - j)) * sum[d](q * k) * v)", "pow of a weight"),
    "twice a running sum": (
        "    a = cumsum[t](g) * 2\n    mask j <= i\n    o = sum[j](exp(a[t -> i] - a[t -> j]) * sum[d](q * k) * v)",
        "exp of a weight",
    ),
}


def one(body: str) -> Kernel:
    """The kernel with this body and the inputs that it reads."""
    more = [text for name, text in (("g", "g[b,h,t]"), ("c", "c[h]")) if re.search(rf"\b{name}\b", body)]
    head = f"kernel spec({', '.join(['q[b,h,i,d]', 'k[b,h,j,d]', 'v[b,h,j,e]', *more])}) -> o[b,h,i,e]:\n"
    found: Kernel = weft.loads(head + body + "\n").spec
    return found


def posed(made: Kernel, length: int, feature: int = 8) -> Problem:
    sizes = {a: length for a in ("i", "j", "t") if a in made.axis_names}
    return pose(made.graph, {"b": 1, "h": 2, **sizes} if "h" in made.axis_names else {"b": 1, **sizes}, {}, Usual(length, feature))


def agree(made: Kernel, problem: Problem) -> None:
    """The dual on generated kernels agrees with the base evaluated in float64, forward and backward."""
    dual = DualKernel.of(made)
    assert isinstance(dual, DualKernel), dual
    inputs = problem.inputs()
    leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    exact = {n: x.double().requires_grad_(x.is_floating_point()) if x.is_floating_point() else x for n, x in inputs.items()}
    assert _as_recurrence(made.prepare(leaves, {})) is not None, dual.lowered("c").reasons
    got, want = made(**leaves, strict=True), made.reference(**exact)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [n for n, x in leaves.items() if x.requires_grad]
    found = torch.autograd.grad(got, [leaves[n] for n in wanted], cotangent.float(), allow_unused=True)
    right = torch.autograd.grad(want, [exact[n] for n in wanted], cotangent, allow_unused=True)
    for name, a, b in [("output", got.detach(), want.detach()), *zip(wanted, found, right, strict=True)]:
        if b is not None:
            assert a is not None, name
            assert (a - b).abs().max() <= 3e-5 * b.abs().max() + 1e-6, (name, float((a - b).abs().max()), float(b.abs().max()))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrences at any length that is looked at."""
    monkeypatch.setattr(DualKernel, "crossover", lambda *_: 1)


@pytest.mark.parametrize("name", [*REQUIRED, *OTHERS])
def test_the_shipped_kernels_that_separate(name: str) -> None:
    made = kernel(name)
    if made.states:
        pytest.skip("a recurrence already")
    found = DualKernel.of(made)
    assert isinstance(found, DualKernel) == (name in SHIPPED), found


@pytest.mark.parametrize("name", sorted(SHIPPED))
@pytest.mark.parametrize("length", [128, 131])
def test_shipped_kernels_agree_with_their_pairwise_form(name: str, length: int, always: None) -> None:
    agree(kernel(name), posed(kernel(name), length))


@pytest.mark.parametrize("spelling", SEPARABLE)
def test_spellings_that_separate(spelling: str, always: None) -> None:
    made = one(SEPARABLE[spelling])
    agree(made, posed(made, 130, 4))


@pytest.mark.parametrize("spelling", INSEPARABLE)
def test_spellings_that_do_not(spelling: str) -> None:
    body, why = INSEPARABLE[spelling]
    found = DualKernel.of(one(body))
    assert isinstance(found, str)
    assert why in found


def chosen(made: Kernel, monkeypatch: pytest.MonkeyPatch, **shapes: tuple[int, ...]) -> bool:
    """Whether a call runs as the recurrence."""
    seen: list[bool] = []
    original = duals.with_dual

    def watch(call: duals.Call) -> duals.Call:
        other = original(call)
        seen.append(other is not call)
        return other

    monkeypatch.setattr(duals, "with_dual", watch)
    made(**{n: torch.randn(*shape) for n, shape in shapes.items()})
    return any(seen)


def test_the_length_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kernel("retention")
    dual = DualKernel.of(made)
    assert isinstance(dual, DualKernel)
    crossover = dual.crossover({"b": 1, "h": 1, "i": 1, "j": 1, "d": 16, "e": 16})
    for length, linear in ((crossover - 1, False), (max(crossover, 128), True)):
        shape = (1, 1, length, 16)
        assert chosen(made, monkeypatch, q=shape, k=shape, v=shape) == linear


def test_more_keys_than_queries_stay_pairs(monkeypatch: pytest.MonkeyPatch, always: None) -> None:
    assert not chosen(kernel("retention"), monkeypatch, q=(1, 1, 130, 16), k=(1, 1, 140, 16), v=(1, 1, 140, 16))


def test_other_origins_stay_pairs(always: None) -> None:
    """A query at position 130 meets all keys; a recurrence would not see that."""
    made = kernel("retention")
    q, k, v = (torch.randn(1, 1, 130, 16) for _ in range(3))
    torch.testing.assert_close(made(q, k, v, origin={"i": 130}), made.reference(q, k, v, origin={"i": 130}), rtol=1e-4, atol=1e-5)
    together = {"i": 7, "j": 7}
    torch.testing.assert_close(made(q, k, v, origin=together), made.reference(q, k, v, origin=together), rtol=1e-4, atol=1e-5)


def test_explain_says_so() -> None:
    made = kernel("retention")
    short, long = (str(explain(made, posed(made, length, 16))) for length in (16, 4096))
    assert "dual      its sums over j separate: from " in short
    assert "rows, one sweep" in short
    assert "recurrence: steps of state_1 along i" in long
    assert "dual" not in str(explain(kernel("full"), posed(kernel("full"), 4096, 16)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_choose_too(dynamic: bool, always: None) -> None:
    made = kernel("retention")
    torch._dynamo.reset()

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return made(q, k, v, strict=True).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (64, 130, 200):
        tensors = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
        got, want = compiled(*tensors), made.reference(*tensors).sin()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        found, right = (torch.autograd.grad(o.sum(), tensors) for o in (got, want))
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
