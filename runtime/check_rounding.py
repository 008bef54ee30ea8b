"""Roundings to whole numbers that rounding errors decide: what they may change.

``round``, ``floor`` and ``ceil`` are steps. Where their argument is nearer to a step than the arithmetic is exact, either whole number is
right, and what follows may differ by much more than a rounding error: a weight quantised to one step more. A reference that takes the
other one for all of these says by how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NEAR = 16.0
"""Rounding errors (eps of float32, in which kernels compute, times the argument) that an argument may be off by."""


class OtherWay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, arguments next to a step are rounded to its other side. Those on a step are not: they are computed exactly, as
    positions are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.undecided = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (isinstance(result, Tensor) and result.is_floating_point() and name in ("round", "floor", "ceil") and len(args) == 1):
            return result
        (x,) = args
        step = x.floor() + 0.5 if name == "round" else x.round()
        distance = (x - step).abs()
        near = (distance > 0) & (distance < NEAR * torch.finfo(torch.float32).eps * x.abs().clamp(min=1.0))
        self.undecided += int(near.sum())
        return torch.where(near, _neighbours(name, step) - result, result)


def _neighbours(name: str, step: Tensor) -> Tensor:
    """The sum of the whole numbers on both sides of a step."""
    return 2 * step + {"round": 0, "floor": -1, "ceil": 1}[name]
