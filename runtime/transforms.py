"""Transforms of PyTorch that kernels do not support, and that would be silently wrong or fail obscurely: here they raise.

Kernels have first derivatives in reverse mode. The reference evaluates with backward rules of its own (nothing flows from
masked positions, however singular the formula), so that it has no more than generated kernels have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import NotSupported
from .registry import KERNELS


def refuse_transforms(kernel: str, tensors: Iterable[Tensor]) -> None:
    """Raises ``NotSupported`` inside ``torch.func`` transforms and for tensors with forward-mode tangents."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None:
        transform = interpreter.key().name.lower()
        if transform in _MENDS:
            raise NotSupported(kernel, f"torch.func.{transform} over a kernel is", _MENDS[transform])
    refuse_tangents(kernel, tensors)


_REVERSE = "Use reverse mode outside of torch.func: torch.autograd.grad, or .backward()."
_MENDS = {
    "vmap": "Add the axis to the spec instead: an axis that every tensor has costs nothing.",
    "grad": _REVERSE,
    "jvp": _REVERSE,
}


def refuse_tangents(kernel: str, tensors: Iterable[Tensor]) -> None:
    """Forward mode would otherwise go on with zero tangents."""
    if torch._C._is_fwd_grad_enabled() and any(torch._unpack_dual(t, level=0)[1] is not None for t in tensors):
        raise NotSupported(kernel, "forward-mode derivatives of a kernel are", _REVERSE)


def refuse_batch(key: str, *_: Any) -> Any:
    """What vmap inside a recorded graph comes to."""
    raise NotSupported(KERNELS[key].name, "torch.func.vmap over a kernel is", _MENDS["vmap"])


def once_differentiable(kernel: str, gradients: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, such that differentiating them raises. ``sources`` are what they were computed from."""
    if torch.is_grad_enabled() and gradients and any(t.requires_grad for t in sources):
        return list(_NoSecondDerivative.apply(kernel, len(gradients), *gradients, *sources))  # type: ignore[no-untyped-call]
    return list(gradients)


def guarded(kernel: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, such that gradients that reach them cannot be differentiated again."""
    wanted = [name for name, t in tensors.items() if t.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return tensors
    values: tuple[Tensor, ...] = _Guard.apply(kernel, *(tensors[name] for name in wanted))  # type: ignore[no-untyped-call]
    return {**tensors, **dict(zip(wanted, values, strict=True))}


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.kernel = kernel
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotSupported(
            ctx.kernel, "second derivatives of a kernel are", "Drop create_graph=True, or write the first derivative as a spec of its own."
        )


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        present = [c for c in cotangents if c is not None]
        tied = iter(once_differentiable(ctx.kernel, present, ctx.saved_tensors))
        return (None, *(None if c is None else next(tied) for c in cotangents))
