"""What ``check`` reads off a spec, and the cases that it draws from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from weft.compiler import ir
from weft.compiler.build import build
from weft.dsl.load import parse
from weft.runtime import check_shapes as shapes
from weft.runtime.check_shapes import FULL, QUICK, THEMES, Case, CaseDrawer

ATTENTION = """
kernel attend(q[b,(g r),i,d], k[b,g,j,d], v[b,g,j,e], doc[b,t]: int, bias[(g r)] = 0) -> o[b,(g r),i,e]:
    param window: int = 64
    mask 0 <= i - j < window
    mask doc[t -> i] == doc[t -> j]
    s = sum[d](q * k) / sqrt(size(d)) + bias
    o = sum[j](softmax[j](s) * v)
"""
NEIGHBOURS = """
kernel near(q[b,y,x,d], k[b,yk,xk,d], v[b,yk,xk,e]) -> o[b,y,x,e]:
    param window: int = 7
    mask 0 <= yk - clamp(y - window // 2, 0, size(yk) - window) < window
    mask 0 <= xk - clamp(x - window // 2, 0, size(xk) - window) < window
    o = sum[yk, xk](softmax[yk, xk](sum[d](q * k)) * v)
"""
EXPERTS = """
kernel route(x[t,d], router[(m n),d], w[(m n),d,f]) -> y[t,f]:
    param groups: int = 4
    axis m = groups
    p = softmax[m, n](sum[d](x * router))
    y = sum[m, n](p * sum[d](x * w))
"""
STATE = """
kernel decay(q[b,h,t,d], k[b,h,t,d], v[b,h,t,e]) -> o[b,h,t,e]:
    state S[b,h,d,e] along t
    S <- S * 0.9 + k * v
    o = sum[d](q * S)
"""


def graph(text: str) -> ir.Graph:
    return build(parse(text).kernels[0])


def drawn(text: str, limits: shapes.Limits = FULL, seed: int = 0) -> list[Case]:
    drawer = CaseDrawer(graph(text), limits, seed, None, None, quick=limits is QUICK)
    cases = [drawer.draw(theme, n % limits.palettes) for n, theme in enumerate(THEMES)]
    return [c for c in cases if c is not None]


def test_roles() -> None:
    assert shapes.roles(graph(ATTENTION)) == {
        "b": "batch", "g": "batch", "r": "batch", "i": "sequence", "d": "feature", "j": "sequence", "e": "feature", "t": "sequence",
    }  # fmt: skip
    assert shapes.roles(graph(STATE))["t"] == "sequence"
    assert "m" not in shapes.roles(graph(EXPERTS))


def test_queries_and_keys_are_found_in_comparisons() -> None:
    assert shapes.compared_pairs(graph(ATTENTION)) == [("i", "j")]
    assert set(shapes.compared_pairs(graph(NEIGHBOURS))) == {("y", "yk"), ("x", "xk")}


def test_reads_tie_axes() -> None:
    assert set(shapes.read_ties(graph(ATTENTION))) == {("t", "i"), ("t", "j")}


def test_only_axes_that_are_treated_alike_are_batch_axes() -> None:
    assert shapes.batch_axes(graph(ATTENTION)) == ["b"]
    assert shapes.batch_axes(graph(STATE)) == ["b", "h"]
    assert shapes.batch_axes(graph(EXPERTS)) == []


@pytest.mark.parametrize("text", [ATTENTION, NEIGHBOURS, EXPERTS, STATE])
@pytest.mark.parametrize("limits", [FULL, QUICK], ids=["full", "quick"])
def test_cases_are_small_enough_and_meaningful(text: str, limits: shapes.Limits) -> None:
    made = graph(text)
    cases = drawn(text, limits)
    assert len(cases) == len(THEMES)
    for case in cases:
        extents = shapes.complete_extents(made.kernel, case.sizes, case.params)
        assert shapes.work(made, extents, limits) <= limits.work
        assert all(n >= 1 for n in extents.values())
        if text is NEIGHBOURS:
            assert min(case.sizes["yk"], case.sizes["xk"]) >= case.params["window"]


def test_cases_are_adversarial() -> None:
    cases = [c for seed in range(6) for c in drawn(ATTENTION, seed=seed)]
    lengths = {c.sizes["i"] for c in cases} | {c.sizes["j"] for c in cases}
    assert lengths & {63, 65} and 1 in lengths
    assert any(c.origin.get("i") == c.sizes["j"] - c.sizes["i"] > 0 for c in cases)
    assert any(c.sizes["j"] < c.sizes["i"] for c in cases)
    assert any(c.sizes["r"] > 1 for c in cases)
    assert any(c.omit == ("bias",) for c in cases)
    assert {c.params["window"] for c in cases} > {64}
    assert any(c.wrt is not None for c in cases)
    assert {c.layout for c in cases} == {"contiguous", "transposed", "expanded", "sliced", "gapped", "far", "mixed"}
    assert any(c.sizes["d"] % 2 for c in cases)


def test_drawing_is_reproducible() -> None:
    assert drawn(ATTENTION, seed=3) == drawn(ATTENTION, seed=3) != drawn(ATTENTION, seed=4)


def test_fixed_sizes_and_params_are_kept() -> None:
    drawer = CaseDrawer(graph(ATTENTION), FULL, 0, {"d": 24, "b": 1}, {"window": 3}, quick=False)
    for theme in THEMES:
        case = drawer.draw(theme, 0)
        assert case is not None
        assert (case.sizes["d"], case.sizes["b"], case.params["window"]) == (24, 1, 3)


def test_palettes_are_shared_between_cases() -> None:
    """Each head dim and int param costs a compilation."""
    drawer = CaseDrawer(graph(ATTENTION), QUICK, 0, None, None, quick=True)
    cases = [drawer.draw(theme, palette) for theme, palette in drawer.cases(12)]
    assert len({(c.sizes["d"], c.sizes["e"], c.params["window"]) for c in cases if c is not None}) <= QUICK.palettes


def test_case_travels_as_json() -> None:
    case = Case({"i": 3}, {"window": 2}, {"i": 4}, "large", "sliced", ("bias",), ("q", "k"), 7)
    assert Case.parse(json.dumps(case.to_json())) == case
    assert Case({"i": 3}).to_json() == {"sizes": {"i": 3}}


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "JSON"), ("[]", "JSON object"), ('{"seed": 1}', "lacks 'sizes'"), ('{"sizes": {}, "colour": 1}', "unknown entries ['colour']")],
)
def test_what_is_no_case_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        Case.parse(text)


def test_smaller_cases_are_smaller() -> None:
    case = Case({"i": 9, "j": 4}, {}, {"i": 5}, "large", "sliced", (), ("k", "q"), 7)
    for other in shapes.smaller_cases(case):
        assert other != case and other.seed == case.seed
        assert sum(other.sizes.values()) <= sum(case.sizes.values())
    assert not list(shapes.smaller_cases(replace(Case({"i": 1, "j": 1}), seed=3)))
