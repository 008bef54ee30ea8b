"""``weft check`` on the CPU backend: every fused kernel, forward and backward."""

from __future__ import annotations

import pytest

from tests.evidence.library import EXPERTS, OTHERS, RECURRENT, REQUIRED, every, kernel
from weft.runtime.check import check_kernel, render

WHOLE = {*RECURRENT, *EXPERTS}
"""Fused whole, besides the required ones."""


@pytest.mark.parametrize("name", REQUIRED)
def test_required_kernels(name: str) -> None:
    report = check_kernel(kernel(name), backend="c", trials=2, quick=True, strict=True)
    assert report.passed, render(report)
    assert not report.reasons, f"{name} is not fused whole: {report.reasons}"


@pytest.mark.parametrize("name", every(4, REQUIRED))
def test_required_kernels_in_float16(name: str) -> None:
    report = check_kernel(kernel(name), backend="c", dtypes=("float16",), trials=1, quick=True, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("name", every(4, REQUIRED, first=1))
def test_required_kernels_in_bfloat16(name: str) -> None:
    report = check_kernel(kernel(name), backend="c", dtypes=("bfloat16",), trials=1, quick=True, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("name", every(4, EXPERTS))
def test_experts_in_bfloat16(name: str) -> None:
    report = check_kernel(kernel(name), backend="c", dtypes=("bfloat16",), trials=1, quick=True, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("name", every(4, RECURRENT))
def test_recurrences_in_bfloat16(name: str) -> None:
    report = check_kernel(kernel(name), backend="c", dtypes=("bfloat16",), trials=1, quick=True)
    assert report.passed, render(report)
    assert report.status == "passed"


@pytest.mark.parametrize("name", OTHERS)
def test_other_fused_kernels(name: str) -> None:
    report = check_kernel(kernel(name), backend="c", trials=1, quick=True)
    if report.status == "reference only":
        assert name not in WHOLE
        pytest.skip(f"not fused: {report.reasons[-1]}")
    assert report.passed, render(report)
    if name in WHOLE:
        assert report.status == "passed"
        assert not report.reasons, f"{name} is not fused whole: {report.reasons}"


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUIRED)
def test_more_shapes(name: str) -> None:
    report = check_kernel(kernel(name), backend="c", dtypes=("float32", "float16", "bfloat16"), seed=1)
    assert report.passed, render(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_more_shapes_of_experts(name: str) -> None:
    """Not in float16: hidden units are stored in the inputs' dtype, and those of tiny inputs leave its range."""
    report = check_kernel(kernel(name), backend="c", dtypes=("float32", "bfloat16"), seed=1)
    assert report.passed, render(report)
