"""The disk cache: atomic, verified, shared by many processes, and never in the way when it cannot be used."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import weft
from weft.runtime import build, errors, pickling
from weft.runtime.cache import Cache, default_root, digest, disk_cache

ROOT = Path(__file__).parents[2]
TEXT = "kernel scaled(x[n,d], w[d]) -> y[n,d], m[n]:\n    y = 2 * x * w\n    m = sum[d](x * w)\n"


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    return tmp_path / "cache"


def run_kernel(text: str = TEXT) -> list[torch.Tensor]:
    x = torch.arange(6.0).reshape(2, 3)
    return list(next(iter(weft.loads(text)))(x, torch.ones(3), strict=True))


def test_entries_are_read_as_written(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    key = digest("a", "b")
    assert cache.read("kind", key) is None
    cache.write("kind", key, b"data")
    assert cache.read("kind", key) == b"data"
    assert digest("ab") != key != digest("a", b"b", "")


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_entry_is_removed(tmp_path: Path, damage: bytes | None) -> None:
    cache = Cache(tmp_path)
    cache.write("kind", "0123", b"data")
    (file,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    file.write_bytes(file.read_bytes()[:-1] + b"!" if damage is None else damage)
    assert cache.read("kind", "0123") is None
    assert not file.exists()


def test_a_damaged_folder_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(1)
        (folder / "text").write_text("whole")

    folder = cache.folder("kind", "key", make)
    assert cache.folder("kind", "key", make) == folder and len(made) == 1
    (folder / "text").write_text("half")
    assert (cache.folder("kind", "key", make) / "text").read_text() == "whole" and len(made) == 2
    (folder / "manifest.json").write_text("{")
    assert (cache.folder("kind", "key", make) / "text").read_text() == "whole" and len(made) == 3
    assert [p.name for p in (tmp_path / "kind").iterdir()] == ["key"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "text").write_text("half")
        raise RuntimeError("the compiler failed")

    with pytest.raises(RuntimeError):
        Cache(tmp_path).folder("kind", "key", make)
    assert list((tmp_path / "kind").iterdir()) == []


def test_many_threads_share_a_folder(tmp_path: Path) -> None:
    cache, start = Cache(tmp_path), threading.Barrier(8)

    def use(_: int) -> str:
        start.wait()
        return (cache.folder("kind", "key", lambda folder: (folder / "text").write_text("whole") and None) / "text").read_text()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(use, range(8))) == {"whole"}
    assert [p.name for p in (tmp_path / "kind").iterdir()] == ["key"]


def test_size_and_clear(root: Path) -> None:
    run_kernel()
    count, total = disk_cache().size()
    assert count >= 3 and total > 1000
    assert disk_cache().clear() == (count, total)
    assert disk_cache().size() == (0, 0)
    assert run_kernel()[1].tolist() == [3.0, 12.0]


def test_generated_sources_stay_on_disk(root: Path) -> None:
    run_kernel()
    (source,) = root.glob("c/*/scaled__forward__????????.c")
    assert source.with_suffix(".so").exists()
    assert source.read_text() == weft.loads(TEXT).scaled.source("c", extents={"n": 2, "d": 3})


def test_a_new_process_neither_parses_nor_plans_nor_compiles(root: Path) -> None:
    program = f"""
import sys, torch, weft
y, m = weft.loads({TEXT!r}).scaled(torch.ones(2, 3), torch.ones(3).requires_grad_(), strict=True)
m.sum().backward()
print(sorted(set(sys.modules) & {{"lark", "sympy", "networkx", "jinja2", "triton"}}), m.tolist())
"""
    first, second = (run_python(program, root) for _ in range(2))
    assert first.endswith("[3.0, 3.0]")
    assert second == "[] [3.0, 3.0]"


def test_many_processes_at_once(root: Path) -> None:
    program = f"import torch, weft; print(weft.loads({TEXT!r}).scaled(torch.ones(2, 3), torch.ones(3), strict=True).m.tolist())"
    running = [start_python(program, root) for _ in range(2)]
    assert [p.communicate()[0].strip() for p in running] == ["[3.0, 3.0]"] * 2
    assert not list(root.rglob(".new-*"))


@pytest.mark.parametrize("pattern", ["c/*/*.so", "c/*/*.c", "variants/*/*", "parsed/*/*"])
def test_a_damaged_cache_is_rebuilt(root: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    run_kernel()
    damaged = list(root.glob(pattern))
    assert damaged
    for file in damaged:
        data = file.read_bytes()
        file.unlink()  # this process has mapped the binary
        file.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(build, "_loaded", {})
    assert run_kernel()[1].tolist() == [3.0, 12.0]


def test_another_spec_of_the_same_name_is_another_kernel(root: Path) -> None:
    assert run_kernel()[1].tolist() == [3.0, 12.0]
    assert run_kernel(TEXT.replace("sum[d](x * w)", "sum[d](x * w) + 1"))[1].tolist() == [4.0, 13.0]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("WEFT_CACHE", str(blocked / "cache"))
    with pytest.warns(errors.CacheUnavailable, match="cannot be used: Not a directory. Kernels are built in a temporary directory"):
        assert run_kernel()[1].tolist() == [3.0, 12.0]
    assert disk_cache().root != blocked / "cache"


def test_a_full_disk_is_no_mistake(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    cache = disk_cache()

    def full(path: Path, data: bytes) -> None:
        if path.is_relative_to(root):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with pytest.warns(errors.CacheUnavailable, match="No space left on device"):
        assert run_kernel()[1].tolist() == [3.0, 12.0]


def test_a_cache_that_others_may_write_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("WEFT_CACHE", str(shared))
    with pytest.warns(errors.CacheUnavailable, match="everybody may write to it"):
        assert disk_cache().root != shared


def test_entries_cannot_run_code() -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("true",)

    with pytest.raises(pickle.UnpicklingError, match="is not data of the compiler"):
        pickling.restore(pickle.dumps(Harmful()))
    with pytest.raises(pickle.UnpicklingError, match="is not data of the compiler"):
        pickling.restore(pickle.dumps(weft.runtime.kernel.SpecFile))


def test_graphs_keep_one_object_per_node() -> None:
    node = weft.loads(TEXT).scaled.graph.outputs["m"]
    assert pickling.restore(pickling.dump(node)) is node


def test_the_default_is_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEFT_CACHE", raising=False)
    assert default_root() == Path.home() / ".cache" / "weft"


def run_python(program: str, root: Path) -> str:
    running = start_python(program, root)
    shown, _ = running.communicate()
    assert running.returncode == 0
    return shown.strip()


def start_python(program: str, root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "WEFT_CACHE": str(root), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
