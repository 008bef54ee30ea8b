"""``check`` on kernels that are right and kernels that are wrong in ways that are easy to miss.

The kernels here are the reference itself, evaluated in the dtype of its inputs and then changed, so that every test knows
what is wrong. ``test_mutations.py`` breaks the compiler instead.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.compiler.build import build
from weft.compiler.choices import current, watching
from weft.compiler.extents import bind, bind_params
from weft.compiler.ir import Select, topological
from weft.compiler.reference import evaluate
from weft.dsl.load import parse
from weft.runtime.check import Case, Report, check_in_subprocess, check_kernel, render

ATTENTION = """
kernel attend(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], pad[b,j]: bool) -> o[b,h,i,e], l[b,h,i]:
    mask pad
    mask j <= i
    s = sum[d](q * k) / sqrt(size(d))
    o = sum[j](softmax[j](s) * v)
    l = lse[j](s)
"""
GATED = """
kernel gated(q[b,t,d], g[b,t]) -> o[b,t,d], first[b]: int:
    assume g <= 0
    sample g = logsigmoid(normal())
    o = cumsum[t](q * exp(g))
    first = argmax[t](g)
"""

Outputs = dict[str, Tensor]
Change = Callable[["Stand", Outputs, Outputs], Outputs]


class Stand:
    """A kernel that is the reference in the dtype of its inputs, changed: it stands for generated code."""

    def __init__(self, text: str, change: Change | None = None, fused: bool = True, reasons: tuple[str, ...] = ()) -> None:
        self.spec = parse(text, "stand.weft")
        self.typed = self.spec.kernels[0]
        self.name = self.typed.name
        self.graph = build(self.typed)
        self.change = change
        self.calls = 0
        self.status = SimpleNamespace(fused=self.graph if fused else None, forward=None, reasons=list(reasons))

    def lowered(self, target: str) -> Any:
        return self.status

    def __call__(
        self, *tensors: Tensor, sizes: Any = None, origin: Any = None, backend: Any = None, strict: bool = False, **params: Any
    ) -> Any:
        self.calls += 1
        inputs = {t.name: x for t, x in zip(self.typed.inputs, tensors, strict=False)}
        # Laid out alike, so that PyTorch computes the same bits whatever the strides of a call are.
        inputs = {n: x.contiguous() for n, x in inputs.items()}
        extents = bind(self.typed, {n: tuple(x.shape) for n, x in inputs.items()}, params, sizes)
        outputs = evaluate(self.graph, inputs, bind_params(self.typed, params), extents, origin=origin)
        if self.change is not None:
            outputs = self.change(self, outputs, inputs)
        values = tuple(outputs.values())
        return values if len(values) > 1 else values[0]


def check(kernel: Stand, **options: Any) -> Report:
    # PyTorch's own matrix products differ between batches, so invariance is not asked of a stand-in.
    return check_kernel(kernel, **{"backend": "c", "quick": True, "invariance": False, "shrink_seconds": 0.2, **options})


def kinds(report: Report) -> set[str]:
    return {f.kind for r in report.results for f in r.failures}


def quantities(report: Report) -> set[str]:
    return {f.quantity for r in report.results for f in r.failures}


# Right kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("text", [ATTENTION, GATED])
def test_a_right_kernel_passes(text: str, dtype: str) -> None:
    report = check(Stand(text), dtypes=(dtype,))
    assert report.passed and report.status == "passed" and report.fused, render(report)
    assert len(report.results) == 5
    measured = {m.quantity for r in report.results for m in r.measures}
    assert measured >= ({"o", "l", "d_q", "d_k", "d_v"} if text is ATTENTION else {"o", "d_q", "d_g"})


def test_forward_alone() -> None:
    report = check(Stand(ATTENTION), directions=("forward",))
    assert report.passed
    assert {m.quantity for r in report.results for m in r.measures} == {"o", "l"}


def test_fixed_sizes_reach_the_kernel() -> None:
    report = check(Stand(ATTENTION), sizes={"d": 5, "e": 2}, trials=3)
    assert len(report.results) == 3
    assert all((r.case.sizes["d"], r.case.sizes["e"]) == (5, 2) for r in report.results)


# Wrong kernels ----------------------------------------------------------------------------------------------------


def zeros(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    return {**outputs, "o": outputs["o"] * 0}


def one_element(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    factor = torch.ones_like(outputs["o"])
    factor.view(-1)[outputs["o"].detach().abs().argmax()] = 1.01
    return {**outputs, "o": outputs["o"] * factor}


def tail(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    """The last row of a length that no tile divides is computed from the one before."""
    o = outputs["o"]
    if o.shape[-2] % 4 == 0 or o.shape[-2] < 2:
        return outputs
    return {**outputs, "o": torch.cat([o[..., :-1, :], o[..., -2:-1, :]], -2)}


def unwritten(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    """Memory that was allocated and not written to: zeros, if it were not poisoned."""
    memory = torch.empty_like(outputs["o"])
    memory[..., :-1] = outputs["o"][..., :-1]
    return {**outputs, "o": memory}


def empty_rows(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    return {**outputs, "l": outputs["l"].nan_to_num(neginf=-1e4)}


def no_gradient(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    """The right output, but the keys of all rows but the first get no gradient."""
    return {**outputs, "o": outputs["o"][..., :1, :] + 0 * outputs["o"] + (outputs["o"] - outputs["o"][..., :1, :]).detach()}


def aside(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    """Right numbers, wrong gradient of the second output."""
    return {**outputs, "l": outputs["l"].detach() + 0.5 * (outputs["l"] - outputs["l"].detach())}


def reads_masked(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    """0 * NaN is NaN: a product with weights that are 0 where masked."""
    return {**outputs, "o": outputs["o"] + 0 * inputs["v"].sum((-1, -2))[..., None, None]}


def drifting(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    return {**outputs, "o": outputs["o"] * (1 + 1e-6 * (kernel.calls % 2))}


def wrong_dtype(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    return {**outputs, "l": outputs["l"].double()}


def raises(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("change", "kind", "quantity"),
    [
        (zeros, "value", "o"),
        (one_element, "value", "o"),
        (tail, "value", "o"),
        (unwritten, "non-finite", "o"),
        (empty_rows, "non-finite", "l"),
        (no_gradient, "value", "d_k"),
        (aside, "value", "d_q"),
        (reads_masked, "masked", "o"),
        (drifting, "determinism", "o"),
        (wrong_dtype, "structure", "l"),
        (raises, "raised", ""),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_kernel_fails(change: Change, kind: str, quantity: str) -> None:
    report = check(Stand(ATTENTION, change))
    assert not report.passed and report.status == "failed"
    assert kind in kinds(report)
    assert quantity in quantities(report)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("change", [zeros, tail, no_gradient], ids=lambda f: f.__name__)
def test_a_wrong_kernel_fails_in_half_precision(change: Change, dtype: str) -> None:
    assert not check(Stand(ATTENTION, change), dtypes=(dtype,)).passed


def test_ints_are_compared_exactly() -> None:
    def shifted(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
        return {**outputs, "first": outputs["first"] + 1}

    assert quantities(check(Stand(GATED, shifted))) == {"first"}


ONE_KEY = """kernel f(q[b,i,d], k[b,j,d], v[b,j,e]) -> o[b,i,e]:
    s = abs(sum[d](q * k))
    w = exp(s - max[j](s))
    o = sum[j](w * v)
"""


def test_a_gradient_of_terms_that_cancel_may_be_rounding_noise() -> None:
    """The gradient of the score of one key is 0; how nearly depends on how the terms are arranged."""

    def leaking(size: float) -> Change:
        def leaks(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
            q = inputs["q"]
            return {**outputs, "o": outputs["o"] + size * (q - q.detach()).sum(-1, keepdim=True)}

        return leaks

    assert check(Stand(ONE_KEY, leaking(1e-7)), sizes={"j": 1}).passed
    assert "d_q" in quantities(check(Stand(ONE_KEY, leaking(1e-3)), sizes={"j": 1}))


def test_a_sample_must_not_depend_on_its_batch() -> None:
    def mixed(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
        return {**outputs, "o": outputs["o"] * (1 + 1e-6 * (outputs["o"].shape[0] > 1))}

    plain = "kernel f(x[b,h,i], y[b,h,i]) -> o[b,h,i]:\n    o = x * y + 1\n"
    assert check(Stand(plain), invariance=True).passed
    assert kinds(check(Stand(plain, mixed), invariance=True)) == {"batch"}


def test_another_program_may_round_otherwise() -> None:
    """The extent of an axis that tiles keep whole is compiled in."""

    def mixed(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
        return {**outputs, "o": outputs["o"] * (1 + 1e-6 * (outputs["o"].shape[0] > 1))}

    stand = Stand("kernel f(x[b,h,i], y[b,h,i]) -> o[b,h,i]:\n    o = x * y + 1\n", mixed)
    for axes, found in ((("h", "i"), {"batch"}), (("b", "h"), set())):
        stand.status.forward = SimpleNamespace(kernels=[SimpleNamespace(whole=axes)])
        stand.status.differentiable = ()
        assert kinds(check(stand, invariance=True)) == found


def test_samples_that_break_an_assumption_are_a_failure() -> None:
    report = check(Stand("kernel f(g[b,t]) -> o[b,t]:\n    assume g <= 0\n    o = exp(g)\n"))
    assert kinds(report) == {"assume"}
    assert "assume g <= 0" in render(report)


def test_a_spec_without_a_meaningful_case_is_a_failure() -> None:
    report = check(Stand("kernel f(x[i]) -> o[i]:\n    o = log(-1 - x * x)\n"))
    assert not report.passed and not report.results
    assert "no case could be made" in render(report)


# Reports ----------------------------------------------------------------------------------------------------------


def test_a_failure_is_located_shrunk_and_reproducible() -> None:
    def wrong(kernel: Stand, outputs: Outputs, inputs: Outputs) -> Outputs:
        o = outputs["o"].clone()
        if o.shape[2] >= 3:
            o[:, :, 2] += 1
        return {**outputs, "o": o}

    report = check(Stand(ATTENTION, wrong), shrink_seconds=60.0)
    failing = next(r for r in report.results if r.failures)
    assert failing.failures[0].index is not None and failing.failures[0].index["i"] == 2
    assert failing.shrunk is not None
    assert failing.shrunk.sizes == {"b": 1, "h": 1, "i": 3, "d": 1, "j": 1, "e": 1}
    assert (failing.shrunk.values, failing.shrunk.layout) == ("normal", "contiguous")

    line = next(text for text in render(report).splitlines() if "reproduce:" in text)
    words = shlex.split(line.split("reproduce:")[1])
    assert words[:9] == ["weft", "check", "stand.weft", "--kernel", "attend", "--backend", "c", "--dtype", "float32"]
    again = check(Stand(ATTENTION, wrong), case=words[words.index("--case") + 1])
    assert not again.passed and again.results[0].case == failing.shrunk
    assert check(Stand(ATTENTION), case=failing.shrunk).passed


def test_a_case_that_does_not_fit_is_a_failure_not_an_exception() -> None:
    report = check(Stand(ATTENTION), case=Case({"b": 1}))
    assert kinds(report) == {"case"}


def test_reports_travel_as_json() -> None:
    for change in (None, tail, raises):
        report = check(Stand(ATTENTION, change), trials=3)
        data = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert Report.from_json(data) == report
        assert data["passed"] == (change is None)
        assert [entry["command"] is None for entry in data["results"]] == [r.passed for r in report.results]


def test_what_is_not_fused_is_reported_as_such() -> None:
    kernel = Stand(ATTENTION, zeros, fused=False, reasons=("the scan of line 3 runs as PyTorch",))
    report = check(kernel)
    assert report.status == "reference only" and report.passed and not report.fused
    assert "the scan of line 3" in render(report)
    assert kernel.calls == 0
    assert not check(kernel, strict=True).passed


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    check(Stand(GATED), progress=lambda done, count: told.append((done, count)))
    assert told == [(n, 5) for n in range(1, 6)]


def test_checking_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "stand.weft"
    path.write_text(GATED)
    report = check_in_subprocess(GATED, str(path), "gated", backend="reference", environment={"WEFT_TEST": "1"}, quick=True, trials=2)
    assert report.passed and report.kernel == "gated" and len(report.results) == 2


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        check_in_subprocess(GATED, "stand.weft", "no_such_kernel", backend="reference")


# Selections -------------------------------------------------------------------------------------------------------

CHOOSING = """
kernel choosing(x[t,d], r[n,d]) -> y[t,n]:
    sample r = 0.0 * normal() + 1.0
    z = sum[d](x * r)
    mask topk[n](z, 2)
    y = z * z
"""


class Chooses(Stand):
    """Chooses what it is told to, in place of the two largest."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__(CHOOSING)
        self.choose = choose

    def __call__(self, *tensors: Tensor, **options: Any) -> Any:
        noted = current()
        (select,) = (n for n in topological(self.graph.outputs.values()) if isinstance(n, Select))
        with watching({select: self.choose(tensors[0] @ tensors[1].detach().T)}) as seen:
            found = super().__call__(*tensors, **options)
        if noted is not None:
            noted.seen.extend(seen.seen)
        return found


def hot(indices: Tensor, n: int) -> Tensor:
    return torch.zeros(len(indices), n, dtype=torch.bool).scatter_(1, indices, True).T


def test_a_tie_may_be_broken_otherwise() -> None:
    """All scores of a token are equal: whichever two are chosen, the numbers are held to that choice."""
    report = check(Chooses(lambda z: hot(torch.tensor([[2, 4]]).expand(len(z), 2), z.shape[1])), sizes={"t": 3, "n": 5, "d": 4}, trials=2)
    assert report.passed, render(report)


@pytest.mark.parametrize("count", [1, 3])
def test_a_choice_of_too_few_or_too_many_fails(count: int) -> None:
    report = check(Chooses(lambda z: hot(z.topk(count, 1).indices, z.shape[1])), sizes={"t": 3, "n": 5, "d": 4}, trials=1)
    assert "topk" in quantities(report)


def test_a_choice_of_lower_scores_fails() -> None:
    kernel = Chooses(lambda z: hot((-z).topk(2, 1).indices, z.shape[1]))
    kernel.spec = parse(CHOOSING.replace("    sample r = 0.0 * normal() + 1.0\n", ""), "stand.weft")
    kernel.typed = kernel.spec.kernels[0]
    kernel.graph = build(kernel.typed)
    report = check(kernel, sizes={"t": 3, "n": 5, "d": 4}, trials=1)
    assert "topk" in quantities(report)
    assert "is not what the scores say, for 3 of 3" in render(report)
