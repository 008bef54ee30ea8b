"""Sizes of tiles and of programs on a GPU: a small table instead of a search.
"""

from __future__ import annotations

from collections.abc import Mapping


def default_blocks(whole_extents: Mapping[str, int], element_bytes: int, accumulators: int, target: str) -> tuple[int, int]:
    widest = max([16, *whole_extents.values()])
    return (64, 64) if widest <= 128 else (32, 32)


def launch_options(rows: int, swept: int, widest: int, element_bytes: int, accumulators: int) -> tuple[int, int]:
    """``num_warps`` and ``num_stages``."""
    return 4, 2
