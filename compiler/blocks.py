"""Tile sizes by target: a table of what was measured, never tuned behind the user's back.

CPU: a tile of 64 x 64 scores and its operands stay in the second-level cache; 64 x 128 was slightly slower. GPU: the largest tiles at which
kernels with one carried tile, and with two, spill no registers on sm_80 and sm_90, masks and grouped heads included.
"""

from __future__ import annotations


def blocks_for(target: str, widest: int, element_bytes: int, accumulators: int) -> tuple[int, int]:
    """(rows, swept) tile sizes of a kernel.

    ``widest`` is the largest extent that a tile keeps whole, ``element_bytes`` those of the floating inputs, ``accumulators`` the
    number of tiles of rows times a whole axis that a sweep carries: 1 for attention's forward and dq, 2 for dk with dv.
    """
    if target == "c":
        return (64, 64)
    several = accumulators > 1
    if element_bytes > 2:
        return (32, 32) if widest <= 64 and not several else (32, 16) if widest <= 128 else (16, 16)
    if widest <= 64:
        return (32, 32) if several else (64, 32)
    if widest <= 128:
        return (32, 32) if several or target == "gfx942" else (64, 64)
    return (32, 16) if several else (32, 32)
