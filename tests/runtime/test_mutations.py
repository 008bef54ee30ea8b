"""Breaks the compiler on purpose and sees ``check`` catch it: a check that has never been seen failing proves nothing.

Each test changes one thing in a printer, in the table of derivatives or in the bounds that masks are solved for, and compiles
a kernel of its own into a cache of its own, so that nothing broken can reach another test.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import weft
from weft.codegen import c_expressions
from weft.compiler import algebra, autodiff, ir, masks
from weft.runtime.check import Report, check_kernel, render

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")), reason="no C compiler")

SPEC = """
kernel broken_on_purpose(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e]) -> o[b,h,i,e]:
    param window: int = 80
    mask 0 <= i - j < window
    s = 5 * tanh(sum[d](q * k) / 5)
    o = sum[j](softmax[j](s) * v)
"""
SIZES = {"b": 1, "h": 2, "i": 129, "j": 129, "d": 16, "e": 8}
"""One more than two tiles: the last tile hangs by a single row, so that a bound off by one loses it."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))


def check() -> Report:
    kernel = weft.loads(SPEC)["broken_on_purpose"]
    return check_kernel(kernel, backend="c", quick=True, trials=1, sizes=SIZES, shrink_seconds=0.0)


def wrong(report: Report) -> set[str]:
    """The outputs and gradients that were found wrong."""
    return {f.quantity for r in report.results for f in r.failures}


def test_the_unbroken_compiler_passes() -> None:
    report = check()
    assert report.passed and report.fused, render(report)


@pytest.mark.parametrize(
    ("table", "operation", "text"),
    [
        ("_REAL_FUNCTIONS", "tanh", "sigmoid"),
        ("_BINARY", "mul", ("+", c_expressions.PRODUCT)),
        ("_BINARY", "lt", ("<=", c_expressions.ORDER)),
    ],
    ids=["another function", "another operator", "a window one key too long"],
)
def test_a_broken_printer_is_caught(monkeypatch: pytest.MonkeyPatch, table: str, operation: str, text: object) -> None:
    monkeypatch.setitem(getattr(c_expressions, table), operation, text)
    assert "o" in wrong(check())


def _forgets_the_square(g: ir.Node, y: ir.Node, x: ir.Node) -> tuple[ir.Node]:
    return (algebra.mul(g, algebra.sub(algebra.ONE, y)),)


def _forgets_the_normaliser(g: ir.Node, y: ir.Node, a: ir.Node, b: ir.Node) -> tuple[ir.Node, None]:
    return algebra.mul(g, y), None


@pytest.mark.parametrize(
    ("operation", "rule"), [("tanh", _forgets_the_square), ("expdiff", _forgets_the_normaliser)], ids=["tanh", "softmax"]
)
def test_a_broken_derivative_is_caught(monkeypatch: pytest.MonkeyPatch, operation: str, rule: Callable[..., object]) -> None:
    """The output stays right: only gradients can show it."""
    monkeypatch.setitem(autodiff.RULES, operation, rule)
    assert wrong(check()) == {"d_q", "d_k"}


LOOSER = {"full_stop": 64, "full_start": -64}
TIGHTER = {"stop": -64, "start": 64}


@pytest.mark.parametrize("bound", [*LOOSER, *TIGHTER])
def test_a_mask_bound_off_by_a_tile_is_caught(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """Tiles that need a test and get none, and tiles that are needed and never visited."""
    solve = masks._solve_affine
    shift = ir.const((LOOSER | TIGHTER)[bound])

    def shifted(*arguments: object) -> masks.Range:
        found = solve(*arguments)  # type: ignore[arg-type]
        edge = getattr(found, bound)
        return found if edge is None else replace(found, **{bound: masks.int_op("add", edge, shift)})

    monkeypatch.setattr(masks, "_solve_affine", shifted)
    assert "o" in wrong(check())


def test_a_mask_bound_off_by_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last key of a row is lost."""
    solve = masks._solve_affine

    def shifted(*arguments: object) -> masks.Range:
        found = solve(*arguments)  # type: ignore[arg-type]
        return found if found.stop is None else replace(found, stop=masks.int_op("sub", found.stop, ir.const(1)))

    monkeypatch.setattr(masks, "_solve_affine", shifted)
    assert "o" in wrong(check())
