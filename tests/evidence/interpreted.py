"""Checks of kernels in Triton's interpreter, collected by ``test_check_triton.py`` in a process of their own."""

from __future__ import annotations

import os

import pytest

import weft
from tests.evidence.library import OTHERS, REQUIRED, kernel
from tests.interpreter import skip_unused_checks
from tests.runtime.stages import STAGES
from tests.runtime.step_reads import STEP_READS
from weft.runtime.check import check_kernel, render

PART, PARTS = (int(n) for n in os.environ.get("WEFT_TEST_PART", "0/1").split("/"))
DTYPES = tuple(os.environ.get("WEFT_TEST_DTYPES", "float32").split(","))

skip_unused_checks()


@pytest.mark.parametrize("name", REQUIRED[PART::PARTS])
def test_kernel(name: str) -> None:
    report = check_kernel(kernel(name), backend="triton", dtypes=DTYPES, trials=1, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("name", OTHERS[PART::PARTS])
def test_other_kernel(name: str) -> None:
    report = check_kernel(kernel(name), backend="triton", dtypes=DTYPES, trials=1, quick=True)
    if report.status == "reference only":
        pytest.skip(f"not fused: {report.reasons[-1]}")
    assert report.passed, render(report)


@pytest.mark.parametrize("name", ["gru", "gru_torch", "lstm", "rnn", "slstm", "m2rnn"])
def test_several_sequences(name: str) -> None:
    """Weights that all sequences of a program share: their gradients are sums over them. In half precision, what steps carry is not rounded
    where it meets them."""
    report = check_kernel(kernel(name), backend="triton", dtypes=DTYPES, trials=1, sizes={"b": 3, "t": 4}, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("name", ["ordered", "pairs", "largest", "running maximum"])
def test_step_reads(name: str) -> None:
    report = check_kernel(weft.loads(STEP_READS[name]).a, backend="triton", dtypes=DTYPES, trials=1, quick=True, strict=True)
    assert report.passed, render(report)


@pytest.mark.parametrize("name", ["two hops", "projected", "induced"])
def test_stages(name: str) -> None:
    report = check_kernel(weft.loads(STAGES[name]).a, backend="triton", dtypes=DTYPES, trials=1, quick=True, strict=True)
    assert report.passed, render(report)
