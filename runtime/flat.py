"""Calls of recurrences with steps within steps, as calls of a kernel with one axis of steps: what goes in chunks on GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..compiler.flatten import LAST, Flat, Unflattenable, find_flat
from .arguments import Bound, Call
from .derived import DerivedKernel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..compiler import ir
    from ..dsl import typed
    from .kernel import Kernel
    from .problem import Problem


class FlatKernel(DerivedKernel):
    """``base`` with one axis for the steps within every step."""

    refusal = Unflattenable

    flat: Flat

    def derive(self, base: Kernel) -> tuple[ir.Graph, str]:
        self.flat = find_flat(base.graph)
        return self.flat.graph, "flat"

    def extents(self, extents: Mapping[str, int]) -> dict[str, int]:
        """The extents of its axes, from those of a call of the base."""
        found = self.flat
        return {a: extents[found.outer] * extents[found.inner] if a == found.time else extents[a] for a in self.axis_names}


def has_steps_within(kernel: Kernel) -> bool:
    """Whether the states of a kernel go along several axes."""
    return any(len(s.along) > 1 for s in kernel.graph.states.values())


def posed_flat(base: Kernel, problem: Problem) -> Problem:
    """A problem as one of the kernel with one axis of steps, which there must be."""
    from .problem import Problem

    kernel = FlatKernel.of(base)
    assert isinstance(kernel, FlatKernel)
    extents = kernel.extents(problem.extents)
    return Problem(kernel.typed, extents, extents, problem.params)


def flattened(call: Call, kernel: FlatKernel) -> Call | None:
    """A call as one with one axis of steps: what the steps of a token share is repeated for each. None where one of the two axes begins at
    another position than 0."""
    if any(call.origin.get(a) for a in (kernel.flat.outer, kernel.flat.inner)):
        return None
    found, bound = kernel.flat, call.bound
    count = bound.extents[found.inner]
    inputs = {t.name: _repeated(call.inputs[t.name], t, found, count) for t in call.kernel.typed.inputs if t.name in call.inputs}
    if found.place:
        steps = torch.arange(count, device=bound.device, dtype=torch.int32)
        inputs[found.place] = steps.repeat(bound.extents[found.outer])
    origin = {a: n for a, n in call.origin.items() if a in kernel.axis_names}
    fresh = Bound(kernel.extents(bound.extents), bound.params, bound.promoted, bound.device)
    return replace(call, kernel=kernel, bound=fresh, inputs=inputs, origin=origin)


def taken(call: Call, done: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a call from those of the same call with one axis of steps; final states, which follow them, are the same."""
    kernel = FlatKernel.of(call.kernel)
    assert isinstance(kernel, FlatKernel)
    found, count = kernel.flat, call.bound.extents[kernel.flat.inner]
    outputs = []
    for t, x in zip(kernel.typed.outputs, done, strict=False):
        if t.name in found.taken:
            place = t.dims.index((found.time,))
            first = count - 1 if found.taken[t.name] == LAST else 0
            x = x[(slice(None),) * place + (slice(first, None, count),)]
        outputs.append(x.contiguous())
    return [*outputs, *done[len(outputs) :]]


def _repeated(x: Tensor, t: typed.Tensor, found: Flat, count: int) -> Tensor:
    """An input with a dimension of tokens, for each of their steps."""
    if found.outer not in t.axes or (found.outer, found.inner) in t.dims:
        return x
    return x.repeat_interleave(count, t.dims.index((found.outer,)))
