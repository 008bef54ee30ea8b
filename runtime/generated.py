"""What the compiler makes of a kernel, to look at (plans, sources) or to have ready before the first call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from . import errors
from .arguments import TORCH_DTYPES, Bound, Number
from .backends import INTERPRETED
from .build import ProgramRecord, source_file
from .problem import Usual, pose
from .variants import Unfused, Variant, variant_for

if TYPE_CHECKING:
    from ..compiler.pipeline import Lowered
    from ..compiler.plan import Plan
    from .kernel import Kernel

TARGETS = ("c", "sm_80", "sm_90", "sm_100", "gfx942")
Direction = Literal["forward", "backward"]


def lowered(kernel: Kernel, target: str, dtype: torch.dtype, extents: Mapping[str, int], params: Mapping[str, Number]) -> Lowered:
    """What the compiler makes of a kernel for a target; also where that is nothing but reasons."""
    from ..compiler.pipeline import Hints, Target, lower

    if target not in TARGETS:
        raise errors.UnknownTarget(target, TARGETS)
    bound = usual_call(kernel, dtype, extents, params)
    compiled_in = tuple((name, value) for name, value in bound.params.items() if isinstance(value, int))
    return lower(kernel.graph, Target(target), Hints(compiled_in, tuple(bound.extents.items()), dtype.itemsize))


def plan(
    kernel: Kernel,
    direction: Direction,
    backend: str | None,
    target: str | None,
    dtype: torch.dtype,
    extents: Mapping[str, int],
    params: Mapping[str, Number],
) -> Plan:
    """The forward plan, or the one of all gradients. Raises ``NotFused``."""
    made = lowered(kernel, target_of(kernel, backend, target), dtype, extents, params)
    if made.forward is None:
        raise errors.NotFused(kernel.name, made.reasons)
    return made.forward if direction == "forward" else made.backward(frozenset(made.differentiable))


def source(
    kernel: Kernel,
    part: Direction,
    backend: str | None,
    target: str | None,
    dtype: torch.dtype,
    extents: Mapping[str, int],
    params: Mapping[str, Number],
) -> str:
    """The text of a generated module. Raises ``NotFused``."""
    return record_of(usual_variant(kernel, target_of(kernel, backend, target), dtype, extents, params), part).text


def build(
    kernel: Kernel,
    target: str = "c",
    *,
    dtype: torch.dtype = torch.float32,
    extents: Mapping[str, int] | None = None,
    params: Mapping[str, Number] | None = None,
) -> dict[str, Path]:
    """Builds a kernel ahead of its first call, for inputs of ``dtype``: forward and the gradients of all inputs.

    ``extents`` of axes that are compiled in (head dims), or that are at most 16 at the call, and int ``params`` must be those
    of the call. Returns the generated file of each direction; a binary for the CPU lies beside it. GPU binaries are compiled by
    Triton for the device at hand, and by ``weft build`` for others. Raises ``NotFused`` and ``UnknownTarget``.
    """
    variant = usual_variant(kernel, target_of(kernel, None, target), dtype, extents or {}, params or {})
    return {part: source_file(record_of(variant, part)) for part in directions(variant)}


def usual_variant(kernel: Kernel, target: str, dtype: torch.dtype, extents: Mapping[str, int], params: Mapping[str, Number]) -> Variant:
    """The variant for inputs of one floating dtype at usual extents. Raises ``NotFused``."""
    dtypes = {t.name: dtype if t.dtype is None else TORCH_DTYPES[t.dtype] for t in kernel.typed.inputs}
    found = variant_for(kernel, target, usual_call(kernel, dtype, extents, params), dtypes)
    if isinstance(found, Unfused):
        raise errors.NotFused(kernel.name, found.reasons)
    return found


def usual_call(kernel: Kernel, dtype: torch.dtype, extents: Mapping[str, int], params: Mapping[str, Number]) -> Bound:
    """A call at these extents and params, the rest as usual."""
    problem = pose(kernel.graph, extents, params, Usual())
    return Bound(problem.extents, problem.params, dtype, torch.device("cpu"))


def target_of(kernel: Kernel, backend: str | None, target: str | None) -> str:
    """The target that is meant: the one named, or a backend's usual one."""
    if target is not None:
        if target not in TARGETS:
            raise errors.UnknownTarget(target, TARGETS)
        return target
    match backend:
        case None | "c":
            return "c"
        case "triton":
            return INTERPRETED
        case _:
            raise errors.UnknownBackend(kernel.name, backend)


def directions(variant: Variant) -> tuple[Direction, ...]:
    return ("forward", "backward") if variant.record.differentiable else ("forward",)


def record_of(variant: Variant, part: Direction) -> ProgramRecord:
    if part == "forward":
        return variant.record.forward
    return variant.backward_program(frozenset(variant.record.differentiable)).record
