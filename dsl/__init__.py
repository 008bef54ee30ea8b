"""Room 1: spec text to typed equations. Nothing here knows how a kernel is computed."""

if __name__ != "weft.dsl":
    raise ImportError("import weft.dsl, not dsl: a bare import would load a second copy of every class")

from .diagnostics import SpecError, SpecErrors
from .lints import Warning_, lint
from .load import load_file, parse
from .typed import Spec

__all__ = ["Spec", "SpecError", "SpecErrors", "Warning_", "lint", "load_file", "parse"]
