"""The order of the rooms is held by lint; here a deliberate violation in each room is seen to be caught."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dsl", "compiler", "codegen", "runtime")
LATER = [(room, later) for n, room in enumerate(ROOMS) for later in ROOMS[n + 1 :]]

pytestmark = pytest.mark.skipif(shutil.which("ruff", path=str(Path(sys.executable).parent)) is None, reason="ruff is not installed")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree's layout and lint rules, without its code."""
    root = tmp_path_factory.mktemp("tree")
    (root / "weft").mkdir()
    shutil.copy(ROOT / "ruff.toml", root)
    shutil.copy(ROOT / "weft" / "ruff.toml", root / "weft")
    (root / "weft" / "__init__.py").touch()
    for room in ROOMS:
        (root / room).mkdir()
        (root / room / "__init__.py").touch()
        shutil.copy(ROOT / room / "ruff.toml", root / room)
        (root / "weft" / room).symlink_to(Path("..") / room)
    return root


def banned(tree: Path, room: str, line: str) -> str:
    """What lint says to a file of ``room`` that holds ``line``."""
    offender = tree / room / "offender.py"
    offender.write_text(f'"""A file."""\n\n{line}\n')
    command = [str(Path(sys.executable).parent / "ruff"), "check", "--no-cache", "--select", "TID251", f"weft/{room}"]
    try:
        return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=60).stdout
    finally:
        offender.unlink()


@pytest.mark.parametrize(("room", "later"), LATER)
def test_import_of_a_later_room_is_an_error(tree: Path, room: str, later: str) -> None:
    for line in (f"from ..{later} import thing", f"from .. import {later}", f"from weft.{later} import thing"):
        assert f"{room} comes before {later}" in banned(tree, room, line), line


@pytest.mark.parametrize(("room", "later"), LATER)
def test_import_of_an_earlier_room_is_allowed(tree: Path, room: str, later: str) -> None:
    assert "TID251" not in banned(tree, later, f"from ..{room} import thing")


@pytest.mark.parametrize("room", ROOMS)
def test_bare_import_is_refused(room: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    assert f"import weft.{room}, not {room}" in run.stderr
