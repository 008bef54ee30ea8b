"""Tile sizes by target: measured once, a table, never tuned behind the user's back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .structure import Structure


def blocks_for(target: str, structure: Structure, extents: dict[str, int], element_bytes: int) -> tuple[int, int]:
    """(rows, swept) tile sizes."""
    widest = max((extents.get(a, 64) for a in structure.whole), default=64)
    if target == "c":
        return (64, 64)
    if widest > 128 or element_bytes == 4:
        return (32, 32)
    return (64, 64)
