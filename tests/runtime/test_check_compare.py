"""The bounds of ``check``: what they let pass and what they must not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from weft.runtime.check_compare import CAP, FLOORS, Floor, compare, representable, same_bits
from weft.runtime.check_rounding import OtherWay

DIMS = ("i", "d")


def reference() -> torch.Tensor:
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def judged(got: torch.Tensor, want: torch.Tensor, eager: torch.Tensor | None = None, noise: Floor | None = None) -> str | None:
    """The kind of failure, or None."""
    _, failure = compare(
        "o", DIMS[: want.dim()], got, want, want.to(got.dtype) if eager is None else eager, lambda: noise or Floor(0.0, 0.0)
    )
    return failure.kind if failure else None


@pytest.mark.parametrize("dtype", FLOORS)
def test_rounding_passes_and_zeros_fail(dtype: torch.dtype) -> None:
    want = reference()
    assert judged(want.to(dtype), want) is None
    assert judged(torch.zeros_like(want, dtype=dtype), want) == "value"


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_bounds_scale_with_the_reference(scale: float) -> None:
    """An absolute tolerance would let zeros pass for small numbers and rounding fail for large ones."""
    want = reference() * scale
    assert judged(want.float(), want) is None
    assert judged(torch.zeros_like(want, dtype=torch.float32), want) == "value"
    assert judged((want * 1.001).float(), want) == "value"


def test_one_element_off_by_a_percent_fails_and_is_found() -> None:
    want = reference()
    got = want.float()
    got[17, 3] = 1.01 * got[17, 3] + 0.001
    _, failure = compare("o", DIMS, got, want, want.float())
    assert failure is not None
    assert failure.index == {"i": 17, "d": 3}
    assert failure.want == f"{float(want[17, 3]):.7g}"


def test_a_wrong_last_row_fails() -> None:
    want = reference()
    got = want.float()
    got[-1] = got[-2]
    assert judged(got, want) == "value"


def test_twice_the_error_of_eager_is_allowed_and_three_times_is_not() -> None:
    want = reference()
    error = 1e-3 * torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eager = (want + error).float()
    assert judged((want - 1.9 * error).float(), want, eager) is None
    assert judged((want - 3 * error).float(), want, eager) == "value"


def test_the_bound_never_exceeds_a_tenth_of_the_rms() -> None:
    """Eager PyTorch may have lost everything; the kernel may not."""
    want = reference()
    eager = torch.zeros_like(want, dtype=torch.float32)
    assert judged((want * (1 + 1.5 * CAP)).float(), want, eager) == "value"
    measure, failure = compare("o", DIMS, (want * (1 + CAP / 100)).float(), want, eager)
    assert failure is None and measure is not None
    assert measure.rms_bound <= CAP * measure.rms * 1.001


def test_numbers_without_digits_are_judged_by_their_conditioning() -> None:
    """Rounding noise around an analytical zero passes; a real number there does not."""
    want = 1e-17 * reference()
    noise = Floor(1.0, 4.0)
    assert judged((want + 1e-7 * reference()).float(), want, noise=noise) is None
    assert judged((want + 1e-7 * reference()).float(), want) == "value"
    assert judged((want + 1e-3 * reference()).float(), want, noise=noise) == "value"


def test_conditioning_excuses_nothing_that_has_digits() -> None:
    want = reference()
    assert judged((want * 1.01).float(), want, noise=Floor(10.0, 100.0)) == "value"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 0.0])
def test_infinities_must_be_where_the_reference_has_them(wrong: float) -> None:
    want = reference()
    want[3] = -math.inf
    want[4] = math.inf
    want[5] = math.nan
    assert judged(want.float(), want) is None
    for row in (3, 4, 5, 6):
        got = want.float()
        got[row, 2] = wrong
        same = got[row, 2] == want[row, 2] or (got[row, 2].isnan() and want[row, 2].isnan())
        assert same or judged(got, want) in ("non-finite", "value")


def test_what_leaves_the_range_of_eager_may_leave_that_of_the_kernel() -> None:
    want = reference()
    eager = want.float()
    eager[2, 1] = math.inf
    got = want.float()
    got[2, 1] = math.nan
    assert judged(got, want, eager) is None
    got[2, 1] = 5.0
    assert judged(got, want, eager) == "value"
    assert judged(got.index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(math.nan)), want, eager) == "non-finite"


def test_ints_and_bools_are_exact() -> None:
    want = torch.arange(6)
    assert judged(want.to(torch.int32), want, want.to(torch.int32)) is None
    assert judged(want.to(torch.int32) + 1, want, want.to(torch.int32)) == "value"
    kept = want > 2
    assert judged(~kept, kept, kept) == "value"


def test_shape_and_dtype_are_part_of_the_answer() -> None:
    want = reference()
    assert judged(want.float().T.contiguous(), want, want.float()) == "structure"
    assert judged(want.half(), want, want.float()) == "structure"


def test_a_missing_gradient_counts_as_zeros() -> None:
    want = reference()
    assert compare("d_q", DIMS, None, torch.zeros_like(want), want.float())[1] is None
    failure = compare("d_q", DIMS, None, want, want.float())[1]
    assert failure is not None and failure.kind == "value"


def test_same_bits() -> None:
    a = torch.tensor([1.0, math.nan, -math.inf])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([1.0 + 2e-7, math.nan, -math.inf]))
    assert not same_bits(a, a.double())


def test_representable() -> None:
    assert representable(torch.tensor([1e4, math.inf], dtype=torch.float64), torch.float16)
    assert not representable(torch.tensor([1e5], dtype=torch.float64), torch.float16)


def test_zeros_of_the_reference_do_not_shrink_the_bounds_and_are_held_to_them() -> None:
    """A gradient of experts of which few are chosen: the RMS is that of the chosen ones."""
    want = torch.zeros(40, 16, dtype=torch.float64)
    want[3] = reference()[3]
    got = want.float()
    got[3] *= 1.000008  # more than the largest error that the RMS of all elements, 6 times less, would allow
    assert judged(got, want) is None
    assert judged(torch.zeros_like(got), want) == "value"
    got[7, 2] = 0.001
    assert judged(got, want) == "value"


def test_the_cap_follows_outliers_and_still_fails_zeros() -> None:
    """A tensor of few large elements, of which eager PyTorch is as wrong as a tenth of the RMS."""
    want = reference()
    want[0, 0] = 40.0
    eager = (want + 0.15 * (want.abs() < 0.01)).float()
    got = want.clone()
    got[(want.abs() < 0.01).nonzero(as_tuple=True)] += 0.25
    assert judged(got.float(), want, eager) is None
    got[5, 5] += 1.2
    assert judged(got.float(), want, eager) == "value"
    assert judged(torch.zeros_like(want, dtype=torch.float32), want, eager) == "value"


def test_what_undecided_roundings_change_is_no_error_and_nothing_else_is_excused() -> None:
    want = reference()
    steps = torch.zeros_like(want)
    steps[3, 5] = 0.5
    got = want.float()
    got[3, 5] += 0.5

    def failed(got: torch.Tensor, steps: torch.Tensor | None) -> bool:
        return compare("o", DIMS, got, want, want.float(), lambda: Floor(0.0, 0.0), lambda: steps)[1] is not None

    assert failed(got, None)
    assert not failed(got, steps)
    got[3, 5] += 0.25
    assert failed(got, steps)
    got = want.float()
    got[3, 6] += 0.5
    assert failed(got, steps)


@pytest.mark.parametrize(
    ("function", "x", "other"),
    [
        (torch.round, [0.5 - 1e-8, 0.5 + 1e-8, 7.5 + 1e-6, 0.4, 0.5, -2.5 - 1e-8], [1.0, 0.0, 7.0, 0.0, 0.0, -2.0]),
        (torch.floor, [1 - 1e-8, 1 + 1e-8, 1.0, 0.5, -3 - 1e-8], [1.0, 0.0, 1.0, 0.0, -3.0]),
        (torch.ceil, [1 - 1e-8, 1 + 1e-8, 1.0, 0.5, -3 - 1e-8], [2.0, 1.0, 1.0, 1.0, -2.0]),
    ],
)
def test_arguments_next_to_a_step_are_rounded_the_other_way(function: Any, x: list[float], other: list[float]) -> None:
    """Those on a step are computed exactly, as positions are, and stay."""
    given = torch.tensor(x, dtype=torch.float64)
    with OtherWay() as rounded:
        found = function(given)
    assert found.tolist() == other
    assert rounded.undecided == int((found != function(given)).sum())


def test_numbers_that_are_nearly_equal_compare_the_other_way() -> None:
    a = torch.tensor([1.0, 1.0, 1.0, 0.4, -3.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1 + 1e-8, 1 - 1e-8, 0.5, -3 - 1e-7], dtype=torch.float64)
    for function in (torch.lt, torch.le, torch.gt, torch.ge):
        with OtherWay() as rounded:
            found = function(a, b)
        assert (found != function(a, b)).tolist() == [False, True, True, False, True]
        assert rounded.undecided == 3
    with OtherWay() as rounded:
        assert torch.arange(3).lt(2).tolist() == [True, True, False] and not rounded.undecided


def test_a_number_by_itself_is_held_to_the_bound_of_its_maximum() -> None:
    want, eager = torch.tensor([2.0]).double(), torch.tensor([2.0])
    _, failure = compare("y", ("i",), torch.tensor([2.0 + 1.5e-4]), want, eager)
    assert failure is None
    _, failure = compare("y", ("i",), torch.tensor([2.0 + 3e-4]), want, eager)
    assert failure is not None
    _, failure = compare("y", ("i",), torch.full((400,), 2.0 + 1.5e-4), want.expand(400), eager.expand(400))
    assert failure is not None, "of many, not all may be"


def test_what_float32_flushes_is_no_error() -> None:
    want = torch.tensor([3e-44, 1e-39]).double()
    assert compare("y", ("i",), torch.zeros(2), want, want.float())[1] is None
    want = torch.tensor([3e-37, 1e-38]).double()
    assert compare("y", ("i",), torch.zeros(2), want, want.float())[1] is not None
