"""The wheel holds the rooms under weft/, with every data file that they read, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dsl", "compiler", "codegen", "runtime", "specs")
NOT_SHIPPED = ("__pycache__", ".ruff_cache", "ruff.toml")


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("tree")
    for name in (*ROOMS, "weft"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("weft-*.whl"))) as wheel:
        return set(wheel.namelist())


def test_every_file_of_every_room_is_in_the_wheel(wheel_files: set[str]) -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and not any(part in path.parts or part == path.name for part in NOT_SHIPPED):
                assert f"weft/{path.relative_to(ROOT).as_posix()}" in wheel_files


def test_nothing_else_is(wheel_files: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_files} == {"weft", "weft-0.1.0.dist-info"}
    assert "weft/py.typed" in wheel_files
