"""Collects ``.weft`` files as tests: ``pytest my_variants/`` checks every kernel, once for each dtype.

    my_variants/gated.weft::gated[float32] PASSED

A kernel of which nothing is fused is skipped with the reasons. A file that is no spec is a collection error that shows
the diagnostics. Imports are made when they are needed: this module is loaded by every pytest run where weft is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .check_report import Report
    from .kernel import Kernel

DTYPES = ("float32", "float16", "bfloat16")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of ``weft check`` that matter in a test run."""
    group = parser.getgroup("weft", "checks of .weft files")
    group.addoption(
        "--weft-backend", choices=("c", "triton", "reference"), default=None, help="backend to check (default: that of the machine)"
    )
    group.addoption("--weft-dtypes", type=_dtypes, default=("float32",), help="dtypes to check, with commas (default: float32)")
    group.addoption(
        "--weft-trials", type=int, default=None, help="cases for each kernel and dtype, of full size (default: a few small ones)"
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SpecFile | None:
    """A collector for every ``.weft`` file."""
    return SpecFile.from_parent(parent, path=file_path) if file_path.suffix == ".weft" else None


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"{name!r} is no dtype that can be checked; choose among {', '.join(DTYPES)}.")
    return names


class SpecFile(pytest.File):
    """The kernels of one file."""

    def collect(self) -> Iterator[pytest.Item]:
        from ..dsl.diagnostics import SpecError
        from .load import load

        try:
            namespace = load(self.path)
        except SpecError as error:
            raise self.CollectError(str(error)) from None
        for kernel in namespace:
            for dtype in self.config.getoption("weft_dtypes"):
                yield KernelItem.from_parent(self, name=f"{kernel.name}[{dtype}]", kernel=kernel, dtype=dtype)


class KernelItem(pytest.Item):
    """One kernel in one dtype."""

    def __init__(self, *, kernel: Kernel, dtype: str, **rest: Any) -> None:
        super().__init__(**rest)
        self.kernel, self.dtype = kernel, dtype

    def runtest(self) -> None:
        from .check import check_kernel

        trials = self.config.getoption("weft_trials")
        backend = self.config.getoption("weft_backend")
        report = check_kernel(self.kernel, backend=backend, dtypes=(self.dtype,), trials=trials, quick=trials is None)
        if not report.passed:
            raise CheckFailed(report)
        if not report.fused:
            pytest.skip("reference only: " + " ".join(report.reasons))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The report in place of a traceback."""
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.kernel.typed.span.line - 1, self.name


class CheckFailed(Exception):
    """A kernel that does not keep to its spec."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
