"""The C compiler helper: a library that works, and every way in which it may not."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from weft.runtime import c_compiler
from weft.runtime.build import ProgramRecord, load_program
from weft.runtime.c_compiler import CompileFailed, CompileTimeout, LoadFailed, MissingCompiler, compile_c, compiler_id, load

SOURCE = """\
#include <stdint.h>
void set_threads(int count) { (void)count; }
void twice(void *const *t, const int64_t *s, const int64_t *extents, const int64_t *o, const double *params)
{
    float *const x = t[0];
    for (int64_t n = 0; n < extents[0]; n++)
        x[n * s[0]] = (float)(2 * x[n * s[0]] + params[0]);
}
"""


def test_compile_load_and_call(tmp_path: Path) -> None:
    library = compile_c(SOURCE, tmp_path / "deep" / "twice.so")
    functions = load(library, ["twice"])
    values = (ctypes.c_float * 3)(1.0, 2.0, 3.0)
    functions["twice"](
        (ctypes.c_void_p * 1)(ctypes.addressof(values)),
        (ctypes.c_int64 * 1)(1),
        (ctypes.c_int64 * 1)(3),
        (ctypes.c_int64 * 1)(),
        (ctypes.c_double * 1)(0.5),
    )
    assert list(values) == [2.5, 4.5, 6.5]
    assert [p.name for p in library.parent.iterdir()] == ["twice.so"]


def test_what_the_compiler_says_is_shown(tmp_path: Path) -> None:
    with pytest.raises(CompileFailed, match="no_such_name") as caught:
        compile_c("int x = no_such_name;", tmp_path / "broken.so")
    assert caught.value.source_path.read_text() == "int x = no_such_name;"
    assert not (tmp_path / "broken.so").exists()


def test_a_compiler_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow-cc"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexec sleep 30\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setenv("WEFT_CC_TIMEOUT", "0.2")
    with pytest.raises(CompileTimeout, match="WEFT_CC_TIMEOUT"):
        compile_c(SOURCE, tmp_path / "twice.so")


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingCompiler, match="no-such-compiler"):
        compile_c(SOURCE, tmp_path / "twice.so")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingCompiler, match="cc, gcc, clang"):
        compiler_id()


def test_the_identity_depends_on_compiler_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler_id()
    assert first == compiler_id() and "\n" not in first
    monkeypatch.setattr(c_compiler, "FLAGS", (*c_compiler.FLAGS, "-g"))
    assert compiler_id() != first


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    with pytest.raises(LoadFailed, match=r"damaged\.so"):
        load(damaged, ["twice"])
    with pytest.raises(LoadFailed, match="thrice"):
        load(compile_c(SOURCE, tmp_path / "twice.so"), ["thrice"])


def test_generated_code_that_does_not_compile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    record = ProgramRecord("broken__forward", "c", "int x = no_such_name;", (), (), ())
    with pytest.raises(CompileFailed, match="bug in weft") as caught:
        load_program(record)
    assert caught.value.source_path.read_text() == record.text
