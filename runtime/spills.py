"""Other launch options for kernels that spill: what no table of tile sizes foresees for every spec, read from the binaries.

The registers of a kernel are known when NVIDIA's assembler has placed them, which needs no GPU. A kernel that spills with the warps and
stages of the table is compiled with others, and gets the first at which nothing is spilled; where all spill, those that spill the
fewest bytes. The numbers stand in the generated file, which the cache keeps: a kernel is fitted once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..codegen.gpu_blocks import AGAINST_SPILLS, register_limit

if TYPE_CHECKING:
    from ..codegen.source import Module, Specialization

WORTH_ONE_STAGE = 512
"""Bytes a thread. With one stage, what would be loaded ahead is not held; more than this was never cured by it."""


def launches_against_spills(module: Module, spec: Specialization, target: str) -> dict[str, tuple[int, int]]:
    """Warps and stages by kernel, for those that spill with the ones they have.

    Empty where nothing can be compiled: without Triton or NVIDIA's tools, in the interpreter, for other GPUs.
    """
    if not target.startswith("sm_"):
        return {}
    try:
        import triton
    except ImportError:
        return {}
    from .gpu_targets import TARGETS, has_tools, spilled_bytes
    from .triton_loader import import_generated

    if triton.knobs.runtime.interpret or not has_tools():
        return {}
    name = next(t for t in TARGETS if t == target)
    dtypes = dict(spec.dtypes)
    found: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        generated = import_generated(module, Path(folder))
        for entry in module.entries:
            function, options = getattr(generated, entry.name), getattr(generated, f"{entry.name}_options")
            least = spilled_bytes(function, entry, dtypes, options, name)
            for warps, stages in AGAINST_SPILLS:
                if not least or (stages == 1 and least > WORTH_ONE_STAGE):
                    break
                if warps < options["num_warps"] or (warps, stages) == (options["num_warps"], options["num_stages"]):
                    continue
                tried = {**options, "num_warps": warps, "num_stages": stages, "maxnreg": register_limit(warps)}
                spilled = spilled_bytes(function, entry, dtypes, tried, name)
                if spilled < least:
                    found[entry.name], least = (warps, stages), spilled
    return found
