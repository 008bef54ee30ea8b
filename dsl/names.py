"""The words of the language: which are reserved, and which functions there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .typed import POINTWISE, REDUCTIONS, SCANS

STATEMENTS = ("mask", "axis", "state", "param", "assume", "sample")
"""The words that begin a statement of a kernel."""

TOP_LEVEL = ("use", "def", "kernel")

KEYWORDS = frozenset(
    (*STATEMENTS, *TOP_LEVEL, "along", "reverse", "exclusive", "where", "and", "or", "not", "inf", "true", "false", "True", "False")
)

OPERATORS = frozenset("add sub mul div floordiv mod pow neg lt le gt ge eq ne and or not".split())
"""The pointwise operations that are written as operators."""

FUNCTIONS = {op: count for op, count in POINTWISE.items() if op not in OPERATORS}
"""Pointwise functions by name, with their number of arguments."""

DRAWS = {"normal": 0, "uniform": 2, "randint": 2}
"""What only ``sample`` may draw from, with the number of arguments; ``sort`` is the other function of ``sample``."""

BRACKETED = frozenset((*REDUCTIONS, *SCANS, "sort"))
"""The functions that take their axes in a bracket."""

FUNCTION_NAMES = frozenset((*FUNCTIONS, *DRAWS, *BRACKETED, "size"))

CALL_NAMES = frozenset("sizes origin cu_seqlens initial history return_final backend strict deterministic".split())
"""Keywords of a kernel call, which no input and no parameter may take."""

DTYPES = {
    "bool": "bool",
    **dict.fromkeys(("int", "int8", "int16", "int32", "int64", "uint8"), "int"),
    **dict.fromkeys(("float16", "bfloat16", "float32", "float64"), "real"),
}
"""The dtypes a tensor may declare, with the kind of their values."""


MAX_OPTIONS = 500


def closest(name: str, known: Iterable[str]) -> str:
    """ "did you mean `k`? " for the nearest known name, or nothing where none is near (or where there are too many)."""
    options = sorted({option for option in known if len(option) <= 64})
    if len(options) > MAX_OPTIONS:
        return ""
    found = difflib.get_close_matches(name[:64], options, n=1, cutoff=0.6)
    if not found:
        found = [option for option in options if option.lower() == name.lower()][:1]
    return f"did you mean `{found[0]}`? " if found else ""
