"""Pass: a routing is a restriction. What holds for chosen pairs of a token and an expert only is computed for these pairs.

Before: y[t, d] = sum[n where chosen](gate[t, n] * sum[f](act[t, n, f] * w[n, f, d])), for every token and every expert. After: with the
pairs s of a token and an expert in order of experts, and for each of them its ``token`` and its ``expert``,

    rows[s, d] = gate[token[s], expert[s]] * sum[f](act[s, f] * w[expert[s], f, d])
    y[t, d] = sum[c](rows[choices[t, c], d])                      (a token's pairs)
    dw[n, f, d] = sum[s where first[n] <= s < last[n]](..)        (an expert's pairs)

Values of tokens and experts alone, such as the router's logits, stay as they are. The rewriting is done on the equations of outputs and
of gradients alike: what is stored, fused and exchanged follows from them. Which axis is the token's and which the expert's is read off:
a sum over experts takes, of those that a condition chooses by value, what their weights make of the token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import algebra, ir
from .affine import affine
from .algebra import conjunction, conjuncts, factors, follows, product, reduce_sum, terms, with_children
from .plan import ROUTE
from .tasks import NotFused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BLOCKS = {"c": 128, "triton": 64}
"""Pairs of a tile, by backend: rows of one expert that a program takes."""


@dataclass(slots=True)
class Routing:
    """A condition on pairs, and the axes that it brings."""

    condition: ir.Node
    route: ir.Route
    pair: str
    tile: str
    word: str
    features: frozenset[str]
    choices: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """Tells the names of several routings of a kernel apart."""
        return self.pair.removeprefix(f"{ROUTE}pair")

    @property
    def tokens(self) -> frozenset[str]:
        return frozenset(self.route.tokens)

    @property
    def experts(self) -> frozenset[str]:
        return frozenset(self.route.experts)

    def table(self, name: str, axes: Iterable[str]) -> ir.Node:
        return ir.make(ir.Table, axes, "int", self.route, name)

    def of_pair(self, axis: str) -> ir.Node:
        """The position along an axis of tokens or experts, of a pair."""
        kind = "token" if axis in self.tokens else "expert"
        return self.table(f"{kind}:{axis}", (self.pair,))

    def choice(self, kept: tuple[str, ...]) -> str:
        """The axis that counts the pairs at an index of ``kept``."""
        if kept not in self.choices:
            self.choices[kept] = f"{self.word}_of_{'_'.join(kept)}"
        return self.choices[kept]

    def bound(self, kept: Iterable[str]) -> ir.Node:
        """The most pairs there can be at an index of ``kept``, as a number made of extents."""
        kept = set(kept)
        free = set(self.condition.axes) - kept
        found = _extent_of(free - self._settled())
        for part in conjuncts(self.condition):
            if isinstance(part, ir.Select) and not kept & set(part.over) and _is_extent(part.k):
                most = ir.pointwise("max", ir.pointwise("min", part.k, _extent_of(part.over)), ir.const(0))
                found = ir.pointwise("min", found, ir.pointwise("mul", most, _extent_of(free - set(part.over))))
        return found

    def _settled(self) -> set[str]:
        """The axes of experts along which tokens say where theirs is: ``number[t] % 8 == n``."""
        found = set()
        for part in conjuncts(self.condition):
            match part:
                case ir.Pointwise(op="eq", args=(a, b)) if a.kind == b.kind == "int":
                    atoms = [n for n in affine(ir.pointwise("sub", a, b)).terms if self.experts & set(n.axes)]
                    if len(atoms) == 1 and isinstance(atoms[0], ir.Position):
                        found.add(atoms[0].axis)
                case _:
                    pass
        return found

    def derived(self) -> dict[str, ir.Node]:
        """Extents of the axes that the routing brings, as numbers made of extents."""
        pairs = self.bound(())
        full = ir.pointwise("floordiv", ir.pointwise("add", pairs, ir.const(self.route.block - 1)), ir.const(self.route.block))
        found = {self.pair: pairs, self.tile: ir.pointwise("add", full, _extent_of(self.experts))}
        return found | {axis: self.bound(kept) for kept, axis in self.choices.items()}


def _extent_of(axes: Iterable[str]) -> ir.Node:
    found: ir.Node = ir.const(1)
    for axis in sorted(axes):
        found = ir.pointwise("mul", found, ir.size(axis))
    return found


def _is_extent(node: ir.Node) -> bool:
    return all(isinstance(n, ir.Size | ir.Const | ir.Pointwise) for n in ir.topological([node])) and not node.axes


def find_routings(outputs: dict[str, ir.Node], rank: Mapping[str, int], block: int = 128) -> list[Routing]:
    """The routings of a graph: conditions under which sums over experts take what their weights make of tokens.

    ``rank`` orders axes; a tile has ``block`` pairs.
    """
    found: list[Routing] = []
    known: set[ir.Node] = set()
    for n in ir.topological(outputs.values()):
        if not isinstance(n, ir.Reduce) or n.op != "sum" or n.where is None:
            continue
        parts = _choosing(n)
        condition = conjunction(parts)
        if not parts or condition in known:
            continue
        experts = set(n.over) & set(condition.axes)
        experts |= {a for w in _weights(n.x, experts) if set(condition.axes) - set(w.axes) for a in set(w.axes) & set(condition.axes)}
        tokens = set(condition.axes) - experts
        features = _features(n.x, tokens, experts)
        if not tokens or not features:
            continue
        known.add(condition)
        number = str(len(found) + 1) if found else ""
        tokens_in_order, experts_in_order = (tuple(sorted(a, key=lambda x: (rank.get(x, len(rank)), x))) for a in (tokens, experts))
        route = ir.make(ir.Route, (), "int", condition, tokens_in_order, experts_in_order, block)
        found.append(Routing(condition, route, f"{ROUTE}pair{number}", f"{ROUTE}tile{number}", f"{ROUTE}choice{number}", features))
    return found


def _choosing(n: ir.Reduce) -> list[ir.Node]:
    """The conditions of a sum that choose by value among what it sums, but those that others imply."""
    over = set(n.over)
    parts = [c for c in conjuncts(n.where) if over & set(c.axes) and set(c.axes) - over and _is_choice(c)]
    implied = {c for p in parts if isinstance(p, ir.Select) for c in conjuncts(p.where)}
    return [p for p in parts if p not in implied]


def _is_choice(condition: ir.Node) -> bool:
    return any(isinstance(n, ir.Select | ir.Input) for n in ir.topological([condition]))


def _weights(x: ir.Node, experts: set[str]) -> list[ir.Node]:
    return [n for n in ir.topological([x]) if isinstance(n, ir.Input) and n.kind == "real" and experts <= set(n.axes)]


def _features(x: ir.Node, tokens: set[str], experts: set[str]) -> frozenset[str]:
    """Axes that only the weights of experts have, if products of these weights with tokens have them: none, if there is no such."""
    nodes = list(ir.topological([x]))
    inputs = [n for n in nodes if isinstance(n, ir.Input) and n.kind == "real"]
    weights = {a for n in inputs if experts <= set(n.axes) and not tokens & set(n.axes) for a in n.axes}
    given = {a for n in inputs if tokens & set(n.axes) and not experts <= set(n.axes) for a in n.axes}
    own = weights - given - experts
    made = any(isinstance(n, ir.Reduce) and tokens & set(n.axes) and experts <= set(n.axes) and own & set(n.axes) for n in nodes)
    return frozenset((weights | given) - tokens - experts) if made else frozenset()


def push_reads(outputs: dict[str, ir.Node], extents: Mapping[str, int], used: set[str]) -> dict[str, ir.Node]:
    """Reads of computed values at fixed positions become reads of tensors.

    Before: gate[t, n, f] = sum[d](x * w)[g -> 0]. After: sum[d](x * w[g -> 0]). Positions must be known to lie on their axes: ``used``
    receives the axes whose extents that takes for granted.
    """
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(outputs.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        if isinstance(new, ir.Read) and all(_is_on(e, extents.get(a, 0)) for a, e in new.at):
            used.update(a for a, _ in new.at)
            new = _pushed(new.x, new.at)
        memo[n] = new
    return {name: memo[n] for name, n in outputs.items()}


def _is_on(position: ir.Node, extent: int) -> bool:
    return isinstance(position, ir.Const) and 0 <= position.value < extent


def _pushed(x: ir.Node, at: tuple[tuple[str, ir.Node], ...]) -> ir.Node:
    mine = tuple((a, e) for a, e in at if a in x.axes)
    if not mine:
        return x
    match x:
        case ir.Pointwise(args=args):
            return with_children(x, tuple(_pushed(a, mine) for a in args))
        case ir.Reduce(over=over) if not {a for a, _ in mine} & set(over):
            return with_children(x, tuple(_pushed(c, mine) for c in ir.children(x)))
        case ir.Read(x=inner, at=other) if not any({a for a, _ in mine} & set(e.axes) for _, e in other):
            return ir.read(inner, [*other, *mine])
        case _:
            return ir.read(x, mine)


def assumptions(roots: Iterable[ir.Node]) -> dict[ir.Node, frozenset[ir.Node]]:
    """The conditions that hold wherever a value is needed."""
    roots = list(roots)
    found: dict[ir.Node, frozenset[ir.Node]] = dict.fromkeys(roots, frozenset())

    def needed(child: ir.Node, conditions: Iterable[ir.Node]) -> None:
        mine = frozenset(conditions)
        found[child] = found[child] & mine if child in found else mine

    for n in reversed(list(ir.topological(roots))):
        here = found[n]
        match n:
            case ir.Pointwise(op="where", args=(c, x, z)):
                needed(c, here)
                needed(x, here | set(conjuncts(c)))
                needed(z, here)
            case ir.Pointwise(args=args):
                for a in args:
                    needed(a, here)
            case ir.Reduce(over=over, x=x, where=where):
                outer = [c for c in here if not set(over) & set(c.axes)]
                needed(x, [*outer, *conjuncts(where)])
                if where is not None:
                    needed(where, outer)
            case _:
                for child in ir.children(n):
                    needed(child, ())
    return found


class Router:
    """Rewrites graphs for one routing."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.tokens, self.experts = routing.tokens, routing.experts
        self.own = set(routing.condition.axes)
        self.parts = set(conjuncts(routing.condition))
        self.implied = self.parts | {c for p in self.parts if isinstance(p, ir.Select) for c in conjuncts(p.where)}
        """Conditions that hold for every pair."""
        self.wide: dict[ir.Node, bool] = {}
        self.made: dict[ir.Node, bool] = {}
        self.assumed: dict[ir.Node, frozenset[ir.Node]] = {}
        self.dense: dict[ir.Node, ir.Node] = {}
        self.paired: dict[ir.Node, ir.Node] = {}

    def rewrite(self, roots: dict[str, ir.Node]) -> dict[str, ir.Node]:
        """Raises NotFused where a value of all pairs is needed that only chosen ones should have."""
        roots = {name: self._exchanged(n) for name, n in roots.items()}
        self.dense, self.paired = {}, {}
        self.assumed = assumptions(roots.values())
        self._mark(roots.values())
        found = {name: self._dense(n) for name, n in roots.items()}
        self._mark(found.values())
        for n in ir.topological(found.values()):
            if isinstance(n, ir.Reduce) and self.made[n]:
                raise NotFused(f"a value over {', '.join(n.axes)} is needed for all tokens and experts")
        return found

    # Exchange -------------------------------------------------------------------------------------------------------

    def _exchanged(self, root: ir.Node) -> ir.Node:
        """Sums of what chosen experts give, times something of the token, as sums over what experts make on their way.

        Before: dgate[t, n] = sum[d](dy[t, d] * sum[f](act * w_down)). After: sum[f](act * sum[d](dy * w_down)), of which the inner sum is
        needed anyway; the output of an expert is not.
        """
        memo: dict[ir.Node, ir.Node] = {}
        for n in ir.topological([root]):
            new = with_children(n, tuple(memo[c] for c in ir.children(n)))
            memo[n] = self._exchange(new) if isinstance(new, ir.Reduce) and new.op == "sum" else new
        return memo[root]

    def _exchange(self, n: ir.Reduce) -> ir.Node:
        over = set(n.over)
        if over & self.own or not self.tokens & set(n.axes) or n.where is not None:
            return n
        parts = factors(n.x)
        for place, f in enumerate(parts):
            several = terms(f)
            if len(several) > 1 and any(isinstance(t, ir.Reduce) and over & set(t.axes) and set(n.axes) <= set(t.axes) for _, t in several):
                others = parts[:place] + parts[place + 1 :]
                each = [(sign, reduce_sum(over, product([*others, t]))) for sign, t in several]
                return algebra.total((sign, self._exchange(t) if isinstance(t, ir.Reduce) else t) for sign, t in each)
        for place, inner in enumerate(parts):
            if not (isinstance(inner, ir.Reduce) and inner.op == "sum" and over & set(inner.axes) and set(n.axes) <= set(inner.axes)):
                continue
            others = parts[:place] + parts[place + 1 :]
            if not others or any(set(inner.over) & set(o.axes) for o in others) or over & set(inner.over):
                continue
            if inner.where is not None and over & set(inner.where.axes):
                continue
            combines = bool(self.parts & set(conjuncts(inner.where)))
            if not combines and not (self.experts <= set(inner.axes) and self.tokens & set(inner.axes)):
                continue
            shared = {a for f in factors(inner.x) if isinstance(f, ir.Reduce) for a in f.axes}  # heads, which are summed with the rest
            first = over - shared or over
            moving = [f for f in factors(inner.x) if first & set(f.axes)]
            fixed = [f for f in factors(inner.x) if not first & set(f.axes)]
            nested = reduce_sum(first, product([*moving, *others]))
            nested = self._exchange(nested) if isinstance(nested, ir.Reduce) else nested
            return reduce_sum({*inner.over, *over - first}, product([*fixed, nested]), inner.where)
        return n

    # What is wide ---------------------------------------------------------------------------------------------------

    def _mark(self, roots: Iterable[ir.Node]) -> None:
        """Values of tokens and experts that have further axes, and what is made of sums that have."""
        for n in ir.topological(roots):
            axes = set(n.axes)
            both = bool(self.tokens & axes) and self.experts <= axes
            further = bool(axes & self.routing.features)
            self.made[n] = both and ((isinstance(n, ir.Reduce) and further) or any(self.made[c] for c in ir.children(n)))
            self.wide[n] = both and n.kind != "bool" and (further or self.made[n])

    def _is_wide(self, n: ir.Node) -> bool:
        if n not in self.wide:
            self._mark([n])
        return self.wide[n]

    # Values of all tokens -------------------------------------------------------------------------------------------

    def _dense(self, root: ir.Node) -> ir.Node:
        for n in ir.topological([root]):
            if n not in self.dense:
                self.dense[n] = self._dense_one(n)
        return self.dense[root]

    def _dense_one(self, n: ir.Node) -> ir.Node:
        assumed = self.assumed.get(n, frozenset())
        match n:
            case ir.Reduce(op="sum", over=over, x=x, where=where) if self._is_wide(x) and self.parts <= assumed | set(conjuncts(where)):
                rest = [c for c in conjuncts(where) if not follows(c, self.implied)]
                return self._combined(n, set(over), x, rest)
        if self._is_wide(n) and set(n.axes) <= self.own and self.parts <= assumed:
            return ir.read(self._pair(n), [(self.routing.pair, self.routing.table("pair", self.own))])
        new = with_children(n, tuple(self.dense[c] for c in ir.children(n)))
        match new:
            case ir.Pointwise(op="add" | "sub"):
                return self._gathered_once(new)
        return new

    def _gathered_once(self, n: ir.Node) -> ir.Node:
        """Sums over the same pairs of a token become one.

        Before: sum[c](a[choices[t, c]]) + sum[c](b[choices[t, c]]). After: sum[c]((a + b)[choices[t, c]]).
        """
        signed = terms(n)
        gathered: dict[tuple[tuple[str, ...], ir.Table], list[tuple[int, ir.Node]]] = {}
        left: list[tuple[int, ir.Node]] = []
        for sign, term in signed:
            match term:
                case ir.Reduce(op="sum", over=over, x=ir.Read(x=x, at=((self.routing.pair, ir.Table() as at),)), where=None):
                    gathered.setdefault((over, at), []).append((sign, x))
                case _:
                    left.append((sign, term))
        if all(len(found) < 2 for found in gathered.values()):
            return n
        for (over, at), found in gathered.items():
            left.append((1, ir.reduce("sum", over, ir.read(algebra.total(found), [(self.routing.pair, at)]))))
        return algebra.total(left)

    def _combined(self, n: ir.Reduce, over: set[str], x: ir.Node, rest: list[ir.Node]) -> ir.Node:
        """A sum of pairs: those of a token, of an expert, or all."""
        r = self.routing
        kept = self.own - over
        inner = over - self.own
        condition = algebra.optional(conjunction(self._pair(c) for c in rest))
        value = self._pair(x)
        if not kept:
            exists = ir.pointwise("lt", ir.position(r.pair), r.table("count", ()))
            return reduce_sum({r.pair, *inner}, value, conjunction([exists, condition]))
        if kept == self.experts:
            here = ir.position(r.pair)
            bounds = [ir.pointwise("le", r.table("first", kept), here), ir.pointwise("lt", here, r.table("last", kept))]
            return reduce_sum({r.pair, *inner}, value, conjunction([*bounds, condition]))
        if self.tokens <= kept:
            rows = reduce_sum(inner, value, condition) if inner or condition is not None else value
            names = (*(a for a in r.route.tokens if a in kept), *(a for a in r.route.experts if a in kept))
            choice = r.choice(names)
            at = r.table(f"choices:{','.join(names)}", (*kept, choice))
            return ir.reduce("sum", (choice,), ir.read(rows, [(r.pair, at)]))
        raise NotFused(f"a sum over {', '.join(sorted(over))} of what {', '.join(sorted(self.own))} choose")

    # Values of pairs ------------------------------------------------------------------------------------------------

    def _pair(self, root: ir.Node) -> ir.Node:
        """A value at the token and the expert of every pair."""
        stack = [root]
        while stack:
            n = stack[-1]
            if n in self.paired:
                stack.pop()
                continue
            waiting = [c for c in self._needs(n) if c not in self.paired]
            if waiting:
                stack.extend(waiting)
                continue
            self.paired[n] = self._pair_one(n)
            stack.pop()
        return self.paired[root]

    def _needs(self, n: ir.Node) -> list[ir.Node]:
        if not self.own & set(n.axes) or follows(n, self.implied):
            return []
        match n:
            case ir.Pointwise(args=args) if self._opens(n):
                return list(args)
            case ir.Reduce(x=x, where=where) if self._is_wide(n):
                return [x, *(c for c in conjuncts(where) if not follows(c, self.implied))]
            case _:
                return []

    def _opens(self, n: ir.Node) -> bool:
        """Whether a pointwise value is computed for every pair, and not read from where it is computed for every token or expert."""
        if self._is_wide(n) or n.kind == "bool":
            return True
        return not any(isinstance(c, ir.Reduce) for c in ir.topological([n])) and len(list(ir.topological([n]))) <= 4

    def _pair_one(self, n: ir.Node) -> ir.Node:
        r = self.routing
        if follows(n, self.implied):
            return algebra.TRUE
        own = self.own & set(n.axes)
        if not own:
            return self._dense(n)
        match n:
            case ir.Position(axis=axis):
                return r.of_pair(axis)
            case ir.Pointwise(args=args) if self._opens(n):
                return with_children(n, tuple(self.paired[a] for a in args))
            case ir.Reduce(op="sum", over=over, x=x, where=where) if self._is_wide(n):
                condition = conjunction(self.paired[c] for c in conjuncts(where) if not follows(c, self.implied))
                if set(over) & self.own:
                    raise NotFused(f"a sum over {', '.join(over)} inside of a routing over {', '.join(sorted(self.own))}")
                return reduce_sum(over, self.paired[x], condition)
            case ir.Reduce() if self._is_wide(n):
                condition = conjunction(self.paired[c] for c in conjuncts(n.where) if not follows(c, self.implied))
                return ir.reduce(n.op, n.over, self.paired[n.x], algebra.optional(condition))
            case ir.Read(x=ir.Input() as x, at=at) if not any(e.axes for _, e in at):
                return ir.read(x, [*at, *((a, r.of_pair(a)) for a in sorted(own))])
            case _:
                return ir.read(self._dense(n), [(a, r.of_pair(a)) for a in sorted(own)])
