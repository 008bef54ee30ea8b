"""What a caller can get wrong: one class per mistake, each saying what, where and how to mend it.

All are ``ValueError``s, so that code that does not know weft can catch them.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CallError(ValueError):
    """A kernel was called with something that its declaration does not allow."""


class MissingInput(CallError):
    def __init__(self, kernel: str, name: str) -> None:
        super().__init__(f"{kernel}: input '{name}' is missing and has no default. Pass a tensor for '{name}'.")


class UnknownInput(CallError):
    def __init__(self, kernel: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"{kernel}: there is no input '{name}'.{_suggest(name, known, 'The inputs are')}")


class RankMismatch(CallError):
    def __init__(self, kernel: str, tensor: str, declared: str, shape: tuple[int, ...]) -> None:
        wanted = _plural(declared.count(",") + 1 if declared != "[]" else 0, "dimension")
        super().__init__(
            f"{kernel}: '{tensor}' has shape {list(shape)} but is declared {tensor}{declared}: {wanted}. "
            f"Pass a tensor with {wanted}, or change the declaration."
        )


class ExtentMismatch(CallError):
    """Two places give an axis different extents; a place is a tensor or a declaration, in words."""

    def __init__(self, kernel: str, axis: str, first: str, first_extent: int, second: str, second_extent: int) -> None:
        super().__init__(
            f"{kernel}: axis '{axis}' is {first_extent} in {first} but {second_extent} in {second}. "
            f"The same name means the same extent: make them equal, or give one of the axes another name in the spec."
        )


class SplitNotDivisible(CallError):
    def __init__(self, kernel: str, tensor: str, dim: str, extent: int, known: str, product: int) -> None:
        super().__init__(
            f"{kernel}: dimension {dim} of '{tensor}' has extent {extent}, which is not divisible by {known} = {product}. "
            f"Pass a multiple of {product}, or another extent for {known}."
        )


class SplitMismatch(CallError):
    def __init__(self, kernel: str, tensor: str, dim: str, extent: int, factors: str, product: int) -> None:
        super().__init__(
            f"{kernel}: dimension {dim} of '{tensor}' has extent {extent} but {factors} = {product}. "
            f"Pass a tensor whose extent there is {product}."
        )


class UnsolvableSplit(CallError):
    def __init__(self, kernel: str, tensor: str, dim: str, unknown: list[str]) -> None:
        names = ", ".join(f"'{a}'" for a in unknown)
        super().__init__(
            f"{kernel}: dimension {dim} of '{tensor}' does not determine the extents of {names}. "
            f"Pass sizes={{'{unknown[0]}': ...}}, or declare 'axis {unknown[0]} = ...' in the spec."
        )


class UnknownExtent(CallError):
    def __init__(self, kernel: str, axis: str) -> None:
        super().__init__(f"{kernel}: nothing passed determines the extent of axis '{axis}'. Pass sizes={{'{axis}': ...}}.")


class UnknownAxis(CallError):
    def __init__(self, kernel: str, axis: str, known: Iterable[str]) -> None:
        super().__init__(f"{kernel}: there is no axis '{axis}'.{_suggest(axis, known, 'The axes are')}")


class BadExtent(CallError):
    def __init__(self, kernel: str, axis: str, value: object) -> None:
        super().__init__(f"{kernel}: the extent of axis '{axis}' must be an int of at least 0, not {value!r}. Pass another size.")


class NegativeExtent(CallError):
    def __init__(self, kernel: str, axis: str, value: int, names: str) -> None:
        super().__init__(f"{kernel}: 'axis {axis}' has the extent {value}, which is negative. Change what it is computed from ({names}).")


class ExtentNotComputable(CallError):
    def __init__(self, kernel: str, axis: str, why: str) -> None:
        super().__init__(
            f"{kernel}: the extent of 'axis {axis}' cannot be computed: {why}. Change the params or sizes it is computed from."
        )


class MissingParam(CallError):
    def __init__(self, kernel: str, name: str, kind: str) -> None:
        super().__init__(f"{kernel}: param '{name}' is missing and has no default. Pass {name}=..., one {kind}.")


class WrongParamType(CallError):
    def __init__(self, kernel: str, name: str, kind: str, value: object) -> None:
        super().__init__(f"{kernel}: param '{name}' is {_article(kind)}, not {value!r} ({type(value).__name__}). Pass {_article(kind)}.")


class UnknownParam(CallError):
    def __init__(self, kernel: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"{kernel}: there is no param '{name}'.{_suggest(name, known, 'The params are')}")


class UnknownState(CallError):
    def __init__(self, kernel: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"{kernel}: there is no state '{name}'.{_suggest(name, known, 'The states are')}")


class WrongShape(CallError):
    """A tensor with the right rank whose shape does not fit the extents already bound."""

    def __init__(self, kernel: str, what: str, shape: tuple[int, ...], wanted: tuple[int, ...], names: str) -> None:
        super().__init__(f"{kernel}: {what} has shape {list(shape)} but {names} is {list(wanted)}. Pass a tensor of that shape.")


class NegativePower(CallError):
    def __init__(self) -> None:
        super().__init__("an int was raised to a negative int power. An int power is an int: write 2.0 ** x for a real one.")


def _suggest(name: str, known: Iterable[str], lead: str) -> str:
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" {lead} {', '.join(names)}." if names else " There are none."


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
