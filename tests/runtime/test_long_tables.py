"""Tables by position that are longer than any tile: in C a head's table is added to in memory, on GPUs every tile of it is swept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch

import weft
from tests.evidence.library import kernel
from weft.runtime.check import check_kernel, render
from weft.runtime.check_shapes import Case
from weft.runtime.library import find

LONG = {
    "spacetime": {"b": 2, "f": 150, "y": 1, "x": 2, "h": 2, "d": 8, "g": 170, "e": 8, "n": 319},
    "t5_bias": {"b": 2, "h": 3, "i": 70, "j": 90, "d": 8, "e": 8, "n": 300},
    "graphormer": {"b": 2, "h": 3, "i": 70, "j": 90, "d": 8, "e": 8, "n": 300},
}
STRIDES = '''"""A bias by a distance that may step by more than one place, or by less."""

kernel strided(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], bias[h,n]) -> o[b,h,i,e]:
    s = sum[d](q * k) + bias[n -> {place}]
    o = sum[j](softmax[j](s) * v)
'''


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LONG)
def test_on_cpus(name: str, dtype: str) -> None:
    report = check_kernel(kernel(name), case=Case(LONG[name], seed=1), backend="c", dtypes=(dtype,), strict=True)
    assert report.passed, render(report)


def test_on_gpus() -> None:
    pytest.importorskip("triton")
    case = '{"sizes":{"b":1,"f":20,"y":1,"x":1,"h":1,"d":16,"g":24,"e":16,"n":290},"seed":1}'
    command = [sys.executable, "-m", "weft.cli", "check", str(find("spacetime")), "--backend", "triton", "--strict", "--case", case]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("place", ["i - j + 150", "(i + j) // 2", "2 * i + j", "abs(i - j)"])
def test_gradients_of_every_subset(place: str) -> None:
    strided = weft.loads(STRIDES.replace("{place}", place)).strided
    torch.manual_seed(0)
    given = [torch.randn(2, 2, 70, 8), torch.randn(2, 2, 80, 8), torch.randn(2, 2, 80, 8), torch.randn(2, 300)]
    for count in (1, 2, 4):
        for chosen in combinations(range(4), count):
            inputs = [t.detach().requires_grad_(n in chosen) for n, t in enumerate(given)]
            found = torch.autograd.grad(strided(*inputs, strict=True).square().sum(), [inputs[n] for n in chosen])
            doubles = [t.detach().double().requires_grad_(n in chosen) for n, t in enumerate(given)]
            expected = torch.autograd.grad(strided.reference(*doubles).square().sum(), [doubles[n] for n in chosen])
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=json.dumps([place, chosen]))
