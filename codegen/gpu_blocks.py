"""Warps and stages of a program on a GPU: a table, measured once. Where the binary of a kernel spills registers nevertheless, it is given
others (``runtime/spills.py``), which the generated file shows.

Tile sizes are the plan's (``compiler/blocks.py``); with them, four warps hold rows of 64 elements and eight warps longer ones without
spilling a register on sm_80 and sm_90, which ``tests/evidence/test_ahead_of_time.py`` reads from the binaries. gfx942 has twice the
registers with 4 warps, and spills with 8. In float32 NVIDIA's tensor cores are not used and operands take twice the space.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.fit import REGISTERS


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched: Triton's ``num_warps`` and ``num_stages``, and whether ``maxnreg`` says what a thread may have."""

    warps: int
    stages: int
    limited: bool = True


AGAINST_SPILLS = (
    (Launch(8, 2), 1 << 20),
    (Launch(16, 2), 64),
    (Launch(8, 1), 512),
    (Launch(8, 1, limited=False), 128),
)
"""What to try, in order, where a kernel spills with the options of the table, and the most bytes a thread may spill for it to be worth
compiling: beyond, it cured no kernel of the library. 16 warps leave 128 registers to a thread, 32 warps 64. One stage loads no tile
ahead, so it comes last. Without a limit the assembler makes other choices, which are seldom better."""


def register_limit(warps: int) -> int:
    """What a thread may have, so that all threads find some.

    Left to itself, NVIDIA's assembler spills a few to fit one more program on a multiprocessor.
    """
    return min(255, REGISTERS // (32 * warps))


def launch_options(widest: int, target: str) -> Launch:
    """The usual options of a kernel whose widest row, padded, has ``widest`` elements.

    Two stages are enough to load a tile while the one before is multiplied; a third one costs shared memory that a second
    program on the same multiprocessor makes better use of.
    """
    warps = 8 if widest > 64 and target != "gfx942" else 4
    return Launch(warps, 2, limited=target.startswith("sm_"))
