"""From a spec file or text to its kernels. What has been parsed before comes from the cache, without the parser."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..dsl import typed
from ..dsl.guard import normalised
from . import errors, pickling
from .cache import digest, disk_cache
from .kernel import Kernel
from .version import FRONT, compiler_digest

SUFFIX = ".weft"


class Namespace:
    """The kernels of one file, by name: as attributes (``ns.gla``), by key (``ns["gla"]``) and, in order, by iteration."""

    def __init__(self, spec: typed.Spec) -> None:
        self._spec = spec
        self._kernels = {kernel.name: Kernel(kernel, spec) for kernel in spec.kernels}

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        found = self._kernels.get(name)
        if found is None:
            raise errors.UnknownKernel(self._spec.filename, name, list(self._kernels))
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
        return f"<kernels of {self._spec.filename}: {', '.join(self._kernels) or 'none'}>"

    def __reduce__(self) -> tuple[object, ...]:
        return Namespace, (self._spec,)


def load(path: str | Path) -> Namespace:
    """The kernels of the file ``path``; modules that it uses are looked for beside it.

    Raises ``SpecNotFound`` where there is no file and ``SpecError`` for what is wrong in it.
    """
    from ..dsl.load import read_text

    path = Path(path)
    if not path.exists():
        raise errors.SpecNotFound(str(path), [p.stem for p in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else [])
    return Namespace(parsed(read_text(path), str(path), path.parent))


def loads(text: str, name: str = "<text>") -> Namespace:
    """The kernels of ``text``; messages show ``name`` as its file name. Raises ``SpecError``."""
    return Namespace(parsed(text, name, None))


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


def parsed(text: str, filename: str, folder: Path | None) -> typed.Spec:
    """The spec that ``text`` is, from the cache where the text, the modules it uses and the front end are unchanged."""
    key = digest(compiler_digest(FRONT), normalised(text))
    stored = disk_cache().read("parsed", key)
    if stored is not None:
        try:
            modules, spec = pickling.restore(stored)
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError, ValueError):
            modules, spec = (), None
        if isinstance(spec, typed.Spec) and all(_module_digest(folder, name) == known for name, known in modules):
            return replace(spec, filename=filename)
    return _parse(text, filename, folder, key)


def _parse(text: str, filename: str, folder: Path | None, key: str) -> typed.Spec:
    from ..dsl.load import beside, parse

    asked: dict[str, str] = {}
    find = beside(folder) if folder is not None else lambda name: None

    def search(name: str) -> tuple[str, str] | None:
        asked[name] = _module_digest(folder, name)
        return find(name)

    spec = parse(text, filename, search)
    try:
        disk_cache().write("parsed", key, pickling.dump((tuple(asked.items()), spec)))
    except RecursionError:  # nested deeper than can be stored: parsed again next time
        pass
    return spec


def _module_digest(folder: Path | None, name: str) -> str:
    """What a module beside the spec is; empty where there is none, so that one that appears later is noticed."""
    if folder is None:
        return ""
    try:
        return digest((folder / f"{name}{SUFFIX}").read_bytes())
    except OSError:
        return ""
