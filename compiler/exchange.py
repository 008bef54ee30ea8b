"""Pass: contraction exchange.

sum_j A_ij (sum_e B_ie V_je) = sum_e B_ie (sum_j A_ij V_je): if the inner sum on the right is already known, a whole sweep is gone.

Before: delta[i] = sum[j](p * sum[e](d_o * v)). After: delta[i] = sum[e](d_o * o), where o = sum[j](p * v) is an output.
"""

from __future__ import annotations

from collections import Counter
from functools import reduce
from math import prod
from operator import and_
from typing import TYPE_CHECKING

from . import ir
from .algebra import (
    ZERO,
    add,
    conjunction,
    conjuncts,
    factors,
    is_const,
    product,
    reduce_sum,
    substitute,
    terms,
    total,
    where,
    with_children,
)
from .online import distribute, splits_terms
from .plan import lies_on

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


def split_sums(roots: dict[str, ir.Node], stored: Collection[ir.Node] = (), whole: Collection[str] = ()) -> dict[str, ir.Node]:
    """Sums over differently normalised terms become differences of sums: each normaliser has its own pivot, if it is not ``stored``. Sums
    over axes that are kept ``whole`` need no sweep, and lose fewer digits as they are.

    Before: sum[j]((a1 - lam * a2) * v). After: sum[j](a1 * v) - lam * sum[j](a2 * v).
    """
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        splits = isinstance(new, ir.Reduce) and new.op == "sum" and not set(new.over) <= set(whole) and splits_terms(new, stored)
        memo[n] = distribute(new) if isinstance(new, ir.Reduce) and splits else new
    return {name: memo[n] for name, n in roots.items()}


LONGEST_TABLE = 256
"""Rows of a table with which products are taken for every row, whichever are read."""


def read_after_products(roots: dict[str, ir.Node], extents: Mapping[str, int], used: set[str]) -> dict[str, ir.Node]:
    """Sums of products with what is read from a table, at more positions than the other factors have, are products with the table first.

    Before: sum[d](q * (k + table[r -> at])), where ``at`` has the axes i and j. After: sum[d](q * k) + sum[d](q * table)[r -> at], as
    Shaw et al. (2018, section 3.3) compute it. ``used`` receives the axes of tables whose extents make it worth while.
    """
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        memo[n] = _read_after(new, extents, used) if isinstance(new, ir.Reduce) and new.op == "sum" and new.where is None else new
    return {name: memo[n] for name, n in roots.items()}


def read_before_products(roots: dict[str, ir.Node]) -> dict[str, ir.Node]:
    """Sums of products that are read at one place of an axis are sums of what tensors hold there.

    Before: sum[d](x * w)[v -> target], the score of a token's target, where no tensor holds scores. After: sum[d](x * w[v -> target]),
    and 0 where the target is none.
    """
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        memo[n] = _read_before(new) if isinstance(new, ir.Read) and isinstance(new.x, ir.Pointwise | ir.Reduce) else new
    return {name: memo[n] for name, n in roots.items()}


def _read_before(n: ir.Read) -> ir.Node:
    at = dict(n.at)
    moved = [m for m in ir.topological([n.x]) if at.keys() & set(m.axes)]
    sums = [m for m in moved if isinstance(m, ir.Reduce)]
    places = {a for e in at.values() for a in e.axes}
    plain = all(m.op == "sum" and m.where is None and not places & set(m.over) for m in sums)
    fewer = bool(sums) and set(n.axes) < set(n.x.axes)
    shifted = not sums and any(isinstance(m, ir.Read) for m in moved) and all(isinstance(e, ir.Position) for e in at.values())
    if not plain or not (fewer or shifted) or _is_of_values(at.values()):
        return n
    memo: dict[ir.Node, ir.Node] = {}
    for m in moved:
        match m:
            case ir.Position(axis=axis):
                memo[m] = at[axis]
            case ir.Input():
                memo[m] = ir.read(m, [(a, e) for a, e in n.at if a in m.axes])
            case ir.Read(x=ir.Input() as x, at=((axis, e),)) if shifted and axis in at and not at.keys() & ({*x.axes} - {axis}):
                memo[m] = ir.read(x, [(axis, substitute(e, {ir.position(axis): at[axis]}))])
            case ir.Pointwise() | ir.Reduce():
                memo[m] = with_children(m, tuple(memo.get(c, c) for c in ir.children(m)))
            case _:
                return n
    return where(conjunction([c for a, e in n.at for c in lies_on(e, a)]), memo[n.x], ZERO)


def _is_of_values(positions: Iterable[ir.Node]) -> bool:
    return any(isinstance(n, ir.Input) and n.kind == "real" for n in ir.topological(positions))


def _read_after(n: ir.Reduce, extents: Mapping[str, int], used: set[str]) -> ir.Node:
    over = set(n.over)
    parts = [f for f in factors(n.x) if over & set(f.axes)]
    outer = [f for f in factors(n.x) if not over & set(f.axes)]
    for place, part in enumerate(parts):
        others = parts[:place] + parts[place + 1 :]
        taken = {a for f in others for a in f.axes}
        found: list[tuple[int, ir.Node]] = []
        left: list[tuple[int, ir.Node]] = []
        for sign, term in terms(part):
            if others and isinstance(term, ir.Read) and _is_row_of_table(term, over, taken, extents):
                used.update(a for a, _ in term.at)
                found.append((sign, ir.read(reduce_sum(over, product([*others, term.x])), list(term.at))))
            else:
                left.append((sign, term))
        if found:
            rest = reduce_sum(over, product([*others, total(left)])) if left else ZERO
            return product([*outer, total([*((1, r) for r in [rest] if not is_const(r, 0)), *found])])
    return n


def _is_row_of_table(read: ir.Read, over: set[str], taken: set[str], extents: Mapping[str, int]) -> bool:
    """Whether a tensor is read at positions that neither the sum nor values decide, and more of them than ``taken`` counts."""
    moved = {a for a, _ in read.at}
    places = {a for _, e in read.at for a in e.axes}
    if not isinstance(read.x, ir.Input) or not over & set(read.x.axes) or over & places or not places - taken or moved & taken:
        return False
    if _is_of_values(e for _, e in read.at):
        return False
    return prod(extents.get(a, LONGEST_TABLE + 1) for a in moved) <= LONGEST_TABLE


def read_what_is_chosen(roots: dict[str, ir.Node]) -> dict[str, ir.Node]:
    """Sums of which a position chooses one term, at more positions than the terms have, are reads.

    Before: sum[r where at == r](d_bins), the gradient of sum[j where at == r](p). After: d_bins[r -> at].
    """
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        memo[n] = _read_chosen(new) if isinstance(new, ir.Reduce) and new.op == "sum" and new.where is not None else new
    return {name: memo[n] for name, n in roots.items()}


def _read_chosen(n: ir.Reduce) -> ir.Node:
    left = list(conjuncts(n.where))
    for test in left:
        match test:
            case ir.Pointwise(op="eq", args=(ir.Position(axis=axis), at)) | ir.Pointwise(op="eq", args=(at, ir.Position(axis=axis))):
                rest = [c for c in left if c is not test]
                alone = n.over == (axis,) and axis in n.x.axes and axis not in at.axes and not any(axis in c.axes for c in rest)
                if alone and set(at.axes) - set(n.x.axes):
                    return where(conjunction(rest), ir.read(n.x, [(axis, at)]), ZERO)
            case _:
                pass
    return n


def exchange_contractions(roots: dict[str, ir.Node], known: set[ir.Node]) -> dict[str, ir.Node]:
    """Rewrite sums so that they use the sums in ``known`` (the reductions of the forward graph)."""
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = n if n in known else with_children(n, tuple(memo[c] for c in ir.children(n)))
        memo[n] = _exchange(new, known) if isinstance(new, ir.Reduce) and new.op == "sum" and new not in known else new
    return {name: memo[n] for name, n in roots.items()}


def _exchange(n: ir.Reduce, known: set[ir.Node]) -> ir.Node:
    parts = factors(n.x)
    for place, f in enumerate(parts):
        others = parts[:place] + parts[place + 1 :]
        exchanged: list[tuple[int, ir.Node]] = []
        left: list[tuple[int, ir.Node]] = []
        for sign, term in terms(f):
            found = _exchange_term(n, others, term, known)
            if found is None:
                left.append((sign, term))
            else:
                exchanged.append((sign, found))
        if exchanged:
            result = total(exchanged)
            if left:
                rest = reduce_sum(n.over, product([*others, total(left)]), n.where)
                result = add(result, _exchange(rest, known) if isinstance(rest, ir.Reduce) else rest)
            return result
    return n


def _exchange_term(n: ir.Reduce, others: list[ir.Node], term: ir.Node, known: set[ir.Node]) -> ir.Node | None:
    """sum_j of others * term, where term = (scalars and rows) * sum_e(B * V), if sum_j(others * V) is known."""
    over = set(n.over)
    for inner in factors(term):
        if not (isinstance(inner, ir.Reduce) and inner.op == "sum" and inner.where is None and not set(inner.over) & over):
            continue
        outside = [f for f in factors(term) if f is not inner]
        fixed = [f for f in factors(inner.x) if not over & set(f.axes)]
        moving = [f for f in factors(inner.x) if over & set(f.axes)]
        if not fixed or not moving or any(set(f.axes) & set(inner.over) for f in (*others, *outside)):
            continue
        candidate = reduce_sum(over, product([*others, *outside, *moving]), n.where)
        if _is_known(candidate, known):
            return reduce_sum(inner.over, product([*fixed, candidate]))
    return None


def _is_known(candidate: ir.Node, known: set[ir.Node]) -> bool:
    """Known but for factors that are not sums over what is swept."""
    sums = [f for f in factors(candidate) if isinstance(f, ir.Reduce)]
    match candidate:
        case ir.Pointwise(op="where", args=(_, x, _)):
            return _is_known(x, known)
    return bool(sums) and all(s in known for s in sums)


def join_choices(root: ir.Node) -> ir.Node:
    """Sums of which a position chooses one, as one sum of what that position chooses.

    Before: where(g == 0, sum[t](y * a), 0) + where(g == 1, sum[t](y * b), 0), the gradient of weights that are read at several g. After:
    sum[t](y * where(g == 0, a, where(g == 1, b, 0))), a product for every g instead of all products for every g.
    """
    groups: dict[tuple[str, tuple[str, ...], ir.Node | None], list[tuple[ir.Node, ir.Reduce]]] = {}
    rest: list[tuple[int, ir.Node]] = []
    for sign, term in terms(root):
        match term:
            case ir.Pointwise(op="where", args=(ir.Pointwise(op="eq") as test, ir.Reduce(op="sum") as found, zero)) if sign > 0:
                axis = _chosen_axis(test)
                if axis and is_const(zero, 0) and axis not in found.axes and axis not in found.over:
                    groups.setdefault((axis, found.over, found.where), []).append((test, found))
                    continue
        rest.append((sign, term))
    if all(len(group) == 1 for group in groups.values()):
        return root
    for (_, over, condition), group in groups.items():
        tests = {test for test, _ in group}
        parts = [Counter(factors(found.x)) for _, found in group]
        common = reduce(and_, parts)  # a square in one of them is not in all
        if len(group) == 1 or not common or len(tests) < len(group):
            rest += [(1, where(test, found, ZERO)) for test, found in group]
            continue
        chosen: ir.Node = ZERO
        for (here, _), p in zip(group, parts, strict=True):
            chosen = ir.pointwise("where", here, product((p - common).elements()), chosen)
        rest.append((1, reduce_sum(over, product([*common.elements(), chosen]), condition)))
    return total(rest)


def _chosen_axis(test: ir.Pointwise) -> str:
    """The axis of which a test names one position; empty where it is another test. Two such tests of an axis never both hold."""
    match test.args:
        case (ir.Const(), ir.Position(axis=axis)) | (ir.Position(axis=axis), ir.Const()):
            return axis
        case _:
            return ""
