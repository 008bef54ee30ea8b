"""What selections chose, for those who compare two evaluations: a tie that rounding breaks otherwise is no error of either.

Inside of ``watching`` every selection of the thread, of the reference or of a kernel, is noted; those that are ``given`` are taken in
place of what the scores say. Outside of it nothing is kept.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import ir

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """One selection: true on what was chosen. The dimensions of all tensors are the axes of the node.

    ``usual`` is what the scores say, where it was given: of those that are true in ``where``, if there is one.
    """

    node: ir.Select
    data: Tensor
    usual: Tensor | None = None
    scores: Tensor | None = None
    where: Tensor | None = None


@dataclass(slots=True)
class Choices:
    """The selections seen so far, and those to take."""

    given: Mapping[ir.Node, Tensor]
    seen: list[Chosen] = field(default_factory=list)


_current: ContextVar[Choices | None] = ContextVar("choices", default=None)


@contextmanager
def watching(given: Mapping[ir.Node, Tensor] | None = None) -> Iterator[Choices]:
    """Notes selections; ``given`` maps selections of a graph to what they are to choose, with sorted axes."""
    choices = Choices(given or {})
    token = _current.set(choices)
    try:
        yield choices
    finally:
        _current.reset(token)


def current() -> Choices | None:
    """Where selections are noted, if they are."""
    return _current.get()


def note(over: tuple[str, ...], axes: tuple[str, ...], chosen: Tensor) -> None:
    """Shows what a kernel chose to those who watch. ``axes`` are those of the tensor's dimensions."""
    choices = _current.get()
    if choices is not None:
        node = ir.make(ir.Select, axes, "bool", over, ir.const(0.0), ir.const(0), None)
        assert isinstance(node, ir.Select)
        choices.seen.append(Chosen(node, chosen.detach().permute([axes.index(a) for a in node.axes]).clone()))
