"""Pass: on a CPU, gradients of rows and of columns in one kernel.

One program owns a whole head: it runs over the tiles of columns, sweeps the rows, keeps the columns' sums in registers and adds the
rows' sums to memory in place. That saves computing the scores twice (two of seven matrix products) and stays deterministic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .tasks import Group

if TYPE_CHECKING:
    from . import ir
    from .emit import Context


def pair_owned(groups: list[Group], context: Context) -> list[tuple[Group, Group | None]]:
    """Each group with the group that its kernel takes along, in order of launch."""
    result: list[tuple[Group, Group | None]] = []
    used: set[int] = set()
    for n, columns in enumerate(groups):
        if n in used:
            continue
        partner = next(
            (m for m in range(n + 1, len(groups)) if m not in used and _fit(columns, groups[m], groups[n + 1 : m], context)), None
        )
        if partner is None:
            result.append((columns, None))
        else:
            used.add(partner)
            a, b = columns, groups[partner]
            first, second = (a, b) if _is_columns(a, b) else (b, a)
            result.append((first, second))
    return result


def _is_columns(a: Group, b: Group) -> bool:
    """``a`` keeps fewer axes: it sweeps the grouped heads as well."""
    return len(a.kept) <= len(b.kept)


def _loops(group: Group, context: Context) -> set[frozenset[str]]:
    return {frozenset(s.over) - context.structure.whole for s in group.sweeps}


def _fit(a: Group, b: Group, between: list[Group], context: Context) -> bool:
    """The same iteration space, plain sums only, results that are the sums themselves, and no dependency."""
    loops_a, loops_b = _loops(a, context), _loops(b, context)
    if len(loops_a) != 1 or len(loops_b) != 1 or not (a.sweeps and b.sweeps):
        return False
    (la,), (lb,) = loops_a, loops_b
    if a.kept | la != b.kept | lb or la == lb:
        return False
    first, second = (a, b) if _is_columns(a, b) else (b, a)
    lead = next(iter(_loops(first, context)))
    if not (second.kept >= lead and first.kept >= next(iter(_loops(second, context)))):
        return False
    if not all(_plain(s) for g in (a, b) for s in g.sweeps) or not all(t.node in t.sweeps and not t.also for t in second.tasks):
        return False
    made = {t.node for t in a.tasks}
    blocked = {t.node for g in between for t in g.tasks}
    return not any(n in made or n in blocked for t in b.tasks for n in t.needs) and not _cross(a, b)


def _cross(a: Group, b: Group) -> bool:
    made_b: set[ir.Node] = {t.node for t in b.tasks}
    return any(n in made_b for t in a.tasks for n in t.needs)


def _plain(s: ir.Reduce) -> bool:
    return s.op == "sum"
