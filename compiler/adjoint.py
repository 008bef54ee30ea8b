"""The adjoint of a recurrence: a recurrence backwards.

With S' = f(S, x) and y = g(S, x) at every step, the adjoint carries dS from the last step to the first:
dS = (df/dS)^T dS' + (dg/dS)^T dy, and gives dx = (df/dx)^T dS' + (dg/dx)^T dy of every step. Where it needs S, it replays the
forward steps from checkpoints; but states that are small beside the weights they meet are kept for every step, and so are their
products, and so are states that are small beside what every step reads. A linear recurrence has an adjoint of its own class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ir
from .algebra import ZERO, depends_on, factors, product, substitute, with_children
from .quiet import is_product
from .recurrence import Carver, histories
from .structure import is_read_copy

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


def adjoint_recurrence(
    forward: ir.Recurrence, cotangents: Mapping[str, ir.Node], reach: Collection[ir.Node]
) -> Iterable[tuple[ir.Node, ir.Node]]:
    """(operand, its adjoint) for the operands of a recurrence in ``reach``, given cotangents of its results by name."""
    from .autodiff import NoDerivative, pull_back

    body = forward.body
    if body.totals or body.replayed:
        raise NoDerivative(forward, "the adjoint of a recurrence has no derivative of its own")
    given: dict[ir.Node, ir.Node] = dict(zip(body.leaves, forward.operands, strict=True))

    def outer(node: ir.Node) -> ir.Node:
        return substitute(node, {leaf: x for leaf, x in given.items() if leaf is not x})

    states = {c.name: ir.state_before(c.name, (*c.axes, *body.along)) for c in body.states}
    names = {c.name: f"d_{c.name}" for c in body.states}
    adjoints = {c.name: ir.state_before(names[c.name], (*c.axes, *body.along)) for c in body.states}
    steps = {c.name: outer(c.next) for c in body.states}
    pairs: list[tuple[ir.Node, ir.Node]] = [(steps[c.name], adjoints[c.name]) for c in body.states]
    pairs += [(outer(node), cotangents[name]) for name, node in body.values if name in cotangents]
    operands = [x for x in dict.fromkeys(forward.operands) if x in reach and x.kind == "real"]  # rewriting may have made two of them one
    found = pull_back(pairs, [*states.values(), *operands])
    products, rows = kept_products(body), histories(body.states, body.along)
    whole = [c for c in body.states if c.name not in rows] if products or keeps_states(body) else []
    if products or whole or rows:
        named = {node: name for name, node in body.values}
        kept: dict[ir.Node, ir.Node] = {
            states[name]: h.before(ir.result(forward, named.get(h.row, f"row_{name}"), h.row.axes), body.along, body.reverse)
            for name, h in rows.items()
        }
        kept |= {states[c.name]: ir.result(forward, named.get(states[c.name], f"before_{c.name}"), {*c.axes, *body.along}) for c in whole}
        kept |= {outer(p): ir.result(forward, f"product_{n}", {*p.axes, *body.along}) for n, p in enumerate(products)}
        found = {x: substitute(node, kept) for x, node in found.items()}
    replayed = tuple(ir.Carry(c.name, c.axes, None, steps[c.name]) for c in body.states)
    carries = tuple(
        ir.Carry(names[c.name], c.axes, cotangents.get(f"final_{c.name}"), found.get(states[c.name], ZERO)) for c in body.states
    )
    roots = {str(n): found[x] for n, x in enumerate(operands) if x in found}
    if any(isinstance(n, ir.Pointwise) and n.op == "where" for n in ir.topological([*steps.values(), *(node for node, _ in pairs)])):
        roots = {name: _quiet(node) for name, node in roots.items()}
    if any(_chooses(steps[c.name], c.axes, body.along) for c in body.states if c.name not in rows):
        back = set(names.values())
        roots = {name: _quiet_inside(node, back) for name, node in roots.items()}
        carries = tuple(ir.Carry(c.name, c.axes, c.start, _quiet_inside(c.next, back)) for c in carries)
    copied = any(is_read_copy(a) for n in ir.topological(steps.values()) if isinstance(n, ir.Reduce) for a in n.over)
    if copied or _leaves_out(cotangents.values(), body.along):
        comes = {*adjoints.values(), *cotangents.values()}
        roots = {name: _quiet_products(node, comes, body.along) for name, node in roots.items()}
        carries = tuple(ir.Carry(c.name, c.axes, c.start, _quiet_products(c.next, comes, body.along)) for c in carries)
    used = {
        n.name for node in (*roots.values(), *(c.next for c in carries)) for n in ir.topological([node]) if isinstance(n, ir.StateValue)
    }
    needed = bool(used & set(states))
    checkpoints = {c.name: ir.result(forward, f"checkpoint_{c.name}", {*c.axes, segment_axis(body)}) for c in body.states} if needed else {}
    outputs = [x.axes for x in ir.topological([*forward.operands, *cotangents.values()]) if isinstance(x, ir.Input)]
    outputs += [node.axes for _, node in body.values]
    outputs += [x.axes for x in forward.operands if isinstance(x, ir.Reduce)]
    started = {c.name: c.start for c in body.states if c.start is not None}
    replays = replayed if needed else ()
    carver = Carver(body.along, not body.reverse, carries, outputs, replays, checkpoints, body.parallel, columns=body.columns)
    carved = carver.carve(roots, {names[s] for s in started})
    for n, x in enumerate(operands):
        if str(n) in carved.roots:
            yield x, carved.roots[str(n)]
    for s, start in started.items():
        for leaf, adjoint in pull_back([(outer(start), carved.finals[names[s]])], operands).items():
            if leaf in operands:
                yield leaf, adjoint


def kept_products(body: ir.Body) -> list[ir.Reduce]:
    """The products of weights with states that are vectors beside them, in the steps of a body.

    A step that is undone needs them again, and they cost many times more than to read what came of them: they are kept for every
    step, and so are the states.
    """

    most = max((body.own(c.axes) for c in body.states), default=0)
    found: list[ir.Reduce] = []
    for n in ir.topological([c.next for c in body.states]):
        if isinstance(n, ir.Reduce) and n.op == "sum":
            parts = factors(n.x)
            weights = [f for f in parts if not set(body.along) & set(f.axes) and body.own(f.axes) > most]
            if weights and any(isinstance(m, ir.StateValue) for f in parts for m in ir.topological([f])):
                found.append(n)
    return found


def keeps_states(body: ir.Body) -> bool:
    """Whether the states of every step are no more than what a step reads besides: a matrix beside the matrices of a chunk of positions.

    They are then kept: nothing is replayed, and what needs no adjoint of a state is made of all steps at once.
    """

    if body.columns:
        return True
    most = max((body.own(c.axes) for c in body.states), default=0)
    return len(body.along) == 1 and most > 1 and any(body.along[0] in x.axes and body.own(x.axes) >= most for x in body.leaves)


def _leaves_out(cotangents: Iterable[ir.Node], along: Collection[str]) -> bool:
    """Whether a mask of what is made of the steps may leave out all that comes back to one; not so chunks and the steps within them."""
    if any(ir.is_made(a) for a in along):
        return False
    sums = (n for n in ir.topological(cotangents) if isinstance(n, ir.Reduce) and n.where is not None)
    return any(not set(along) & set(n.over) for n in sums)


def _quiet(gradient: ir.Node) -> ir.Node:
    """0 where nothing comes back, whatever it would be multiplied with: a branch that was not taken may hold anything."""
    parts = factors(gradient)
    coming = [f for f in parts if any(isinstance(n, ir.StateValue) for n in ir.topological([f]))]
    if len(coming) in (0, len(parts)) or set(product(coming).axes) != set(gradient.axes):
        return gradient
    return ir.pointwise("where", ir.pointwise("eq", product(coming), ZERO), ZERO, gradient)


def _chooses(step: ir.Node, axes: Collection[str], along: Collection[str]) -> bool:
    """Whether the step number says which elements of a state with these axes are kept: what they would have become otherwise may be
    anything."""
    conditions = [n.args[0] for n in ir.topological([step]) if isinstance(n, ir.Pointwise) and n.op == "where"]
    return any(set(along) & set(c.axes) and set(axes) & set(c.axes) for c in conditions)


def _quiet_inside(root: ir.Node, back: Collection[str]) -> ir.Node:
    """The sums of ``root`` with 0 for every term to which nothing comes back through the states ``back``."""
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological([root]):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        if isinstance(new, ir.Reduce) and new.op == "sum":
            parts = factors(new.x)
            coming = [f for f in parts if any(isinstance(m, ir.StateValue) and m.name in back for m in ir.topological([f]))]
            if coming and len(coming) < len(parts):
                quiet = ir.pointwise("where", ir.pointwise("eq", product(coming), ZERO), ZERO, new.x)
                new = ir.reduce("sum", new.over, quiet, new.where)
        memo[n] = new
    return memo[root]


def _quiet_products(root: ir.Node, comes: Collection[ir.Node], along: Collection[str]) -> ir.Node:
    """``root`` with 0 for every product to which nothing comes back: what a step reads at other positions does not read all of them. Sums
    over steps stay the products that they are, of weights' gradients, and so do products with weights."""
    order = list(ir.topological([root]))
    back = set(comes)
    for n in order:
        if any(c in back for c in ir.children(n)):
            back.add(n)
    within = {c for n in order if is_product(n) for c in ir.children(n) if is_product(c)}
    within |= {n.x for n in order if isinstance(n, ir.Reduce) and set(along) & set(n.over)}
    memo: dict[ir.Node, ir.Node] = {}
    for n in order:
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        if n in back and is_product(n) and n not in within:
            parts = factors(new)
            coming = [f for f in parts if depends_on(f, comes.__contains__)]
            weights = [f for f in parts if f not in coming and not _is_of_steps(f, along)]
            if coming and len(coming) + len(weights) < len(parts):
                own = product(f for f in parts if f not in weights)
                new = product([ir.pointwise("where", ir.pointwise("eq", product(coming), ZERO), ZERO, own), *weights])
        memo[n] = new
    return memo[root]


def _is_of_steps(x: ir.Node, along: Collection[str]) -> bool:
    """Whether steps differ in a value."""
    return bool(set(along) & set(x.axes)) or depends_on(x, lambda n: isinstance(n, ir.StateValue))


def segment_axis(body: ir.Body) -> str:
    """The axis of checkpoints: one for every so many steps of the outer time axis. No axis of a spec has such a name."""
    return f"{body.along[0]}.segment"


def replay_axis(body: ir.Body) -> str:
    """The axis of the states that are replayed within a segment."""
    return f"{body.along[0]}.replay"
