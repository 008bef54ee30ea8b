"""Statements of a plan taken apart into pieces that one loop nest can hold, and their arrangement into nests.

A piece does one thing at every point of its ``space`` (axes of the tile, in tile order). Pieces between two matrix products
are fused: they share the loop over their outermost axis as long as none needs the whole of a fold that the loop is making.

    scores = raw * scale      (i, j)             for i:
    next   = max over j       (i, j) -> (i)          for j: scores, next
    p      = exp(scores - m)  (i, j)      -->    for i: move the maximum
                                                 for i:
                                                     for j: p
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..compiler import ir
from ..compiler.plan import Load, Local

Space = tuple[str, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Define:
    """A pointwise value. ``becomes``: the carried value that it is the next value of, and whose place it takes."""

    space: Space
    node: ir.Node
    reads: tuple[ir.Node, ...]
    becomes: Local | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Gather:
    """One element from memory."""

    space: Space
    load: Load
    reads: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Folded:
    """``target`` <- fold of the product of ``factors`` over ``folded`` (``set``), or that joined to what it holds (``join``),
    after multiplying it by ``rescale``. ``best`` holds the value that an argmax has found."""

    space: Space
    target: ir.Node
    op: str
    factors: tuple[ir.Node, ...]
    folded: Space
    mode: Literal["set", "join"]
    rescale: ir.Node | None
    best: Local | None
    index: str | None
    reads: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Fill:
    """Set a carried value to the start of ``op``."""

    space: Space
    local: ir.Node
    op: str
    reads: tuple[ir.Node, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Scale:
    """Multiply a carried value by a factor."""

    space: Space
    local: ir.Node
    factor: ir.Node
    reads: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Move:
    """``local`` becomes the larger of itself and ``candidate``; ``rescale`` is exp(old - new)."""

    space: Space
    local: Local
    candidate: Local
    rescale: Local
    reads: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Write:
    """One element to memory."""

    space: Space
    buffer: str
    node: ir.Node
    checked: tuple[str, ...]
    reads: tuple[ir.Node, ...]
    at: tuple[tuple[str, ir.Node], ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Spread:
    """``local[at] += x`` along ``axis``."""

    space: Space
    local: Local
    axis: str
    at: ir.Node
    x: ir.Node
    reads: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """A carried value takes the value of ``node``."""

    space: Space
    local: Local
    node: ir.Node
    reads: tuple[ir.Node, ...]


Piece = Define | Gather | Folded | Fill | Scale | Move | Write | Spread | Copy


@dataclass(eq=False, slots=True)
class Nest:
    """A loop over ``axis`` around pieces and inner loops."""

    axis: str
    items: list[Piece | Nest] = field(default_factory=list)

    @property
    def innermost(self) -> bool:
        return not any(isinstance(item, Nest) for item in self.items)


def writes(piece: Piece) -> tuple[ir.Node, ...]:
    """The values that a piece sets or changes."""
    match piece:
        case Define(node=node, becomes=becomes):
            return (node,) if becomes is None else (node, becomes)
        case Gather(load=load):
            return (load.node,)
        case Folded(target=target, best=best):
            return (target,) if best is None else (target, best)
        case Fill(local=local) | Scale(local=local) | Spread(local=local) | Copy(local=local):
            return (local,)
        case Move(local=local, rescale=rescale):
            return (local, rescale)
        case Write():
            return ()


def all_reads(piece: Piece) -> tuple[ir.Node, ...]:
    """What a piece needs, with the old value of what it changes."""
    match piece:
        case Folded(target=target, mode="join") | Scale(local=target) | Spread(local=target):
            return (*piece.reads, target)
        case Move(local=local, candidate=candidate):
            return (*piece.reads, local, candidate)
        case _:
            return piece.reads


def ends_with_loop(piece: Piece, axis: str) -> bool:
    """Whether the result of a piece is known only when the loop over ``axis`` has ended."""
    match piece:
        case Folded(folded=folded):
            return axis in folded
        case Spread():
            return True
        case _:
            return False


def arrange(pieces: list[Piece], fixed: Space = ()) -> list[Piece | Nest]:
    """The pieces as loop nests. Order changes only where no value notices; short loops go as early as they can, out of the way."""
    groups: list[tuple[tuple[str, bool, bool] | None, list[Piece]]] = []
    place: dict[Piece, int] = {}
    for position, piece in enumerate(pieces):
        rest = [axis for axis in piece.space if axis not in fixed]
        alone = isinstance(piece, Spread) and len(rest) == 1  # it would keep what is beside it from being vectors
        key = (rest[0], len(rest) > 1, alone) if rest else None
        earliest = 0
        for other in pieces[:position]:
            if _depends(piece, other):
                at = place[other]
                shared = groups[at][0] == key and (key is None or not ends_with_loop(other, key[0]))
                earliest = max(earliest, at if shared else at + 1)
        found = next((n for n in range(earliest, len(groups)) if groups[n][0] == key), None)
        if found is not None and not _is_long(key) and any(_is_long(k) for k, _ in groups[earliest:found]):
            found = None  # what comes later might belong into that nest, and wait for this loop
        if found is None:
            found = len(groups) if _is_long(key) else earliest
            groups.insert(found, (key, []))
            place.update({p: n + 1 for p, n in place.items() if n >= found})
        groups[found][1].append(piece)
        place[piece] = found
    items: list[Piece | Nest] = []
    for key, members in groups:
        if key is None:
            items.extend(members)
        else:
            items.append(Nest(key[0], arrange(members, (*fixed, key[0]))))
    return items


def _is_long(key: tuple[str, bool, bool] | None) -> bool:
    """Whether a group of pieces is a nest of several loops."""
    return key is not None and key[1]


def _depends(piece: Piece, other: Piece) -> bool:
    """Whether ``piece`` must stay behind ``other``, which comes before it."""
    written, now = writes(other), writes(piece)
    return any(n in written for n in all_reads(piece)) or any(n in written or n in all_reads(other) for n in now)


def inside(items: list[Piece | Nest]) -> list[Piece]:
    """Every piece of the nests, in order."""
    return [p for item in items for p in (inside(item.items) if isinstance(item, Nest) else [item])]


def innermost(nest: Nest) -> list[Nest]:
    """The loops of a nest that hold no other."""
    if nest.innermost:
        return [nest]
    return [found for item in nest.items if isinstance(item, Nest) for found in innermost(item)]
