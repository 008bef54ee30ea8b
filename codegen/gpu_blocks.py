"""Sizes of tiles and of programs on a GPU: a table, measured once, that no search changes behind the user's back.

Measured with ``runtime/gpu_targets.py`` on causal softmax attention of one sweep, forward and backward (rows of the backward
keep two accumulators, dk and dv), with Triton 3.9: of the tiles that spill no register, those with the most work a program.
Registers a thread, for 16-bit inputs:

    head dim  kernel   rows x swept  warps  sm_80  sm_90    the next larger that spills
    64        forward  64 x 32       4      143    119      64 x 64, 4 warps: 24 bytes on sm_80
    64        dq       64 x 32       4      168     97
    64        dk, dv   32 x 32       4      246    250      64 x 32, 4 warps: 360 and 56 bytes
    128       forward  64 x 64       8      170    182
    128       dq       64 x 64       8      178    204
    128       dk, dv   32 x 32       8      255    231      64 x 32, 8 warps: 0 and 288 bytes
    256       dq       32 x 32       8      128    136      forward: 16 bytes on sm_80
    256       dk, dv   32 x 16       8      255      -      spills 40 bytes itself; 32 x 32: 160

gfx942 has twice the registers with 4 warps, and spills with 8: 32 x 32 takes up to 403 of 512 at a head dim of 128. In float32
NVIDIA's tensor cores are not used and operands take twice the space: 32 x 16 spills nothing up to a head dim of 128.
"""

from __future__ import annotations


def launch_options(widest: int, target: str) -> tuple[int, int]:
    """``num_warps`` and ``num_stages`` of a kernel whose widest whole axis, padded, is ``widest``.

    Two stages are enough to load a tile while the one before is multiplied; a third one costs shared memory that a second
    program on the same multiprocessor makes better use of.
    """
    warps = 8 if widest > 64 and target != "gfx942" else 4
    return warps, 2
