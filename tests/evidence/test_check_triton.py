"""``weft check`` on the Triton backend, in its interpreter: every fused kernel, forward and backward, at small shapes.

Triton decides at import whether it interprets, so the checks run in processes of their own. Its interpreter computes wrong bfloat16
products: bfloat16 is compiled only (``test_ahead_of_time.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = 6
ROOT = Path(__file__).parents[2]


def _run(part: int, dtypes: str, test: str) -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "WEFT_TEST_PART": f"{part}/{PARTS}",
        "WEFT_TEST_DTYPES": dtypes,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    file = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", f"{file}::{test}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("part", range(PARTS))
def test_float16(part: int) -> None:
    _run(part, "float16", "test_kernel")


@pytest.mark.parametrize("part", range(PARTS))
def test_other_kernels(part: int) -> None:
    _run(part, "float32", "test_other_kernel")


def test_several_sequences() -> None:
    _run(0, "float32,float16", "test_several_sequences")


def test_step_reads() -> None:
    _run(0, "float32", "test_step_reads")


def test_stages() -> None:
    _run(0, "float32", "test_stages")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_float32(part: int) -> None:
    _run(part, "float32", "test_kernel")
