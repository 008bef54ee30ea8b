"""How well conditioned a number is: what rounding inside a computation does to it.

A reference is evaluated again in float64 with every sum, product and function result changed by a random relative
``NUDGE``, in the forward and the backward pass. What moves, divided by the nudge, is how much an arithmetic amplifies its
rounding errors, whatever its precision. Running sums are left alone: kernels and eager PyTorch keep them in float32. So are the
partial sums of sums and products in half precision; in float32 they are nudged like everything else: a sum S of n terms x,
taken one after another, is off by about the nudge times the root of the sum of its squared partial sums, however small S itself is. The
partial sums wander about a line from 0 to S: their squares sum to n / 3 * S^2 + n / 2 * (sum x^2 - S^2 / n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NUDGE = 1e-9
ROUNDED = frozenset(
    "add sub rsub mul div mm bmm addmm baddbmm sum exp exp2 log log1p expm1 sqrt rsqrt reciprocal sigmoid tanh erf sin cos pow "
    "log_sigmoid_forward softplus logaddexp logsumexp _softmax prod".split()
)
"""The operations whose results are nudged, by their names in ATen."""


PRODUCTS = frozenset(("mm", "bmm"))


class Nudged(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, results of floating arithmetic are off by a relative ``NUDGE`` times a normal number, and so are
    ``partial_sums`` if asked."""

    def __init__(self, seed: int, sign: int = 1, *, partial_sums: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = sign * NUDGE
        self._partial_sums = partial_sums
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (isinstance(result, Tensor) and result.is_floating_point() and name in ROUNDED):
            return result
        noise = torch.randn(result.shape, generator=self._generator, dtype=result.dtype).mul_(self._size)
        if self._partial_sums and name in PRODUCTS:
            a, b = args
            return result + noise * _partial_sums(result, func(a * a, b * b), a.shape[-1])
        if self._partial_sums and name == "sum" and result.numel():
            x, *how = args
            return result + noise * _partial_sums(result, func(x * x, *how, **(kwargs or {})), x.numel() / result.numel())
        return result * noise.add_(1)


def _partial_sums(total: Tensor, squares: Tensor, terms: float) -> Tensor:
    """The root of the sum of squared partial sums of so many terms, from their sum and the sum of their squares."""
    if not terms:
        return total
    spread = (squares - total * total / terms).clamp(min=0.0)
    return (terms / 3 * total * total + terms / 2 * spread).sqrt()


def amplification(exact: Tensor | None, nudged: Tensor | None) -> tuple[float, float]:
    """RMS and maximum of what a nudge moved, per unit of nudge, among finite numbers."""
    if exact is None or nudged is None or not exact.is_floating_point():
        return 0.0, 0.0
    moved = (nudged - exact)[exact.isfinite() & nudged.isfinite()] / NUDGE
    return (float(moved.square().mean().sqrt()), float(moved.abs().max())) if moved.numel() else (0.0, 0.0)
