"""Macros, the prelude, modules beside a spec, and files."""

from pathlib import Path

import pytest

from weft import dsl
from weft.dsl import diagnostics as d
from weft.dsl import guard
from weft.dsl.load import PRELUDE, beside

HEAD = "kernel f(x[b,t], g[t]) -> y[b,t]:\n"


def same(text: str, other: str) -> bool:
    return dsl.parse(text).kernels == dsl.parse(other).kernels


def test_a_macro_is_its_body() -> None:
    assert same(
        f"def m(a, b) = a * b + 1\n{HEAD}    y = 2 * m(x - g, -g)\n",
        f"{HEAD}    y = 2 * ((x - g) * -g + 1)\n",
    )


def test_macros_take_axes_and_other_macros() -> None:
    macros = "def second(x, d) = mean[d](square(x))\ndef square(x) = x * x\ndef last(x, d) = x[d -> size(d) - 1]\n"
    assert same(
        f"{macros}{HEAD}    y = x * second(x, b) + last(x, t)\n",
        f"{HEAD}    y = x * mean[b](x * x) + x[t -> size(t) - 1]\n",
    )


def test_macros_are_hygienic() -> None:
    assert same(f"def m(g, x) = g - 2 * x\n{HEAD}    y = m(x, g)\n", f"{HEAD}    y = x - 2 * g\n")
    assert same(f"def m(x) = n(2 * x, x)\ndef n(x, y) = x + y\n{HEAD}    y = m(g) * x\n", f"{HEAD}    y = (2 * g + g) * x\n")


def test_mistakes_in_a_macro_are_shown_at_its_call() -> None:
    with pytest.raises(d.NeedsNumber) as caught:
        dsl.parse(f"def m(a) = a + 1\n{HEAD}    z = m(x > 0)\n    y = x\n", "a.weft")
    assert caught.value.where == "a.weft:3:11"


def test_a_macro_may_not_share_a_name() -> None:
    with pytest.raises(d.NameTaken):
        dsl.parse(f"def x(a) = a\n{HEAD}    y = x\n")
    with pytest.raises(d.NameTaken):
        dsl.parse("def m(a) = a\ndef m(b) = b\n")


@pytest.mark.parametrize("path", sorted(PRELUDE.glob("*.weft")), ids=lambda p: p.stem)
def test_prelude_modules_are_well_formed(path: Path) -> None:
    spec = dsl.load_file(path)
    assert spec.doc and not spec.kernels


@pytest.mark.parametrize(
    ("module", "macro", "call", "meaning"),
    [
        ("masks", "causal", "causal(b, t)", "t <= b"),
        ("masks", "window", "window(b, t, 4)", "0 <= b - t < 4"),
        ("masks", "band", "band(b, t, 4)", "abs(b - t) <= 4"),
        ("masks", "prefix", "prefix(b, t, 4)", "t <= b or t < 4"),
        ("masks", "same_block", "same_block(b, t, 4)", "b // 4 == t // 4"),
        ("masks", "same_document", "same_document(g, t, b, t)", "g[t -> b] == g[t -> t]"),
        ("norms", "rms", "rms(x, t) > 0", "x * rsqrt(mean[t](x * x) + 1e-6) > 0"),
        ("norms", "l2", "l2(x, t) > 0", "x * rsqrt(sum[t](x * x) + 1e-6) > 0"),
        ("norms", "layernorm", "layernorm(x, t) > 0", "(x - mean[t](x)) * rsqrt(mean[t]((x - mean[t](x))**2) + 1e-5) > 0"),
    ],
)
def test_prelude_macros(module: str, macro: str, call: str, meaning: str) -> None:
    assert same(f"use {module}.{macro}\n{HEAD}    m = {call}\n    y = x\n", f"{HEAD}    m = {meaning}\n    y = x\n")


def test_a_module_beside_the_spec(tmp_path: Path) -> None:
    (tmp_path / "mine.weft").write_text("use norms.rms\ndef scaled(x, d) = 3 * rms(x, d)\n")
    (tmp_path / "spec.weft").write_text(f"use mine.scaled\n{HEAD}    y = scaled(x, t)\n")
    spec = dsl.load_file(tmp_path / "spec.weft")
    assert spec.filename == str(tmp_path / "spec.weft")
    assert spec.kernels == dsl.parse(f"use norms.rms\n{HEAD}    y = 3 * rms(x, t)\n").kernels


def test_a_module_beside_the_spec_comes_before_the_prelude(tmp_path: Path) -> None:
    (tmp_path / "masks.weft").write_text("def causal(i, j) = j < i\n")
    (tmp_path / "spec.weft").write_text(f"use masks.causal\n{HEAD}    m = causal(b, t)\n    y = x\n")
    assert dsl.load_file(tmp_path / "spec.weft").kernels == dsl.parse(f"{HEAD}    m = t < b\n    y = x\n").kernels


def test_a_module_exports_only_its_own_macros(tmp_path: Path) -> None:
    (tmp_path / "mine.weft").write_text("use norms.rms\ndef f(x, d) = rms(x, d)\n")
    (tmp_path / "spec.weft").write_text("use mine.rms\n")
    with pytest.raises(d.UnknownMember):
        dsl.load_file(tmp_path / "spec.weft")


def test_parse_takes_a_search() -> None:
    spec = dsl.parse(f"use any_name.m\n{HEAD}    y = m(x)\n", search=lambda name: (name, "def m(x) = 2 * x\n"))
    assert spec.kernels == dsl.parse(f"{HEAD}    y = 2 * x\n").kernels


def test_modules_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.weft").write_text("use b.g\ndef f(x) = g(x)\n")
    (tmp_path / "b.weft").write_text("use a.f\ndef g(x) = f(x)\n")
    with pytest.raises(d.UseCycle) as caught:
        dsl.parse("use a.f\n", search=beside(tmp_path))
    assert caught.value.message == "the module `a` uses itself, through `a` -> `b` -> `a`"


def test_a_broken_module_is_shown_at_its_use(tmp_path: Path) -> None:
    (tmp_path / "a.weft").write_text("def f(x) = y\n")
    (tmp_path / "spec.weft").write_text("use a.f\n")
    with pytest.raises(d.ModuleBroken) as caught:
        dsl.load_file(tmp_path / "spec.weft")
    assert caught.value.message == "the module `a` has a mistake: `y` in the macro `f` is not one of its parameters"
    assert caught.value.advice == f"mend {tmp_path / 'a.weft'}:1:12"


def test_a_failed_use_is_reported_once() -> None:
    with pytest.raises(d.UnknownMember):
        dsl.parse(f"use masks.casual\ndef m(i, j) = casual(i, j)\n{HEAD}    mask casual(b, t)\n    y = x\n")


def test_macros_of_one_name_in_two_files_do_not_meet() -> None:
    module = "def twice(x) = f(x)\ndef f(x) = 2 * x\n"
    spec = dsl.parse(f"use a.twice\ndef f(x) = twice(x) + 1\n{HEAD}    y = f(x)\n", search=lambda _: ("a.weft", module))
    assert spec.kernels == dsl.parse(f"{HEAD}    y = 2 * x + 1\n").kernels


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    bad = tmp_path / "bad.weft"
    bad.write_bytes(b"# \xff\n")
    with pytest.raises(d.FileUnreadable, match="byte 2 is not UTF-8"):
        dsl.load_file(bad)
    with pytest.raises(d.FileUnreadable, match="No such file"):
        dsl.load_file(tmp_path / "missing.weft")
    with pytest.raises(d.FileUnreadable):
        dsl.load_file(tmp_path)
    bad.write_bytes(b"#" * (4 * guard.MAX_CHARACTERS + 1))
    with pytest.raises(d.TextTooLong):
        dsl.load_file(bad)
