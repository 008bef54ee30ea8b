"""Tile sizes by target: a table of what was measured, never tuned behind the user's back.

CPU: a tile of 64 x 64 scores and its operands stay in the second-level cache; 64 x 128 was slightly slower. GPU: the largest tiles at
which the shipped kernels spill no registers on sm_80 and sm_90 at head dims of 64 and 128, masks and grouped heads included
(``tests/evidence/test_ahead_of_time.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

SMALL = 16
"""An axis of no more than this many indices, the query of a decoding step or the frames of a video, has tiles of this size on a CPU; rows
of a product are then no work for several programs, on any target."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a kernel holds for every row of its tiles, in elements.

    ``widest``: the longest row of one value. ``accumulated``: rows of all carried sums together. ``operands``: rows of all tensors
    that enter the sweeps, of rows and of swept axis alike. ``stepped``: axes that loops take one index at a time, each with
    addresses of its own. ``split``: a row has several axes (the halves of a rotation), and is reshaped for a matrix product.
    """

    widest: int
    accumulated: int
    operands: int
    stepped: int = 0
    split: bool = False

    def load(self, element_bytes: int) -> float:
        """Registers that a row needs, in units of the row that four or eight warps are chosen for: 2.5 for attention's forward, 3 for dq,
        4 for dk with dv, in 16 bits."""
        unit = 64 if self.widest <= 64 else 128 if self.widest <= 128 else 256
        return (self.accumulated + self.operands * element_bytes / 4) / unit + self.stepped / 4 + self.split


def blocks_for(target: str, demand: Demand, element_bytes: int) -> tuple[int, int]:
    """(rows, swept) tile sizes of a kernel; ``element_bytes`` are those of the floating inputs."""
    if target == "c":
        return (64, 64)
    several = demand.accumulated > demand.widest
    if element_bytes > 2:
        return (32, 32) if demand.widest <= 64 and not several else (32, 16) if demand.widest <= 128 else (16, 16)
    load = demand.load(element_bytes)
    if demand.widest <= 64:
        return (64, 32) if load <= 3.25 else (32, 32) if load <= 4.25 else (32, 16)
    if demand.widest <= 128:
        return (64, 32) if load <= 3.25 else (32, 32) if load <= 4.25 else (32, 16) if load <= 5.5 else (16, 16)
    return (32, 32) if load <= 3.25 else (32, 16) if load <= 4.25 else (16, 16)


def block_of(target: str, block: int, extent: int | None) -> int:
    """The tile size along an axis of this extent, if it is known."""
    return SMALL if target == "c" and extent is not None and extent <= SMALL else block
