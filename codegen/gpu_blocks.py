"""Warps and stages of a program on a GPU: a table, measured once, that no search changes behind the user's back.

Tile sizes are the plan's (``compiler/blocks.py``); with them, four warps hold rows of 64 elements and eight warps longer ones without
spilling a register on sm_80 and sm_90, which ``tests/evidence/test_ahead_of_time.py`` reads from the binaries. gfx942 has twice the
registers with 4 warps, and spills with 8. In float32 NVIDIA's tensor cores are not used and operands take twice the space.
"""

from __future__ import annotations


def launch_options(widest: int, target: str) -> tuple[int, int]:
    """``num_warps`` and ``num_stages`` of a kernel whose widest row, padded, has ``widest`` elements.

    Two stages are enough to load a tile while the one before is multiplied; a third one costs shared memory that a second
    program on the same multiprocessor makes better use of.
    """
    warps = 8 if widest > 64 and target != "gfx942" else 4
    return warps, 2
