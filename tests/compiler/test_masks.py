"""Mask intervals against brute force: outside a range nothing is kept, inside the full range everything is."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

import weft.dsl
from tests.compiler.scalars import value
from weft.compiler import ir, masks
from weft.compiler.algebra import substitute
from weft.compiler.build import build
from weft.compiler.canonicalise import canonicalise
from weft.compiler.plan import edge, index, origin

MASKS = [
    "j <= i",
    "j < i",
    "0 <= i - j < 5",
    "abs(i - j) <= 3",
    "j >= i - 4 and j <= i + 2",
    "j <= i or j < 6",
    "abs(i - j) <= 2 or j < 3",
    "not (j > i)",
    "i // 4 == j // 4",
    "j // 3 <= i // 3",
    "0 <= j - clamp(i - 3, 0, size(j) - 7) < 7",
    "j % 3 == i % 3 and 0 <= j // 3 - clamp(i // 3 - 1, 0, (size(j) - i % 3 + 2) // 3 - 3) < 3",
    "2 * j <= i",
    "j <= min(i, 9)",
    "j != i",
    "abs(j - i) % 2 == 0 and j <= i",
    "max(i, 4) >= j",
    "j <= i or i >= 8",
    "i >= 8 and j <= i",
    "j < 6 or i < 4",
]


def _condition(text: str) -> ir.Node:
    spec = f'"""Mask."""\n\nkernel k(x[i], y[j]) -> o[i]:\n    o = sum[j where {text}](x * y)\n'
    outputs = canonicalise(build(weft.dsl.parse(spec).kernels[0]).outputs)
    (sweep,) = [n for n in ir.topological(outputs.values()) if isinstance(n, ir.Reduce)]
    assert sweep.where is not None
    positions = {n: ir.pointwise("add", index(n.axis), origin(n.axis)) for n in ir.topological([sweep.where]) if isinstance(n, ir.Position)}
    return substitute(sweep.where, dict(positions))


def _at(node: ir.Node | None, default: int, edges: dict[str, tuple[int, int]], sizes: dict[str, int], origins: dict[str, int]) -> int:
    return default if node is None else value(node, {}, edges, sizes, origins)


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("swept", ["j", "i"])
def test_ranges_hold_what_is_kept_and_full_ranges_are_full(text: str, swept: str) -> None:
    condition = _condition(text)
    rows = "i" if swept == "j" else "j"
    bounds = masks.solve(condition, swept, frozenset([rows]))
    test = masks.possible(condition, frozenset([rows, swept]))
    rng = random.Random(text + swept)
    for _ in range(40):
        sizes = {"i": rng.randint(7, 24), "j": rng.randint(10, 24)}
        origins = {"i": rng.choice([0, 0, 3, 11]), "j": rng.choice([0, 0, 2])}
        start = rng.randrange(sizes[rows])
        edges = {rows: (start, min(start + rng.randint(1, 6), sizes[rows]))}

        call = (edges, sizes, origins)
        low, high = _at(bounds.start, 0, *call), _at(bounds.stop, sizes[swept], *call)
        full_low, full_high = _at(bounds.full_start, 0, *call), _at(bounds.full_stop, sizes[swept], *call)
        for s in range(sizes[swept]):
            kept = [bool(value(condition, {rows: r, swept: s}, {}, sizes, origins)) for r in range(*edges[rows])]
            if any(kept):
                assert low <= s < high, (text, sizes, origins, edges, s)
            if bounds.solved and max(full_low, 0) <= s < min(full_high, sizes[swept]):
                assert all(kept), (text, sizes, origins, edges, s)
            if test is not None:
                one = {**edges, swept: (s, s + 1)}
                assert value(test, {}, one, sizes, origins) or not any(kept)


@pytest.mark.parametrize(
    "text",
    ["j <= i", "0 <= i - j < 5", "abs(i - j) <= 3", "j <= i or j < 6", "i // 4 == j // 4", "0 <= j - clamp(i - 3, 0, size(j) - 7) < 7"],
)
def test_affine_masks_are_solved(text: str) -> None:
    assert masks.solve(_condition(text), "j", frozenset("i")).solved


@pytest.mark.parametrize("text", ["j % 3 == i % 3", "2 * j <= i", "j != i"])
def test_what_is_not_affine_is_said_to_be_unknown(text: str) -> None:
    assert not masks.solve(_condition(text), "j", frozenset("i")).solved


def test_a_window_is_tight() -> None:
    bounds = masks.solve(_condition("0 <= i - j < 5"), "j", frozenset("i"))
    edges, sizes = {"i": (20, 24)}, {"i": 40, "j": 40}
    found = [value(b, {}, edges, sizes, {}) for b in (bounds.start, bounds.stop, bounds.full_start, bounds.full_stop) if b is not None]
    assert found == [16, 24, 19, 21]


def test_a_tile_within_one_period_of_a_remainder_is_told_apart() -> None:
    test = masks.possible(_condition("abs(i // 4 % 8 - j // 4 % 8) <= 1"), frozenset(["i", "j"]))
    assert test is not None
    sizes = {"i": 64, "j": 64}
    near, far = ({"i": (0, 4), "j": (first, first + 4)} for first in (4, 8))
    across = {"i": (0, 4), "j": (28, 36)}
    assert value(test, {}, near, sizes, {})
    assert not value(test, {}, far, sizes, {})
    assert value(test, {}, across, sizes, {}), "the tile holds the beginning of the next period"


def _tiles(text: str, condition: ir.Node) -> Iterator[tuple[list[bool], dict[str, tuple[int, int]], dict[str, int], dict[str, int]]]:
    """Which elements of a tile are kept; its edges, and sizes and origins."""
    rng = random.Random(text)
    for _ in range(200):
        sizes = {"i": rng.randint(7, 24), "j": rng.randint(10, 24)}
        origins = {"i": rng.choice([0, 0, 3, 11]), "j": rng.choice([0, 0, 2])}
        starts = {a: rng.randrange(n) for a, n in sizes.items()}
        edges = {a: (starts[a], min(starts[a] + rng.randint(1, 6), n)) for a, n in sizes.items()}
        places = [{"i": i, "j": j} for i in range(*edges["i"]) for j in range(*edges["j"])]
        yield [bool(value(condition, place, {}, sizes, origins)) for place in places], edges, sizes, origins


@pytest.mark.parametrize("text", MASKS)
def test_no_tile_with_a_kept_element_is_skipped(text: str) -> None:
    condition = _condition(text)
    test = masks.possible(condition, frozenset(["i", "j"]))
    for kept, *call in _tiles(text, condition) if test is not None else ():
        assert not any(kept) or value(test, {}, *call), (text, call)


@pytest.mark.parametrize("text", [*MASKS, "j < 9 or i < 4", "i // 4 == j // 4"])
def test_no_tile_with_a_masked_element_is_called_whole(text: str) -> None:
    condition = _condition(text)
    test = masks.certain(condition, frozenset(["i", "j"]))
    for kept, *call in _tiles(text, condition) if test is not None else ():
        assert all(kept) or not value(test, {}, *call), (text, call)


def test_whole_tiles_are_found() -> None:
    sizes = {"i": 16, "j": 16}
    for text, j, whole in (("j < 9 or i == j", (4, 8), True), ("j < 9 or i == j", (8, 12), False), ("i // 8 == j // 8", (0, 4), True)):
        test = masks.certain(_condition(text), frozenset(["i", "j"]))
        assert test is not None
        assert bool(value(test, {}, {"i": (0, 4), "j": j}, sizes, {})) == whole, text


def _bound(rng: random.Random, axis: str, depth: int) -> ir.Node:
    """A random bound made of the edges of a tile."""
    if not depth:
        return rng.choice([edge(axis, "start"), edge(axis, "stop"), ir.const(rng.randint(-3, 70)), ir.size("j")])
    op = rng.choice(["add", "sub", "min", "max", "mul", "floordiv"])
    a = _bound(rng, axis, depth - 1)
    return ir.pointwise(op, a, ir.const(rng.randint(1, 16)) if op in ("mul", "floordiv") else _bound(rng, axis, depth - 1))


def test_limits_hold_for_every_tile() -> None:
    """Along an axis that always has 64 places, and one of which nothing is known."""
    rng = random.Random(5)
    known = ir.within("t", 64)
    for _ in range(300):
        axis, block = rng.choice([known, "i"]), rng.choice([16, 32, 64, 48])
        bound = _bound(rng, axis, rng.randint(1, 3))
        limits = masks.limits(bound, {axis: block})
        for start in range(0, 64, block):
            found = value(bound, {}, {axis: (start, min(start + block, 64))}, {"j": 7}, {})
            assert limits.low <= found <= limits.high, bound
    assert masks.limits(edge(known, "stop"), {known: 16}) == masks.Limits(16, 64)
    assert masks.limits(edge(known, "start"), {known: 16}) == masks.Limits(0, 48)


def test_bounds_a_constant_apart_are_compared_at_once() -> None:
    a, b = edge("i", "start"), ir.pointwise("add", edge("i", "start"), ir.const(2))
    assert masks.int_op("min", a, b) is a
    assert masks.int_op("max", a, b) is b
    assert masks.int_op("max", b, a) is b


def test_a_bound_does_not_vary_along_what_a_tile_keeps_whole() -> None:
    low = ir.pointwise("le", index("j"), index("d"))
    assert masks.solve(low, "j", frozenset()).stop is not None
    assert masks.solve(low, "j", frozenset(), {"d"}) == masks.UNKNOWN
    both = ir.pointwise("and", low, ir.pointwise("le", index("j"), index("i")))
    found = masks.solve(both, "j", frozenset(), {"d"})
    assert found.stop == masks.solve(ir.pointwise("le", index("j"), index("i")), "j", frozenset()).stop
    assert not found.solved
