"""Budgets of time, with slack for a busy machine: what they guard against is a factor, not a percentage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLACK = 4.0

COLD = """
import time, torch
torch.set_num_threads(2)
started = time.perf_counter()
import weft
kernel = getattr(weft.load("specs/{name}.weft"), "{name}")
from weft.compiler.sampling import sample
from weft.runtime.problem import Usual, pose
problem = pose(kernel.graph, {{}}, {{}}, Usual(length=128, heads=2))
inputs = problem.inputs()
for x in inputs.values():
    if x.is_floating_point():
        x.requires_grad_()
out = kernel(*inputs.values(), **problem.params, strict=True)
out = out if isinstance(out, tuple) else (out,)
sum(o.sum() for o in out).backward()
print(time.perf_counter() - started)
"""


@pytest.mark.parametrize("name", ["softmax_attention", "kitchen_sink", "deberta"])
def test_from_an_empty_cache_to_gradients(name: str, tmp_path: Path) -> None:
    """3 s on a quiet machine, from the import of weft to gradients."""
    environment = {**os.environ, "WEFT_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", COLD.format(name=name)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 3.0 * SLACK
