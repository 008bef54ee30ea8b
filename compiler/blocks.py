"""Tile sizes by target: a table of what was measured, never tuned behind the user's back.

CPU: a tile of 64 x 64 scores and its operands stay in the second-level cache; 64 x 128 was slightly slower. GPU: the largest tiles whose
column kernel (two accumulators) spills no registers on sm_80 and sm_90 with masks and grouped heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .structure import Structure


def blocks_for(target: str, structure: Structure, extents: dict[str, int], element_bytes: int) -> tuple[int, int]:
    """(rows, swept) tile sizes."""
    if target == "c":
        return (64, 64)
    widest = max((extents.get(a, 64) for a in structure.whole), default=64)
    if widest > 128 or element_bytes > 2:
        return (32, 32)
    return (64, 32)
