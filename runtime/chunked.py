"""Calls of recurrences on GPUs: the kernel in chunks of steps, which are matrix products.

What is left over at the end of a sequence goes step by step, from the states that the last chunk leaves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..compiler import ir
from ..compiler.chunks import Chunks, Unchunkable, find_chunks, in_blocks
from .arguments import Bound, Call
from .derived import DerivedKernel
from .flat import FlatKernel, flattened, has_steps_within, posed_flat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from .kernel import Kernel
    from .problem import Problem

LENGTH, BLOCK = 64, 16
"""Steps of a chunk: a tile of tensor cores' products. Where a decay varies along summed features, a pair of steps has a product of its own
for every one of them, and such pairs must be few: only those of a block, or of a chunk as short as a block, are of this kind."""
FEWEST = 2
"""Chunks that are worth it: below, the steps of a chunk by themselves are as many."""


class ChunkedKernel(DerivedKernel):
    """``base`` in chunks, for calls with a whole number of them."""

    refusal = Unchunkable

    length: int
    blocks: int
    """Blocks of steps in a chunk."""
    chunks: Chunks

    def derive(self, base: Kernel) -> tuple[ir.Graph, str]:
        self.length, self.blocks, self.chunks = LENGTH, 1, find_chunks(base.graph, LENGTH)
        if self.chunks.per_feature:
            found = find_chunks(base.graph, BLOCK)
            try:
                self.blocks, self.chunks = LENGTH // BLOCK, in_blocks(found, LENGTH // BLOCK)
            except Unchunkable:
                self.length, self.blocks, self.chunks = BLOCK, 1, found
        return self.chunks.graph, f"chunks of {self.length} in {self.blocks} blocks"

    def extents(self, extents: Mapping[str, int]) -> dict[str, int]:
        """The extents of its axes, from those of a call of the base with a whole number of chunks."""
        own = {**extents, self.chunks.chunk: extents[self.chunks.time] // self.length}
        return {a: ir.fixed_extent(a) or own[a] for a in self.axis_names}


def chunks_of(kernel: Kernel) -> ChunkedKernel | str:
    """The kernel in chunks of steps, or why there is none; steps within steps are numbered along one axis first."""
    flat = FlatKernel.of(kernel) if has_steps_within(kernel) else kernel
    return flat if isinstance(flat, str) else ChunkedKernel.of(flat)


def posed_in_chunks(kernel: Kernel, problem: Problem) -> tuple[ChunkedKernel, Problem] | None:
    """The kernel that a GPU would run a long problem on, and its whole chunks as a problem of that; None where there is none."""
    from .problem import Problem

    made = chunks_of(kernel) if kernel.graph.states else ""
    if isinstance(made, str):
        return None
    problem = posed_flat(kernel, problem) if has_steps_within(kernel) else problem
    time = made.chunks.time
    whole = problem.extents[time] // made.length * made.length
    if whole < FEWEST * made.length:
        return None
    extents = made.extents({**problem.extents, time: whole})
    return made, Problem(made.typed, extents, extents, problem.params)


def in_chunks(call: Call, kernel: ChunkedKernel) -> Call:
    """A call with a whole number of chunks, as one of the kernel in chunks."""
    bound = call.bound
    fresh = Bound(kernel.extents(bound.extents), bound.params, bound.promoted, bound.device)
    origin = {a: n for a, n in call.origin.items() if a in kernel.axis_names}
    return replace(call, kernel=kernel, bound=fresh, origin=origin)


def split(call: Call) -> tuple[Call, Call | None] | None:
    """(all whole chunks as a call of the kernel in chunks, a call with the steps that are left), or None: better one by one.

    The call of the rest begins with the states that the chunks end with, which are not known yet.
    """
    kernel = ChunkedKernel.of(call.kernel)
    if isinstance(kernel, str):
        return None
    time = kernel.chunks.time
    if kernel.chunks.counts and call.origin.get(time):
        return None
    steps = call.bound.extents[time]
    whole = steps // kernel.length * kernel.length
    if whole < FEWEST * kernel.length:
        return None
    if whole == steps:
        return in_chunks(call, kernel), None
    states = call.kernel.graph.states
    if kernel.chunks.counts_all or states.keys() != {*call.kernel.states} or any(s.reverse for s in states.values()):
        return None
    chunks, rest = part(call, time, 0, whole), part(call, time, whole, steps)
    origin = {**call.origin, time: whole} if kernel.chunks.counts else call.origin
    return in_chunks(replace(chunks, return_final=True), kernel), replace(rest, initial={}, origin=origin)


def flat_call(call: Call) -> Call | None:
    """A call of a kernel with steps within steps as one with one axis of steps, where that goes in chunks."""
    made = chunks_of(call.kernel)
    if isinstance(made, str):
        return None
    flat = FlatKernel.of(call.kernel)
    assert isinstance(flat, FlatKernel)
    steps = flat.extents(call.bound.extents)[made.chunks.time]
    return flattened(call, flat) if steps >= FEWEST * made.length else None


def part(call: Call, time: str, start: int, stop: int) -> Call:
    """The same call on some of the steps."""
    inputs = dict(call.inputs)
    for t in call.kernel.typed.inputs:
        if time in t.axes and t.name in inputs:
            inputs[t.name] = inputs[t.name].narrow(t.dims.index((time,)), start, stop - start)
    bound = call.bound
    fresh = Bound({**bound.extents, time: stop - start}, bound.params, bound.promoted, bound.device)
    return replace(call, inputs=inputs, bound=fresh)


def joined(kernel: Kernel, time: str, chunks: Sequence[Tensor], rest: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a call from those of its parts along ``time``; what has no such axis is as the last part leaves it."""
    found = []
    for t, first, last in zip(kernel.typed.outputs, chunks, rest, strict=False):
        found.append(torch.cat([first, last], t.dims.index((time,))) if time in t.axes else last)
    return [*found, *rest[len(found) :]]
