"""Running reductions as states: every kind, direction and mask, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.evidence.library import kernel
from weft.compiler import ir
from weft.compiler.scans import scans_as_states
from weft.runtime.check import check_kernel

SCANS = {
    f"{op}{', reverse' * reverse}": f"{op}[t{', reverse' * reverse}](x)"
    for op in ("cumsum", "cumprod", "cumlse")
    for reverse in (False, True)
}
FORMS = {
    "alone": "kernel spec(x[b,t,n], y[b,t,n]) -> o[b,t,n]:\n    a = {scan}\n    o = {value} * y",
    "masked": "kernel spec(x[b,t,n], y[b,t,n], m[b,t]: bool) -> o[b,t,n]:\n    mask m\n    a = {scan}\n    o = {value} * y",
    "read by pairs": (
        "kernel spec(q[b,i,d], k[b,j,d], x[b,t]) -> o[b,i]:\n    a = {scan}\n    mask j <= i\n"
        "    o = sum[j](sum[d](q * k) * tanh(where(a[t -> i] > -5, a[t -> i], 0) - where(a[t -> j] > -5, a[t -> j], 0)))"
    ),
    "of a value of sums": (
        "kernel spec(x0[b,t,d], w[d,n], y[b,t,n]) -> o[b,t,n]:\n    x = tanh(sum[d](x0 * w)) / 3\n    a = {scan}\n    o = {value} * y"
    ),
}


def spec(form: str, scan: str) -> str:
    """An empty prefix of a log-sum-exp is -inf, which the output leaves out."""
    value = "where(a > -1e30, a, 0)" if "cumlse" in scan else "a"
    return FORMS[form].format(scan=SCANS[scan], value=value) + "\n"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_is_fused_and_agrees(scan: str, form: str) -> None:
    made = weft.loads(spec(form, scan)).spec
    lowered = made.lowered("c")
    assert lowered.forward is not None
    assert not lowered.reasons
    report = check_kernel(made, backend="c", trials=2, quick=True, dtypes=("float32",))
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["abc", "forgetting", "ssd_dual"])
def test_shipped_kernels_with_scans_are_fused_whole(name: str) -> None:
    for target in ("c", "sm_90"):
        lowered = kernel(name).lowered(target, extents={"h": 8})
        assert lowered.forward is not None
        assert not lowered.reasons


def test_exclusive_scans_stay_outside() -> None:
    made = weft.loads("kernel spec(x[t]) -> o[t]:\n    o = cumsum[t, exclusive](x)\n").spec
    assert scans_as_states(made.graph) is made.graph


def test_what_no_tensor_holds_stays_a_scan() -> None:
    made = weft.loads("kernel spec(q[i,d], k[j,d]) -> o[i]:\n    o = sum[j](cumsum[j](sum[d](q * k)))\n").spec
    assert scans_as_states(made.graph) is made.graph
    assert any("a scan (cumsum)" in reason for reason in made.lowered("c").reasons)


def test_a_zero_factor_has_the_gradient_of_a_product() -> None:
    """The derivative of a running product is not the product over the factor."""
    made = weft.loads("kernel spec(x[t]) -> o[t]:\n    o = cumprod[t](x)\n").spec
    x = torch.tensor([2.0, 0.0, 3.0, 0.5, -1.0], requires_grad=True)
    made(x, strict=True).sum().backward()
    y = x.detach().double().requires_grad_()
    y.cumprod(0).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad.double(), y.grad)


def test_states_of_scans_have_names_of_their_own() -> None:
    text = "kernel spec(a[t]) -> o[t]:\n    state a_[] along t\n    a_ <- a_ + a\n    o = cumsum[t](a) + cumsum[t](a * a) + a_\n"
    graph = scans_as_states(weft.loads(text).spec.graph)
    assert len(graph.states) == 3
    assert not any(isinstance(n, ir.Scan) for n in ir.topological(graph.outputs.values()))
