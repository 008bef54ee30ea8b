"""Loading: files, texts, imports, namespaces, and what the cache may and may not answer for."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weft
import weft.specs
from weft.runtime import errors

DOUBLE = "kernel double(x[n]) -> y[n]:\n    y = 2 * x\n"
TWO = DOUBLE + "\nkernel triple(x[n]) -> y[n]:\n    y = 3 * x\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``my_package`` with a subpackage ``kernels``, importable."""
    folder = tmp_path / "my_package" / "kernels"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_a_namespace_has_the_kernels_by_name(tmp_path: Path) -> None:
    file = tmp_path / "both.weft"
    file.write_text(TWO)
    found = weft.load(file)
    assert [kernel.name for kernel in found] == ["double", "triple"] == dir(found)
    assert len(found) == 2 and "double" in found and "third" not in found
    assert found.triple is found["triple"]
    assert repr(found) == f"<kernels of {file}: double, triple>"
    assert found.double(torch.ones(2)).tolist() == [2.0, 2.0]


def test_an_unknown_kernel_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(errors.UnknownKernel) as caught:
        _ = weft.loads(TWO, name="both.weft").duble
    assert str(caught.value) == "both.weft has no kernel 'duble'. did you mean `double`? It has: double, triple."


def test_a_missing_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "both.weft").write_text(TWO)
    with pytest.raises(errors.SpecNotFound) as caught:
        weft.load(tmp_path / "bot.weft")
    assert str(caught.value) == (f"there is no spec file {tmp_path}/bot.weft. did you mean `both`? Pass the path of a .weft file.")
    assert isinstance(caught.value, FileNotFoundError)


def test_a_mistake_in_a_text_has_its_name() -> None:
    with pytest.raises(errors.SpecError, match=r"mine\.weft:2:9"):
        weft.loads("kernel double(x[n]) -> y[n]:\n    y = z\n", name="mine.weft")


def test_import_gives_the_kernel(package: Path) -> None:
    (package / "my_variant.weft").write_text(DOUBLE)
    module = importlib.import_module("my_package.kernels")
    from my_package.kernels import my_variant  # type: ignore[import-not-found]

    assert isinstance(my_variant, weft.Kernel)
    assert my_variant.name == "double"
    assert module.my_variant is my_variant
    assert importlib.import_module("my_package.kernels.my_variant") is my_variant


def test_import_of_several_kernels_takes_the_one_named_like_the_file(package: Path) -> None:
    (package / "triple.weft").write_text(TWO)
    from my_package.kernels import triple

    assert triple.name == "triple"


def test_import_of_several_kernels_is_ambiguous_otherwise(package: Path) -> None:
    file = package / "pair.weft"
    file.write_text(TWO)
    with pytest.raises(errors.AmbiguousKernel) as caught:
        importlib.import_module("my_package.kernels.pair")
    assert str(caught.value) == (
        f"{file} defines the kernels double, triple and none of them is named pair, so it is not clear which one to import. "
        f"Write weft.load({str(file)!r}).double, or give one the name pair."
    )


def test_a_module_of_macros_has_nothing_to_import(package: Path) -> None:
    (package / "macros.weft").write_text("def half(x) = x / 2\n")
    with pytest.raises(errors.NoKernels, match="defines macros but no kernel"):
        importlib.import_module("my_package.kernels.macros")


def test_python_modules_come_first(package: Path) -> None:
    (package / "plain.weft").write_text(DOUBLE)
    (package / "plain.py").write_text("value = 3\n")
    assert importlib.import_module("my_package.kernels.plain").value == 3


def test_a_name_without_a_file_is_not_found(package: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("my_package.kernels.absent")


def test_specs_are_listed_and_imported() -> None:
    from weft.specs import gla

    assert gla.name == "gla"
    assert weft.specs.gla is gla
    assert "gla" in dir(weft.specs) and weft.specs.__all__ == sorted(p.stem for p in weft.specs.FOLDER.glob("*.weft"))
    with pytest.raises(AttributeError) as caught:
        _ = weft.specs.softmax_atention
    assert "did you mean `softmax_attention`?" in str(caught.value)


def test_every_shipped_spec_is_a_kernel() -> None:
    for name in weft.specs.__all__:
        assert isinstance(getattr(weft.specs, name), weft.Kernel)


def test_kernels_are_copied_and_pickled() -> None:
    kernel = weft.loads(DOUBLE).double
    assert copy.deepcopy(kernel) is kernel
    again = pickle.loads(pickle.dumps(kernel))
    assert again(torch.ones(2)).tolist() == [2.0, 2.0]
    assert again.key == kernel.key
    assert repr(pickle.loads(pickle.dumps(weft.loads(TWO)))) == "<kernels of <text>: double, triple>"


def test_a_kernel_shows_its_declaration() -> None:
    kernel = weft.loads('"""Doubles."""\nkernel double(x[(m n)], u[n] = 0, c[n]: int) -> y[m,n]: \n    y = 2 * x + u + c\n').double
    assert repr(kernel) == "<weft kernel double(x[(m n)], u[n] = 0.0, c[n]: int) -> y[m,n]>"
    assert kernel.doc == "Doubles." == kernel.__doc__
    assert kernel.spec.kernels == (kernel.typed,)


def test_what_was_parsed_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    weft.loads(DOUBLE)
    monkeypatch.setattr("weft.dsl.load.parse", lambda *_: pytest.fail("parsed again"))
    assert weft.loads(DOUBLE, name="other.weft").double.spec.filename == "other.weft"


def test_a_changed_module_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    spec, module = tmp_path / "spec.weft", tmp_path / "mine.weft"
    spec.write_text("use mine.scaled\n\nkernel k(x[n]) -> y[n]:\n    y = scaled(x)\n")
    module.write_text("def scaled(x) = 2 * x\n")
    assert weft.load(spec).k(torch.ones(1)).item() == 2
    assert weft.load(spec).k(torch.ones(1)).item() == 2
    module.write_text("def scaled(x) = 5 * x\n")
    assert weft.load(spec).k(torch.ones(1)).item() == 5


def test_comments_do_not_change_a_kernel() -> None:
    a, b = weft.loads(DOUBLE).double, weft.loads("# mine\n" + DOUBLE.replace("2 * x", "2*x  # twice")).double
    c = weft.loads(DOUBLE.replace("2", "2.0")).double
    assert a.identity == b.identity != c.identity


def test_a_bare_import_of_a_room_fails() -> None:
    for room in ("dsl", "compiler", "codegen", "runtime", "specs"):
        with pytest.raises(ImportError, match=f"import weft.{room}"):
            importlib.import_module(room)
