"""Whether states can be stepped: a step may look back only through what it carries.

States carried along the same axes in the same direction are stepped together. What an update needs may not read,
reduce or scan such a state along its time axes, and states that are stepped apart may not need each other in a circle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import diagnostics as d
from . import typed as t
from .diagnostics import Source, SpecError
from .extents import operands

Group = tuple[tuple[str, ...], bool]
"""The time axes and the direction of states that are stepped together."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a value needs: states, and (axis, state) pairs where it looks at other positions of a state along an axis."""

    states: frozenset[str] = frozenset()
    looks: frozenset[tuple[str, str]] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.states | other.states, self.looks | other.looks)


def needs(expr: t.Expr, values: Mapping[str, Needs]) -> Needs:
    """What ``expr`` needs, given what the values of earlier lines need."""
    match expr:
        case t.ValueRef(name=name):
            return values.get(name, Needs())
        case t.StateRef(name=name):
            return Needs(frozenset((name,)))
    parts = [needs(operand, values) for operand in operands(expr)]
    result = Needs(frozenset().union(*(p.states for p in parts)), frozenset().union(*(p.looks for p in parts)))
    match expr:
        case t.Reduce(over=over):
            looked = result.states
        case t.Scan(axis=axis):
            over, looked = (axis,), result.states
        case t.Read(at=at):
            over, looked = tuple(a for a, _ in at), parts[0].states
        case _:
            return result
    return result | Needs(looks=frozenset((axis, state) for axis in over for state in looked))


def check_steps(source: Source, body: Sequence[t.Statement]) -> list[SpecError]:
    """Updates that look at other steps, starts that need their own steps, and circles between groups."""
    states = {s.name: s for s in body if isinstance(s, t.State)}
    if not states:
        return []
    groups: dict[str, Group] = {s.name: (s.along, s.reverse) for s in states.values()}
    values: dict[str, Needs] = {}
    direct: dict[str, set[str]] = {name: set() for name in states}
    errors: list[SpecError] = []
    for statement in body:
        match statement:
            case t.Equation(name=name, expr=expr, masks=masks):
                values[name] = needs(expr, values)
                for mask in masks:
                    values[name] |= needs(mask, values)
            case t.Update(state=name, expr=expr):
                found = needs(expr, values)
                direct[name] |= found.states
                errors += _looks(source, statement, groups, found)
            case t.State(name=name, init=init, masks=masks):
                found = needs(init, values) if init is not None else Needs()
                errors += [
                    d.InitNeedsState(source, init.span, name=name, other=other)
                    for other in sorted(found.states)
                    if init is not None and groups[other] == groups[name]
                ]
                direct[name] |= found.states.union(*(needs(m, values).states for m in masks))
    errors += _circles(source, states, groups, direct)
    return errors


def _looks(source: Source, update: t.Update, groups: Mapping[str, Group], found: Needs) -> Iterator[SpecError]:
    along = groups[update.state][0]
    for axis, other in sorted(found.looks):
        if axis in along and groups[other] == groups[update.state]:
            yield d.StepLooksElsewhere(source, update.expr.span, name=update.state, other=other, axis=axis)
            return


def _circles(
    source: Source, states: Mapping[str, t.State], groups: Mapping[str, Group], direct: Mapping[str, set[str]]
) -> Iterator[SpecError]:
    """The first pair of states of different groups whose groups need each other."""
    edges: dict[Group, set[Group]] = {}
    for name, others in direct.items():
        edges.setdefault(groups[name], set()).update(groups[o] for o in others)
    reach = {group: _reachable(group, edges) for group in edges}
    for name, state in states.items():
        for other in states:
            mine, theirs = groups[name], groups[other]
            if mine != theirs and theirs in reach[mine] and mine in reach[theirs]:
                yield d.StepsInterleave(source, state.span, name=name, other=other)
                return


def _reachable(start: Group, edges: Mapping[Group, set[Group]]) -> set[Group]:
    seen: set[Group] = set()
    waiting = list(edges.get(start, ()))
    while waiting:
        group = waiting.pop()
        if group not in seen:
            seen.add(group)
            waiting.extend(edges.get(group, ()))
    return seen
