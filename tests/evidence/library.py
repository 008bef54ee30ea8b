"""The shipped kernels, and which of them must be fused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import weft
from weft.runtime.kernel import Kernel

SPECS = Path(__file__).parents[2] / "specs"

REQUIRED = tuple(
    "softmax_attention full alibi softcap sliding_window dilated_window global_window prefix_lm kitchen_sink sigmoid_attention "
    "gelu_attention relu2_attention qk_norm rope mla mla_full differential shaped fastgen natten1d natten2d natten3d sta2d hierarchical "
    "spacetime deberta graphormer t5_bias tree in_context_blocks maxsim based retention".split()
)
"""Fused whole, in both directions."""

OTHERS = tuple(p.stem for p in sorted(SPECS.glob("*.weft")) if p.stem not in REQUIRED)


@cache
def kernel(name: str) -> Kernel:
    """The main kernel of a shipped spec."""
    found = getattr(weft.load(SPECS / f"{name}.weft"), name)
    assert isinstance(found, Kernel)
    return found
