"""The system's C compiler: source text -> shared library -> functions.

The compiler is ``$CC`` (which may carry options), else the first of ``cc``, ``gcc`` and ``clang`` on the path. The
flags ask for this machine's vector instructions; nothing that would change the meaning of floating-point code is on
(no ``-ffast-math``), but fused multiply-adds are.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

FLAGS = (
    "-std=gnu11", "-O2", "-ftree-vectorize", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp",
    "-fPIC", "-shared",
)  # fmt: skip
GCC_FLAGS = ("-fvect-cost-model=dynamic",)
GCC_X86_FLAGS = ("-mprefer-vector-width=512",)
TIMEOUT = 120.0


class CompilerError(RuntimeError):
    """Something about the C compiler; each subclass says what and how to mend it."""


class MissingCompiler(CompilerError):
    """There is no C compiler."""

    def __init__(self, tried: Sequence[str]) -> None:
        super().__init__(
            f"no C compiler found (tried {', '.join(tried)}). Install gcc or clang, or name one in the environment variable CC; "
            "backend='reference' needs none."
        )


class CompileFailed(CompilerError):
    """The compiler rejected a generated file."""

    def __init__(self, command: Sequence[str], status: int, messages: str, source_path: Path) -> None:
        self.command = tuple(command)
        self.messages = messages
        self.source_path = source_path
        shown = "\n".join(messages.strip().splitlines()[:20])
        super().__init__(
            f"the C compiler ended with status {status} on generated code:\n{shown}\nThe source is kept in {source_path}. "
            f"It was run as: {shlex.join(command)}\nIf this compiler is old (before gcc 12 or clang 15), name another one in CC; "
            "otherwise this is a bug in weft."
        )


class CompileTimeout(CompilerError):
    """The compiler did not finish in time."""

    def __init__(self, seconds: float, source_path: Path) -> None:
        self.source_path = source_path
        super().__init__(
            f"the C compiler did not finish {source_path} within {seconds:g} s. Raise the limit with the environment variable "
            "WEFT_CC_TIMEOUT (seconds), or try again on a less busy machine."
        )


class LoadFailed(CompilerError):
    """A compiled library cannot be loaded or lacks a function."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot use the compiled library {path}: {reason}. Remove it to have it built again.")


def compiler_command() -> tuple[str, ...]:
    """The command that runs the compiler, without flags of ours. Raises ``MissingCompiler``."""
    given = shlex.split(os.environ.get("CC", ""))
    for candidate in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(candidate[0])
        if found:
            return (found, *candidate[1:])
    raise MissingCompiler([given[0]] if given else ["cc", "gcc", "clang"])


@cache
def _version(command: tuple[str, ...]) -> str:
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingCompiler(command[:1]) from error
    return shown.stdout.strip()


def compiler_flags() -> tuple[str, ...]:
    """The flags that every file is compiled with."""
    if "clang" in _version(compiler_command()).lower():
        return FLAGS
    return (*FLAGS, *GCC_FLAGS, *(GCC_X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else ()))


@cache
def cpu_features() -> str:
    """The instruction sets of this machine: what ``-march=native`` depends on."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def compiler_id() -> str:
    """A short line that changes whenever the same source might give another binary: compiler, flags or processor."""
    command = compiler_command()
    version = _version(command)
    digest = hashlib.sha256(" ".join((version, *command, *compiler_flags(), cpu_features())).encode()).hexdigest()
    return f"{version.splitlines()[0] if version else command[0]} {digest[:16]}"


def compile_c(source: str, out_path: str | Path, timeout: float | None = None, failed: Path | None = None) -> Path:
    """Builds a shared library from a C text at ``out_path``, which appears only when it is complete.

    Raises ``MissingCompiler``, ``CompileFailed`` and ``CompileTimeout``; the last two leave the source in the folder ``failed``, or
    beside ``out_path``.
    """
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds = timeout if timeout is not None else float(os.environ.get("WEFT_CC_TIMEOUT", TIMEOUT))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build-") as folder:
        text, library = Path(folder, "kernel.c"), Path(folder, "kernel.so")
        text.write_text(source, encoding="utf-8")
        command = [*compiler_command(), *compiler_flags(), str(text), "-o", str(library), "-lm"]
        kept = (failed or out.parent) / out.with_suffix(".failed.c").name
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            _keep(text, kept)
            raise CompileTimeout(seconds, kept) from error
        if done.returncode != 0:
            _keep(text, kept)
            raise CompileFailed(command, done.returncode, done.stderr, kept)
        os.replace(library, out)
    return out


def _keep(text: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(text, kept)


def load(path: str | Path, entries: Sequence[str]) -> dict[str, Any]:
    """The functions of a compiled library by name, and ``set_threads``. Raises ``LoadFailed``.

    Each takes arrays of tensor pointers, element strides, extents, origins and params; see ``codegen.source.Entry``.
    """
    where = Path(path)
    try:
        library = ctypes.CDLL(str(where.resolve()))
        functions = {name: library[name] for name in entries}
        threads = library["set_threads"]
    except (OSError, AttributeError) as error:
        raise LoadFailed(where, str(error)) from error
    for function in functions.values():
        function.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.POINTER(ctypes.c_double),
        ]
        function.restype = None
    threads.argtypes = [ctypes.c_int]
    threads.restype = None
    return {**functions, "set_threads": threads}
