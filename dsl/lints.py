"""Warnings: what is right by the language, but seldom what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import typed as t
from .diagnostics import Source, excerpt
from .extents import walk


@dataclass(frozen=True, slots=True)
class Warning_:
    """A suspicion: what is odd, where, and how to write what was probably meant."""

    source: Source
    span: t.Span
    message: str
    advice: str

    def __str__(self) -> str:
        where = f"{self.source.filename}:{self.span.line}:{self.span.column}"
        return f"{where}: warning: {self.message}\n{excerpt(self.source, self.span)}\n  help: {self.advice}"


def lint(spec: t.Spec) -> list[Warning_]:
    """The warnings of a spec, in the order of its kernels and lines."""
    source = Source(spec.filename, spec.text)
    return [warning for kernel in spec.kernels for warning in _normalised_above_mask(source, kernel)]


def _normalised_above_mask(source: Source, kernel: t.Kernel) -> Iterator[Warning_]:
    """A ``softmax`` or ``lse`` along an axis that a later mask restricts, unless the mask is a routing by the same scores."""
    masks = _masks(kernel)
    for statement in kernel.body:
        if not isinstance(statement, t.Equation):
            continue
        for node in walk([statement.expr]):
            if not isinstance(node, t.Reduce) or node.op not in ("softmax", "lse"):
                continue
            for mask in masks:
                own = frozenset().union(*(w.axes for w in node.where))
                shared = sorted((mask.axes & set(node.over)) - own)
                below = mask.span.line > statement.span.end_line
                if shared and below and not _needs(kernel, mask) & {statement.name, *_values(node)}:
                    over, axis = ", ".join(node.over), shared[0]
                    message = f"`{node.op}[{over}]` on line {node.span.line} is above the mask on `{axis}` on line {mask.span.line}"
                    advice = "a mask restricts only the lines below it: move it up if it is meant here, too"
                    yield Warning_(source, node.span, message, advice)


def _masks(kernel: t.Kernel) -> list[t.Expr]:
    """The conditions of the kernel's masks that act on something, in the order of the text."""
    found: dict[t.Span, t.Expr] = {}
    for statement in kernel.body:
        if isinstance(statement, t.Equation | t.State):
            found |= {m.span: m for m in statement.masks}
        roots = [statement.expr] if not isinstance(statement, t.State) else [] if statement.init is None else [statement.init]
        for node in walk(roots):
            if isinstance(node, t.Reduce | t.Scan):
                found |= {w.span: w for w in node.where if not _inside(w.span, statement.span)}
    return [found[span] for span in sorted(found, key=lambda s: (s.line, s.column))]


def _inside(inner: t.Span, outer: t.Span) -> bool:
    start = (outer.line, outer.column) <= (inner.line, inner.column)
    return start and (inner.end_line, inner.end_column) <= (outer.end_line, outer.end_column)


def _values(expr: t.Expr) -> set[str]:
    return {node.name for node in walk([expr]) if isinstance(node, t.ValueRef)}


def _needs(kernel: t.Kernel, mask: t.Expr) -> set[str]:
    """The values that ``mask`` is computed from, directly or not."""
    equations = {s.name: s.expr for s in kernel.body if isinstance(s, t.Equation)}
    seen: set[str] = set()
    waiting = [mask]
    while waiting:
        found = _values(waiting.pop()) - seen
        seen |= found
        waiting += [equations[name] for name in found]
    return seen
