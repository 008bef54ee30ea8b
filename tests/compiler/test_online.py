"""The online law: which sums share a sweep, and which need another."""

from __future__ import annotations

import pytest

import weft.dsl
from weft.compiler import ir
from weft.compiler.build import build
from weft.compiler.canonicalise import canonicalise
from weft.compiler.exchange import split_sums
from weft.compiler.online import find_law
from weft.compiler.pipeline import Hints, Target, lower
from weft.compiler.plan import Loop, Store, inner_statements

HEAD = '"""Law."""\n\nkernel k(q[b,i,d], k[b,j,d], v[b,j,e], sink[b]) -> o[b,i,e]:\n    s = sum[d](q * k)\n'


def _output(body: str) -> ir.Node:
    kernel = weft.dsl.parse(HEAD + "".join(f"    {line}\n" for line in body.splitlines())).kernels[0]
    return split_sums(canonicalise(build(kernel).outputs))["o"]


def _law(body: str) -> int | None:
    """Terms of the law of the value sum, None where there is none."""
    nodes = list(ir.topological([_output(body)]))
    rows = {n for n in nodes if isinstance(n, ir.Reduce) and n.over == ("j",) and "e" not in n.axes}
    sums = [n for n in nodes if isinstance(n, ir.Reduce) and n.over == ("j",) and "e" in n.axes]
    laws = [find_law(s.x, rows, frozenset("j")) for s in sums]
    return None if any(law is None for law in laws) else max(len(law.basis) for law in laws if law is not None)


@pytest.mark.parametrize(
    ("body", "terms"),
    [
        ("o = sum[j](softmax[j](s) * v)", 1),
        ("o = sum[j](exp(s - logaddexp(lse[j](s), sink)) * v)", 1),
        ("o = sum[j](exp(s - max[j](s)) * v)", 1),
        ("p = softmax[j](s)\no = sum[j](p * (s - lse[j](s)) * v)", 2),
        ("p = softmax[j](s)\no = sum[j](p * (s - lse[j](s))**2 * v)", 3),
        ("p = softmax[j](s)\no = sum[j](relu(p - mean[j](p)) * v)", None),
        ("o = sum[j](sigmoid(s - lse[j](s)) * v)", None),
        ("o = sum[j](softmax[j](s) * tanh(s - max[j](s)) * v)", None),
    ],
)
def test_terms_of_the_law(body: str, terms: int | None) -> None:
    assert _law(body) == terms


def _sweeps(body: str) -> int:
    kernel = weft.dsl.parse(HEAD + "".join(f"    {line}\n" for line in body.splitlines())).kernels[0]
    plan = lower(build(kernel), Target("c"), Hints()).forward
    assert plan is not None
    (fused,) = [k for k in plan.kernels if any(isinstance(s, Store) and s.buffer == "o" for s in inner_statements(k.body))]
    loops = [s for s in fused.body if isinstance(s, Loop)]
    return len({id(s) for s in loops if s.note.startswith("full")})


def test_softmax_takes_one_sweep_and_a_failed_law_another() -> None:
    assert _sweeps("o = sum[j](softmax[j](s) * v)") == 1
    assert _sweeps("p = softmax[j](s)\no = sum[j](relu(p - mean[j](p)) * v)") == 2
