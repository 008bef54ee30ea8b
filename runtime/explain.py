"""What a kernel comes to on a target, for people: its class, sweeps, saved tensors, bytes and FLOPs, and what runs outside it.

For a GPU, which need not be there, the kernels are compiled and their registers, spills, shared memory and tensor-core
instructions are read from the binary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .costs import Cost, KernelCost, buffer_bytes, plan_cost, totals
from .problem import Problem

if TYPE_CHECKING:
    from ..compiler.pipeline import Lowered
    from ..compiler.plan import Plan
    from .dual import DualKernel
    from .kernel import Kernel


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that the forward keeps for the backward. ``output``: it is an output as well and costs nothing extra."""

    name: str
    axes: tuple[str, ...]
    bytes: int
    output: bool


@dataclass(frozen=True, slots=True)
class Direction:
    """One plan. ``moved`` is what has to cross memory at least once: inputs, saved tensors and outputs, each once."""

    name: str
    kernels: tuple[KernelCost, ...]
    moved: int
    temporary: int

    @property
    def total(self) -> Cost:
        return totals(self.kernels)

    @property
    def intensity(self) -> float:
        """FLOPs per byte that has to be moved."""
        return self.total.flops / self.moved if self.moved else 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    kernel: str
    target: str
    dtype: str
    problem: str
    kind: str
    forward: Direction | None
    backward: Direction | None
    saved: tuple[Saved, ...]
    outside: tuple[str, ...]
    reasons: tuple[str, ...]
    gpu: tuple[dict[str, Any], ...] = ()
    gpu_note: str = ""
    states: tuple[str, ...] = ()
    """The class of every state, and why."""
    dual: str = ""
    """Whether long calls run as a recurrence, and from which length."""
    chunks: str = ""
    """Whether the steps of a recurrence go in chunks on a GPU, and of which length."""

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        for name in ("forward", "backward"):
            direction: Direction | None = getattr(self, name)
            if direction is not None:
                data[name] |= {"flops": direction.total.flops, "intensity": direction.intensity}
        return data

    def __str__(self) -> str:
        return "\n".join(_lines(self)) + "\n"


def explain(kernel: Kernel, problem: Problem, target: str = "c", dtype: str = "float32") -> Explanation:
    """Plans a kernel for a target at the extents of ``problem`` and counts: as a recurrence, where that is what would run."""
    from .dual import DualKernel

    if not kernel.states:
        dual = DualKernel.of(kernel)
        if isinstance(dual, DualKernel):
            return _explain_dual(kernel, dual, problem, target, dtype)
        return _explain(kernel, problem, target, dtype)
    return _explain_steps(kernel, problem, target, dtype)


def _explain_steps(kernel: Kernel, problem: Problem, target: str, dtype: str) -> Explanation:
    """A recurrence: in chunks on GPUs, where that is fused whole."""
    if target == "c":
        return _explain(kernel, problem, target, dtype)
    from .chunked import FEWEST, chunks_of, posed_in_chunks

    made = chunks_of(kernel)
    if isinstance(made, str):
        return replace(_explain(kernel, problem, target, dtype), chunks=f"none, every step by itself: {made}")
    blocks = f", in blocks of {made.length // made.blocks}" if made.blocks > 1 else ""
    length = f"of {made.length} steps along {made.chunks.time}{blocks}, from {FEWEST * made.length} steps on"
    text = f"{length}; what is left over goes step by step"
    posed = posed_in_chunks(kernel, problem)
    if posed is None:
        return replace(_explain(kernel, problem, target, dtype), chunks=text)
    found = _explain(*posed, target, dtype)
    if found.forward is None or found.reasons:
        return replace(_explain(kernel, problem, target, dtype), chunks=f"none, every step by itself: {found.reasons[-1]}")
    return replace(found, chunks=text)


def _explain_dual(kernel: Kernel, dual: DualKernel, problem: Problem, target: str, dtype: str) -> Explanation:
    from .dual import posed_as_dual

    query, key = dual.dual.query, dual.dual.key
    length = dual.crossover(problem.extents) if target == "c" else dual.gpu_crossover(problem.extents)
    text = f"its sums over {key} separate: from {length} on and with as many keys as queries, a recurrence along {query}"
    posed: tuple[Kernel, Problem] | None = posed_as_dual(kernel, problem) if problem.extents[query] >= length else None
    if target != "c":
        from .chunked import ChunkedKernel, posed_in_chunks

        made = ChunkedKernel.of(dual)
        if isinstance(made, str):
            return replace(_explain(kernel, problem, target, dtype), dual=f"its sums over {key} separate, but not in chunks: {made}")
        text += f" in chunks of {made.length}"
        posed = posed_in_chunks(*posed) if posed is not None else None
    return replace(_explain(*(posed or (kernel, problem)), target, dtype), dual=text)


def _explain(kernel: Kernel, problem: Problem, target: str, dtype: str) -> Explanation:
    lowered = kernel.lowered(target, dtype=getattr(torch, dtype), extents=problem.extents, params=problem.params)
    head = (kernel.name, target, dtype, str(problem))
    outside = tuple(lowered.outside)
    if lowered.forward is None:
        return Explanation(*head, "reference: nothing is fused", None, None, (), outside, tuple(lowered.reasons))
    backward = lowered.backward(frozenset(lowered.differentiable)) if lowered.differentiable else None
    forward = _direction("forward", lowered.forward, problem, dtype)
    return Explanation(
        *head,
        _routed(lowered) or _kind(forward),
        forward,
        _direction("backward", backward, problem, dtype) if backward is not None else None,
        _saved(lowered, problem, dtype),
        outside,
        tuple(lowered.reasons),
        *_resources(kernel, target, dtype, problem),
        _states(lowered),
    )


def _routed(lowered: Lowered) -> str:
    """The class of a kernel with routings; empty where there are none."""
    pairs = [f"{', '.join(r.route.tokens)} and {', '.join(r.route.experts)}" for r in lowered.routings]
    return f"routed: chosen pairs of {'; of '.join(pairs)}, in products of tiles" if pairs else ""


def _states(lowered: Lowered) -> tuple[str, ...]:
    from ..compiler import ir
    from ..compiler.classify import classify

    assert lowered.fused is not None
    found = [n for n in ir.topological(lowered.fused.outputs.values()) if isinstance(n, ir.Recurrence)]
    return tuple(str(c) for n in found for c in classify(n.body))


def _direction(name: str, plan: Plan, problem: Problem, dtype: str) -> Direction:
    sizes = {b: (buffer.role, buffer_bytes(plan, b, problem.extents, dtype)) for b, buffer in plan.buffers.items()}
    temporary = sum(size for role, size in sizes.values() if role == "temporary")
    moved = sum(size for role, size in sizes.values() if role != "temporary")
    return Direction(name, tuple(plan_cost(plan, problem.extents, problem.params, dtype)), moved, temporary)


def _kind(forward: Direction) -> str:
    """The class of a kernel in words: what a program keeps and what it sweeps over."""
    swept: dict[str, int] = {}
    for k in forward.kernels:
        swept |= {axis: max(count, swept.get(axis, 0)) for axis, count in k.sweeps.items()}
    steps = [k.note for k in forward.kernels if k.note.startswith("steps of ")]
    if steps:
        return f"recurrence: {'; '.join(steps)}, one after the other"
    if not swept:
        return f"rows, no sweep: {forward.kernels[0].note}" if forward.kernels else "rows"
    count = max(swept.values())
    return f"rows, {'one sweep' if count == 1 else f'{count} sweeps'} over {', '.join(swept)}"


def _saved(lowered: Lowered, problem: Problem, dtype: str) -> tuple[Saved, ...]:
    assert lowered.forward is not None
    outputs = {t.name for t in lowered.graph.kernel.outputs}
    buffers = lowered.forward.buffers
    return tuple(
        Saved(name, buffers[name].axes, buffer_bytes(lowered.forward, name, problem.extents, dtype), name in outputs)
        for name in lowered.saved
        if name in buffers
    )


def _resources(kernel: Kernel, target: str, dtype: str, problem: Problem) -> tuple[tuple[dict[str, Any], ...], str]:
    """What the GPU kernels need, each as a row of a table; and a note where that cannot be told."""
    if target == "c":
        return (), ""
    from .ahead import compiled_for_gpu

    try:
        return tuple(asdict(row) for row in compiled_for_gpu(kernel, target, dtype, problem)), ""
    except ImportError:
        return (), "registers and shared memory are not known: Triton is not installed"


# As text ----------------------------------------------------------------------------------------------------------


def _lines(found: Explanation) -> Iterable[str]:
    yield f"{found.kernel} for {found.target}, {found.dtype}: {found.problem}"
    yield f"class     {found.kind}"
    if found.dual:
        yield f"dual      {found.dual}"
    if found.chunks:
        yield f"chunks    {found.chunks}"
    yield from (f"state     {text}" for text in found.states)
    for direction in (found.forward, found.backward):
        if direction is not None:
            yield from _direction_lines(direction)
    if found.saved:
        yield "saved     " + "; ".join(f"{s.name}[{','.join(s.axes)}] {_bytes(s.bytes)}{' (an output)' * s.output}" for s in found.saved)
    elif found.forward is not None:
        yield "saved     nothing but the inputs"
    if found.outside:
        yield f"outside   {', '.join(found.outside)}: run as PyTorch before the fused part"
    yield from (f"because   {reason}" for reason in found.reasons)
    if found.forward is not None and not found.reasons:
        yield "outside   nothing"
    yield from _gpu_lines(found)


def _direction_lines(d: Direction) -> Iterable[str]:
    total = d.total
    share = f"{total.products / max(1, total.flops):.0%} in matrix products"
    kernels = f"{len(d.kernels)} kernel{'s' * (len(d.kernels) != 1)}"
    yield f"{d.name:<9} {kernels}, {_count(total.flops)}FLOP ({share}), {_bytes(d.moved)} moved at least, {d.intensity:.0f} FLOP/byte"
    if d.temporary:
        yield f"          {_bytes(d.temporary)} of temporaries"
    for k in d.kernels:
        tile = " x ".join(f"{n} {a}" for a, n in k.tile.items()) or "no tiles"
        data = ", bounds follow from data (counted in full)" if k.data_dependent else ""
        traffic = f"{_bytes(k.cost.loaded)} loaded, {_bytes(k.cost.stored)} stored"
        yield f"          {k.name}: {k.programs} programs of {tile}; {k.note}; {_count(k.cost.flops)}FLOP, {traffic}{data}"


def _gpu_lines(found: Explanation) -> Iterable[str]:
    if found.gpu:
        keys = list(dict.fromkeys(key for row in found.gpu for key in row))
        yield from _columns([keys, *([_cell(row.get(key)) for key in keys] for row in found.gpu)])
    if found.gpu_note:
        yield found.gpu_note


def _columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _bytes(count: int) -> str:
    return f"{_count(count, 1024)}B"


def _count(count: float, step: int = 1000) -> str:
    """A number with a prefix: 1.5 M, 3.2 Gi."""
    for prefix in ("", "K", "M", "G"):
        if abs(count) < step:
            return f"{count:.3g} {prefix}" + ("i" if step == 1024 and prefix else "")
        count /= step
    return f"{count:.3g} T" + ("i" if step == 1024 else "")
