"""From a plan to a program that can be launched: source, file, binary, each from the cache where it is there.

A *record* is what the cache keeps: plain data from which a program is loaded without the compiler. The binary lies
beside its source in a folder of the cache, under a key that also names the system compiler and the CPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..codegen.source import Entry, Module, Specialization
from ..compiler import ir
from ..compiler.plan import Buffer, Library, with_derived
from .arguments import Number
from .cache import digest, disk_cache
from .version import __version__, compiler_digest

if TYPE_CHECKING:
    from ..compiler.plan import Plan
    from .kernel import Kernel

Launch = Callable[..., None]

BUFFER_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64,
    "bool": torch.bool,
}  # fmt: skip
"""The dtypes that generated kernels read and write."""


@dataclass(frozen=True, slots=True)
class ProgramRecord:
    """One generated module: its source, and how its kernels are called."""

    stem: str
    backend: str
    text: str
    entries: tuple[Entry, ...]
    buffers: tuple[Buffer, ...]
    dtypes: tuple[tuple[str, str], ...]
    derived: tuple[tuple[str, ir.Node], ...] = ()
    library: tuple[Library, ...] = ()
    selections: tuple[tuple[str, tuple[str, ...]], ...] = ()


def generate(
    kernel: Kernel, plan: Plan, target: str, dtypes: Mapping[str, str], whole: Mapping[str, int], params: Mapping[str, Number]
) -> ProgramRecord:
    """The source of a plan. ``dtypes`` gives the inputs, outputs, cotangents and gradients theirs, and "input" the promoted one."""
    concrete = tuple((b.name, dtypes.get(b.name) or (dtypes["input"] if b.dtype == "input" else b.dtype)) for b in plan.buffers.values())
    kept = {axis for k in plan.kernels for axis in k.whole}
    whole = with_derived(whole, plan.derived)
    compiled_in = tuple((name, value) for name, value in params.items() if isinstance(value, int))
    specialization = Specialization(concrete, tuple((a, n) for a, n in whole.items() if a in kept), compiled_in)
    module = _print(target, plan, specialization, kernel)
    stem = f"{kernel.name}__{plan.direction}__{digest(module.text)[:8]}"
    return ProgramRecord(
        stem,
        module.backend,
        module.text,
        module.entries,
        tuple(plan.buffers.values()),
        concrete,
        tuple(plan.derived.items()),
        tuple(plan.library),
        tuple(plan.selections),
    )


def _print(target: str, plan: Plan, specialization: Specialization, kernel: Kernel) -> Module:
    if target == "c":
        from ..codegen.print_c import print_c

        return print_c(plan, specialization, kernel.spec.text, Path(kernel.spec.filename).name, __version__)
    from .spills import print_fitted

    return print_fitted(plan, specialization, kernel.spec.text, target)


def source_file(record: ProgramRecord) -> Path:
    """The generated file on disk, beside its binary where there is one. Builds what is not built."""
    return _folder(record) / _filename(record)


_loaded: dict[str, tuple[Launch, ...]] = {}
_loading = threading.RLock()
_forked = False


def load_program(record: ProgramRecord) -> tuple[Launch, ...]:
    """The functions of a module's entries, built and loaded where they are not yet. One thread builds at a time."""
    key = digest(record.text)
    found = _loaded.get(key)
    if found is None:
        with _loading:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(record)
    return found


def _load(record: ProgramRecord) -> tuple[Launch, ...]:
    names = [entry.name for entry in record.entries]
    if record.backend == "c":
        from . import c_compiler

        functions = c_compiler.load((_folder(record) / _filename(record)).with_suffix(".so"), names)
        return tuple(_with_threads(functions[name], functions["set_threads"]) for name in names)
    from .triton_loader import load_triton

    launchers = load_triton(Module("triton", record.text, record.entries), _folder(record), _filename(record))
    return tuple(launchers[name] for name in names)


def _with_threads(function: Launch, set_threads: Callable[[int], None]) -> Launch:
    """Runs with as many threads as PyTorch uses; with one in a forked child, where OpenMP's threads are gone."""

    def run(*arguments: Any) -> None:
        set_threads(1 if _forked else torch.get_num_threads())
        function(*arguments)

    return run


def _after_fork() -> None:
    """A lock that another thread of the parent held would never be released in the child."""
    global _loading, _forked
    _loading = threading.RLock()
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _folder(record: ProgramRecord) -> Path:
    if record.backend == "c":
        from .c_compiler import compiler_id

        return disk_cache().folder("c", digest(record.text, compiler_id()), lambda folder: _make_c(record, folder))
    return disk_cache().folder("triton", digest(record.text), lambda folder: _write_text(record, folder))


def _filename(record: ProgramRecord) -> str:
    return f"{record.stem}{'.c' if record.backend == 'c' else '.py'}"


def _make_c(record: ProgramRecord, folder: Path) -> None:
    from .c_compiler import compile_c

    _write_text(record, folder)
    compile_c(record.text, (folder / _filename(record)).with_suffix(".so"), failed=disk_cache().root / "failed")


def _write_text(record: ProgramRecord, folder: Path) -> None:
    (folder / _filename(record)).write_text(record.text, encoding="utf-8")


def cache_key(kernel: Kernel, *parts: object) -> str:
    """A key for what the compiler makes of a kernel."""
    return digest(compiler_digest(), kernel.identity, *(repr(part) for part in parts))
