"""What `check` found out: plain data that prints as text and travels as JSON.

A report holds one result per case and dtype. A result holds the measured errors of every output and gradient with
the bounds they were held to, and a failure for each thing that was wrong.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .check_shapes import Case

FailureKind = Literal["raised", "structure", "value", "non-finite", "determinism", "masked", "batch", "assume", "case"]
Status = Literal["passed", "failed", "reference only"]


@dataclass(frozen=True, slots=True)
class Measure:
    """Errors of one output (``o``) or gradient (``d_q``) against float64, and the bounds they had to keep."""

    quantity: str
    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float
    rms: float

    @property
    def ratio(self) -> float:
        """How much of its bound the worse of the two errors uses; above 1 is a failure."""
        return max(_ratio(self.max_error, self.max_bound), _ratio(self.rms_error, self.rms_bound))


@dataclass(frozen=True, slots=True)
class Failure:
    """One thing that is wrong. ``index`` locates the worst element by the names of its dimensions."""

    kind: FailureKind
    quantity: str
    message: str
    index: dict[str, int] | None = None
    got: str | None = None
    want: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.quantity}: {self.message}" if self.quantity else self.message]
        if self.index is not None:
            where = ", ".join(f"{name}={n}" for name, n in self.index.items()) or "the only element"
            lines.append(f"    worst at {where}: got {self.got}, want {self.want}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Result:
    """One case in one dtype. ``shrunk`` is the smallest case found that still fails."""

    case: Case
    dtype: str
    measures: tuple[Measure, ...] = ()
    failures: tuple[Failure, ...] = ()
    shrunk: Case | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def worst(self) -> Measure | None:
        return max(self.measures, key=lambda m: m.ratio, default=None)


@dataclass(frozen=True, slots=True)
class Report:
    """The evidence for one kernel on one backend.

    ``status`` is "reference only" where nothing is fused: then the evaluation was only seen to run, and ``fused`` is False.
    ``reasons`` say why something is not fused; ``notes`` what could not be checked.
    """

    spec: str
    kernel: str
    backend: str
    dtypes: tuple[str, ...]
    status: Status
    results: tuple[Result, ...] = ()
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    failures: tuple[Failure, ...] = field(default=())
    """Failures that belong to no case."""

    @property
    def passed(self) -> bool:
        return self.status != "failed"

    @property
    def fused(self) -> bool:
        return self.status != "reference only"

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, with the commands that reproduce the failures."""
        data = asdict(self)
        data["passed"], data["fused"] = self.passed, self.fused
        for entry, result in zip(data["results"], self.results, strict=True):
            entry["case"] = result.case.to_json()
            entry["shrunk"] = result.shrunk.to_json() if result.shrunk else None
            entry["command"] = None if result.passed else command(self, result)
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """The inverse of ``to_json``."""
        return Report(
            spec=data["spec"],
            kernel=data["kernel"],
            backend=data["backend"],
            dtypes=tuple(data["dtypes"]),
            status=data["status"],
            results=tuple(_result(r) for r in data["results"]),
            reasons=tuple(data["reasons"]),
            notes=tuple(data["notes"]),
            seconds=data["seconds"],
            seed=data["seed"],
            failures=tuple(Failure(**f) for f in data["failures"]),
        )

    def __str__(self) -> str:
        return render(self)


def _result(data: dict[str, Any]) -> Result:
    return Result(
        case=Case.from_json(data["case"]),
        dtype=data["dtype"],
        measures=tuple(Measure(**m) for m in data["measures"]),
        failures=tuple(Failure(**f) for f in data["failures"]),
        shrunk=Case.from_json(data["shrunk"]) if data["shrunk"] else None,
        seconds=data["seconds"],
    )


def command(report: Report, result: Result) -> str:
    """The command line that runs the smallest failing case of a result again."""
    case = json.dumps((result.shrunk or result.case).to_json(), separators=(",", ":"))
    words = ["weft", "check", report.spec, "--kernel", report.kernel, "--backend", report.backend, "--dtype", result.dtype, "--case", case]
    return shlex.join(words)


def worst_measure(results: Iterable[Result]) -> Measure | None:
    """The measure that uses most of its bound."""
    found = [m for r in results if (m := r.worst) is not None]
    return max(found, key=lambda m: m.ratio, default=None)


def render(report: Report, shown: int = 3) -> str:
    """A report as text: a line that sums it up, then the first ``shown`` failing cases in full."""
    lines = [summary(report)]
    lines += [f"  {note}" for note in (*report.reasons, *report.notes)]
    lines += [f"  {failure}" for failure in report.failures]
    failing = [r for r in report.results if not r.passed]
    for result in failing[:shown]:
        lines += ["", f"  {result.dtype}, {result.case}"]
        if result.shrunk is not None and result.shrunk != result.case:
            lines.append(f"  still fails when shrunk to {result.shrunk}")
        lines += ["    " + str(f).replace("\n", "\n    ") for f in result.failures]
        lines.append(f"  reproduce: {command(report, result)}")
    if len(failing) > shown:
        lines += ["", f"  and {len(failing) - shown} more failing cases"]
    return "\n".join(lines)


def summary(report: Report) -> str:
    """One line: what was checked, how it went, and how near the worst error came to its bound."""
    failing = sum(not r.passed for r in report.results)
    outcome = report.status if not failing else f"failed in {failing} of {len(report.results)} cases"
    line = f"{report.kernel} on {report.backend} ({', '.join(report.dtypes)}): {outcome}"
    worst = worst_measure(report.results)
    if report.status == "passed" and worst is not None:
        line += f", {len(report.results)} cases, worst {worst.quantity} at {worst.ratio:.0%} of its bound"
    return f"{line}, {report.seconds:.1f} s"


def _ratio(error: float, bound: float) -> float:
    if error == 0:
        return 0.0
    return error / bound if bound > 0 else float("inf")
