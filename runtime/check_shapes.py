"""Draws the shapes, params and origins that `check` tries a kernel at, and makes failing ones smaller.

Nothing here knows a spec by name. What an axis is for is read off the equation graph: axes with positions, scans or
states are *sequences* and get ragged extents around tile sizes, contracted last dimensions are *features* and get odd head
dims, the rest is *batch*. Every extent and int param that a kernel is compiled for costs a compilation, so a run draws
a few palettes of them and lets its cases share these.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..compiler import errors, ir
from ..compiler.extents import bind
from ..compiler.reference import evaluate_nodes
from ..dsl import typed

Number = bool | int | float
Role = Literal["sequence", "feature", "batch"]
Values = Literal["normal", "large", "constant", "tiny", "spiky", "empty"]
Layout = Literal["contiguous", "transposed", "expanded", "sliced", "gapped", "far", "mixed"]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel, complete enough to be made again.

    ``sizes`` are the extents of all axes that are not declared; ``omit`` the inputs left to their default; ``wrt`` the inputs
    that gradients are taken of, None for every differentiable one; ``seed`` draws values, layouts and cotangents.
    """

    sizes: dict[str, int]
    params: dict[str, Number] = field(default_factory=dict)
    origin: dict[str, int] = field(default_factory=dict)
    values: Values = "normal"
    layout: Layout = "contiguous"
    omit: tuple[str, ...] = ()
    wrt: tuple[str, ...] | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, and the sizes."""
        data: dict[str, Any] = {"sizes": self.sizes}
        for name in ("params", "origin", "values", "layout", "omit", "wrt", "seed"):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and value not in ({}, ()):
                data[name] = list(value) if isinstance(value, tuple) else value
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Case:
        """The inverse of ``to_json``. Raises ValueError for what is not a case."""
        unknown = data.keys() - Case.__dataclass_fields__.keys()
        if unknown or "sizes" not in data:
            fault = f"has unknown entries {sorted(unknown)}" if unknown else "lacks 'sizes'"
            raise ValueError(f"a case {fault}. Its entries are: {', '.join(Case.__dataclass_fields__)}.")
        made = dict(data)
        for name in ("omit", "wrt"):
            if made.get(name) is not None:
                made[name] = tuple(made[name])
        return Case(**made)

    @staticmethod
    def parse(text: str) -> Case:
        """A case from the JSON of a printed command."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a case is written as JSON, and this is not: {error}.") from error
        if not isinstance(data, dict):
            raise ValueError("a case is a JSON object with the entry 'sizes'.")
        return Case.from_json(data)

    def __str__(self) -> str:
        parts = [" ".join(f"{a}={n}" for a, n in self.sizes.items())]
        if self.params:
            parts.append("params " + " ".join(f"{p}={v:.4g}" if isinstance(v, float) else f"{p}={v}" for p, v in self.params.items()))
        if self.origin:
            parts.append("origin " + " ".join(f"{a}={n}" for a, n in self.origin.items()))
        parts.append(f"{self.values} values")
        parts.append(f"{self.layout} inputs")
        if self.omit:
            parts.append("without " + ", ".join(self.omit))
        if self.wrt is not None:
            parts.append("gradients of " + (", ".join(self.wrt) or "nothing"))
        return "; ".join(parts) + f"; seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a case may be. ``work`` counts numbers that the reference computes, with a surcharge for each step of a state."""

    tiles: tuple[int, ...] = (64, 32, 16, 8, 4)
    features: tuple[int, ...] = (1, 3, 16, 17, 32, 40, 64, 100, 128)
    batch: tuple[int, ...] = (1, 2, 3)
    work: int = 3_000_000
    step: int = 4_000
    palettes: int = 5
    samples: int = 1_000_000
    """All batch axes together."""


FULL = Limits()
QUICK = Limits(features=(3, 8, 16, 17), batch=(1, 2), work=400_000, palettes=2)
INTERPRETED = Limits(features=(3, 8, 16), batch=(1, 2), work=50_000, palettes=2, samples=2)
"""For Triton's interpreter, which takes milliseconds for each operation on a tile."""


@dataclass(frozen=True, slots=True)
class Theme:
    """What a case tries. ``relation`` relates sequences that are compared: equal lengths, queries at the end of longer keys,
    few keys for many queries (rows with nothing to attend to), or lengths that have nothing to do with each other."""

    lengths: Literal["small", "ragged", "ones"]
    relation: Literal["equal", "decode", "few", "free"]
    values: Values = "normal"
    layout: Layout = "contiguous"
    subset: bool = False


THEMES = (
    Theme("ragged", "equal"),
    Theme("ragged", "decode", "normal", "sliced", subset=True),
    Theme("small", "few", "spiky", "transposed"),
    Theme("ones", "equal", "large", "gapped"),
    Theme("ragged", "equal", "empty", "mixed"),
    Theme("ragged", "free", "large", "transposed", subset=True),
    Theme("small", "decode", "constant", "expanded"),
    Theme("ones", "free", "normal", "mixed"),
    Theme("ragged", "few", "tiny", "gapped"),
    Theme("ragged", "equal", "spiky", "expanded", subset=True),
    Theme("small", "equal", "normal", "far"),
)
QUICK_THEMES = (THEMES[0], THEMES[1], THEMES[2], THEMES[3], THEMES[4])
EDGES = (-1, 0, 1)
"""Offsets of ragged lengths from a tile; 1, 2 and 2 * tile + 3 are the other ragged lengths."""


# What axes are for ------------------------------------------------------------------------------------------------


def graph_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Every node of the outputs and of the states."""
    roots = list(graph.outputs.values())
    for state in graph.states.values():
        roots += [*state.updates, *(n for n in (state.init, state.where) if n is not None)]
    return list(ir.topological(roots))


def drawn_axes(kernel: typed.Kernel) -> list[str]:
    """The axes that a caller chooses: all but those the kernel declares."""
    declared = {a.name for a in kernel.axes if a.extent is not None}
    named = [a for t in (*kernel.inputs, *kernel.outputs) for a in t.axes] + [a.name for a in kernel.axes]
    return [a for a in dict.fromkeys(named) if a not in declared]


def roles(graph: ir.Graph) -> dict[str, Role]:
    """What every drawn axis is for."""
    swept, positioned, summed = _uses(graph)
    ranked = [t.dims for t in graph.kernel.inputs if len(t.dims) >= 2]
    last = {a for dims in ranked for a in dims[-1]}
    leading = {a for dims in ranked for dim in dims[:-2] for a in dim}
    before_last = {dims[-2][0] for dims in ranked if len(dims[-2]) == 1} - leading
    compared = {a for pair in compared_pairs(graph) for a in pair}
    swept |= compared | {a for a, b in read_ties(graph) if b in compared}
    stepped = {a for s in graph.states.values() for a in s.along}
    held = {a for s in graph.states.values() for a in s.axes} - compared - stepped
    always_last = last - {a for dims in ranked for dim in dims[:-1] for a in dim}
    reduced = {a for n in graph_nodes(graph) if isinstance(n, ir.Reduce | ir.Select) for a in n.over}
    shown = {a for t in graph.kernel.outputs if len(t.dims) >= 2 for a in t.dims[-1]}
    heads = last - always_last - reduced - shown  # that have a number each
    last -= heads
    first = {t.axes[0] for t in graph.kernel.outputs if t.axes}
    scored = {a for n in graph_nodes(graph) if isinstance(n, ir.Reduce) and n.op not in ("sum", "any", "all") for a in n.x.axes}
    places = compared | swept or first
    varying = {a for t in graph.kernel.inputs if places & set(t.axes) for a in t.axes}
    varying |= {a for t in graph.kernel.outputs for a in t.axes[:-1]}
    unvarying = (before_last & (summed | shown)) - varying - positioned - scored  # in weights alone, as what a projection makes: W[d, c]
    if not compared | swept:
        unvarying &= shown
    before_last -= unvarying
    last |= unvarying
    found: dict[str, Role] = {}
    for axis in drawn_axes(graph.kernel):
        if axis in held:
            found[axis] = "feature" if axis in last else "batch"
        elif (axis in swept and not (axis in always_last and axis in summed - compared - stepped)) or (
            axis in positioned and axis not in leading and not (axis in last and axis in summed)
        ):
            found[axis] = "sequence"
        elif axis in last:
            found[axis] = "feature"
        else:
            found[axis] = "sequence" if axis in before_last - heads else "batch"
    for axis, at in read_ties(graph):
        if axis in held and at in found and axis in found:
            found[at] = found[axis]  # a state read under another name of its axis
    return found


def _uses(graph: ir.Graph) -> tuple[set[str], set[str], set[str]]:
    """Axes that are swept (scanned, stepped through, reduced under a condition or other than by a sum), have a position or are
    read at one of another axis, and are plainly summed."""
    swept = {a for s in graph.states.values() for a in s.along}
    positioned: set[str] = set()
    summed: set[str] = set()
    for node in graph_nodes(graph):
        match node:
            case ir.Position(axis=axis):
                positioned.add(axis)
            case ir.Scan(axis=axis):
                swept.add(axis)
            case ir.Reduce(op="sum" | "any" | "all", over=over, where=None):
                summed.update(over)
            case ir.Reduce(over=over) | ir.Select(over=over):
                swept.update(over)
            case ir.Read(at=at):
                positioned.update(a for a, e in at if _is_shift(e))
            case _:
                pass
    return swept, positioned, summed


def batch_axes(graph: ir.Graph) -> list[str]:
    """Axes along which a kernel treats every index alike and by itself: never reduced, scanned, read at, counted or compared."""
    used = {a for s in graph.states.values() for a in s.along}
    for node in graph_nodes(graph):
        match node:
            case ir.Position(axis=axis) | ir.Size(axis=axis) | ir.Scan(axis=axis):
                used.add(axis)
            case ir.Reduce(over=over) | ir.Select(over=over):
                used.update(over)
            case ir.Read(at=at):
                used.update(a for a, _ in at)
            case _:
                pass
    shared = set.intersection(*(set(t.axes) for t in graph.kernel.outputs))
    split = {a for t in (*graph.kernel.inputs, *graph.kernel.outputs) for dim in t.dims if len(dim) > 1 for a in dim}
    return [a for a, role in roles(graph).items() if role == "batch" and a in shared - split - used]


def read_ties(graph: ir.Graph) -> list[tuple[str, str]]:
    """Pairs (a, b) where something is read along ``a`` at the positions of ``b``: ``a`` should cover ``b``."""
    ties: dict[tuple[str, str], None] = {}
    for node in graph_nodes(graph):
        if isinstance(node, ir.Read):
            for axis, at in node.at:
                for other in at.axes:
                    if other != axis and _is_shift(at):
                        ties[axis, other] = None
    return list(ties)


def _is_shift(node: ir.Node) -> bool:
    """A position, perhaps moved by something without axes."""
    match node:
        case ir.Position():
            return True
        case ir.Pointwise(op="add" | "sub", args=(a, b)):
            return (_is_shift(a) and not b.axes) or (_is_shift(b) and not a.axes)
        case _:
            return False


def compared_pairs(graph: ir.Graph) -> list[tuple[str, str]]:
    """Pairs (query, key) of axes whose positions meet in one comparison; the query axis is one of the outputs, the key is reduced."""
    outputs = {a for t in graph.kernel.outputs for a in t.axes}
    reduced = {a for n in graph_nodes(graph) if isinstance(n, ir.Reduce) for a in n.over}
    reduced |= {n.axis for n in graph_nodes(graph) if isinstance(n, ir.Scan)}
    pairs: dict[tuple[str, str], None] = {}
    for node in graph_nodes(graph):
        if isinstance(node, ir.Pointwise) and node.op in ("lt", "le", "gt", "ge", "eq", "ne"):
            held = {n.axis for n in ir.topological([node]) if isinstance(n, ir.Position)}
            for a, b in itertools.permutations(sorted(held), 2):
                if a in outputs and b in reduced and (b not in outputs or (b, a) not in pairs):
                    pairs[a, b] = None
    return list(pairs)


# What a case costs, and whether it means anything ---------------------------------------------------------------


def complete_extents(kernel: typed.Kernel, sizes: Mapping[str, int], params: Mapping[str, Number]) -> dict[str, int]:
    """The extents of all axes, the declared ones computed. Raises ``CallError`` where one cannot be."""
    shapeless = replace(kernel, inputs=())
    return bind(shapeless, {}, params, sizes)


def shape_of(tensor: typed.Tensor, extents: Mapping[str, int]) -> list[int]:
    """The shape of a tensor, its composite dimensions merged."""
    return [math.prod(extents[a] for a in dim) for dim in tensor.dims]


def call_sizes(kernel: typed.Kernel, case: Case, extents: Mapping[str, int]) -> dict[str, int]:
    """The ``sizes=`` that a call needs because the shapes of its inputs do not tell."""
    shapes = {t.name: shape_of(t, extents) for t in kernel.inputs if t.name not in case.omit}
    try:
        bind(kernel, shapes, case.params)
    except errors.CallError:
        return dict(case.sizes)
    return {}


def work(graph: ir.Graph, extents: Mapping[str, int], limits: Limits) -> int:
    """About how many numbers the reference computes; products that are summed at once are matrix products and count little."""
    inner = {id(n.x) for n in graph_nodes(graph) if isinstance(n, ir.Reduce) and n.op == "sum"}
    total = 0
    for node in graph_nodes(graph):
        volume = math.prod(extents[a] for a in node.axes)
        total += volume // 16 if id(node) in inner and isinstance(node, ir.Pointwise) and node.op == "mul" else volume
    steps = {s.along: math.prod(extents[a] for a in s.along) for s in graph.states.values()}
    return total + limits.step * sum(steps.values())


def is_meaningful(graph: ir.Graph, case: Case, extents: Mapping[str, int]) -> bool:
    """Whether every ``clamp`` whose bounds follow from sizes, params and positions has room: a window must fit into its axis."""
    gaps = [ir.pointwise("sub", n.args[2], n.args[1]) for n in graph_nodes(graph) if isinstance(n, ir.Pointwise) and n.op == "clamp"]
    known = [gap for gap in gaps if not any(isinstance(n, ir.Input | ir.StateValue) for n in ir.topological([gap]))]
    values = evaluate_nodes(graph, known, {}, case.params, extents, origin=case.origin)
    return all(bool((v >= 0).all()) for v in values)


# Drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Palette:
    """What a compilation is specialised to, as far as extents and params go."""

    features: dict[str, int]
    params: dict[str, Number]


class CaseDrawer:
    """Draws cases for one kernel, one theme after the other and then at random. ``sizes`` and ``params`` are kept fixed."""

    def __init__(
        self, graph: ir.Graph, limits: Limits, seed: int, sizes: Mapping[str, int] | None, params: Mapping[str, Number] | None, quick: bool
    ) -> None:
        self.graph, self.kernel, self.limits, self.quick = graph, graph.kernel, limits, quick
        self.rng = random.Random(seed)
        self.fixed_sizes, self.fixed_params = dict(sizes or {}), dict(params or {})
        self.roles = roles(graph)
        self.pairs = compared_pairs(graph)
        self.ties = read_ties(graph)
        self.palettes = [self._palette(n) for n in range(limits.palettes)]

    def cases(self, count: int) -> Iterator[tuple[Theme, int]]:
        """``count`` themes with the palette that each should use."""
        themes = QUICK_THEMES if self.quick else THEMES
        for n in range(count):
            theme = themes[n] if n < len(themes) else self.rng.choice(themes)
            yield theme, n % len(self.palettes)

    def draw(self, theme: Theme, palette: int, attempts: int = 40) -> Case | None:
        """A case of this theme that is cheap enough and means something; None where none was found.

        What a palette cannot give (a window that fits no length) is redrawn with other params, which then stay.
        """
        for attempt in range(attempts):
            if attempt and attempt % 8 == 0:
                self.palettes[palette] = self._palette(attempt // 8)
            for tile, widest in [*((t, None) for t in self.limits.tiles), (self.limits.tiles[-1], 8)]:
                case = self._propose(theme, self.palettes[palette], tile, widest)
                if self._fits(case):
                    return case
        return None

    def _fits(self, case: Case) -> bool:
        try:
            extents = complete_extents(self.kernel, case.sizes, case.params)
        except errors.CallError:
            return False
        return work(self.graph, extents, self.limits) <= self.limits.work and is_meaningful(self.graph, case, extents)

    def _palette(self, n: int) -> Palette:
        """Palette 0 has plain head dims and the default params, the others odd head dims and small params."""
        features: dict[str, int] = {}
        plain = [f for f in self.limits.features if f & (f - 1) == 0 and f > 1] or list(self.limits.features)
        for axis, role in self.roles.items():
            if role == "feature":
                features[axis] = self.rng.choice(plain if n == 0 else self.limits.features)
        return Palette(features, {p.name: self._param(p, plain=n == 0) for p in self.kernel.params})

    def _param(self, param: typed.Param, plain: bool) -> Number:
        if param.name in self.fixed_params:
            return self.fixed_params[param.name]
        if plain and param.default is not None:
            return param.default
        match param.kind:
            case "bool":
                return self.rng.random() < 0.5
            case "float":
                return self.rng.uniform(0.5, 1.5) * float(param.default or 1.0)
            case "int":
                usual = 4 if param.default is None else int(param.default)
                if usual <= 0:
                    return usual
                return self.rng.randint(1, min(8, usual + 1))

    def _propose(self, theme: Theme, palette: Palette, tile: int, widest: int | None) -> Case:
        rng = self.rng
        sizes: dict[str, int] = {}
        samples = 1
        for axis, role in self.roles.items():
            if role == "feature":
                sizes[axis] = min(palette.features[axis], widest or palette.features[axis])
            elif role == "batch":
                sizes[axis] = 1 if theme.lengths == "ones" and rng.random() < 0.5 else rng.choice(self.limits.batch)
                if samples * sizes[axis] > self.limits.samples:
                    sizes[axis] = 1
                samples *= sizes[axis]
        sizes.update(self._lengths(theme, tile))
        sizes.update(self.fixed_sizes)
        origin: dict[str, int] = {}
        if theme.relation == "decode":
            origin = {q: sizes[k] - sizes[q] for q, k in self.pairs if q in sizes and k in sizes and sizes[k] > sizes[q]}
        self._cover_reads(theme, sizes, origin)
        ordered = {a: sizes[a] for a in self.roles}
        omit, wrt, seed = self._omitted(), self._subset(theme), rng.randrange(2**31)
        return Case(ordered, dict(palette.params), origin, theme.values, theme.layout, omit, wrt, seed)

    def _lengths(self, theme: Theme, tile: int) -> dict[str, int]:
        sequences = [a for a, role in self.roles.items() if role == "sequence"]
        common = self._length(theme, tile)
        lengths = {a: common if theme.relation != "free" else self._length(theme, tile) for a in sequences}
        for query, key in self.pairs:
            if query not in lengths or key not in lengths:
                continue
            if theme.relation == "decode":
                lengths[query] = self.rng.randint(1, max(1, lengths[key] // 2))
            elif theme.relation == "few":
                lengths[key] = self.rng.randint(1, max(1, lengths[query] // 4))
        if theme.lengths == "ones" and sequences:
            lengths[self.rng.choice(sequences)] = 1
        return lengths

    def _length(self, theme: Theme, tile: int) -> int:
        if theme.lengths == "ragged":
            return self.rng.choice([*(max(1, tile + e) for e in EDGES), 2 * tile + 3])
        if theme.lengths == "small":
            return self.rng.randint(2, max(3, tile // 2))
        return self.rng.choice([1, 2, max(1, tile - 1), tile + 1])

    def _cover_reads(self, theme: Theme, sizes: dict[str, int], origin: Mapping[str, int]) -> None:
        """Lets an axis that is read at positions of others reach as far as these, unless lengths are to be unrelated."""
        if theme.relation == "free":
            return
        for axis in {a for a, _ in self.ties if a in sizes and a not in self.fixed_sizes}:
            others = [b for a, b in self.ties if a == axis and b in sizes]
            if others and self.roles[axis] == "sequence" and not any(axis in pair for pair in self.pairs):
                sizes[axis] = max(sizes[b] + origin.get(b, 0) for b in others)
            elif others and self.roles[axis] == "feature":
                sizes[axis] = max(sizes[b] for b in others)

    def _omitted(self) -> tuple[str, ...]:
        """Now and then the trailing inputs that have a default."""
        names: list[str] = []
        for tensor in reversed(self.kernel.inputs):
            if tensor.default is None or self.rng.random() < 0.6:
                break
            names.append(tensor.name)
        return tuple(names)

    def _subset(self, theme: Theme) -> tuple[str, ...] | None:
        names = differentiable_inputs(self.kernel)
        if not theme.subset or len(names) < 2:
            return None
        return tuple(sorted(self.rng.sample(names, self.rng.randint(1, len(names) - 1))))


def differentiable_inputs(kernel: typed.Kernel) -> list[str]:
    """The inputs that may have a gradient: the floating ones."""
    return [t.name for t in kernel.inputs if t.dtype is None or t.dtype.startswith(("float", "bfloat"))]


# Shrinking --------------------------------------------------------------------------------------------------------


def smaller_cases(case: Case, compiled_in: Collection[str] = ()) -> Iterator[Case]:
    """Cases one step simpler: an axis halved or one less, plain inputs, plain values, an origin halved, fewer gradients.

    Axes that are ``compiled_in`` come last: each of their extents costs a compilation.
    """
    plain = Case(case.sizes)
    if case.layout != plain.layout:
        yield replace(case, layout=plain.layout)
    if case.values != plain.values:
        yield replace(case, values=plain.values)
    yield from _resized(case, [a for a in case.sizes if a not in compiled_in])
    for axis, start in case.origin.items():
        if start > 0:
            yield replace(case, origin={**case.origin, axis: start // 2})
    if case.wrt is not None and len(case.wrt) > 1:
        yield from (replace(case, wrt=(name,)) for name in case.wrt)
    yield from _resized(case, [a for a in case.sizes if a in compiled_in])


def _resized(case: Case, axes: Iterable[str]) -> Iterator[Case]:
    """Cases with one of the axes smaller, the longest first."""
    for axis in sorted(axes, key=lambda a: -case.sizes[a]):
        extent = case.sizes[axis]
        for less in dict.fromkeys((1, (extent + 1) // 2, extent - 1)):
            if 1 <= less < extent:
                yield replace(case, sizes={**case.sizes, axis: less})
