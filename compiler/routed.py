"""Planning of a graph with routings, or of products too wide for tiles of rows: rows, library steps and products, in the order in which
they need each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from . import ir
from .algebra import factors, product, substitute
from .outside import is_library
from .plan import ROUTE, Buffer, Dtype, Library
from .products import ProductBuilder, Shape, choose_stores, conditional_sums, is_pair, is_product, is_ready, shape_of
from .selections import by_folds
from .tasks import LEAVES, NotFused

if TYPE_CHECKING:
    from .pipeline import Work
    from .routes import Routing
    from .structure import Structure

NAMES = {
    "token": "token_of_pair", "expert": "expert_of_pair", "tile": "expert_of_tile", "first": "first_pair", "last": "last_pair",
    "count": "pair_count", "pair": "pair_of", "choices": "pairs_of", "tile_start": "tile_start", "tile_stop": "tile_stop",
}  # fmt: skip


class RouteTables:
    """The tables of one routing as tensors of a plan: given where the forward saved them, else made as soon as they are asked for."""

    def __init__(self, routing: Routing, work: Work, known: Mapping[ir.Node, Buffer]) -> None:
        self.routing = routing
        self.work = work
        self.known = known
        self.condition: ir.Node | None = None
        """The condition as a tensor, once there is one."""
        self.made: dict[str, ir.Input] = {}
        self.kinds: dict[str, str] = {}
        self.waiting: list[str] = []

    def input(self, name: str) -> ir.Node:
        """A table as a tensor that a kernel may read."""
        found = self.reserve(name)
        self.make_waiting()
        return found

    def reserve(self, name: str) -> ir.Node:
        """The tensor of a table that is made once there is a condition."""
        if name not in self.made:
            node = table_node(self.routing, name)
            buffer = self.known[node].name if node in self.known else self._named(name, node)
            self.made[name] = ir.make(ir.Input, node.axes, "int", buffer)
            self.kinds[buffer] = name
        return self.made[name]

    def kind(self, n: ir.Input) -> str:
        """Which table a tensor is: empty where it is none."""
        return self.kinds.get(n.name, "")

    def _named(self, name: str, node: ir.Node) -> str:
        """The buffer of a table that this plan makes."""
        self.waiting.append(name)
        buffer = next((b for b, n in self.work.wanted.items() if n is node), None)
        if buffer is None:
            buffer = self.work.fresh(table_word(name, self.routing.suffix))
            self.work.buffers[buffer] = Buffer(buffer, table_order(self.routing, node), "int32", "temporary")
        return buffer

    def make_waiting(self) -> None:
        """Library steps for the tables that were asked for."""
        r = self.routing.route
        for name in self.waiting:
            assert self.condition is not None
            route = ir.make(ir.Route, (), "int", self.condition, r.tokens, r.experts, r.block)
            node = ir.make(ir.Table, table_node(self.routing, name).axes, "int", route, name)
            self.work.library.append(Library(len(self.work.kernels), node, self.made[name].name))
        self.waiting.clear()


def table_node(r: Routing, name: str) -> ir.Node:
    """A table as the graph has it."""
    kind, _, axes = name.partition(":")
    match kind:
        case "token" | "expert":
            return r.table(name, (r.pair,))
        case "first" | "last":
            return r.table(name, r.experts)
        case "count":
            return r.table(name, ())
        case "pair":
            return r.table(name, r.condition.axes)
        case "choices":
            kept = tuple(axes.split(","))
            return r.table(name, (*kept, r.choice(kept)))
        case _:
            return r.table(name, (r.tile,))


def table_word(name: str, suffix: str = "") -> str:
    """What a plan calls a table."""
    kind, _, axes = name.partition(":")
    return "_".join(p for p in (f"{NAMES[kind]}{suffix}", *axes.split(",")) if p)


def table_order(routing: Routing, node: ir.Node) -> tuple[str, ...]:
    """The axes of a table in memory: tokens, experts, then what is counted."""
    r = routing.route
    return tuple(
        sorted(node.axes, key=lambda a: (a.startswith(ROUTE), (*r.tokens, *r.experts).index(a) if a in routing.condition.axes else 0))
    )


def plan_routed(work: Work, left: dict[str, ir.Node], known: Mapping[ir.Node, Buffer], routings: list[Routing]) -> dict[str, ir.Node]:
    """Plans all selections, tables and products under the roots; returns what is left, for rows."""
    work.wanted = dict(left)
    tables: dict[ir.Node, RouteTables] = {r.route: RouteTables(r, work, known) for r in routings}
    replaced: dict[ir.Node, ir.Node] = {n: ir.make(ir.Input, n.axes, n.kind, b.name) for n, b in known.items()}
    for n in ir.topological(left.values()):
        if isinstance(n, ir.Table):
            replaced[n] = tables[n.route].reserve(n.name)
    work.masks = list(work.lowered.masks)
    left = work.became(left, replaced)
    for r in routings:
        table = tables[r.route]
        if table.waiting or work.direction == "forward":
            left, table.condition = _plan_condition(work, left, substitute(r.condition, replaced), tables)
            table.make_waiting()
    while True:
        step = next((n for n in ir.topological(left.values()) if is_step(work, n)), None)
        if step is None:
            return left
        left = _plan_step(work, left, step, tables)


def is_step(work: Work, n: ir.Node) -> bool:
    """What is planned by itself: a step of the library, or a product."""
    return is_library(n) or is_product(n, work.storable)


def _plan_condition(
    work: Work, left: dict[str, ir.Node], condition: ir.Node, tables: dict[ir.Node, RouteTables]
) -> tuple[dict[str, ir.Node], ir.Node]:
    """The condition of a routing as a tensor."""
    both = {"": condition, **left}
    while True:
        step = next((n for n in ir.topological([both[""]]) if is_step(work, n)), None)
        if step is None:
            break
        both = _plan_step(work, both, step, tables)
    if not isinstance(both[""], ir.Input):
        both = _store(work, both, [both[""]])
    condition = both.pop("")
    return both, condition


def _plan_step(work: Work, left: dict[str, ir.Node], step: ir.Node, tables: dict[ir.Node, RouteTables]) -> dict[str, ir.Node]:
    prepared = _prepare(work, left)
    if prepared is not None:
        return prepared
    if work.is_short(step):
        return _store(work, left, [step])
    if is_library(step):
        return _plan_library(work, left, step)
    assert isinstance(step, ir.Reduce)
    return _plan_products(work, left, step, tables)


def _prepare(work: Work, left: dict[str, ir.Node]) -> dict[str, ir.Node] | None:
    """Stores what steps read that is neither a tensor nor made of tensors elementwise, or takes more than a few operations. None where
    all is there."""
    waiting: set[ir.Node] = set()
    """Steps, and what rests on them."""
    near: list[ir.Node] = []
    """Steps, and what is made of them elementwise."""
    wanted: dict[ir.Node, None] = {}
    for n in ir.topological(left.values()):
        step = is_step(work, n)
        if step or any(c in waiting for c in ir.children(n)):
            waiting.add(n)
        if step or (isinstance(n, ir.Pointwise | ir.Read) and any(c in near for c in ir.children(n)) and work.storable(n.axes)):
            near.append(n)
    for n in near:
        for c in ir.children(n):
            if c not in waiting and not work.is_short(n):
                whole = is_library(n) and not isinstance(c, LEAVES) and bool(c.axes)
                whole = whole or (isinstance(n, ir.Read) and c is n.x and not isinstance(c, ir.Input))
                if whole:
                    wanted.setdefault(c, None)
                else:
                    wanted.update(dict.fromkeys(_inner(c)))
    if wanted:
        short = [n for n in near if work.is_short(n) and not any(c in waiting for c in ir.children(n))]
        return _store(work, left, [*wanted, *short])
    return _store_operands(work, left)


def _store_operands(work: Work, left: dict[str, ir.Node]) -> dict[str, ir.Node] | None:
    """Operands of dense products as tensors, where it takes more than a few operations to make them again for every tile."""
    rewritten: dict[ir.Node, ir.Node] = {}
    cores: dict[ir.Node, None] = {}
    for n in ir.topological(left.values()):
        if (
            not is_product(n, work.storable)
            or not isinstance(n, ir.Reduce)
            or any(is_pair(a) for a in (*n.axes, *n.over))
            or not is_ready(n.x, ())
        ):
            continue
        sides: dict[tuple[str, ...], list[ir.Node]] = {}
        for f in factors(n.x):
            sides.setdefault(f.axes, []).append(f)
        for axes, side in sides.items():
            core = product(side)
            if not isinstance(core, LEAVES) and axes and sum(isinstance(m, ir.Pointwise) for m in ir.topological([core])) > 3:
                cores[core] = None
                rest = [f for f in factors(n.x) if f.axes != axes]
                rewritten[n] = ir.reduce("sum", n.over, ir.pointwise("mul", core, product(rest)) if rest else core, n.where)
                break
    if not cores:
        return None
    return _store(work, work.became(left, rewritten), list(cores))


def _inner(n: ir.Node) -> list[ir.Node]:
    """The reductions, and what is read elsewhere, that an elementwise value is made of."""
    found: list[ir.Node] = []
    stack, seen = [n], set()
    while stack:
        m = stack.pop()
        if m in seen or isinstance(m, LEAVES):
            continue
        seen.add(m)
        match m:
            case ir.Pointwise(args=args):
                stack.extend(args)
            case ir.Read(x=x, at=at):
                stack.extend(e for _, e in at)
                if not isinstance(x, ir.Input):
                    found.append(x)
            case _:
                found.append(m)
    return found


def _store(work: Work, left: dict[str, ir.Node], nodes: list[ir.Node]) -> dict[str, ir.Node]:
    """Values of rows, and selections in them, as tensors."""
    from .pipeline import plan_rows

    names: dict[str, ir.Node] = {}
    replaced: dict[ir.Node, ir.Node] = {}
    for n in nodes:
        name = next((b for b, root in left.items() if root is n and b and set(work.buffers[b].axes) == set(n.axes)), None)
        if name is None:
            usual = "chosen" if isinstance(n, ir.Select) else ""
            name = work.fresh(work.lowered.fused.names.get(n, usual) if work.lowered.fused else usual)
            work.buffers[name] = Buffer(name, work.order(n.axes), _dtype(n), "temporary")
        names[name] = n
        if isinstance(n, ir.Select):
            work.lowered.by_extent |= set(n.over)
            work.selections.append((name, n.over))
            names[name] = by_folds(n, dict(work.lowered.hints.extents))
        replaced[n] = ir.make(ir.Input, n.axes, n.kind, name)
    work.kernels += plan_rows(work, names, {}, names, chains=any(isinstance(n, ir.Select) for n in nodes))
    return work.became(left, replaced)


def _dtype(n: ir.Node) -> Dtype:
    return "float32" if n.kind == "real" else "bool" if n.kind == "bool" else "int32"


def _plan_library(work: Work, left: dict[str, ir.Node], step: ir.Node) -> dict[str, ir.Node]:
    """A selection, or a running count, as a step of PyTorch."""
    if isinstance(step, ir.Select):
        fixed = all(isinstance(n, ir.Size | ir.Const | ir.Pointwise) for n in ir.topological([step.k]))
        if not fixed and not isinstance(step.k, ir.Input):
            raise NotFused("the number of what is chosen depends on a parameter that is known at the call only")
    name = next((b for b, root in left.items() if root is step and b and work.buffers[b].dtype == _dtype(step)), None)
    if name is None:
        usual = "chosen" if isinstance(step, ir.Select) else "counted"
        name = work.fresh(work.lowered.fused.names.get(step, usual) if work.lowered.fused else usual)
        work.buffers[name] = Buffer(name, work.order(step.axes), _dtype(step), "temporary")
    work.library.append(Library(len(work.kernels), step, name))
    replaced: dict[ir.Node, ir.Node] = {step: ir.make(ir.Input, step.axes, step.kind, name)}
    return work.became(left, replaced)


def _plan_products(work: Work, left: dict[str, ir.Node], step: ir.Reduce, tables: dict[ir.Node, RouteTables]) -> dict[str, ir.Node]:
    """One kernel: a product, with the others of its shape that can be made now."""
    extents = dict(work.lowered.hints.extents)
    table = _tables_of(step, tables)
    shape = shape_of(step, work.order, extents, table)
    sums = [
        n
        for n in ir.topological(left.values())
        if isinstance(n, ir.Reduce) and is_product(n, work.storable) and _alike(n, step, shape, work, extents, table)
    ]
    if shape.pair is None and shape.rows is not None and work.context().few(shape.rows):
        saved = {b.name for b in work.buffers.values() if b.role == "saved"}
        work.conditional |= conditional_sums(left, sums, work.masks, saved)
        some = work.conditional.get(step)
        if some is not None and any(s not in work.conditional for s in sums):
            some = None
        sums = [s for s in sums if work.conditional.get(s) is some]
    taken: dict[str, None] = {}

    def fresh(n: ir.Node) -> str:
        word = work.lowered.fused.names.get(n, "") if work.lowered.fused else ""
        name = work.fresh(word)
        taken[name] = None
        work.buffers[name] = Buffer(name, work.order(n.axes), "float32", "temporary")
        return name

    made, replaced = choose_stores(left, sums, shape, work.storable, fresh, set(work.masks))
    for name in taken:
        n = made.stores.get(name) or made.totals[name]
        feature = not tables or any(shape.columns in t.routing.features for t in tables.values())
        wide = feature and shape.columns in n.axes and len(n.axes) > 1
        dtype: Dtype = _dtype(n) if n.kind != "real" else "input" if wide else "float32"
        work.buffers[name] = Buffer(name, work.order(n.axes), dtype, "temporary")
    builder = ProductBuilder(work.context(), shape, sums, made, table, work.conditional.get(sums[0]))
    written = "_".join([*made.stores, *made.totals])
    name = f"{work.direction}_{written}" if len(written) < 60 else f"{work.direction}_{next(iter([*made.stores, *made.totals]))}_and_others"
    work.kernels.append(builder.build(work.unused(name), _note(shape)))
    return work.became(left, replaced)


def _tables_of(n: ir.Reduce, tables: dict[ir.Node, RouteTables]) -> RouteTables | None:
    """The tables of the routing whose pairs a sum has; any, where it has none."""
    mine = [t for t in tables.values() if t.routing.pair in (*n.axes, *n.over)]
    return mine[0] if mine else next(iter(tables.values()), None)


def _alike(n: ir.Reduce, step: ir.Reduce, shape: Shape, work: Work, extents: dict[str, int], table: RouteTables | None) -> bool:
    if n is step:
        return True
    if n.axes != step.axes or set(n.over) != set(step.over) or n.where is not step.where:
        return False
    below = ir.topological([n.x, *([n.where] if n.where is not None else [])])
    if any(is_step(work, m) for m in below) or not is_ready(n.x, ()):
        return False
    return shape_of(n, work.order, extents, table) == shape


def _note(shape: Shape) -> str:
    kept = ", ".join(a for a in (*shape.grid, shape.rows, shape.columns) if a)
    return f"keeps {kept or 'nothing'}; sums {', '.join((*shape.steps, *([shape.depth] if shape.depth else []))) or 'nothing'}"


def routed_candidates(
    outputs: dict[str, ir.Node], routings: list[Routing], structure: Structure, storable: Callable[[Iterable[str]], bool]
) -> tuple[list[ir.Node], dict[ir.Node, tuple[str, ...]]]:
    """What the backward pass of a graph with routings may read, and how it lies in memory: selections, sums and all tables."""
    found = [n for n in ir.topological(outputs.values()) if is_library(n) or (isinstance(n, ir.Reduce) and storable(n.axes))]
    layout = {n: tuple(sorted(structure.sort(n.axes), key=lambda a: not a.startswith(ROUTE))) for n in found}
    for r in routings:
        words = [f"token:{a}" for a in r.route.tokens] + [f"{word}:{a}" for a in r.route.experts for word in ("expert", "tile")]
        words += ["first", "last", "count", "pair", "tile_start", "tile_stop", *(f"choices:{','.join(kept)}" for kept in r.choices)]
        nodes = [table_node(r, word) for word in words]
        layout |= {n: table_order(r, n) for n in nodes}
    return list(layout), layout


def needed_steps(steps: list[Library], read: set[str]) -> list[Library]:
    """The library steps whose results are read, by kernels or by one another."""
    needed: list[Library] = []
    wanted = set(read)
    for s in reversed(steps):
        if s.buffer in wanted:
            needed.append(s)
            wanted |= {n.name for n in ir.topological([s.node]) if isinstance(n, ir.Input)}
    return needed[::-1]
