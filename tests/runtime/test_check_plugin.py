"""``pytest my_variants/`` checks the specs there."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = any(e.name == "weft" for e in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "weft.runtime.pytest_plugin")
GOOD = """
kernel attend(q[b,i,d], k[b,j,d], v[b,j,e]) -> o[b,i,e]:
    mask j <= i
    o = sum[j](softmax[j](sum[d](q * k)) * v)
kernel second(x[i]) -> o[i]:
    o = exp(x)
"""


def run(folder: Path, *options: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *PLUGIN,
        "-p",
        "no:cacheprovider",
        "-rA",
        "-v",
        *options,
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("variants")
    (folder / "good.weft").write_text(GOOD)
    (folder / "broken.weft").write_text("kernel f(q[i]) -> o[i]:\n    o = q * kk\n")
    (folder / "wrong.weft").write_text("kernel f(g[b,t]) -> o[b,t]:\n    assume g <= 0\n    o = exp(g)\n")
    return run(folder, "--weft-backend=reference", "--weft-dtypes=float32,float16", "--continue-on-collection-errors")


def test_every_kernel_is_an_item_for_each_dtype(output: str) -> None:
    for name in ("attend[float32]", "attend[float16]", "second[float32]", "second[float16]"):
        assert f"good.weft::{name} PASSED" in output


def test_a_broken_spec_shows_its_diagnostic_and_no_traceback(output: str) -> None:
    assert "broken.weft:2:13" in output and "`kk`" in output
    assert "Traceback" not in output and "runtime/pytest_plugin.py" not in output


def test_a_failure_shows_the_report(output: str) -> None:
    assert "wrong.weft::f[float32] FAILED" in output
    assert "break 'assume g <= 0'" in output
    assert "reproduce: weft check" in output and "--case" in output


def test_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    assert "no dtype that can be checked" in run(tmp_path, "--weft-dtypes=float8") or "invalid _dtypes value" in run(
        tmp_path, "--weft-dtypes=float8"
    )
