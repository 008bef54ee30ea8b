"""Binding of axes at call time: what is solved, and the message for every kind of bad call."""

from __future__ import annotations

from typing import Any

import pytest

import weft.dsl
from weft.compiler import errors, extents
from weft.dsl import typed

TEXT = """
kernel f(q[b,(g r),i], k[b,g,j], bias[(g r)] = 0) -> o[b,(g r),i]:
    param block: int = 2
    param scale: float
    param flag: bool = false
    axis m = (size(j) + block - 1) // block
    o = where(flag, 2.0, scale) * q * sum[j](k) * sum[m](m) + bias
"""


def kernel(text: str = TEXT) -> typed.Kernel:
    return weft.dsl.parse(text).kernels[0]


SHAPES = {"q": (2, 6, 5), "k": (2, 3, 7)}
PARAMS: dict[str, Any] = {"scale": 1}


def test_composite_and_declared_axes_are_solved() -> None:
    assert extents.bind(kernel(), SHAPES, PARAMS) == {"b": 2, "g": 3, "r": 2, "i": 5, "j": 7, "m": 4}
    assert extents.bind(kernel(), SHAPES, {**PARAMS, "block": 4})["m"] == 2
    assert extents.bind(kernel(), {**SHAPES, "bias": (6,)}, PARAMS)["r"] == 2


def test_a_declared_axis_solves_a_split() -> None:
    text = "kernel f(x[(a b c)]) -> y[a]:\n    axis b = 2\n    axis c = size(b) + 1\n    y = sum[b, c](x)\n"
    assert extents.bind(kernel(text), {"x": (24,)}, {}) == {"a": 4, "b": 2, "c": 3}


def test_extents_of_zero() -> None:
    assert extents.bind(kernel(), {"q": (2, 6, 0), "k": (2, 3, 0)}, PARAMS)["m"] == 0
    assert extents.bind(kernel(), {"q": (2, 0, 5), "k": (2, 3, 7)}, PARAMS)["r"] == 0


def test_complete_needs_no_tensors() -> None:
    assert extents.free_axes(kernel()) == ["b", "g", "i", "j", "r"]
    sizes = {"b": 1, "g": 2, "r": 3, "i": 4, "j": 5}
    bound = extents.complete(kernel(), PARAMS, sizes)
    assert bound == {**sizes, "m": 3}
    assert extents.shape(kernel().inputs[0], bound) == (1, 6, 4)


def test_params() -> None:
    assert extents.bind_params(kernel(), {"scale": 2}) == {"block": 2, "scale": 2.0, "flag": False}
    assert isinstance(extents.bind_params(kernel(), {"scale": 2})["scale"], float)


Case = tuple[type[errors.CallError], dict[str, Any], dict[str, Any], dict[str, Any], str]

BAD: list[Case] = [
    (
        errors.MissingInput, {"q": (2, 6, 5)}, PARAMS, {},
        "f: input 'k' is missing and has no default. Pass a tensor for 'k'.",
    ),
    (
        errors.UnknownInput, {**SHAPES, "bais": (6,)}, PARAMS, {},
        "f: there is no input 'bais'. Did you mean 'bias'?",
    ),
    (
        errors.RankMismatch, {**SHAPES, "q": (2, 6)}, PARAMS, {},
        "f: 'q' has shape [2, 6] but is declared q[b,(g r),i]: 3 dimensions. "
        "Pass a tensor with 3 dimensions, or change the declaration.",
    ),
    (
        errors.ExtentMismatch, {**SHAPES, "k": (4, 3, 7)}, PARAMS, {},
        "f: axis 'b' is 2 in 'q' but 4 in 'k'. The same name means the same extent: "
        "make them equal, or give one of the axes another name in the spec.",
    ),
    (
        errors.ExtentMismatch, SHAPES, PARAMS, {"m": 9},
        "f: axis 'm' is 9 in sizes but 4 in 'axis m = ...'. The same name means the same extent: "
        "make them equal, or give one of the axes another name in the spec.",
    ),
    (
        errors.SplitNotDivisible, {**SHAPES, "q": (2, 7, 5)}, PARAMS, {},
        "f: dimension (g r) of 'q' has extent 7, which is not divisible by g=3 = 3. Pass a multiple of 3, or another extent for g=3.",
    ),
    (
        errors.SplitMismatch, {**SHAPES, "bias": (5,)}, PARAMS, {},
        "f: dimension (g r) of 'bias' has extent 5 but g=3 * r=2 = 6. Pass a tensor whose extent there is 6.",
    ),
    (
        errors.UnknownAxis, SHAPES, PARAMS, {"z": 1},
        "f: there is no axis 'z'. The axes are b, g, i, j, m, r.",
    ),
    (
        errors.BadExtent, SHAPES, PARAMS, {"i": -1},
        "f: the extent of axis 'i' must be an int of at least 0, not -1. Pass another size.",
    ),
    (
        errors.NegativeExtent, SHAPES, {**PARAMS, "block": -1}, {},
        "f: 'axis m' has the extent -5, which is negative. Change what it is computed from (block, size(j)).",
    ),
    (
        errors.ExtentNotComputable, SHAPES, {**PARAMS, "block": 0}, {},
        "f: the extent of 'axis m' cannot be computed: it divides by zero. Change the params or sizes it is computed from.",
    ),
    (
        errors.MissingParam, SHAPES, {}, {},
        "f: param 'scale' is missing and has no default. Pass scale=..., one float.",
    ),
    (
        errors.WrongParamType, SHAPES, {**PARAMS, "block": 2.0}, {},
        "f: param 'block' is an int, not 2.0 (float). Pass an int.",
    ),
    (
        errors.WrongParamType, SHAPES, {**PARAMS, "block": True}, {},
        "f: param 'block' is an int, not True (bool). Pass an int.",
    ),
    (
        errors.WrongParamType, SHAPES, {**PARAMS, "flag": 1}, {},
        "f: param 'flag' is a bool, not 1 (int). Pass a bool.",
    ),
    (
        errors.UnknownParam, SHAPES, {**PARAMS, "blok": 1}, {},
        "f: there is no param 'blok'. Did you mean 'block'?",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shapes", "params", "sizes", "message"), BAD)
def test_bad_call(kind: type[errors.CallError], shapes: Any, params: Any, sizes: Any, message: str) -> None:
    with pytest.raises(kind) as caught:
        extents.bind(kernel(), shapes, params, sizes)
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_unsolvable_split() -> None:
    shapes = {"q": (2, 0, 5), "k": (2, 0, 7)}
    with pytest.raises(errors.UnsolvableSplit) as caught:
        extents.bind(kernel(), shapes, PARAMS)
    assert str(caught.value) == (
        "f: dimension (g r) of 'q' does not determine the extents of 'r'. Pass sizes={'r': ...}, or declare 'axis r = ...' in the spec."
    )
    assert extents.bind(kernel(), shapes, PARAMS, {"r": 2})["r"] == 2


def test_completing_needs_the_size_of_every_free_axis() -> None:
    with pytest.raises(errors.UnknownExtent, match=r"nothing passed determines the extent of axis 'b'. Pass sizes=\{'b': ...\}."):
        extents.complete(kernel(), PARAMS, {"g": 2, "r": 3, "i": 4, "j": 5})


@pytest.mark.parametrize("extent", ["9 ** 99 ** 9", "2 ** 62 * p", "floor(10.0 ** 300)"])
def test_huge_extents_end_soon(extent: str) -> None:
    text = f"kernel f(x[t]) -> y[t]:\n    param p: int = 9\n    axis m = {extent}\n    y = x + sum[m](m)\n"
    with pytest.raises(errors.ExtentNotComputable, match="the number is too large"):
        extents.bind(kernel(text), {"x": (6,)}, {})
