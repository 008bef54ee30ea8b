"""Whether every extent of a kernel can be told from its inputs: plain dimensions, declared axes, and splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from . import diagnostics as d
from . import typed as t
from .diagnostics import Source, SpecError


def check_extents(source: Source, inputs: Sequence[t.Tensor], declared: Mapping[str, t.Axis]) -> list[SpecError]:
    """Mistakes that leave an extent unknown.

    A plain dimension gives its axis, a declaration gives one once the sizes it mentions are known, and a split gives
    its last unknown part. Inputs that may be left out give nothing.
    """
    given = [i for i in inputs if i.default is None]
    known = {dim[0] for i in given for dim in i.dims if len(dim) == 1}
    mentioned = {name: sizes(axis.extent) for name, axis in declared.items() if axis.extent is not None}
    while True:
        found = {name for name, axes in mentioned.items() if axes <= known} - known
        for tensor in given:
            for dim in tensor.dims:
                unknown = [a for a in dim if a not in known | found]
                if len(unknown) == 1:
                    found.add(unknown[0])
        if not found:
            break
        known |= found
    return [*_splits(source, given, known, declared), *_cycles(source, known, declared, given), *_optional(source, inputs, given, declared)]


def _splits(source: Source, given: Sequence[t.Tensor], known: set[str], declared: Mapping[str, t.Axis]) -> Iterator[SpecError]:
    reported: set[tuple[str, ...]] = set()
    for tensor in given:
        for dim in tensor.dims:
            unknown = _undeclared(dim, known, declared)
            if unknown and unknown not in reported:
                reported.add(unknown)
                axes = " and ".join(f"`{a}`" for a in unknown)
                yield d.UnsolvableSplit(source, tensor.span, axes=axes, dim=f"({' '.join(dim)})", axis=unknown[-1])


def _undeclared(dim: tuple[str, ...], known: set[str], declared: Mapping[str, t.Axis]) -> tuple[str, ...]:
    """The axes of a split that nothing tells apart: two or more that are neither known nor declared."""
    unknown = tuple(a for a in dim if a not in known and a not in declared)
    return unknown if len(unknown) > 1 else ()


def _cycles(source: Source, known: set[str], declared: Mapping[str, t.Axis], given: Sequence[t.Tensor]) -> Iterator[SpecError]:
    """Declared axes that stay unknown although no split is to blame."""
    lost = {a for tensor in given for dim in tensor.dims for a in _undeclared(dim, known, declared)}
    for name, axis in declared.items():
        if name not in known and axis.extent is not None and not _reaches(axis.extent, lost, declared):
            yield d.AxisCycle(source, axis.span, name=name)


def _reaches(extent: t.Expr, lost: set[str], declared: Mapping[str, t.Axis]) -> bool:
    seen: set[str] = set()
    waiting = set(sizes(extent))
    while waiting:
        name = waiting.pop()
        seen.add(name)
        if name in lost:
            return True
        other = declared.get(name)
        if other is not None and other.extent is not None:
            waiting |= sizes(other.extent) - seen
    return False


def _optional(source: Source, inputs: Sequence[t.Tensor], given: Sequence[t.Tensor], declared: Mapping[str, t.Axis]) -> Iterator[SpecError]:
    """Axes that only an input with a default has."""
    certain = {a for tensor in given for a in tensor.axes} | set(declared)
    for tensor in inputs:
        if tensor.default is None:
            continue
        for axis in tensor.axes:
            if axis not in certain:
                yield d.OptionalExtent(source, tensor.span, name=axis, tensor=tensor.name)


def sizes(expr: t.Expr) -> frozenset[str]:
    """The axes whose extents ``expr`` mentions."""
    return frozenset(e.axis for e in walk([expr]) if isinstance(e, t.Size))


def walk(roots: Iterable[t.Expr]) -> Iterator[t.Expr]:
    """Every expression inside ``roots``, themselves included."""
    stack = list(roots)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(operands(node))


def operands(node: t.Expr) -> tuple[t.Expr, ...]:
    """The expressions directly inside ``node``."""
    match node:
        case t.Pointwise(args=args) | t.Draw(args=args):
            return args
        case t.Reduce(x=x, where=where, k=k):
            return (x, *where) if k is None else (x, *where, k)
        case t.Scan(x=x, where=where):
            return (x, *where)
        case t.Read(x=x, at=at):
            return (x, *(e for _, e in at))
        case t.Sort(x=x):
            return (x,)
        case _:
            return ()
