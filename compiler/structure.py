"""What the axes of a graph are to a schedule, read off its contractions.

A value is *storable* if some tensor of the kernel has all of its axes; one that is not (a score, with query and key axes both)
must never meet memory: a kernel makes it tile by tile. A reduction of such a value to a storable one is a *sweep*. Axes that
inner contractions sum (head dims), and those that only the other factor of a sweep has (value dims), are kept *whole*; the
remaining ones are loops, one at a time or in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..dsl import typed
from . import ir
from .algebra import conjuncts, factors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


Axes = frozenset[str]

WHOLE_LIMIT = 256
"""Largest extent of an axis that a tile keeps whole."""
NARROW = 16
"""An axis that is declared to have fewer indices makes no row of elements that lie side by side."""


@dataclass(slots=True)
class Structure:
    hosts: list[Axes]
    whole: set[str]
    pair: set[str]
    """Axes of the values that are never stored."""
    related: set[str]
    """Axes whose positions a condition or a value compares."""
    order: dict[str, int] = field(default_factory=dict)
    """Declared order of axes, memory order within a tensor."""
    minor: set[str] = field(default_factory=set)
    """Later parts of split dimensions: rather looped over than tiled."""
    stages: list[Axes] = field(default_factory=list)
    """Axes of sums that one stage of a kernel hands to the next, and that no tensor of the kernel has."""
    by_extent: set[str] = field(default_factory=set)
    """Axes kept whole, or not, because of their extent."""
    tables: set[str] = field(default_factory=set)
    """Axes kept whole that are too long for a tile: sums by position along them are added to in memory."""
    narrow: set[str] = field(default_factory=set)
    """Axes that a spec declares with few indices."""
    innermost: set[str] = field(default_factory=set)
    """Axes that lie innermost in every input of several axes that has them, but for narrow ones."""
    features: set[str] = field(default_factory=set)
    """Those, axes that lie innermost in all that has a sample axis, and those of `_graph_features`."""
    shares: list[Axes] = field(default_factory=list)
    """Axes of the shares that heads store of a gradient that sums over them."""

    def storable(self, axes: Iterable[str]) -> bool:
        wanted = frozenset(axes)
        return any(wanted <= host for host in self.hosts)

    def is_sweep(self, node: ir.Node) -> bool:
        """A reduction that a loop over tiles computes."""
        if not isinstance(node, ir.Reduce) or not self.storable(node.axes) or not set(node.over) - self.whole:
            return False
        return not self.storable(operand_axes(node)) or bool(set(node.over) & (self.pair | self.related) - self.whole)

    def sort(self, axes: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(axes, key=lambda a: (self.order.get(original(a), len(self.order)), a)))


def copied(axis: str, number: int) -> str:
    """The name of the first, second ... axis of one size and meaning, where a product has an axis several times."""
    return f"{axis}.{number}" if number > 1 else axis


def read_copy(axis: str, number: int) -> str:
    """The name of a copy of an axis along which a step reads a state at other positions than its own."""
    return f"{original(axis)}.read{number}"


def is_read_copy(axis: str) -> bool:
    return axis.rpartition(".")[2].startswith("read") and "." in axis


def original(axis: str) -> str:
    """The axis that a copy is one of; any other axis itself."""
    name, dot, number = axis.rpartition(".")
    return name if dot and number.removeprefix("read").isdigit() else axis


def operand_axes(node: ir.Reduce) -> set[str]:
    return {*node.x.axes, *node.over, *(node.where.axes if node.where is not None else ())}


def analyse(
    kernel: typed.Kernel,
    forward: dict[str, ir.Node],
    roots: dict[str, ir.Node],
    extents: Mapping[str, int],
    extra_hosts: Iterable[Iterable[str]] = (),
    *,
    in_memory: bool = False,
    time: Collection[str] = (),
    stages: Collection[Axes] = (),
) -> Structure:
    """The structure of the graph under ``roots``; ``forward``: the canonical outputs, which the roots are or derive from.

    ``in_memory``: tables that are too long for a tile may be added to in memory; else every tile of their axis is a sweep of its own.
    ``time``: axes of steps, which no tile keeps whole.
    """
    nodes = list(ir.topological([*forward.values(), *roots.values()]))
    inputs = [n for n in nodes if isinstance(n, ir.Input)]
    contracted = {f for n in nodes if isinstance(n, ir.Reduce) and n.op == "sum" and len(factors(n.x)) > 1 for f in factors(n.x)}
    added = {frozenset(n.axes) for n in inputs if n not in contracted}
    made = [n for n in ir.topological(forward.values()) if isinstance(n, ir.Reduce)]
    scores = [set(n.axes) for n in made if n.op == "sum" and len(factors(n.x)) > 1]
    outputs = [frozenset(t.axes) for t in kernel.outputs]
    for n in roots.values():  # that the gradient of a bias of every score is stored makes no tensors of scores
        axes = frozenset(n.axes)
        if axes not in added or not any(s <= axes for s in scores):
            outputs.append(axes)
    crossing = _crossing(nodes, outputs)
    hosts = [*outputs, *(frozenset(h) for h in extra_hosts), *stages]
    for given in inputs:
        paired = any({a, b} <= set(given.axes) for a, b in crossing)
        if not paired or given in contracted:
            hosts.append(frozenset(given.axes))
    hosts += [frozenset(n.x.axes) for n in nodes if isinstance(n, ir.Read) and ir.children(n.x)]
    known = {*hosts}
    for n in nodes:
        if isinstance(n, ir.Read) and _is_rename(n, stages):
            again = frozenset(n.x.axes) in known and all(isinstance(e, ir.Position) for _, e in n.at)
            if again or not any({a, b} <= {*n.axes} for a, b in crossing):
                hosts.append(frozenset(n.axes))
    found = Structure(hosts, set(), set(), set(), stages=[*stages])
    crossed = {a for pair in crossing for a in pair}
    for n in nodes:
        if isinstance(n, ir.Reduce) and not found.storable(n.axes) and crossed & set(n.over) and not (n.op == "sum" and n.where is None):
            found.hosts.append(frozenset(n.axes))
    _order(kernel, found, ir.topological(forward.values()))
    found.pair.update(time)
    for n in nodes:
        if isinstance(n, ir.Reduce) and not found.storable(n.axes):
            found.whole.update(n.over)
    swept = {a for n in ir.topological(forward.values()) if isinstance(n, ir.Reduce) and not _weighs_bins(n) for a in n.over}
    _sweep_axes(nodes, found, extents, swept, in_memory=in_memory)
    return found


def _weighs_bins(n: ir.Reduce) -> bool:
    """Whether a sum goes over what positions were summed to, as a product with a table has it: a small axis, no sweep."""
    scattered = [scatter_axis(f) for f in factors(n.x) if isinstance(f, ir.Reduce)]
    return n.op == "sum" and n.where is None and {*n.over} == {s[0] for s in scattered if s is not None}


def _is_made_row(f: ir.Node, paired: list[ir.Node], found: Structure) -> bool:
    """Whether a factor that no tensor holds is nevertheless a row of features for every position, a projection, beside weights of pairs."""
    if not (isinstance(f, ir.Reduce) and f.op == "sum" and f.where is None and set(f.over) <= found.whole):
        return False
    places = set(f.axes) - found.features
    return len(places) < len(f.axes) and any(places < set(g.axes) - found.features for g in paired if g is not f)


@dataclass(frozen=True, slots=True)
class Stages:
    """What one part of a graph hands to the next: the axes of sums that no tensor of the kernel has."""

    axes: list[Axes] = field(default_factory=list)
    positions: set[str] = field(default_factory=set)
    """That some of these sums go over."""
    projects: bool = False
    """Whether some are projections, rows of features times weights, and scores are made of what is handed on."""


def find_stages(outputs: Mapping[str, ir.Node], kernel: typed.Kernel) -> Stages:
    """Sums over positions that leave features and that no tensor of the kernel has (keys summed to fewer keys, an attention to keys that
    are attended to in turn), and projections. None where another such sum leaves something else."""
    hosts = [frozenset(t.axes) for t in (*kernel.inputs, *kernel.outputs)]
    nodes = list(ir.topological(outputs.values()))
    order = Structure([], set(), set(), set())
    _order(kernel, order, nodes)
    features = order.features
    positions: set[str] = set()
    found: dict[Axes, None] = {}
    projects = False
    for n in nodes:
        if not (isinstance(n, ir.Reduce) and n.op == "sum") or any(set(n.axes) <= h for h in hosts):
            continue
        if not set(n.over) - features:
            if n.where is None and len(set(n.axes) & features) == 1 and any(isinstance(f, ir.Input) for f in factors(n.x)):
                found[frozenset(n.axes)] = None
                projects = True
        elif set(n.over) & features:
            return Stages()
        else:
            found[frozenset(n.axes)] = None
            positions.update(n.over)
    stages = [axes for axes in found if len(axes & features) == 1]
    if not all(any(axes <= s for s in stages) for axes in found):
        return Stages()
    hosts += stages
    projects &= any(isinstance(n, ir.Reduce) and not any(set(n.axes) <= h for h in hosts) for n in nodes)
    return Stages(stages, {a for a in positions if not _is_innermost(a, kernel)}, projects)


def _is_innermost(axis: str, kernel: typed.Kernel) -> bool:
    """Whether a tensor with as many axes as any that has this one ends with it: a feature that weights have elsewhere too."""
    having = [t.axes for t in kernel.inputs if axis in t.axes]
    return any(axes[-1] == axis and len(axes) == max(map(len, having)) for axes in having)


def ordered(kernel: typed.Kernel) -> Structure:
    """A structure that knows nothing but the order of the axes."""
    found = Structure([], set(), set(), set())
    _order(kernel, found)
    return found


def _is_rename(n: ir.Read, stages: Collection[Axes]) -> bool:
    """A stored tensor, an input or what a stage made, read along other axes, one for one."""
    return (isinstance(n.x, ir.Input) or frozenset(n.x.axes) in stages) and all(len(e.axes) <= 1 for _, e in n.at)


def _crossing(nodes: list[ir.Node], outputs: list[Axes]) -> set[tuple[str, str]]:
    """Pairs of axes that a contraction of stored values brings together and no output has."""
    expanded: set[ir.Node] = set()
    pairs: set[tuple[str, str]] = set()
    for n in nodes:
        inherited = any(c in expanded for c in ir.children(n))
        crosses = False
        if isinstance(n, ir.Reduce) and n.op == "sum":
            parts = factors(n.x)
            for x, a in enumerate(parts):
                for b in parts[x + 1 :]:
                    left, right = set(a.axes) - set(b.axes), set(b.axes) - set(a.axes)
                    if left and right:
                        crosses = True
                        if a not in expanded and b not in expanded:
                            pairs |= {(p, q) for p in left for q in right}
        if inherited or crosses:
            expanded.add(n)
    return {(a, b) for a, b in pairs if not any({a, b} <= o for o in outputs)}


def _order(kernel: typed.Kernel, found: Structure, nodes: Iterable[ir.Node] = ()) -> None:
    """Fills in what the declarations say of the axes, and what ``nodes`` say of which are features."""
    for tensor in (*kernel.inputs, *kernel.outputs):
        for dim in tensor.dims:
            found.minor.update(dim[1:])
    found.narrow = {a.name for a in kernel.axes if isinstance(a.extent, typed.Literal) and int(a.extent.value) < NARROW}
    wide = [[a for a in t.axes if a not in found.narrow] for t in kernel.inputs if len(t.axes) > 1]
    found.innermost = {axes[-1] for axes in wide if axes} - {a for axes in wide for a in axes[:-1]}
    nodes = list(nodes)
    found.features = found.innermost | _features_of_rows(kernel, found.narrow) | _graph_features(kernel, nodes, found.narrow)
    projected = _projected_features(kernel, nodes) - found.narrow
    found.features |= projected
    if any(ir.fixed_extent(a) for n in nodes for a in n.axes):  # in chunks
        found.innermost |= projected
    rank: dict[str, int] = {}
    for tensor in (*kernel.inputs, *kernel.outputs):
        for place, axis in enumerate(tensor.axes):
            rank.setdefault(axis, len(rank) + 100 * place)
    found.order = {axis: n for n, axis in enumerate(sorted(rank, key=lambda a: rank[a]))}


def _sample_axis(kernel: typed.Kernel) -> str | None:
    """The axis that all outputs begin with, if some inputs, weights, lack it and others have it before two more."""
    firsts = {t.axes[0] if t.axes else None for t in kernel.outputs}
    axis = firsts.pop()
    if firsts or axis is None or all(axis in t.axes for t in kernel.inputs):
        return None
    return axis if any(t.axes[0] == axis and len(t.axes) > 2 for t in kernel.inputs if t.axes) else None


def _features_of_rows(kernel: typed.Kernel, narrow: Collection[str]) -> set[str]:
    """The axes that lie innermost in everything that differs by sample, wherever weights have them."""
    sample = _sample_axis(kernel)
    rows = [[a for a in t.axes if a not in narrow] for t in (*kernel.inputs, *kernel.outputs) if sample in t.axes[:-1]]
    return {axes[-1] for axes in rows if len(axes) > 2} - {a for axes in rows for a in axes[:-1]}


def _projected_features(kernel: typed.Kernel, nodes: Iterable[ir.Node]) -> set[str]:
    """The axes that lie innermost, of those that are left, in all weights that rows of a recurrence are projected with: features of what
    that makes, if no row that is given has them otherwise. Attention has axes of keys in such places; a recurrence has none."""
    sample = _sample_axis(kernel)
    if sample is None or not any(isinstance(s, typed.State) for s in kernel.body):
        return set()
    declared = {t.name: t.axes for t in kernel.inputs}
    given = [t.axes for t in kernel.inputs if sample in t.axes]
    made: list[list[str]] = []
    for n in nodes:
        if isinstance(n, ir.Reduce) and n.op == "sum" and n.where is None and sample in n.axes:
            weights = [declared.get(f.name, f.axes) for f in factors(n.x) if isinstance(f, ir.Input) and sample not in f.axes]
            made += [[a for a in w if a in n.axes] for w in weights]
    last = {a for row in made for a in row[-1:]}
    return last - {a for row in (*made, *given) for a in row[:-1]}


def _graph_features(kernel: typed.Kernel, nodes: Iterable[ir.Node], narrow: Collection[str]) -> set[str]:
    """The axes that plain sums go over or that results end with, that no score has and that do not number what differs by place: what
    projections make and take."""
    summed = {t.axes[-1] for t in kernel.outputs if len(t.axes) > 1}
    places: set[str] = set()
    other: set[str] = set()
    scores: list[ir.Node] = []
    for n in nodes:
        match n:
            case ir.Reduce(op="sum", over=over, where=None):
                summed.update(over)
            case ir.Reduce(op="sum", over=over, where=condition):
                places.update(over, condition.axes if condition is not None else ())
            case ir.Reduce():
                places.update(n.over)
                other |= operand_axes(n)
            case ir.Position(axis=axis):
                places.add(axis)
            case ir.Read(at=at):
                other.update(axis for axis, _ in at)
            case ir.Scan(axis=axis):
                places.add(axis)
            case ir.Select(over=over):
                places.update(over)
            case ir.Pointwise(op=op) if op not in ("mul", "div"):
                scores.append(n)
            case _:
                pass
    other |= {a for n in scores if len(places & set(n.axes)) > 1 for a in n.axes}
    wide = [[a for a in t.axes if a not in narrow] for t in kernel.inputs]
    other |= {a for axes in wide if places & {*axes} for a in axes[:-1]}
    return summed - places - other if places else set()


def scatter_axis(node: ir.Reduce) -> tuple[str, ir.Node, ir.Node] | None:
    """(axis, position, condition) of a condition ``position == axis`` in a sum, where neither operand nor position has the axis."""
    rest = set(node.x.axes)
    for part in conjuncts(node.where):
        match part:
            case ir.Pointwise(op="eq", args=(a, b)):
                for p, at in ((a, b), (b, a)):
                    if isinstance(at, ir.Position) and at.axis not in {*p.axes, *rest, *node.over}:
                        return at.axis, p, part
    return None


def is_table(node: ir.Node) -> bool:
    """A sum by position, or a sum of such sums: what the gradient of a table is made of."""
    return isinstance(node, ir.Reduce) and (scatter_axis(node) is not None or (node.op == "sum" and is_table(node.x)))


def is_long_table(node: ir.Node, structure: Structure) -> bool:
    """A sum by position along an axis that no tile holds."""
    scattered = scatter_axis(node) if isinstance(node, ir.Reduce) else None
    return scattered is not None and scattered[0] in structure.tables


def _sweep_axes(nodes: list[ir.Node], found: Structure, extents: Mapping[str, int], swept: set[str], *, in_memory: bool) -> None:
    sweeps = [
        n
        for n in nodes
        if isinstance(n, ir.Reduce) and found.storable(n.axes) and not found.storable(operand_axes(n)) and set(n.over) - found.whole
    ]
    others: list[str] = []
    loose: set[str] = set()
    """Features of rows that are summed by position."""
    firm = set(found.pair)
    """What anything else pairs."""
    held: set[str] = set()
    """What sweeps over pairs have whole."""
    for sweep in sweeps:
        scattered = scatter_axis(sweep)
        conditions = [c for c in conjuncts(sweep.where) if scattered is None or c is not scattered[2]]
        parts = factors(sweep.x)
        paired = [f for f in parts if not found.storable(f.axes)]
        paired = [f for f in paired if not _is_made_row(f, paired, found)]
        if not paired and parts and not conditions:
            paired = [max(parts, key=lambda f: len(f.axes))]
            own = found.features & {*paired[0].axes} if scattered is not None else set()
            loose |= own
            firm |= {*paired[0].axes} - own
        elif not paired and parts:  # a sum of rows that the condition picks: the features of a row, and one program for every other axis
            fixed = {a for c in conditions for a in c.axes} | set(sweep.over)
            found.pair.update({a for f in parts for a in f.axes} - fixed - found.features - found.whole)
        elif paired:
            firm.update(a for f in paired for a in f.axes)
            held.update(a for f in parts if f not in paired for a in f.axes)
        looped = set(sweep.over)
        if found.stages and looped - found.features:  # heads and their features: what was one sweep's row is summed as one
            others += looped & found.features
            looped -= found.features
        firm.update(looped, *(c.axes for c in conditions))
        for f in paired:
            found.pair.update(set(f.axes) - found.whole - (found.features if found.stages and found.storable(f.axes) else set()))
        for c in conditions:
            found.pair.update(set(c.axes) - found.whole)
        found.pair.update(looped - found.whole)
        others += [a for f in parts if f not in paired for a in f.axes]
        if scattered is not None:
            others.append(scattered[0])
            found.by_extent.add(scattered[0])
            if extents.get(scattered[0], 0) > WHOLE_LIMIT:
                (found.tables if in_memory else found.pair).add(scattered[0])
    found.pair -= (loose & held) - firm
    if found.stages:  # features of a row that another stage sums: whole there as well
        both = found.features & held & found.pair
        found.by_extent |= both
        found.pair -= {a for a in both if extents.get(a, 0) <= WHOLE_LIMIT}
    for n in nodes:
        if isinstance(n, ir.Reduce) and found.storable(operand_axes(n)) and n.where is None:
            others += n.over
        if isinstance(n, ir.Position):
            found.related.add(n.axis)
    for n in nodes:  # matrix products of rows with small tables
        if isinstance(n, ir.Reduce) and found.storable(n.axes) and not set(n.over) - found.whole and not found.storable(operand_axes(n)):
            others += [a for f in factors(n.x) for a in f.axes]
    for sweep in sweeps:
        scattered = scatter_axis(sweep)
        if scattered is not None and scattered[0] in found.pair - swept:  # else every index of a table would be a sweep of its own
            found.by_extent.add(scattered[0])
            if extents.get(scattered[0], 0) <= WHOLE_LIMIT:
                found.pair.discard(scattered[0])
                found.whole.add(scattered[0])
    found.whole.update(a for a in others if a not in found.pair)
    for n in nodes:  # rows of a tensor that a condition picks, where nothing else says how its axes are gone through
        if isinstance(n, ir.Reduce) and n.where is not None and scatter_axis(n) is None:
            found.pair.update(set(n.over) - found.whole)
    found.related &= found.pair
