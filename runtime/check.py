"""The evidence: compares a kernel with the float64 meaning of its spec, on cases drawn to break it.

For every case: outputs and gradients against float64 (``check_compare``), twice for determinism, with memory poisoned by
NaN before it is written, with NaN put where the spec says that nothing is read, and one sample of a batch by itself. A
case that fails is shrunk, and the report holds the command that runs it again.

    draw (check_shapes) --> inputs (check_values) --> reference, eager, kernel (check_trial) --> compare (check_compare) --> report
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import check_shapes as shapes
from .check_report import Failure, FailureKind, Report, Result, Status, render
from .check_shapes import Case, CaseDrawer, Number, Theme
from .check_trial import Checkable, Direction, Rejected, Settings, Trial
from .kernel import Kernel
from .load import load, loads

__all__ = ["Case", "Report", "check_in_subprocess", "check_kernel", "render"]

OF_ONE_RUN: frozenset[FailureKind] = frozenset({"value", "non-finite", "structure", "raised", "assume"})
"""What a single run of a kernel shows."""
BOTH: tuple[Direction, ...] = ("forward", "backward")


def check_kernel(
    kernel: Checkable,
    *,
    backend: str | None = None,
    dtypes: Sequence[str] = ("float32",),
    trials: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    directions: Sequence[Direction] = BOTH,
    sizes: Mapping[str, int] | None = None,
    params: Mapping[str, Number] | None = None,
    quick: bool = False,
    strict: bool = False,
    invariance: bool = True,
    nan_in_masked: bool = True,
    case: Case | str | None = None,
    shrink_seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks a kernel on ``trials`` cases for each dtype and reports what was found; it does not raise for a wrong kernel.

    ``sizes`` and ``params`` keep extents and params fixed. ``quick`` draws few and small cases. ``case`` runs one case again (a
    ``Case`` or the JSON of a printed command). ``strict`` fails a kernel of which nothing is fused; otherwise it is
    reported as "reference only". ``invariance`` asks that a sample of a batch has the same bits when it is called alone,
    ``nan_in_masked`` that NaN in elements which are masked everywhere changes nothing.
    ``progress`` is called with the number of cases done and in all.
    """
    started = time.perf_counter()
    place = torch.device(device or "cpu")
    name = backend or ("triton" if place.type == "cuda" else "c")
    interpreted = name == "triton" and place.type == "cpu"
    limits = shapes.INTERPRETED if interpreted else shapes.QUICK if quick else shapes.FULL
    fused, reasons = fusion(kernel, name)
    everything_fused = name != "reference" and fused and not reasons
    patience = shrink_seconds if shrink_seconds is not None else 3.0 if quick else 10.0
    settings = Settings(
        name, place, tuple(directions), limits, patience, invariance and name != "reference", nan_in_masked, interpreted, everything_fused
    )
    run = _Run(kernel, settings, notes=[])
    if interpreted and "bfloat16" in dtypes:
        dtypes = [d for d in dtypes if d != "bfloat16"]
        run.notes.append("bfloat16 was left out: Triton's interpreter computes wrong bfloat16 products.")
    if fused:
        cases = None if case is None else Case.parse(case) if isinstance(case, str) else case
        results, lost = _results(run, dtypes, cases, trials, seed, sizes, params, quick or interpreted, progress)
        long = _long(kernel) if name == "triton" and not quick and case is None and not sizes else {}
        if long:
            longer = _Run(kernel, replace(settings, limits=replace(limits, work=LONG_WORK)), run.notes)
            more, failures = _results(longer, dtypes, None, 1, seed, long, params, quick or interpreted, None)
            results += more
            run.notes.extend(f"chunks of steps were not checked: {f.message}" for f in failures)
    else:
        results, lost = (), _smoke(run, seed, sizes, params)
    failed = bool(lost) or any(not r.passed for r in results) or (strict and not fused)
    status: Status = "failed" if failed else "passed" if fused else "reference only"
    seconds = time.perf_counter() - started
    spec = kernel.spec.filename
    return Report(spec, kernel.name, name, tuple(dtypes), status, results, tuple(reasons), tuple(run.notes), seconds, seed, lost)


def fusion(kernel: Checkable, backend: str) -> tuple[bool, list[str]]:
    """Whether anything of a kernel is fused on a backend, and why what is not fused is not."""
    if backend == "reference":
        return True, []
    lowered = kernel.lowered("c" if backend == "c" else "sm_80")
    return lowered.fused is not None, list(lowered.reasons)


LONG_WORK = 2_000_000
"""The work of a case (``check_shapes.Limits``) that is long enough for chunks."""


def _long(kernel: Checkable) -> dict[str, int]:
    """A length at which a recurrence goes in chunks on GPUs, with steps left over; nothing where it never does."""
    from .chunked import FEWEST, chunks_of

    found = chunks_of(kernel) if isinstance(kernel, Kernel) and kernel.states else ""
    if not isinstance(kernel, Kernel) or isinstance(found, str):
        return {}
    return {next(iter(kernel.graph.states.values())).along[0]: FEWEST * found.length + 5}


def _results(
    run: _Run,
    dtypes: Sequence[str],
    case: Case | None,
    trials: int | None,
    seed: int,
    sizes: Mapping[str, int] | None,
    params: Mapping[str, Number] | None,
    quick: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[tuple[Result, ...], tuple[Failure, ...]]:
    """A result for every case and dtype; and a failure where no case could be made."""
    if case is not None:
        return tuple(run.replay(case, dtype) for dtype in dtypes), ()
    results: list[Result] = []
    count = trials if trials is not None else len(shapes.QUICK_THEMES if quick else shapes.THEMES)
    for dtype in dtypes:
        drawer = CaseDrawer(run.kernel.graph, run.settings.limits, seed, sizes, params, quick)
        for theme, palette in drawer.cases(count):
            result = run.try_theme(drawer, theme, palette, dtype)
            if result is not None:
                results.append(result)
            if progress is not None:
                progress(len(results), count * len(dtypes))
    if results:
        return tuple(results), ()
    why = "; ".join(dict.fromkeys(run.rejections[-3:])) or "no sizes were found that are small enough and fit its windows"
    return (), (Failure("case", "", f"no case could be made for this kernel: {why}. Pass sizes= and params= that it is meant for."),)


def _smoke(run: _Run, seed: int, sizes: Mapping[str, int] | None, params: Mapping[str, Number] | None) -> tuple[Failure, ...]:
    """Evaluates a kernel of which nothing is fused once, forward and backward, in float32."""
    drawer = CaseDrawer(run.kernel.graph, shapes.QUICK, seed, sizes, params, quick=True)
    for theme, palette in drawer.cases(len(shapes.QUICK_THEMES)):
        case = drawer.draw(theme, palette)
        if case is not None:
            try:
                trial = run.trial(case, "float32")
                _ = trial.exact, trial.eager
            except Rejected as error:
                run.rejections.append(str(error))
            else:
                return ()
    why = "; ".join(dict.fromkeys(run.rejections[-3:])) or "no fitting sizes were found"
    return (Failure("case", "", f"the reference could not be evaluated: {why}."),)


class _Run:
    """Cases of one kernel under one setting."""

    def __init__(self, kernel: Checkable, settings: Settings, notes: list[str]) -> None:
        self.kernel, self.settings, self.notes = kernel, settings, notes
        self.rejections: list[str] = []

    def trial(self, case: Case, dtype: str) -> Trial:
        return Trial(self.kernel, case, dtype, self.settings)

    def try_theme(self, drawer: CaseDrawer, theme: Theme, palette: int, dtype: str) -> Result | None:
        """The first case of a theme that means something, checked and shrunk; plain values where special ones mean nothing."""
        for attempt in range(6):
            tried = theme if attempt < 3 else replace(theme, values="normal")
            case = drawer.draw(tried, palette)
            if case is None:
                return None
            try:
                return self.checked(case, dtype)
            except Rejected as error:
                self.rejections.append(str(error))
        return None

    def replay(self, case: Case, dtype: str) -> Result:
        """One given case. What it means for the spec is the caller's affair: a rejection is a failure."""
        try:
            return self.checked(case, dtype)
        except Rejected as error:
            return Result(case, dtype, failures=(Failure("case", "", str(error)),))

    def checked(self, case: Case, dtype: str) -> Result:
        started = time.perf_counter()
        measures, failures = self.trial(case, dtype).findings()
        shrunk = self.shrink(case, dtype, {f.kind for f in failures}) if failures else None
        return Result(case, dtype, tuple(measures), tuple(failures), shrunk, time.perf_counter() - started)

    def shrink(self, case: Case, dtype: str, kinds: set[FailureKind]) -> Case:
        """The simplest case found in the time given that fails in one of the same ways."""
        features = [a for a, role in shapes.roles(self.kernel.graph).items() if role == "feature"]
        deadline = time.perf_counter() + self.settings.shrink_seconds
        smaller = True
        while smaller:
            smaller = False
            for candidate in shapes.smaller_cases(case, features):
                if time.perf_counter() > deadline:
                    return case
                if self.fails(candidate, dtype, kinds):
                    case, smaller = candidate, True
                    break
        return case

    def fails(self, case: Case, dtype: str, kinds: set[FailureKind]) -> bool:
        try:
            return any(f.kind in kinds for f in self.trial(case, dtype).findings(bool(kinds & OF_ONE_RUN))[1])
        except Rejected:
            return False


# In another process ---------------------------------------------------------------------------------------------


def check_in_subprocess(
    text: str,
    filename: str,
    kernel: str,
    *,
    backend: str = "triton",
    environment: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> Report:
    """Checks a kernel of a spec text in a fresh Python process, by default under Triton's interpreter.

    The file itself is read where there is one, so that it finds the modules beside it. Triton decides at import whether
    it interprets, so a process that has compiled with it cannot. ``options`` are those of ``check_kernel`` that JSON can
    hold. Raises RuntimeError with the process' last words where it dies.
    """
    request = {"text": text, "filename": filename, "kernel": kernel, "options": {"backend": backend, **options}}
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        **(environment or {"TRITON_INTERPRET": "1"}),
    }
    program = f"from {__name__} import serve; serve()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(request), env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"checking {kernel} of {filename} in a process of its own failed:\n{done.stderr.strip()[-2000:]}")
    return Report.from_json(json.loads(done.stdout.splitlines()[-1]))


def serve() -> None:
    """Reads a request of ``check_in_subprocess`` from standard input and writes the report to standard output."""
    request = json.load(sys.stdin)
    path = Path(request["filename"])
    kernels = load(path) if path.is_file() else loads(request["text"], request["filename"])
    kernel = kernels[request["kernel"]]
    report = check_kernel(kernel, **request["options"])
    print(json.dumps(report.to_json()))
