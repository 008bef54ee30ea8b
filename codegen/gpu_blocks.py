"""Warps and stages of a program on a GPU: a table, measured once. Where the binary of a kernel spills registers nevertheless, it is given
others (``runtime/spills.py``), which the generated file shows.

Tile sizes are the plan's (``compiler/blocks.py``); with them, four warps hold rows of 64 elements and eight warps longer ones without
spilling a register on sm_80 and sm_90, which ``tests/evidence/test_ahead_of_time.py`` reads from the binaries. gfx942 has twice the
registers with 4 warps, and spills with 8. In float32 NVIDIA's tensor cores are not used and operands take twice the space.
"""

from __future__ import annotations

from ..compiler.fit import REGISTERS

AGAINST_SPILLS = ((8, 2), (16, 2), (4, 1), (8, 1))
"""Warps and stages to try, in order, where a kernel spills with those of the table. One stage loads no tile ahead, so it comes last; 32
warps leave 64 registers to a thread and help no kernel."""


def register_limit(warps: int) -> int:
    """What a thread may have, so that all threads find some.

    Left to itself, NVIDIA's assembler spills a few to fit one more program on a multiprocessor.
    """
    return min(255, REGISTERS // (32 * warps))


def launch_options(widest: int, target: str) -> tuple[int, int]:
    """``num_warps`` and ``num_stages`` of a kernel whose widest row, padded, has ``widest`` elements.

    Two stages are enough to load a tile while the one before is multiplied; a third one costs shared memory that a second
    program on the same multiprocessor makes better use of.
    """
    warps = 8 if widest > 64 and target != "gfx942" else 4
    return warps, 2
