"""The library of variants: ``from weft.specs import gla`` gives the kernel of ``gla.weft``.

A spec is read when it is first asked for. ``dir(weft.specs)`` and ``weft.specs.__all__`` list what there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if __name__ != "weft.specs":
    raise ImportError("import weft.specs, not specs: a bare import would load a second copy of every class")

if TYPE_CHECKING:
    from ..runtime.kernel import Kernel

FOLDER = Path(__file__).parent

_NAMES = sorted(path.stem for path in FOLDER.glob("*.weft"))

__all__ = _NAMES  # noqa: PLE0605


def __getattr__(name: str) -> Kernel:
    if name not in _NAMES:
        from ..dsl.names import closest

        raise AttributeError(f"weft.specs has no spec {name!r}. {closest(name, _NAMES)}`weft list` shows them.")
    from importlib import import_module

    return import_module(f"{__name__}.{name}")  # type: ignore[return-value]  # the import hook gives the kernel


def __dir__() -> list[str]:
    return _NAMES
