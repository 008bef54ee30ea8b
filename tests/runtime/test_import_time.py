"""Budgets: importing weft and constructing every shipped kernel from the cache is quick and imports no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGET = 0.5
SLACK = 2.5
"""Machines that run tests are busy."""

PROGRAM = """
import sys, time
import torch
start = time.process_time()
import weft, weft.specs
kernels = [getattr(weft.specs, name) for name in weft.specs.__all__]
print(time.process_time() - start, len(kernels), *sorted(set(sys.modules) & {"lark", "sympy", "networkx", "jinja2", "triton"}))
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a second process prints, with byte code and parsed specs cached by the first."""
    folder = tmp_path_factory.mktemp("warm")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"WEFT_CACHE": str(folder / "weft"), "PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_constructing_every_kernel_is_quick(warm: list[str]) -> None:
    assert float(warm[0]) < BUDGET * SLACK


def test_constructing_every_kernel_imports_no_compiler(warm: list[str]) -> None:
    assert warm[2:] == []
    assert int(warm[1]) >= 85
