"""Building ahead of time, for the CPU at hand or for GPUs that need not be there."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..codegen.source import Module, Specialization
from . import generated
from .build import source_file

if TYPE_CHECKING:
    from .build import ProgramRecord
    from .gpu_targets import KernelReport, TargetName
    from .kernel import Kernel
    from .problem import Problem


@dataclass(frozen=True, slots=True)
class Built:
    """One kernel built for one target and dtype; ``reports`` are those of its GPU binaries, ``reasons`` say why nothing is fused."""

    kernel: str
    target: str
    dtype: str
    seconds: float
    files: tuple[Path, ...] = ()
    reports: tuple[KernelReport, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        head = f"{self.kernel} for {self.target}, {self.dtype}: "
        if not self.fused:
            return head + "not fused: " + "; ".join(self.reasons)
        lines = [head + f"built in {self.seconds:.1f} s"]
        lines += [f"  {path}" for path in self.files]
        lines += [f"  {report}" for report in self.reports]
        return "\n".join(lines)


def build_ahead(kernel: Kernel, problem: Problem, target: str, dtype: str, folder: Path | None = None) -> Built:
    """Builds forward and backward at the head dims and params of ``problem``; sources are copied to ``folder``. For GPUs, a recurrence
    is built step by step and in chunks, if it has them.

    A GPU's binaries go to Triton's own cache, where the machine with that GPU finds them if it has the same Triton.
    """
    started = time.perf_counter()
    lowered = kernel.lowered(target, dtype=getattr(torch, dtype), extents=problem.extents, params=problem.params)
    if lowered.forward is None:
        return Built(kernel.name, target, dtype, 0.0, reasons=tuple(lowered.reasons))
    records = _records(kernel, problem, target, dtype)
    stems = [record.stem for record in records]
    reports: list[KernelReport] = []
    if target != "c":
        reports = _compiled(records, problem, target)
        long = _in_chunks(kernel, problem, target, dtype)
        if long is not None:
            made, posed = long
            more = _records(made, posed, target, dtype)
            reports += _compiled(more, posed, target)
            records += more
            stems += [f"{record.stem}__chunks" for record in more]
    files = [source_file(record) for record in records]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        copies = [folder / f"{stem}__{target}{path.suffix}" for stem, path in zip(stems, files, strict=True)]
        for record, copy in zip(records, copies, strict=True):
            copy.write_text(record.text, encoding="utf-8")
        files = copies
    return Built(kernel.name, target, dtype, time.perf_counter() - started, tuple(files), tuple(reports))


def compiled_for_gpu(kernel: Kernel, target: str, dtype: str, problem: Problem) -> list[KernelReport]:
    """What the binaries of a kernel need of a GPU, forward and backward. Raises ``ImportError`` where there is no Triton."""
    import triton  # noqa: F401

    return _compiled(_records(kernel, problem, target, dtype), problem, target)


def _in_chunks(kernel: Kernel, problem: Problem, target: str, dtype: str) -> tuple[Kernel, Problem] | None:
    """What long calls of a recurrence run on, or of a kernel whose sums separate, if that is fused whole."""
    from .chunked import posed_in_chunks
    from .dual import posed_as_dual

    found = posed_in_chunks(*(posed_as_dual(kernel, problem) or (kernel, problem)))
    if found is None:
        return None
    made, posed = found
    lowered = made.lowered(target, dtype=getattr(torch, dtype), extents=posed.extents, params=posed.params)
    return None if lowered.forward is None or lowered.reasons else found


def _records(kernel: Kernel, problem: Problem, target: str, dtype: str) -> list[ProgramRecord]:
    variant = generated.usual_variant(kernel, target, getattr(torch, dtype), problem.extents, problem.params)
    return [generated.record_of(variant, part) for part in generated.directions(variant)]


def _compiled(records: list[ProgramRecord], problem: Problem, target: str) -> list[KernelReport]:
    from .gpu_targets import TARGETS, compile_for

    name: TargetName = next(t for t in TARGETS if t == target)
    params = tuple((p, v) for p, v in problem.params.items() if isinstance(v, int))
    reports: list[KernelReport] = []
    with tempfile.TemporaryDirectory() as folder:
        for record in records:
            specialization = Specialization(record.dtypes, tuple(problem.extents.items()), params)
            module = Module(record.backend, record.text, record.entries)
            reports += compile_for(module, specialization, name, Path(folder))
    return reports
