"""The names of one kernel: what each one is, where it was defined, and from which line on it is visible."""

from __future__ import annotations

from dataclasses import dataclass

from . import typed as t


@dataclass(frozen=True, slots=True)
class InputSymbol:
    tensor: t.Tensor
    kind: t.Kind

    role = "an input"


@dataclass(frozen=True, slots=True)
class ParamSymbol:
    kind: t.Kind

    role = "a parameter"


@dataclass(frozen=True, slots=True)
class AxisSymbol:
    role = "an axis"


@dataclass(frozen=True, slots=True)
class MacroSymbol:
    params: tuple[str, ...]

    role = "a macro"


@dataclass(frozen=True, slots=True)
class ValueSymbol:
    axes: frozenset[str]
    kind: t.Kind

    role = "a value"


@dataclass(slots=True)
class StateSymbol:
    """A state; ``version`` counts the updates so far, ``failed`` is set where an update was tried in a wrong way."""

    state: t.State
    version: int = 0
    failed: bool = False

    role = "a state"

    @property
    def axes(self) -> frozenset[str]:
        return frozenset((*self.state.axes, *self.state.along))


@dataclass(frozen=True, slots=True)
class BrokenSymbol:
    """A name whose definition has a mistake of its own; using it is not reported again."""

    role = "a value"


Symbol = InputSymbol | ParamSymbol | AxisSymbol | MacroSymbol | ValueSymbol | StateSymbol | BrokenSymbol


@dataclass(frozen=True, slots=True)
class Entry:
    """A symbol, the span that defines it (None for a macro that could not be read)."""

    symbol: Symbol
    span: t.Span | None


class Scope:
    """The names of a kernel; ``later`` are those that some later line will define."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.later: dict[str, t.Span] = {}

    def get(self, name: str) -> Symbol | None:
        entry = self.entries.get(name)
        return None if entry is None else entry.symbol

    def define(self, name: str, symbol: Symbol, span: t.Span | None) -> None:
        self.entries[name] = Entry(symbol, span)

    def axes(self) -> list[str]:
        return [name for name, entry in self.entries.items() if isinstance(entry.symbol, AxisSymbol)]

    def values(self) -> list[str]:
        """Everything that may stand in an expression by its bare name."""
        return [name for name, entry in self.entries.items() if not isinstance(entry.symbol, MacroSymbol)]
