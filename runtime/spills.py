"""Other launch options and tiles for kernels that spill: what no table foresees for every spec, read from the binaries.

The registers of a kernel are known when NVIDIA's assembler has placed them, which needs no GPU. A kernel that spills with the warps and
stages of the table is compiled with others, and gets the first at which nothing is spilled. Where all spill, finer tiles are tried, then
a kernel for each half of what it writes, and the same for a half that spills; where these spill as well, it stays as it was, with the
options that spill the fewest bytes.
The numbers stand in the generated file, which the cache keeps: a kernel is fitted once.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..codegen.gpu_blocks import AGAINST_SPILLS, Launch, register_limit
from ..compiler.plan import USUAL, Refinement

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ..codegen.source import Module, Specialization
    from ..compiler.plan import Plan

WORTH_FINER_TILES = 1536
"""Bytes a thread: what spills more has large values besides its tiles, and would be compiled many times for nothing."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """``launches`` of the kernels that spill with the options of the table, and the bytes of those that spill with all."""

    launches: dict[str, Launch] = field(default_factory=dict)
    spilling: dict[str, int] = field(default_factory=dict)


def print_fitted(plan: Plan, spec: Specialization, text: str, target: str) -> Module:
    """A plan as a Triton module whose kernels spill nothing, as far as launch options and tiles can help it."""
    from ..codegen.print_triton import print_triton

    module = print_triton(plan, spec, text, target)
    fitted = fit_launches(module, spec, target)
    launches, made, refinement = dict(fitted.launches), plan, USUAL

    def fit(tried: Refinement) -> tuple[Plan, Fitted] | None:
        assert plan.refined is not None
        after = plan.refined(tried)
        changed = _changed(made, after)
        return (after, fit_launches(print_triton(after, spec, text, target), spec, target, changed)) if changed else None

    pending = list(fitted.spilling.items()) if plan.refined is not None else []
    for name, spilled in pending:  # the halves of a kernel that spill join it
        found = _refit(name, spilled, refinement, fit) if spilled <= WORTH_FINER_TILES else None
        if found is not None:
            refinement, made, again = found
            launches.pop(name, None)
            launches.update(again.launches)
            pending += again.spilling.items()
    return print_triton(made, spec, text, target, launches) if launches or made is not plan else module


def _refit(
    name: str, spilled: int, given: Refinement, fit: Callable[[Refinement], tuple[Plan, Fitted] | None]
) -> tuple[Refinement, Plan, Fitted] | None:
    """The first way to make a kernel otherwise with which nothing is spilled: finer tiles, as long as they help, or a kernel for each half
    of its results, which need only spill less."""
    for step in itertools.count(1):
        tried = replace(given, finer=(*given.finer, (name, step)))
        made = fit(tried)
        if made is None:
            break
        left = sum(made[1].spilling.values())
        if not left:
            return tried, *made
        if left >= spilled:
            break
        spilled = left
    halves = replace(given, apart=given.apart | {name})
    made = fit(halves)
    return None if made is None or sum(made[1].spilling.values()) >= spilled else (halves, *made)


def _changed(before: Plan, after: Plan) -> set[str]:
    """The kernels of a plan that another one has not, or with other tiles."""
    tiles = {k.name: k.tiled for k in before.kernels}
    return {k.name for k in after.kernels if tiles.get(k.name) != k.tiled}


def fit_launches(module: Module, spec: Specialization, target: str, only: Collection[str] | None = None) -> Fitted:
    """Warps and stages for the kernels of a module that spill with the ones they have; ``only`` for those named, where it is given.

    Nothing where nothing can be compiled: without Triton or NVIDIA's tools, in the interpreter, for other GPUs.
    """
    fitted = Fitted()
    if not target.startswith("sm_"):
        return fitted
    try:
        import triton
    except ImportError:
        return fitted
    from .gpu_targets import TARGETS, has_tools, spilled_bytes
    from .triton_loader import import_generated

    if triton.knobs.runtime.interpret or not has_tools():
        return fitted
    architecture = next(t for t in TARGETS if t == target)
    dtypes = dict(spec.dtypes)
    with tempfile.TemporaryDirectory() as folder:
        generated = import_generated(module, Path(folder))
        for entry in module.entries:
            if only is not None and entry.name not in only:
                continue
            function, options = getattr(generated, entry.name), getattr(generated, f"{entry.name}_options")
            least = spilled_bytes(function, entry, dtypes, options, architecture)
            usual = Launch(options["num_warps"], options["num_stages"])
            for launch, most in AGAINST_SPILLS:
                if not least or least > most or launch.warps < usual.warps or launch == usual:
                    continue
                tried = {**options, "num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": register_limit(launch.warps)}
                if not launch.limited:
                    del tried["maxnreg"]
                spilled = spilled_bytes(function, entry, dtypes, tried, architecture)
                if spilled < least:
                    fitted.launches[entry.name], least = launch, spilled
            if least:
                fitted.spilling[entry.name] = least
    return fitted
