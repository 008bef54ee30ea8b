"""Steps that rounding errors decide: roundings to whole numbers and comparisons of real numbers, and what they may change.

Where the argument of ``round``, ``floor`` or ``ceil`` is nearer to a step than the arithmetic is exact, either whole number is right, and
what follows may differ by much more than a rounding error: a weight quantised to one step more. So may what follows a comparison of two
numbers that are nearly equal: an expert more below a threshold. A reference that goes the other way at all of these says by how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NEAR = 16.0
"""Rounding errors (eps of float32, in which kernels compute, times the argument) that an argument may be off by."""


COMPARISONS = frozenset(("lt", "le", "gt", "ge"))


class OtherWay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, arguments next to a step are rounded to its other side, and numbers that are nearly equal compare the other way.

    Those on a step, and those that are equal, do not: they are computed exactly, as positions are, or are one number.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.undecided = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in COMPARISONS and len(args) == 2 and any(isinstance(x, Tensor) and x.is_floating_point() for x in args):
            a, b = (torch.as_tensor(x, dtype=torch.float64) for x in args)
            near = self._near((a - b).abs(), torch.maximum(a.abs(), b.abs()))
            return result ^ near
        if not (isinstance(result, Tensor) and result.is_floating_point() and name in ("round", "floor", "ceil") and len(args) == 1):
            return result
        (x,) = args
        step = x.floor() + 0.5 if name == "round" else x.round()
        near = self._near((x - step).abs(), x.abs().clamp(min=1.0))
        return torch.where(near, _neighbours(name, step) - result, result)

    def _near(self, distance: Tensor, size: Tensor) -> Tensor:
        """Where a distance is not 0, but may be in float32."""
        near = (distance > 0) & (distance < NEAR * torch.finfo(torch.float32).eps * size)
        self.undecided += int(near.sum())
        return near


def _neighbours(name: str, step: Tensor) -> Tensor:
    """The sum of the whole numbers on both sides of a step."""
    return 2 * step + {"round": 0, "floor": -1, "ceil": 1}[name]
