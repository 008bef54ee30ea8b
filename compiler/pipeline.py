"""The pipeline: equations -> plans, as one visible list of passes.

``lower`` prepares a kernel for a target and plans its forward; ``Lowered.backward`` plans the gradients of the inputs that need one.
What no class covers stays outside and runs as PyTorch around the fused part, with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from . import algebra, ir
from .adjoint import segment_axis
from .algebra import factors, substitute
from .autodiff import NoDerivative, differentiate
from .canonicalise import as_counts, canonicalise
from .emit import build_kernel
from .emit_values import Context, Tiling
from .exchange import exchange_contractions, join_choices, read_after_products, read_before_products, read_what_is_chosen, split_sums
from .fit import MOST_PRODUCTS, REGISTERS
from .names import name_nodes
from .outside import is_library, split_outside
from .plan import ROUTE, USUAL, Buffer, Dtype, Kernel, Library, Plan, Refinement, divided, with_derived
from .products import dense_mixtures, is_matrix_product, makes_scores
from .quiet import quieted
from .recurrence import make_recurrences
from .routed import needed_steps, plan_routed, routed_candidates, table_word
from .routes import BLOCKS, Router, Routing, find_routings, push_reads
from .scans import scans_as_states
from .selections import fold_rows, is_short
from .step_reads import copies_in
from .structure import WHOLE_LIMIT, Structure, analyse, find_stages, is_long_table, is_table, ordered, original
from .tasks import Crowded, Group, NotFused, Planner, Task, TooWide, contract_blocks, group_tasks, merge_sums, nest_sums
from .verify import verify

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """What plans are made for: "c", or a GPU by its architecture ("sm_80", "sm_90", "sm_100", "gfx942")."""

    name: str

    @property
    def backend(self) -> str:
        return "c" if self.name == "c" else "triton"


@dataclass(frozen=True, slots=True)
class Hints:
    """What a plan may know of a call: int and bool params, extents of the axes, bytes of a floating element."""

    params: tuple[tuple[str, int | bool], ...] = ()
    extents: tuple[tuple[str, int], ...] = ()
    element_bytes: int = 4


@dataclass(slots=True)
class Lowered:
    """A kernel for one target. See the fields' comments for who reads them."""

    graph: ir.Graph
    target: Target
    hints: Hints
    outside: dict[str, ir.Node]
    """Values that run as PyTorch before the fused part; they become its inputs under these names."""
    reasons: list[str]
    """Why something runs outside, or why nothing is fused."""
    fused: ir.Graph | None
    forward: Plan | None = None
    saved: tuple[str, ...] = ()
    cotangents: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, str] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    by_extent: set[str] = field(default_factory=set)
    """Axes that the plans keep whole, or not, because of their extent at this call."""
    tiled: set[str] = field(default_factory=set)
    """Axes that the plans tile; a small extent has a small tile."""
    small: set[str] = field(default_factory=set)
    """Axes of which the plans differ where they are short."""
    copies: dict[str, ir.Node] = field(default_factory=dict)
    """Axes that steps read states along in the plans only, and their extents: those of axes of the spec."""
    passes: dict[str, object] = field(default_factory=dict)
    """The graph or plan after each named pass, for ``weft show --after``."""
    routings: list[Routing] = field(default_factory=list)
    """Which pairs of tokens and experts are computed."""
    stages: list[frozenset[str]] = field(default_factory=list)
    """Axes of sums that no tensor of the kernel has and that are stored nevertheless: what one stage of a kernel hands to the next."""
    tables_first: bool | None = None
    """Whether sums take products with tables before they read them; None where there is no such sum."""
    in_products: bool = False
    """Whether matrix products are stored where tiles of rows could not hold their axes."""
    _known: dict[ir.Node, Buffer] = field(default_factory=dict)
    _gradient_nodes: dict[str, ir.Node] = field(default_factory=dict)
    selects: bool = False
    """Whether rows make selections, which what is made of the same rows should not repeat."""
    masks: list[ir.Node] = field(default_factory=list)
    """The conditions of the sums of outputs: what they leave out is not read, while a derivative's 0 may well be multiplied."""
    _births: dict[ir.Node, int] = field(default_factory=dict)
    _backward: dict[frozenset[str], Plan] = field(default_factory=dict)

    def named(self, axes: Iterable[str]) -> set[str]:
        """Axes by the names that the spec has for them."""
        return {original(a) if a in self.copies else a for a in axes}

    def backward(self, wanted: frozenset[str]) -> Plan:
        """The plan that writes the gradients of exactly these inputs."""
        if wanted not in self._backward:
            roots = {self.gradients[name]: node for name, node in self._gradient_nodes.items() if name in wanted}
            with algebra.births(self._births):
                self._backward[wanted] = _plan(self, roots, self._known, "backward")
        return self._backward[wanted]


PASSES = ("build", "recur", "outside", "canonicalise", "differentiate", "exchange", "schedule")


def lower(graph: ir.Graph, target: Target, hints: Hints) -> Lowered:
    """Plan the forward of a kernel and prepare its backward."""
    lowered = Lowered(graph, target, hints, {}, [], None)
    with algebra.births(lowered._births):
        _lower(lowered)
        if lowered.forward is None and lowered.tables_first:
            _begin_again(lowered)
            lowered.tables_first, lowered.in_products, lowered.outside = False, False, {}
            _lower(lowered)
    return lowered


def _lower(lowered: Lowered) -> None:
    graph, hints = lowered.graph, lowered.hints
    lowered.passes["build"] = lowered.passes["recur"] = dict(graph.outputs)
    constants: dict[ir.Node, ir.Node] = {ir.make(ir.Param, (), _kind(value), name): ir.const(value) for name, value in hints.params}
    constants |= as_counts(graph, constants)
    stepped, refused = _recur(lowered, constants)
    routings = [] if stepped.states else _routings(stepped, constants, BLOCKS[lowered.target.backend])
    if routings:
        _plan_graph(lowered, stepped, constants, routings)
        if lowered.forward is not None:
            return
        refused = lowered.reasons
        _begin_again(lowered)
    if not stepped.states and dense_mixtures(ir.topological(_canonical(stepped, constants).values())):
        lowered.in_products = True
        _plan_graph(lowered, stepped, constants, [])
        if lowered.forward is not None:
            return
        lowered.in_products = False
        _begin_again(lowered)
    too_wide = _plan_graph(lowered, stepped, constants, []) and not stepped.states
    if not stepped.states and _plan_stages(lowered, stepped, constants, too_wide):
        return
    if too_wide:
        reasons = lowered.reasons
        _begin_again(lowered)
        lowered.in_products = True
        _plan_graph(lowered, stepped, constants, [])
        lowered.reasons = reasons if lowered.forward is None else []
    lowered.reasons = [*refused, *lowered.reasons]


def _plan_stages(lowered: Lowered, stepped: ir.Graph, constants: dict[ir.Node, ir.Node], too_wide: bool) -> bool:
    """Plans a graph with what its stages hand on stored; True if that is done. Only where it has projections, or where no plan was made
    before or one whose tiles keep positions whole."""
    stages = find_stages(_canonical(stepped, constants), lowered.graph.kernel)
    plan = lowered.forward
    if not stages.axes or (plan is not None and not stages.projects and not any(stages.positions & {*k.whole} for k in plan.kernels)):
        return False
    reasons = lowered.reasons
    _begin_again(lowered)
    lowered.stages = stages.axes
    _plan_graph(lowered, stepped, constants, [])
    if lowered.forward is not None:
        return True
    lowered.stages = []
    _begin_again(lowered)
    if not too_wide:
        _plan_graph(lowered, stepped, constants, [])
    lowered.reasons = reasons
    return False


def _begin_again(lowered: Lowered) -> None:
    """As if nothing had been planned."""
    lowered.cotangents, lowered.gradients, lowered.by_extent, lowered.tiled, lowered.small = {}, {}, set(), set(), set()
    lowered._births.clear()


def _plan_graph(lowered: Lowered, stepped: ir.Graph, constants: dict[ir.Node, ir.Node], routings: list[Routing]) -> bool:
    """Plans a graph with these routings, or says in ``reasons`` why it cannot. True where products may do: axes are too long for tiles of
    rows, or a value that is no tensor's is chosen from."""
    graph = lowered.graph
    lowered.routings = routings
    if not routings and not stepped.states:
        folded, axes = fold_rows(stepped.outputs, constants, dict(lowered.hints.extents))
        lowered.by_extent |= axes
        lowered.selects = folded != stepped.outputs
        stepped = replace(stepped, outputs=folded)
    outputs, lowered.outside, lowered.reasons = split_outside(stepped, selects=bool(routings) or lowered.in_products)
    lowered.passes["outside"] = outputs
    if outputs is None:
        return any(is_library(n) for n in ir.topological(stepped.outputs.values()))
    outputs = {name: substitute(node, constants) for name, node in outputs.items()}
    if routings:
        outputs = push_reads(outputs, dict(lowered.hints.extents), lowered.by_extent)
    became: dict[ir.Node, ir.Node] = {}
    outputs = canonicalise(outputs, became)
    outputs = split_sums(outputs if routings else read_before_products(outputs))
    if lowered.tables_first is not False:
        written, outputs = outputs, read_after_products(outputs, dict(lowered.hints.extents), lowered.by_extent)
        lowered.tables_first = True if outputs != written else lowered.tables_first
    lowered.passes["canonicalise"] = outputs
    lowered.fused = ir.Graph(graph.kernel, outputs, {}, _carry(graph.names, constants, became), _carry(graph.spans, constants, became))
    try:
        hosts = [set(t.axes) for t in (*graph.kernel.inputs, *graph.kernel.outputs)]
        if lowered.in_products and makes_scores(ir.topological(outputs.values()), hosts):
            raise NotFused("scores of queries and keys are not stored")
        _derive(lowered, outputs)
        _schedule(lowered, _routed(lowered, outputs))
    except NotFused as error:
        lowered.reasons.append(str(error))
        lowered.fused = None
        lowered.forward = None
        lowered._backward.clear()
        return isinstance(error, TooWide) and not lowered.outside
    return False


def _routings(graph: ir.Graph, constants: dict[ir.Node, ir.Node], block: int) -> list[Routing]:
    """The routings of a graph."""
    return find_routings(_canonical(graph, constants), ordered(graph.kernel).order, block)


def _canonical(graph: ir.Graph, constants: dict[ir.Node, ir.Node]) -> dict[str, ir.Node]:
    return canonicalise({name: substitute(node, constants) for name, node in graph.outputs.items()})


def _routed(lowered: Lowered, outputs: dict[str, ir.Node]) -> dict[str, ir.Node]:
    """Outputs with what only chosen pairs need computed for these; the gradients are rewritten likewise."""
    names = lowered.fused.names if lowered.fused is not None else {}
    for routing in lowered.routings:
        router = Router(routing)
        for gradients in (False, True):
            rewritten = router.rewrite(lowered._gradient_nodes if gradients else outputs)
            if gradients:
                lowered._gradient_nodes = rewritten
            else:
                outputs = rewritten
            for node, name in list(names.items()):
                for became in (router.paired.get(node), router.dense.get(node)):
                    if became is not None and not isinstance(became, ir.Const | ir.Input):
                        names.setdefault(became, name)
    return outputs


def _recur(lowered: Lowered, constants: dict[ir.Node, ir.Node]) -> tuple[ir.Graph, list[str]]:
    """The graph with its states as recurrences; as it was, and why, where they are none."""
    given = lowered.graph
    graph = scans_as_states(given)
    if not graph.states:
        return given, []

    def prepared(node: ir.Node) -> ir.Node:
        return canonicalise({"": substitute(node, constants)})[""]

    states = {name: algebra.map_state(s, prepared) for name, s in graph.states.items()}
    outputs = {name: prepared(node) for name, node in graph.outputs.items()}
    try:
        made = make_recurrences(ir.Graph(graph.kernel, outputs, states), outputs)
    except NotFused as error:
        return given, [str(error)]
    lowered.passes["recur"] = made
    lowered.copies = copies_in(made)
    known = dict(lowered.hints.extents)
    lowered.hints = replace(lowered.hints, extents=tuple(with_derived(known, lowered.copies).items()))
    return ir.Graph(graph.kernel, made, {}, graph.names, graph.spans), []


def _carry(notes: dict[ir.Node, T], constants: dict[ir.Node, ir.Node], became: dict[ir.Node, ir.Node]) -> dict[ir.Node, T]:
    """Names or spans of nodes, for what the nodes became."""
    carried: dict[ir.Node, T] = {}
    for node, note in notes.items():
        new = substitute(node, constants)
        carried.setdefault(became.get(new, new), note)
    return carried


def _kind(value: int | bool) -> ir.Kind:
    return "bool" if isinstance(value, bool) else "int"


def _derive(lowered: Lowered, outputs: dict[str, ir.Node]) -> None:
    """Gradient nodes of all differentiable inputs."""
    inputs = sorted({n for n in ir.topological(outputs.values()) if isinstance(n, ir.Input) and n.kind == "real"}, key=lambda n: n.name)
    taken = {n.name for n in inputs} | {t.name for t in lowered.graph.kernel.inputs} | set(lowered.outside)
    for name, node in outputs.items():
        if node.kind == "real":
            lowered.cotangents[name] = _unique(f"d_{name}", taken)
    cotangents = {name: ir.make(ir.Input, _output_axes(lowered, name), "real", c) for name, c in lowered.cotangents.items()}
    try:
        adjoints: dict[ir.Node, ir.Node] = {}
        gradients = differentiate(outputs, cotangents, inputs, adjoints)
    except NoDerivative as error:
        raise NotFused(str(error)) from error
    became: dict[ir.Node, ir.Node] = {}
    gradients = canonicalise(gradients, became)
    if not lowered.routings:
        gradients = read_what_is_chosen(gradients)
    assert lowered.fused is not None
    names = lowered.fused.names
    for node, name in list(names.items()):
        adjoint = became.get(adjoints.get(node, node))
        if adjoint is not None and node in adjoints and not isinstance(adjoint, ir.Input | ir.Const):
            names.setdefault(adjoint, f"d_{name}")
    lowered.passes["differentiate"] = gradients
    known: set[ir.Node] = {n for n in ir.topological(outputs.values()) if isinstance(n, ir.Reduce)}
    experts = {a for r in lowered.routings for a in r.experts}
    gradients = exchange_contractions(split_sums(exchange_contractions(gradients, known), known, experts), known)
    if lowered.tables_first is not False:
        gradients = read_after_products(gradients, dict(lowered.hints.extents), lowered.by_extent)
    gradients = {name: join_choices(node) for name, node in gradients.items()}
    if not lowered.routings:
        gradients = quieted(gradients, cotangents.values())
    lowered.passes["exchange"] = gradients
    lowered._gradient_nodes = gradients
    lowered.differentiable = tuple(n.name for n in inputs)
    lowered.gradients = {n.name: _unique(f"d_{n.name}", taken) for n in inputs}


def _unique(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _output_axes(lowered: Lowered, name: str) -> tuple[str, ...]:
    return next(t.axes for t in lowered.graph.kernel.outputs if t.name == name)


def _schedule(lowered: Lowered, outputs: dict[str, ir.Node]) -> None:
    """The forward plan, with what the backward of all inputs will read saved."""
    conditions = [n.where for n in ir.topological(outputs.values()) if isinstance(n, ir.Reduce)]
    lowered.masks = list(dict.fromkeys(c for condition in conditions for c in algebra.conjuncts(condition)))
    structure = analyse(lowered.graph.kernel, outputs, outputs, dict(lowered.hints.extents), stages=lowered.stages)
    sweeps: list[ir.Node] = [n for n in ir.topological(outputs.values()) if structure.is_sweep(n)]
    layout = {n: structure.sort(n.axes) for n in sweeps}
    for name, node in outputs.items():
        if node in layout and set(_output_axes(lowered, name)) == set(node.axes):
            layout[node] = _output_axes(lowered, name)
    steps = {n for n in ir.topological(outputs.values()) if isinstance(n, ir.Recurrence)}
    kept = [n for n in ir.topological(lowered._gradient_nodes.values()) if isinstance(n, ir.Result) and n.recurrence in steps]
    order = ordered(lowered.graph.kernel)
    segments = {segment_axis(n.body) for n in steps}
    layout |= {n: tuple(sorted(order.sort(n.axes), key=lambda a: a not in segments)) for n in kept}
    sweeps += kept
    if lowered.routings or lowered.in_products:
        sweeps, layout = routed_candidates(outputs, lowered.routings, structure, partial(_storable, lowered))
        for name, node in outputs.items():
            if node in layout and set(_output_axes(lowered, name)) == set(node.axes):
                layout[node] = _output_axes(lowered, name)
    by_node = {node: name for name, node in reversed(outputs.items())}
    candidates: dict[ir.Node, Buffer] = {}
    exact = {x for n in steps if isinstance(n, ir.Recurrence) for x in n.operands}  # as steps compute: what they read and begin with
    exact |= {n for n in kept if isinstance(n, ir.Result) and (n.name.startswith("checkpoint_") or _is_matrix(n))}
    for n in sweeps:
        wide = _wide_dtype(lowered) if set(n.axes) & structure.whole and n not in exact else "float32"
        dtype: Dtype = wide if n.kind == "real" else "bool" if n.kind == "bool" else "int32"
        kept_whole = lowered.target.backend != "c" or lowered.hints.element_bytes >= 4 or n.kind != "real"
        if n in by_node and not _declared_dtype(lowered, by_node[n]) and kept_whole:
            candidates[n] = Buffer(by_node[n], layout[n], "input" if n.kind == "real" else dtype, "output")
        else:
            candidates[n] = Buffer(
                f"saved_{len(candidates)}_{lowered.graph.names.get(n, _kind_of(n))}",
                layout[n],
                dtype,
                "saved",
            )
    for n, buffer in list(candidates.items()):
        if buffer.role == "output" and not set(n.axes) & structure.whole:
            name = f"saved_{buffer.name}"
            candidates[n] = Buffer(name, buffer.axes, "float32", "saved")
    lowered._known = candidates
    used: set[str] = set()
    if lowered.differentiable:
        everything = lowered.backward(frozenset(lowered.differentiable))
        used = {b.name for b in everything.buffers.values()}
    known = {n: b for n, b in candidates.items() if b.name in used}
    lowered._known = known
    lowered._backward.clear()  # that plan could read more than will be saved
    lowered.saved = tuple(dict.fromkeys(b.name for b in known.values()))
    roots = dict(outputs) | {b.name: n for n, b in known.items() if b.role == "saved"}
    saved = {b.name: b for b in known.values() if b.role == "saved"}
    lowered.forward = _plan(lowered, roots, {}, "forward", saved)
    lowered.passes["schedule"] = lowered.forward


def _is_matrix(n: ir.Result) -> bool:
    """Whether a result of every step is a matrix, or a whole state."""
    assert isinstance(n.recurrence, ir.Recurrence)
    body = n.recurrence.body
    return body.own(n.axes) > 1 or (body.columns is not None and any(set(c.axes) <= set(n.axes) for c in body.states))


def _kind_of(n: ir.Node) -> str:
    match n:
        case ir.Reduce(op=op):
            return op
        case ir.Result(name=name):
            return name
        case ir.Table(name=name):
            return table_word(name)
        case ir.Select():
            return "chosen"
        case _:
            return "value"


def _declared_dtype(lowered: Lowered, name: str) -> str | None:
    return next(t.dtype for t in lowered.graph.kernel.outputs if t.name == name)


def _plan(
    lowered: Lowered,
    outputs: dict[str, ir.Node],
    known: Mapping[ir.Node, Buffer],
    direction: str,
    saved: Mapping[str, Buffer] | None = None,
    refinement: Refinement = USUAL,
) -> Plan:
    """Nodes (by buffer) -> a plan: rows before each recurrence, its steps, and rows after the last."""
    assert lowered.fused is not None
    nodes = ir.topological([*lowered.fused.outputs.values(), *outputs.values()])
    time = frozenset(a for n in nodes if isinstance(n, ir.Recurrence) for a in n.body.along)
    time = time.union(*(r.tokens | {r.pair} for r in lowered.routings))
    if lowered.in_products:
        time |= {a for a, extent in lowered.hints.extents if extent > WHOLE_LIMIT}
    made = _buffers(lowered, known, direction, saved or {})
    work = Work(lowered, direction, made, derived=dict(lowered.copies), time=time, refinement=refinement)
    stored: dict[ir.Node, ir.Node] = {n: _stored_as(n, b) for n, b in known.items() if isinstance(n, ir.Result)}
    left = {name: substitute(node, stored) for name, node in outputs.items()}
    plain = {n: b for n, b in known.items() if not isinstance(n, ir.Result)}
    while True:
        found = next((n for n in ir.topological(left.values()) if isinstance(n, ir.Recurrence)), None)
        if found is None:
            break
        replaced = plan_recurrence(work, found, left, plain)
        left = {name: substitute(node, replaced) for name, node in left.items()}
    has_steps = bool(work.kernels)
    routed = bool(lowered.routings) or lowered.in_products or (has_steps and _has_wide_products(lowered, left))
    if routed:
        left, plain = plan_routed(work, left, plain, lowered.routings), {}
    rest = {name: node for name, node in left.items() if not (isinstance(node, ir.Input) and node.name == name)}
    forward = rest if routed else lowered.fused.outputs
    if rest:
        basis = forward if len(rest) == len(outputs) and work.derived == lowered.copies else rest
        work.kernels += plan_rows(work, rest, plain, basis, chains=lowered.selects)
    for r in lowered.routings:
        work.derived |= r.derived()
    read = {b for k in work.kernels for b in _touched(k)} | {
        b.name for b in work.buffers.values() if b.role == "saved" and b.name in outputs
    }
    library = needed_steps(work.library, read)
    read |= {n.name for s in library for n in ir.topological([s.node]) if isinstance(n, ir.Input)} | {s.buffer for s in library}
    buffers = {n: b for n, b in work.buffers.items() if n in read}
    plan = Plan(
        lowered.fused,
        "forward" if direction == "forward" else "backward",
        buffers,
        work.kernels,
        derived=work.derived,
        library=library,
        selections=work.selections,
    )
    verify(plan)
    name_nodes(plan, lowered.fused)

    def refined(otherwise: Refinement) -> Plan:
        with algebra.births(lowered._births):
            return _plan(lowered, outputs, known, direction, saved, otherwise)

    plan.refined = refined
    return plan


def _stored_as(node: ir.Node, buffer: Buffer) -> ir.Input:
    return ir.make(ir.Input, node.axes, node.kind, buffer.name)


@dataclass(slots=True)
class Work:
    """A plan being made."""

    lowered: Lowered
    direction: str
    buffers: dict[str, Buffer]
    kernels: list[Kernel] = field(default_factory=list)
    derived: dict[str, ir.Node] = field(default_factory=dict)
    library: list[Library] = field(default_factory=list)
    time: frozenset[str] = frozenset()
    """Axes of the steps of recurrences and of the tokens of routings, which no tile keeps whole."""
    wanted: dict[str, ir.Node] = field(default_factory=dict)
    """What is to be stored, by buffer, as the graph had it before anything was planned."""
    masks: list[ir.Node] = field(default_factory=list)
    """The conditions of the spec's own sums, as what has been planned so far made them."""
    refinement: Refinement = USUAL
    conditional: dict[ir.Node, ir.Node] = field(default_factory=dict)
    """Products that are read only where a condition holds, and that condition, which other products make."""
    selections: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Selections that kernels make: the buffer, and the axes that are chosen from."""

    def is_short(self, node: ir.Node) -> bool:
        """Whether a node is a selection that a kernel makes. One over tokens is not, however few they are: their number changes from call
        to call, and a kernel that holds all would be compiled for each."""
        tokens = {a for r in self.lowered.routings for a in r.route.tokens}
        return is_short(node, dict(self.lowered.hints.extents)) and not (isinstance(node, ir.Select) and tokens & set(node.over))

    def became(self, left: dict[str, ir.Node], replaced: dict[ir.Node, ir.Node]) -> dict[str, ir.Node]:
        """What is left to plan, some of its nodes being tensors now."""
        self.masks = [substitute(c, replaced) for c in self.masks]
        self.conditional = {substitute(n, replaced): substitute(c, replaced) for n, c in self.conditional.items()}
        return {name: substitute(n, replaced) for name, n in left.items()}

    def temporaries(self) -> int:
        return sum(b.role == "temporary" for b in self.buffers.values())

    def fresh(self, word: str) -> str:
        """A name for a buffer: a word, or a number where there is none."""
        name = word or f"t{self.temporaries() + 1}"
        taken = {*self.buffers, *(t.name for t in (*self.lowered.graph.kernel.inputs, *self.lowered.graph.kernel.outputs))}
        while name in taken:
            name += "_"
        return name

    def order(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Axes as they lie in memory: pairs of a routing first."""
        found = ordered(self.lowered.graph.kernel).sort(axes)
        return (*(a for a in found if a.startswith(ROUTE)), *(a for a in found if not a.startswith(ROUTE)))

    def unused(self, name: str) -> str:
        """A name for a kernel."""
        return _unused(name, self)

    def storable(self, axes: Iterable[str]) -> bool:
        """Whether a value with these axes may be stored."""
        return _storable(self.lowered, axes)

    def context(self) -> Context:
        """What builders of kernels share, where all that they read is in memory."""
        return _context(self.lowered, ordered(self.lowered.graph.kernel), {}, self.buffers, self.refinement)


def _storable(lowered: Lowered, axes: Iterable[str]) -> bool:
    """Whether some tensor has the axes, or a routing: those of its condition, of a selection in it, or features of its pairs; in a plan of
    products, also whether one of these has them."""
    wanted = set(axes)
    for r in lowered.routings:
        if wanted <= set(r.condition.axes) or (r.pair in wanted and wanted - {r.pair} <= r.features):
            return True
        if any(wanted <= set(n.axes) for n in ir.topological([r.condition]) if isinstance(n, ir.Select)):
            return True
    kernel = lowered.graph.kernel
    if any(wanted <= set(t.axes) for t in (*kernel.inputs, *kernel.outputs)):
        return True
    if not lowered.in_products or lowered.fused is None:
        return False
    return any(wanted <= set(n.axes) for n in ir.topological(lowered.fused.outputs.values()) if is_matrix_product(n))


def plan_recurrence(work: Work, found: ir.Recurrence, left: dict[str, ir.Node], known: Mapping[ir.Node, Buffer]) -> dict[ir.Node, ir.Node]:
    """Plans what a recurrence reads and its steps; returns what its results are stored as."""
    from .adjoint import replay_axis
    from .emit_steps import SEGMENT, StepBuilder, check_tiles, loaded_again, step_axes

    lowered, body = work.lowered, found.body
    operands: dict[str, ir.Node] = {}
    held: dict[ir.Node, str] = {}
    replaced: dict[ir.Node, ir.Node] = {}
    for leaf, x in zip(body.leaves, found.operands, strict=True):
        root = next((name for name, root in left.items() if root is x and work.buffers[name].dtype == "float32"), None)
        if isinstance(x, ir.Input):
            held[leaf] = x.name
        elif root is not None:  # it is to be stored anyway
            held[leaf] = root
            operands[root] = x
            replaced[x] = ir.make(ir.Input, x.axes, x.kind, root)
        else:
            held[leaf] = name = f"t{work.temporaries() + 1}"
            operands[name] = x
            work.buffers[name] = Buffer(name, x.axes, _operand_dtype(x), "temporary")
    if operands:
        work.kernels += plan_rows(work, operands, known, operands)
    order = ordered(lowered.graph.kernel)
    results = [n for n in ir.topological(left.values()) if isinstance(n, ir.Result) and n.recurrence is found]
    segment = segment_axis(body)
    work.derived |= {segment: divided(body.along[0], SEGMENT), replay_axis(body): ir.const(SEGMENT)}
    places: dict[str, list[str]] = {}
    for n in results:
        targets = [name for name, root in left.items() if root is n and set(work.buffers[name].axes) == set(n.axes)]
        if not targets:
            targets = [f"t{work.temporaries() + 1}"]
            lead = [a for a in (segment,) if a in n.axes]
            axes = order.sort(a for a in n.axes if a not in lead)
            work.buffers[targets[0]] = Buffer(targets[0], (*lead, *axes), "float32", "temporary")
        places[n.name] = targets
        replaced[n] = ir.make(ir.Input, n.axes, n.kind, targets[0])
    extents = dict(lowered.hints.extents)
    stepped = step_axes(found)
    rows = _step_rows(lowered, body, stepped, order)
    order.whole = stepped - body.parallel - ({rows[0]} if rows else set())
    replay: dict[str, str] = {}
    for c in body.replayed:
        replay[c.name] = name = f"t{work.temporaries() + 1}"
        programs = order.sort(body.parallel & set(c.axes) - ({rows[0]} if rows else set()))
        held_axes = order.sort(a for a in c.axes if a not in programs)  # as the tiles of the kernel lie
        work.buffers[name] = Buffer(name, (*programs, replay_axis(body), *body.along[1:], *held_axes), "float32", "temporary")
    check_tiles(found, order.whole, extents, lowered.target.backend)
    again = frozenset() if lowered.target.backend == "c" else loaded_again(found, order.whole, extents)
    context = _context(lowered, order, held, work.buffers, work.refinement)
    written = "_".join(b for names in places.values() for b in names)
    name = f"{work.direction}_{written}" if len(written) < 60 else f"{work.direction}_steps_of_{'_'.join(c.name for c in body.states)}"
    note = f"steps of {', '.join(c.name for c in body.states)} along {', '.join(body.along)}"
    builder = StepBuilder(context, found, places, replay, rows, again, lowered.target.backend == "c")
    work.kernels.append(builder.build(_unused(name, work), note))
    return replaced


def _has_wide_products(lowered: Lowered, left: dict[str, ir.Node]) -> bool:
    """Whether matrix products are left whose results are longer both ways than a tile can be: gradients of the weights of wide steps."""
    wide = {a for a, extent in lowered.hints.extents if extent > WHOLE_LIMIT}
    return any(isinstance(n, ir.Reduce) and is_matrix_product(n) and set(n.axes) <= wide for n in ir.topological(left.values()))


def _unused(name: str, work: Work) -> str:
    name, taken = name.replace(".", "_"), {k.name for k in work.kernels}
    while name in taken:
        name += "_"
    return name


def _operand_dtype(x: ir.Node) -> Dtype:
    return "float32" if x.kind == "real" else "bool" if x.kind == "bool" else "int32"


def _shares_weights(body: ir.Body) -> str | None:
    """A parallel axis that the weights of all contractions of a vector state lack."""
    if any(len(set(c.axes) - body.parallel) != 1 for c in body.states):
        return None
    axes = set(body.parallel)
    found = False
    for n in ir.topological([c.next for c in body.states]):
        if isinstance(n, ir.Reduce) and n.op == "sum":
            weights = [f for f in factors(n.x) if not set(body.along) & set(f.axes) and set(n.over) & set(f.axes)]
            moving = [f for f in factors(n.x) if set(body.along) & set(f.axes) and set(n.over) & set(f.axes)]
            if weights and moving:
                found = True
                axes -= {a for f in weights for a in f.axes}
    return min(axes) if found and axes else None


def _step_rows(lowered: Lowered, body: ir.Body, axes: set[str], order: Structure) -> tuple[str, int] | None:
    """The parallel axis that a program takes a tile of: where no step couples anything, the one that lies innermost in memory; where
    vectors meet weights that every batch shares, the batch, so that they are multiplied as a matrix; where steps are products of
    matrices, the columns of the states."""
    if not body.parallel:
        return None
    if body.columns:
        lowered.tiled.add(body.columns)
        return body.columns, 64 if lowered.target.backend == "c" else 32
    if axes - body.parallel:
        shared = _shares_weights(body)
        if shared is not None:
            lowered.tiled.add(shared)
        return None if shared is None else (shared, 8 if lowered.target.backend == "c" else 16)
    axis = order.sort(body.parallel)[-1]
    lowered.tiled.add(axis)
    return axis, 64


def plan_rows(
    work: Work,
    outputs: dict[str, ir.Node],
    known: Mapping[ir.Node, Buffer],
    forward: dict[str, ir.Node],
    separate: bool = True,
    in_memory: bool = True,
    chains: bool = False,
    alone: Collection[ir.Node] = (),
) -> list[Kernel]:
    """Nodes (by buffer) -> kernels that sweep rows. ``separate``: sums that another kernel might take along are tasks of their own;
    ``in_memory``: long tables are to be added to in memory by such a kernel; ``chains``, ``alone``: see ``group_tasks``."""
    from .owned import pair_owned

    lowered = work.lowered
    kernel = lowered.graph.kernel
    stepped = work.derived != lowered.copies
    hosts = [b.axes for b in (*known.values(), *(work.buffers.values() if stepped else ()))]
    extents = dict(lowered.hints.extents)
    owns = lowered.target.backend == "c"
    in_memory = in_memory and owns
    time = work.time
    look = partial(analyse, in_memory=in_memory, time=time, stages=lowered.stages)
    first = look(kernel, forward, outputs, extents, hosts)
    roots = merge_sums(contract_blocks(outputs), first)
    given = forward is not outputs
    structure = look(kernel, forward if given else roots, roots, extents, hosts)
    roots = expand_lse(roots, structure)
    roots = nest_sums(roots, structure, shares=lowered.target.backend == "c")
    structure = look(kernel, forward if given else roots, roots, extents, [*hosts, *structure.shares])
    lowered.by_extent |= structure.by_extent
    _check_whole(lowered, structure)
    buffers = dict(work.buffers)
    planner = Planner(structure, {n: b.name for n, b in known.items()}, work.temporaries(), alone)
    for name, node in roots.items():
        planner.add_root(node, name, buffers[name].axes)
    separated = planner.separate() if owns and separate else set()
    tasks = [*planner.tasks.values(), *planner.spread]
    for task in tasks:
        if task.buffer not in buffers:
            axes = structure.sort(task.node.axes)
            if is_table(task.node):  # what one row writes lies together
                axes = tuple(sorted(axes, key=lambda a: a in structure.whole))
            buffers[task.buffer] = Buffer(task.buffer, axes, _temporary_dtype(lowered, task, structure), "temporary")
    groups = group_tasks(tasks, structure, chains=chains, alone=alone)
    stored = {n: b.name for n, b in known.items()} | {t.node: t.buffer for t in tasks if not isinstance(t.node, ir.Input)}
    context = _context(lowered, structure, stored, buffers, work.refinement)
    units: list[tuple[Group, Group | None]] = pair_owned(groups, context) if owns else [(g, None) for g in groups]
    along = {t.node for _, extra in units if extra is not None for t in extra.tasks}
    if separated - along:  # not taken along: they would only be stored and read
        return plan_rows(work, outputs, known, forward, False, in_memory, chains, alone)
    if any(is_long_table(s, structure) and s not in along for t in tasks for s in t.sweeps):
        return plan_rows(work, outputs, known, forward, separate, False, chains, alone)
    try:
        kernels = _kernels(units, context, work.direction)
    except Crowded as crowded:
        if set(crowded.sweeps) <= set(alone):
            raise NotFused(str(crowded)) from crowded
        return plan_rows(work, outputs, known, forward, separate, in_memory, chains, [*alone, *crowded.sweeps])
    work.buffers.update(buffers)
    return kernels


def expand_lse(roots: dict[str, ir.Node], structure: Structure) -> dict[str, ir.Node]:
    """lse over whole axes as maximum and sum: it is a fold of a tile, not a sweep."""
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = algebra.with_children(n, tuple(memo[c] for c in ir.children(n)))
        if isinstance(new, ir.Reduce) and new.op == "lse" and not structure.is_sweep(n):
            top = ir.reduce("max", new.over, new.x, new.where)
            total = ir.reduce("sum", new.over, ir.pointwise("expdiff", new.x, top), new.where)
            new = algebra.add(top, ir.pointwise("log", total))
        memo[n] = new
    return {name: memo[n] for name, n in roots.items()}


def _check_whole(lowered: Lowered, structure: Structure) -> None:
    extents = dict(lowered.hints.extents)
    for axis in sorted(structure.whole):
        if extents.get(axis, 0) > WHOLE_LIMIT and axis not in structure.tables:
            raise TooWide(f"axis {axis} would be kept whole in a tile, and its extent {extents[axis]} is above {WHOLE_LIMIT}")


def _wide_dtype(lowered: Lowered) -> Dtype:
    """The dtype of a stored value with a head axis: what matrix products on the target take."""
    return "float32" if lowered.target.backend == "c" else "input"


def _temporary_dtype(lowered: Lowered, task: Task, structure: Structure) -> Dtype:
    if task.node.kind != "real":
        return "bool" if task.node.kind == "bool" else "int32"
    return _wide_dtype(lowered) if not task.sweeps and set(task.node.axes) & structure.whole else "float32"


def _buffers(lowered: Lowered, known: Mapping[ir.Node, Buffer], direction: str, saved: Mapping[str, Buffer]) -> dict[str, Buffer]:
    kernel = lowered.graph.kernel
    buffers: dict[str, Buffer] = {}
    dtypes: dict[str, Dtype] = {"bool": "bool", "int": "int64"}
    for t in kernel.inputs:
        buffers[t.name] = Buffer(t.name, t.axes, dtypes.get(t.dtype or "", "input"), "input")
    for name, node in lowered.outside.items():
        kind: Dtype = "bool" if node.kind == "bool" else "int64" if node.kind == "int" else "input"
        buffers[name] = Buffer(name, node.axes, kind, "input")
    if direction == "forward":
        for t in kernel.outputs:
            node = lowered.graph.outputs[t.name]  # a constant 0 may be left of a real number
            real: Dtype = "float32" if t.name in lowered.graph.states and t.dtype is None else "input"
            dtype: Dtype = "bool" if node.kind == "bool" else "int64" if node.kind == "int" else real
            buffers[t.name] = Buffer(t.name, t.axes, dtype, "output")
        buffers.update(saved)
        return buffers
    for b in known.values():
        buffers[b.name] = Buffer(b.name, b.axes, b.dtype, "saved")
    for t in kernel.outputs:
        if t.name in lowered.cotangents:
            buffers[lowered.cotangents[t.name]] = Buffer(lowered.cotangents[t.name], t.axes, "input", "cotangent")
    for name, gradient in lowered.gradients.items():
        buffers[gradient] = Buffer(gradient, buffers[name].axes, "input", "gradient")
    return buffers


def _context(
    lowered: Lowered, structure: Structure, stored: dict[ir.Node, str], buffers: dict[str, Buffer], refinement: Refinement
) -> Context:
    from .blocks import SMALL, Demand, block_of, blocks_for

    extents = dict(lowered.hints.extents)

    def tilings(demand: Demand) -> list[Tiling]:
        rows, swept = blocks_for(lowered.target.name, demand, lowered.hints.element_bytes)
        if lowered.target.name == "c":
            return [Tiling(rows, swept)]
        smaller = [Tiling(r, swept) for r in (rows, 32, 16) if r == rows or r < rows]
        return [*smaller, *(Tiling(None, s) for s in (swept, 16) if s <= swept)]

    def block(axis: str, usual: int) -> int:
        if axis.startswith(ROUTE):
            return usual
        lowered.tiled.add(axis)
        return min(block_of(lowered.target.name, usual, extents.get(axis)), ir.fixed_extent(axis) or usual)

    def few(axis: str) -> bool:
        lowered.small.add(axis)
        return axis in extents and extents[axis] <= SMALL

    layout = {name: b.axes for name, b in buffers.items()}
    assert lowered.fused is not None
    registers = None if lowered.target.backend == "c" else REGISTERS
    return Context(structure, stored, layout, tilings, block, few, extents, registers is None, lowered.fused.names, registers, refinement)


def _kernels(units: list[tuple[Group, Group | None]], context: Context, direction: str) -> list[Kernel]:
    return [kernel for group, extra in units for kernel in _kernels_of(group, extra, context, direction)]


def _kernels_of(group: Group, extra: Group | None, context: Context, direction: str) -> list[Kernel]:
    """One kernel for all tasks of a group; for each half, or each task, where no program of a GPU can hold that."""
    written = "_".join(b for t in (*group.tasks, *(extra.tasks if extra else ())) for b in (t.buffer, *t.also))
    name = f"{direction}_{written}" if len(written) < 60 else f"{direction}_{group.tasks[0].buffer}_and_{len(group.tasks) - 1}_more"
    name = name.replace(".", "_")
    products = sum(len(factors(s.x)) > 1 for s in group.sweeps)
    crowded = (context.registers is not None and products > MOST_PRODUCTS) or name in context.refinement.apart
    if crowded and len(group.tasks) > 1 and extra is None:
        half = len(group.tasks) // 2
        return [k for part in (group.tasks[:half], group.tasks[half:]) for k in _kernels_of(Group(part), None, context, direction)]
    try:
        return [build_kernel(context, group, name, extra)]
    except NotFused:
        if len(group.tasks) < 2 or extra is not None:
            raise
    return [kernel for t in group.tasks for kernel in _kernels_of(Group([t]), None, context, direction)]


def _touched(kernel: Kernel) -> set[str]:
    from .plan import Begin, Load, Store, inner_statements

    found: set[str] = set()
    for s in inner_statements(kernel.body):
        match s:
            case Load(buffer=b) | Store(buffer=b):
                found.add(b)
            case Begin(buffer=str(b)):
                found.add(b)
            case _:
                pass
    return found
