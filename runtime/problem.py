"""One call of a kernel with everything chosen: sizes, params and inputs, for `explain`, `plot` and `bench`.

What is not given is chosen by what an axis is for: sequences share a length, heads and head dims have usual sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler import ir
from ..compiler.canonicalise import canonicalise
from ..compiler.extents import bind_params, complete, shape
from ..compiler.products import dense_mixtures
from ..compiler.routes import find_routings
from ..compiler.sampling import sample
from ..dsl import typed
from .check_shapes import Role, compared_pairs, graph_nodes, read_ties, roles

Number = bool | int | float


@dataclass(frozen=True, slots=True)
class Usual:
    """The extents of axes that are not given: ``length`` is the number of positions of a sequence, over all of its axes."""

    length: int = 2048
    feature: int = 64
    heads: int = 8
    batch: int = 1
    experts: int = 32


@dataclass(frozen=True, slots=True)
class Problem:
    """``sizes`` are the extents that a caller chooses, ``extents`` all of them; ``params`` are complete."""

    kernel: typed.Kernel
    sizes: dict[str, int]
    extents: dict[str, int]
    params: dict[str, Number]

    def inputs(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Every input, drawn by its ``sample`` line, in its declared shape."""
        generator = torch.Generator().manual_seed(seed)
        return sample(self.kernel, self.extents, generator, dtype, device, params=self.params)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output, in its declared dimensions."""
        tensors = {t.name: t for t in (*self.kernel.outputs, *self.kernel.inputs)}
        return shape(tensors[name], self.extents)

    def __str__(self) -> str:
        parts = [" ".join(f"{a}={n}" for a, n in self.extents.items())]
        if self.params:
            parts.append(" ".join(f"{p}={v:g}" for p, v in self.params.items()))
        return ", ".join(parts)


def pose(graph: ir.Graph, sizes: Mapping[str, int], params: Mapping[str, Number], usual: Usual) -> Problem:
    """A problem with these sizes and params, the rest as usual. Raises ``CallError`` for names and values that do not fit."""
    complete_params = bind_params(graph.kernel, params)
    chosen = {**usual_sizes(graph, usual), **sizes}
    return Problem(graph.kernel, chosen, complete(graph.kernel, complete_params, chosen), complete_params)


def usual_sizes(graph: ir.Graph, usual: Usual) -> dict[str, int]:
    """An extent for every axis that a caller chooses."""
    tensors = (*graph.kernel.inputs, *graph.kernel.outputs)
    first = next((t.axes for t in tensors if t.axes), ())
    later_parts = {a for t in tensors for dim in t.dims for a in dim[1:]}
    found = {a: "batch" if role == "sequence" and numbers_heads(graph, a) else role for a, role in roles(graph).items()}
    found |= dict.fromkeys(_mixed_heads(graph, found), "batch")
    side = _side(usual.length, sum(found.get(a) == "sequence" for a in first))
    samples = _samples(graph, found) | set(first[:1])
    sizes: dict[str, int] = {}
    for axis, role in found.items():
        match role:
            case "sequence":
                sizes[axis] = side
            case "feature":
                sizes[axis] = usual.feature
            case _:
                sizes[axis] = usual.batch if axis in samples else 1 if axis in later_parts else usual.heads
    sizes |= dict.fromkeys(_slots(graph, found), usual.feature)
    sizes |= _experts(graph, found, sizes, usual)
    for axis, at in read_ties(graph):
        if axis in sizes and at in sizes:
            sizes[axis] = max(sizes[axis], sizes[at])
    return sizes


def _experts(graph: ir.Graph, role: Mapping[str, Role], chosen: Mapping[str, int], usual: Usual) -> dict[str, int]:
    """Axes of experts, which together have about ``usual.experts``, and of heads that an expert has."""
    if graph.states:
        return {}
    outputs = canonicalise(graph.outputs)
    routings = find_routings(outputs, {})
    tokens = {a for r in routings for a in r.tokens}
    dense = {a for own in dense_mixtures(ir.topological(outputs.values())).values() for a in own if role.get(a) == "sequence"}
    found = dict.fromkeys(dense & chosen.keys(), usual.experts)
    for r in routings:
        selected = {a for n in ir.topological([r.condition]) if isinstance(n, ir.Select) for a in n.over}
        free = sorted((r.experts | selected) & chosen.keys() - tokens)
        found |= dict.fromkeys((a for a in r.features & chosen.keys() if role.get(a) == "sequence"), usual.heads)
        found |= dict.fromkeys(free, max(1, round(usual.experts ** (1 / len(r.experts)))))
    return found


def _mixed_heads(graph: ir.Graph, found: Mapping[str, Role]) -> set[str]:
    """Heads that look like features because a matrix mixes them: those in front of positions in some input, and the axes that meet
    nothing but heads."""
    inputs = [t.axes for t in graph.kernel.inputs]
    heads = {a for axes in inputs for n, a in enumerate(axes) if any(found.get(b) == "sequence" for b in axes[n + 1 :])}
    features = {a for a, role in found.items() if role == "feature"}
    mixed = features & heads
    for axis in features - heads if mixed else ():
        partners = {b for axes in inputs if axis in axes for b in axes} - {axis}
        if partners and all(found.get(b) == "batch" or b in mixed for b in partners):
            mixed.add(axis)
    return mixed


def _samples(graph: ir.Graph, found: Mapping[str, Role]) -> set[str]:
    """The axes of samples: outputs begin with them, and so do inputs with positions."""
    first = {t.axes[0] for t in graph.kernel.outputs if t.axes}
    placed = {t.axes[0] for t in graph.kernel.inputs if any(found.get(a) == "sequence" for a in t.axes[1:])}
    return {a for a in first & placed if found.get(a) == "batch"}


def _slots(graph: ir.Graph, found: Mapping[str, Role]) -> set[str]:
    """Axes of learned positions, latents or slots of a memory: weights alone have them, which lack the axis of samples, and no position is
    compared or read at."""
    outputs = _samples(graph, found)
    samples = [t for t in graph.kernel.inputs if outputs & set(t.axes)]
    if not samples:
        return set()
    nodes = graph_nodes(graph)
    placed = {a for pair in compared_pairs(graph) for a in pair} | {a for s in graph.states.values() for a in s.along}
    placed |= {n.axis for n in nodes if isinstance(n, ir.Position)} | {a for n in nodes if isinstance(n, ir.Read) for a, _ in n.at}
    held = {a for t in graph.kernel.inputs if t in samples or t.dtype is not None for a in t.axes}  # numbers and masks are no weights
    return {a for a, role in found.items() if role == "sequence" and a not in held | placed}


def numbers_heads(graph: ir.Graph, axis: str) -> bool:
    """Whether the positions of an axis are mere numbers of its elements: nothing runs along it, and another axis is the query's."""
    for node in graph_nodes(graph):
        match node:
            case ir.Reduce(over=over) | ir.Select(over=over) if axis in over:
                return False
            case ir.Scan(axis=scanned) if axis == scanned:
                return False
            case _:
                pass
    if any(axis in state.along for state in graph.states.values()) or any(axis in pair for pair in compared_pairs(graph)):
        return False
    if any(axis == read for read, _ in read_ties(graph)):  # one tensor for queries and keys
        return False
    compared = {query for query, _ in compared_pairs(graph)}
    return all(compared & set(t.axes) - {axis} for t in graph.kernel.outputs if axis in t.axes) if compared else False


def _side(length: int, axes: int) -> int:
    """The extent of each of some axes that together have about ``length`` positions."""
    side: float = length ** (1 / max(1, axes))
    return max(1, round(side))
