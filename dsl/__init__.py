"""Room 1: spec text to typed equations. Nothing here knows how a kernel is computed.

The parser is imported when something is parsed: a spec that comes from the cache needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "weft.dsl":
    raise ImportError("import weft.dsl, not dsl: a bare import would load a second copy of every class")

if TYPE_CHECKING:
    from .diagnostics import SpecError, SpecErrors
    from .lints import Warning_, lint
    from .load import load_file, parse
    from .typed import Spec

__all__ = ["Spec", "SpecError", "SpecErrors", "Warning_", "lint", "load_file", "parse"]

_HOMES = {
    "Spec": "typed", "SpecError": "diagnostics", "SpecErrors": "diagnostics", "Warning_": "lints", "lint": "lints",
    "load_file": "load", "parse": "load",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
