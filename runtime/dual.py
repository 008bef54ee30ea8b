"""Long calls of kernels whose sums separate: the kernel as a recurrence, in linear time.

On GPUs the recurrence goes in chunks of steps; the queries that are left over, fewer than a chunk has, meet all keys as pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..compiler.duality import Dual, Inseparable, find_dual
from .arguments import Bound, Call
from .chunked import FEWEST, ChunkedKernel, in_chunks, part
from .derived import DerivedKernel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..compiler import ir
    from .kernel import Kernel
    from .problem import Problem

STEP_COST, POWER_COST = 2.5, 9.0
"""What going through an element of a state costs on a CPU, forward and backward, in multiples of what a product of a pair of positions
costs: measured with retention, and with the states of the second power of `based` and `rebased`."""
GPU_COST = 16
"""How many times longer a sequence has to be on a GPU, where products of pairs stay on chip and chunks and their states go through memory.
Counted for retention (448 T operations a position at 400 TFLOP/s against 23 KB at 3 TB/s), not measured."""


class DualKernel(DerivedKernel):
    """``base`` as a recurrence along its query axis, for calls with as many keys as queries."""

    refusal = Inseparable

    dual: Dual

    def derive(self, base: Kernel) -> tuple[ir.Graph, str]:
        self.dual = find_dual(base.graph)
        return self.dual.graph, "dual"

    def crossover(self, extents: Mapping[str, int]) -> int:
        """The length from which the recurrence is faster on a CPU.

        A query meets half of the keys on average, and a product with each; a step goes through the states twice.
        """

        def size(axes: tuple[str, ...]) -> int:
            return math.prod(extents[self.dual.copies.get(a, a)] for a in axes)

        powers = [any(a in self.dual.copies for a in axes) for axes in self.dual.work]
        step = sum(2 * size(axes) * (POWER_COST if power else STEP_COST) for axes, power in zip(self.dual.work, powers, strict=True))
        return math.ceil(2 * step / sum(size(axes) for axes in self.dual.pair))

    def gpu_crossover(self, extents: Mapping[str, int]) -> int:
        """The length from which the recurrence in chunks is faster on a GPU."""
        return GPU_COST * self.crossover(extents)

    def extents(self, extents: Mapping[str, int]) -> dict[str, int]:
        """The extents of its axes, from those of a call of the base."""
        return {a: extents[self.dual.copies.get(a, a)] for a in self.axis_names}


def posed_as_dual(kernel: Kernel, problem: Problem) -> tuple[DualKernel, Problem] | None:
    """The recurrence and its problem, where there is one and there are as many keys as queries."""
    from .problem import Problem

    dual = "" if kernel.states else DualKernel.of(kernel)
    if isinstance(dual, str) or problem.extents[dual.dual.query] != problem.extents[dual.dual.key]:
        return None
    extents = dual.extents(problem.extents)
    return dual, Problem(dual.typed, extents, extents, problem.params)


def with_dual(call: Call) -> Call:
    """The same call of the recurrence, where there is one and the call is on a CPU and long enough; or the call."""
    if call.backend not in (None, "c") or call.bound.device.type != "cpu":
        return call
    kernel = _dual_of(call)
    if kernel is None or call.bound.extents[kernel.dual.query] < kernel.crossover(call.bound.extents):
        return call
    return _as_dual(call, kernel)


def with_chunks(call: Call) -> tuple[Call, Call | None] | None:
    """A call on a GPU as one of the recurrence in chunks, and one with the queries that are left; None where there is no recurrence, or
    the call is not long enough."""
    if call.backend not in (None, "triton") or (call.bound.device.type == "cpu" and call.backend is None):
        return None
    kernel = _dual_of(call)
    if kernel is None or call.bound.extents[kernel.dual.query] < kernel.gpu_crossover(call.bound.extents):
        return None
    chunked = ChunkedKernel.of(kernel)
    if isinstance(chunked, str) or (chunked.chunks.counts and call.origin.get(kernel.dual.query)):
        return None
    query, key = kernel.dual.query, kernel.dual.key
    steps = call.bound.extents[query]
    whole = steps // chunked.length * chunked.length
    if whole < FEWEST * chunked.length:
        return None
    if whole == steps:
        return in_chunks(_as_dual(call, kernel), chunked), None
    if chunked.chunks.counts_all or query in call.kernel.fixed_axes:  # the queries that are left begin at another position
        return None
    first = part(part(call, query, 0, whole), key, 0, whole)
    rest = part(call, query, whole, steps)
    rest = replace(rest, origin={**call.origin, query: call.origin.get(query, 0) + whole})
    return in_chunks(_as_dual(first, kernel), chunked), rest


def _dual_of(call: Call) -> DualKernel | None:
    """The recurrence for a call with as many keys as queries, which begin at the same position."""
    if call.kernel.states:
        return None
    kernel = DualKernel.of(call.kernel)
    if isinstance(kernel, str):
        return None
    query, key, extents = kernel.dual.query, kernel.dual.key, call.bound.extents
    aligned = extents[query] == extents[key] and call.origin.get(query, 0) == call.origin.get(key, 0)
    return kernel if aligned else None


def _as_dual(call: Call, kernel: DualKernel) -> Call:
    bound = call.bound
    fresh = Bound(kernel.extents(bound.extents), bound.params, bound.promoted, bound.device)
    origin = {a: n for a, n in call.origin.items() if a in kernel.axis_names}
    return replace(call, kernel=kernel, bound=fresh, origin=origin)
