"""From a spec file or text to its kernels. What has been parsed before comes from the cache, without the parser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..dsl.guard import normalised
from . import errors, pickling
from .cache import digest, disk_cache
from .identity import Header, header
from .kernel import Kernel, SpecFile
from .version import FRONT, compiler_digest

SUFFIX = ".weft"


class Namespace:
    """The kernels of one file, by name: as attributes (``ns.gla``), by key (``ns["gla"]``) and, in order, by iteration."""

    def __init__(self, file: SpecFile, headers: tuple[Header, ...]) -> None:
        self._file = file
        self._headers = headers
        self._kernels = {head.name: Kernel(head, file) for head in headers}

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        found = self._kernels.get(name)
        if found is None:
            raise errors.UnknownKernel(self._file.filename, name, list(self._kernels))
        return found

    def __getitem__(self, name: str) -> Kernel:
        return self._kernels[name]

    def __iter__(self) -> Iterator[Kernel]:
        return iter(self._kernels.values())

    def __len__(self) -> int:
        return len(self._kernels)

    def __contains__(self, name: object) -> bool:
        return name in self._kernels

    def __dir__(self) -> list[str]:
        return list(self._kernels)

    def __repr__(self) -> str:
        return f"<kernels of {self._file.filename}: {', '.join(self._kernels) or 'none'}>"

    def __reduce__(self) -> tuple[object, ...]:
        return Namespace, (self._file, self._headers)


def load(path: str | Path) -> Namespace:
    """The kernels of the file ``path``; modules that it uses are looked for beside it.

    Raises ``SpecNotFound`` where there is no file and ``SpecError`` for what is wrong in it.
    """
    from ..dsl.load import read_text

    path = Path(path)
    if not path.exists():
        raise errors.SpecNotFound(str(path), [p.stem for p in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else [])
    return Namespace(*parsed(read_text(path), str(path), path.parent))


def loads(text: str, name: str = "<text>") -> Namespace:
    """The kernels of ``text``; messages show ``name`` as its file name. Raises ``SpecError``."""
    return Namespace(*parsed(text, name, None))


def only_kernel(path: str | Path) -> Kernel:
    """The kernel that importing the file ``path`` gives: its only one, or the one named like the file.

    Raises ``NoKernels`` or ``AmbiguousKernel``, and what ``load`` raises.
    """
    found, stem = load(path), Path(path).stem
    if not len(found):
        raise errors.NoKernels(str(path))
    if stem in found or len(found) == 1:
        return found[stem] if stem in found else next(iter(found))
    raise errors.AmbiguousKernel(str(path), stem, dir(found))


def parsed(text: str, filename: str, folder: Path | None) -> tuple[SpecFile, tuple[Header, ...]]:
    """The file that ``text`` is, with the headers of its kernels.

    It comes from the cache where the text, the modules it uses and the front end are unchanged.
    """
    key = digest(compiler_digest(FRONT), normalised(text))
    stored = _restored(disk_cache().read("parsed", key))
    if stored is not None:
        modules, headers, spec = stored
        if all(_module_digest(folder, name) == known for name, known in modules):
            return SpecFile(filename, spec), tuple(Header(*head) for head in headers)
    return _parse(text, filename, folder, key)


Stored = tuple[tuple[tuple[str, str], ...], tuple[tuple[Any, ...], ...], bytes]
"""What the cache keeps of a text: the modules it uses with what they were, the headers of its kernels, and the spec as bytes."""


def _restored(data: bytes | None) -> Stored | None:
    try:
        found: Stored | None = None if data is None else pickling.restore(data)
    except pickling.DAMAGED:
        return None
    return found


def _parse(text: str, filename: str, folder: Path | None, key: str) -> tuple[SpecFile, tuple[Header, ...]]:
    from ..dsl.load import beside, parse

    asked: dict[str, str] = {}
    find = beside(folder) if folder is not None else lambda name: None

    def search(name: str) -> tuple[str, str] | None:
        asked[name] = _module_digest(folder, name)
        return find(name)

    spec = parse(text, filename, search)
    headers = tuple(header(kernel, spec) for kernel in spec.kernels)
    stored = tuple(asked.items()), tuple(tuple(head) for head in headers), pickling.dump(spec)
    disk_cache().write("parsed", key, pickling.dump(stored))
    return SpecFile(filename, spec), headers


def _module_digest(folder: Path | None, name: str) -> str:
    """What a module beside the spec is; empty where there is none, so that one that appears later is noticed."""
    if folder is None:
        return ""
    try:
        return digest((folder / f"{name}{SUFFIX}").read_bytes())
    except OSError:
        return ""
