"""Pictures of what a spec keeps and how it weighs it: masks and weights, from the reference.

A picture has the positions of the queries downwards and those of the keys across; several axes of either are laid out
one inside the other, and every other axis is fixed at one index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiler import ir
from ..compiler.algebra import factors
from ..compiler.reference import evaluate_nodes
from .check_shapes import graph_nodes
from .problem import Problem, numbers_heads


@dataclass(frozen=True, slots=True)
class Picture:
    """``values`` is (rows, columns): bools of a mask, or weights, which are 0 where masked."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor

    @property
    def is_mask(self) -> bool:
        return self.values.dtype == torch.bool


class NothingToPlot(ValueError):
    """A kernel without a reduction over pairs of positions."""

    def __init__(self, kernel: str) -> None:
        super().__init__(f"{kernel}: there is nothing to plot, because no mask and no weight has two axes of positions.")


def pictures(graph: ir.Graph, problem: Problem, at: Mapping[str, int] | None = None, seed: int = 0) -> list[Picture]:
    """The distinct masks and weights of a kernel, masks first. ``at`` fixes other axes than at 0. Raises ``NothingToPlot``."""
    found = list(_masks(graph)) + list(_weights(graph))
    if not found:
        raise NothingToPlot(graph.kernel.name)
    values = evaluate_nodes(graph, [f.node for f in found], problem.inputs(seed=seed), problem.params, problem.extents)
    made = [_picture(f, value, problem.extents, at or {}) for f, value in zip(found, values, strict=True)]
    return sorted(made, key=lambda p: not p.is_mask)


def save(shown: Sequence[Picture], path: Path, heading: str) -> None:
    """Writes pictures side by side into one image file. Raises ImportError where matplotlib is missing."""
    figure = _figure(len(shown))
    for n, picture in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), n + 1)
        _draw(figure, axes, picture)
    figure.suptitle(heading)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def save_curves(curves: Mapping[str, Sequence[float]], path: Path, heading: str, quantity: str) -> None:
    """Writes curves over steps into one image file. Raises ImportError where matplotlib is missing."""
    figure = _figure(2)
    axes = figure.add_subplot(1, 1, 1)
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(heading)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def text(picture: Picture, width: int = 64) -> str:
    """A picture as characters: darker is larger."""
    values = picture.values.to(torch.float64)
    step = max(1, math.ceil(max(values.shape) / width))
    pooled = torch.nn.functional.max_pool2d(values[None, None], step, ceil_mode=True)[0, 0]
    top = float(pooled.max()) or 1.0
    shades = " .:-=+*#%@"
    lines = ["".join(shades[min(9, int(9.999 * max(0.0, float(v)) / top))] for v in row) for row in pooled]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Found:
    title: str
    node: ir.Node
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def _masks(graph: ir.Graph) -> Iterable[_Found]:
    """The condition of every reduction that has positions of its result as well as reduced ones."""
    seen: set[ir.Node] = set()
    for node in graph_nodes(graph):
        if isinstance(node, ir.Reduce) and node.where is not None and node.where not in seen:
            columns = tuple(a for a in _in_order(graph, node.over) if a in node.where.axes)
            rows = _rows(graph, node, set(node.where.axes) - set(node.over))
            if rows and columns:
                seen.add(node.where)
                yield _Found("mask", node.where, rows, columns)


def _weights(graph: ir.Graph) -> Iterable[_Found]:
    """What values are multiplied by in a sum over keys: the factors that no tensor of the kernel could hold."""
    outputs = [set(t.axes) for t in graph.kernel.outputs]
    held = [*outputs, *(set(t.axes) for t in graph.kernel.inputs)]
    for hosts in (held, outputs):
        found = list(_weights_outside(graph, hosts))
        if found:
            return found
    return []


def _weights_outside(graph: ir.Graph, hosts: list[set[str]]) -> Iterable[_Found]:
    seen: set[ir.Node] = set()
    for node in graph_nodes(graph):
        if not (isinstance(node, ir.Reduce) and node.op == "sum"):
            continue
        parts = factors(node.x)
        paired = [f for f in parts if set(f.axes) & set(node.over) and not any(set(f.axes) <= h for h in hosts)]
        if not paired or len(paired) == len(parts):
            continue
        weight = paired[0]
        for factor in paired[1:]:
            weight = ir.pointwise("mul", weight, factor)
        if node.where is not None:
            weight = ir.pointwise("where", node.where, weight, ir.const(0.0))
        rows = _rows(graph, node, set(weight.axes) - set(node.over))
        if weight not in seen and rows:
            seen.add(weight)
            names = " * ".join(graph.names[f] for f in paired if f in graph.names)
            yield _Found(f"weights {names}".strip(), weight, rows, _in_order(graph, node.over))


def _rows(graph: ir.Graph, node: ir.Reduce, free: set[str]) -> tuple[str, ...]:
    """The axes of ``free`` with positions in a condition or in the operand; the last one of the spec where there are none."""
    roots = [node.x] if node.where is None else [node.where, node.x]
    placed = {n.axis for n in ir.topological(roots) if isinstance(n, ir.Position)} & free
    placed = {axis for axis in placed if not numbers_heads(graph, axis)} or placed
    ordered = _in_order(graph, placed or free)
    return ordered if placed else ordered[-1:]


def _in_order(graph: ir.Graph, axes: Iterable[str]) -> tuple[str, ...]:
    declared = [a for t in (*graph.kernel.inputs, *graph.kernel.outputs) for a in t.axes]
    return tuple(sorted(axes, key=lambda a: (declared.index(a) if a in declared else len(declared), a)))


def _picture(found: _Found, value: Tensor, extents: Mapping[str, int], at: Mapping[str, int]) -> Picture:
    shown = (*found.rows, *found.columns)
    fixed = [a for a in found.node.axes if a not in shown]
    index = tuple(min(at.get(a, 0), extents[a] - 1) if a in fixed else slice(None) for a in found.node.axes)
    left = [a for a in found.node.axes if a in shown]
    plane = value[index].permute([left.index(a) for a in shown])
    height = math.prod(extents[a] for a in found.rows)
    return Picture(found.title, found.rows, found.columns, plane.detach().reshape(height, -1))


def _figure(count: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * count, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(figure: Any, axes: Any, picture: Picture) -> None:
    values = picture.values.to(torch.float32).numpy()
    if picture.is_mask:
        axes.imshow(values, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    else:
        limit = float(abs(values).max()) or 1.0
        signed = bool((values < 0).any())
        colours = "RdBu_r" if signed else "viridis"
        image = axes.imshow(values, cmap=colours, vmin=-limit if signed else 0, vmax=limit, interpolation="nearest")
        figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_title(picture.title)
    axes.set_xlabel(" ".join(picture.columns))
    axes.set_ylabel(" ".join(picture.rows))
