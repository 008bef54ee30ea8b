"""Holds one tensor to its float64 reference.

Three numbers decide: the error of the kernel, the error that eager PyTorch makes at the same precision, and the RMS of the
reference. With ``rms`` and ``eps = 2 * unit roundoff`` of the dtype,

    RMS error  <=  min(max(2 * eager's RMS error, FLOORS[dtype].rms * rms), rms / 10)
    each error <=  min(max(2 * eager's maximum,   FLOORS[dtype].max * rms), s / 10)  +  eps * |reference|

Both RMS are those of the elements that are not exactly 0 in the reference: masks and experts that nobody chose leave many zeros, which
say nothing of how large the others are. An error in a zero counts in the maximum.

The floor allows another order of summation and other approximations of exp. It is a multiple of the reference's own
RMS: zeros never pass. A tenth of the RMS is never exceeded but by the rounding of the element itself, even where eager has
lost everything; s is the RMS, or a quarter of the largest element where that is more (a few outliers among many small numbers).
Ints and bools must be equal.

Eager's error is one draw from what that arithmetic makes, and sometimes a lucky one: a difference of two sums whose errors happen
to cancel. When the bound above is not kept, the conditioning of the numbers is measured (``check_noise``), and twice a rounding
error (eps) times the amplification of rounding errors counts like twice eager's error, with the same cap.

Where this is not enough either, what roundings to whole numbers and comparisons that are undecided in float32 change in an element is no
error (``check_rounding``). A number by itself may be off by the bound of its maximum: the RMS bound of n elements is no less than that
divided by the root of n.

Some numbers have no digits to ask for: the gradient of a softmax over one key is analytically 0 and comes out as rounding
noise. Where eps times the amplification is ``LOST[dtype]`` of the RMS or more, ``NOISY * eps * amplification`` is the bound. How terms
cancel depends on how a formula is arranged: where a gradient is 0 everywhere, the size of a term stands for the amplification.

Infinities and NaN must be where the reference has them. Where it has a number and eager PyTorch has none, as it
left the range of the dtype on the way, a kernel may have none either; if it has one, it must be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check_report import Failure, Measure


class Floor(NamedTuple):
    """Multiples of the reference's RMS that an error may always have: the RMS error and the largest one."""

    rms: float
    max: float


FLOORS = {
    torch.float64: Floor(1e-13, 1e-12),
    torch.float32: Floor(1e-5, 1e-4),
    torch.float16: Floor(2e-3, 1e-2),
    torch.bfloat16: Floor(1.6e-2, 8e-2),
}
EAGER_FACTOR = 2.0
CAP = 0.1
LOST = {torch.float64: 0.02, torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.25}
"""In half precision a kernel still does most of its arithmetic in float32, so more must be lost before it is excused."""
NOISY = 16.0
SMALLEST = torch.finfo(torch.float32).smallest_normal
"""Kernels compute in float32 and may flush what is smaller to 0."""


def compare(
    quantity: str,
    dims: Sequence[str],
    got: Tensor | None,
    want: Tensor,
    eager: Tensor | None,
    noise: Callable[[], Floor] | None = None,
    steps: Callable[[], Tensor | None] | None = None,
) -> tuple[Measure | None, Failure | None]:
    """The errors of ``got`` against ``want`` (float64, or exact ints), and what is wrong with it.

    ``eager`` is what PyTorch makes of it at the same precision, with the dtype and shape that ``got`` must have. A
    gradient that is None counts as zeros. ``noise`` is called only where the plain bound is not kept, and ``steps``, of the shape of
    ``want``, where that is not enough.
    """
    if got is None:
        if eager is None or not bool((want != 0).any()):
            return None, None
        got = torch.zeros_like(eager)
    structure = _structure(quantity, got, want, eager)
    if structure is not None:
        return None, structure
    got = got.detach().to("cpu")
    if not want.is_floating_point():
        return None, _exact(quantity, dims, got, want)
    eager = torch.zeros_like(got) if eager is None else eager.detach().to("cpu")
    beyond = want.isfinite() & ~eager.isfinite() & ~got.isfinite()
    pattern = _pattern(quantity, dims, got, want, beyond)
    if pattern is not None:
        return None, pattern
    judged = want.isfinite() & ~beyond
    measure, failure = _errors(quantity, dims, got, want, eager, judged, None)
    if failure is not None and noise is not None:
        floor = noise()
        measure, failure = _errors(quantity, dims, got, want, eager, judged, floor)
        allowed = steps() if failure is not None and steps is not None else None
        if allowed is not None:
            measure, failure = _errors(quantity, dims, got, want, eager, judged, floor, allowed)
    return measure, failure


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def first_difference(quantity: str, dims: Sequence[str], got: Tensor, want: Tensor) -> Failure:
    """A failure at the element where two runs differ most."""
    apart = (got.double() - want.double()).abs()
    apart = torch.where(got.isnan() & want.isnan(), 0.0, apart).nan_to_num(nan=math.inf)
    return _located("determinism", quantity, "differs from what it should equal to the last bit", dims, int(apart.argmax()), got, want)


def representable(want: Tensor, dtype: torch.dtype) -> bool:
    """Whether the finite numbers of a reference fit comfortably into a dtype."""
    if not want.is_floating_point() or not dtype.is_floating_point:
        return True
    finite = want[want.isfinite()]
    return not finite.numel() or float(finite.abs().max()) < torch.finfo(dtype).max / 4


def _structure(quantity: str, got: Tensor, want: Tensor, eager: Tensor | None) -> Failure | None:
    if got.shape != want.shape:
        return Failure("structure", quantity, f"has shape {list(got.shape)}, and should have {list(want.shape)}")
    if eager is not None and got.dtype != eager.dtype:
        return Failure("structure", quantity, f"has dtype {got.dtype}, and should have {eager.dtype}".replace("torch.", ""))
    return None


def _exact(quantity: str, dims: Sequence[str], got: Tensor, want: Tensor) -> Failure | None:
    wrong = got.to(want.dtype) != want
    if not bool(wrong.any()):
        return None
    message = f"{int(wrong.sum())} of {wrong.numel()} elements differ from the reference"
    return _located("value", quantity, message, dims, int(wrong.int().argmax()), got, want)


def _pattern(quantity: str, dims: Sequence[str], got: Tensor, want: Tensor, beyond: Tensor) -> Failure | None:
    """NaN, inf and -inf must be where the reference has them, or ``beyond`` the range of the dtype."""
    got = got.double()
    wrong = ~beyond & ~torch.where(want.isfinite(), got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
    if not bool(wrong.any()):
        return None
    message = f"{int(wrong.sum())} of {wrong.numel()} elements are not finite where the reference is, or the other way round"
    return _located("non-finite", quantity, message, dims, int(wrong.int().argmax()), got, want)


def _errors(
    quantity: str,
    dims: Sequence[str],
    got: Tensor,
    want: Tensor,
    eager: Tensor,
    judged: Tensor,
    noise: Floor | None,
    steps: Tensor | float = 0.0,
) -> tuple[Measure | None, Failure | None]:
    """The errors of the ``judged`` elements and their bounds; ``noise`` is how the quantity amplifies rounding errors, if asked. What
    roundings to whole numbers may change, ``steps``, is no error."""
    if not bool(judged.any()):
        return None, None
    eps = torch.finfo(got.dtype).eps
    error = torch.where(judged, ((got.double() - want).abs() - steps).clamp(min=0.0), 0.0)
    counted = judged & (want != 0)
    counted = counted if bool(counted.any()) else judged
    rms = _rms(want[counted])
    largest = max(rms, float(want[judged].abs().max()) / 4)
    bounds = _bounds(got.dtype, rms, largest, _eager_error(eager, want, judged, counted), noise)
    bounds = bounds._replace(rms=max(bounds.rms, bounds.max / math.sqrt(int(counted.sum()))))
    bound = bounds.max + eps * torch.where(judged, want, 0.0).abs()
    worst = int((error / bound).argmax())
    measure = Measure(quantity, float(error.flatten()[worst]), float(bound.flatten()[worst]), _rms(error[counted]), bounds.rms, rms)
    if measure.ratio <= 1:
        return measure, None
    message = (
        f"maximum error {measure.max_error:.3g} (bound {measure.max_bound:.3g}), "
        f"RMS error {measure.rms_error:.3g} (bound {measure.rms_bound:.3g}), reference RMS {rms:.3g}"
    )
    return measure, _located("value", quantity, message, dims, worst, got, want)


def _bounds(dtype: torch.dtype, rms: float, largest: float, eager: Floor, noise: Floor | None) -> Floor:
    """The bounds of the RMS error and of the largest one, but for the rounding of the element itself. A tenth of ``rms`` and of ``largest``
    caps them."""
    info, floor = torch.finfo(dtype), FLOORS[dtype]
    smallest = max(info.smallest_normal * info.eps, SMALLEST if dtype != torch.float64 else 0.0)
    if noise is not None and info.eps * noise.rms >= LOST[dtype] * rms:
        return Floor(NOISY * info.eps * noise.rms + smallest, NOISY * info.eps * noise.max + smallest)
    drawn = Floor(0.0, 0.0) if noise is None else Floor(info.eps / 2 * noise.rms, info.eps / 2 * noise.max)
    rms_bound = min(max(EAGER_FACTOR * max(eager.rms, drawn.rms), floor.rms * rms), CAP * rms)
    max_bound = min(max(EAGER_FACTOR * max(eager.max, drawn.max), floor.max * rms), CAP * largest)
    return Floor(rms_bound + smallest, max_bound + smallest)


def _eager_error(eager: Tensor, want: Tensor, judged: Tensor, counted: Tensor) -> Floor:
    """The errors of eager PyTorch where it has numbers."""
    error, there = (eager.double() - want).abs(), eager.isfinite()
    largest = error[judged & there]
    return Floor(_rms(error[counted & there]), float(largest.max())) if largest.numel() else Floor(0.0, 0.0)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def _located(kind: str, quantity: str, message: str, dims: Sequence[str], flat: int, got: Tensor, want: Tensor) -> Failure:
    where = [int(n) for n in torch.unravel_index(torch.tensor(flat), want.shape)] if want.dim() else []
    index = dict(zip(dims, where, strict=True))
    return Failure(kind, quantity, message, index, _show(got.flatten()[flat]), _show(want.flatten()[flat]))  # type: ignore[arg-type]


def _show(value: Tensor) -> str:
    return f"{float(value):.7g}" if value.is_floating_point() else str(value.item())
