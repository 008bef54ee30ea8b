"""Long calls of kernels whose sums separate: the kernel as a recurrence, in linear time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..compiler.duality import Dual, Inseparable, find_dual
from .arguments import Bound, Call
from .derived import DerivedKernel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..compiler import ir
    from .kernel import Kernel

STEP_COST, POWER_COST = 2.5, 9.0
"""What going through an element of a state costs on a CPU, forward and backward, in multiples of what a product of a pair of positions
costs: measured with retention, and with the states of the second power of `based` and `rebased`."""


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

    def extents(self, extents: Mapping[str, int]) -> dict[str, int]:
        """The extents of its axes, from those of a call of the base."""
        return {a: extents[self.dual.copies.get(a, a)] for a in self.axis_names}


def with_dual(call: Call) -> Call:
    """The same call of the recurrence, where there is one and the call is long enough; or the call."""
    if call.kernel.states or call.backend not in (None, "c") or call.bound.device.type != "cpu":
        return call
    kernel = DualKernel.of(call.kernel)
    if isinstance(kernel, str):
        return call
    query, key, extents = kernel.dual.query, kernel.dual.key, call.bound.extents
    aligned = extents[query] == extents[key] and call.origin.get(query, 0) == call.origin.get(key, 0)
    if not aligned or extents[query] < kernel.crossover(extents):
        return call
    bound = call.bound
    fresh = Bound(kernel.extents(extents), bound.params, bound.promoted, bound.device)
    origin = {a: n for a, n in call.origin.items() if a in kernel.axis_names}
    return replace(call, kernel=kernel, bound=fresh, origin=origin)
