"""Pass: gradients or outputs -> tasks, each a tensor to be written, grouped into kernels.

A task writes one storable value. Its *kept* axes index the result, its sweeps loop over the others. What a loop would otherwise
compute again for every tile of rows (a normalised key, a row statistic read by columns) becomes a task of its own.
Tasks that keep and sweep the same axes share a kernel where no dependency forbids it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from . import ir
from .algebra import conjunction, conjuncts, factors, is_const, product, reduce_sum, with_children
from .plan import Edge, Index, Local, Origin
from .structure import NARROW, scatter_axis

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import networkx as nx

    from .structure import Axes, Structure

CHEAP = frozenset("add sub mul neg abs relu min max where le lt ge gt eq ne and or not".split())
PROGRAMS = 2
"""Axes that gradients of rows and of columns must both keep to be made by one program for each of their points: a batch and heads."""
LEAVES = (ir.Input, ir.Param, ir.Size, ir.Position, ir.Const, Index, Origin, Edge, Local)


class NotFused(Exception):
    """No schedule of this class computes the graph; the text says which value and why."""


class TooWide(NotFused):
    """An axis would be kept whole in a tile, and is too long for that."""


class Crowded(Exception):
    """One kernel cannot make all that it should, but could without some of its ``sweeps``: a program of a GPU could not hold its tiles, or
    sweeps do not go well together."""

    def __init__(self, sweeps: list[ir.Reduce], reason: str) -> None:
        super().__init__(reason)
        self.sweeps = sweeps


@dataclass(slots=True)
class Task:
    """Write ``node`` to ``buffer`` (and ``also`` to others): ``kept`` axes index it, ``sweeps`` are the loops it needs, ``needs`` the
    stored values it reads."""

    node: ir.Node
    buffer: str
    kept: frozenset[str]
    sweeps: list[ir.Reduce] = field(default_factory=list)
    needs: list[ir.Node] = field(default_factory=list)
    also: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Group:
    """Tasks of one kernel."""

    tasks: list[Task]

    @property
    def kept(self) -> frozenset[str]:
        return self.tasks[0].kept

    @property
    def sweeps(self) -> list[ir.Reduce]:
        found: list[ir.Reduce] = []
        for task in self.tasks:
            found += [s for s in task.sweeps if s not in found]
        return found


def nest_sums(roots: dict[str, ir.Node], structure: Structure, *, shares: bool) -> dict[str, ir.Node]:
    """A sum over more axes than one kernel sweeps becomes a sum of row sums.

    Before: d_slope[h] = sum[b, i, j](..). After: d_slope[h] = sum[b](sum[i](sum[j](..))), where sum[j] joins the sweep that d_q needs.
    So does the gradient of a table that is read by position: every row then stores a table of its own, which takes memory, but gives
    every row to a program of its own, where one sum would leave only the table's other axes to share out. With ``shares``, so does the
    gradient of keys that heads share: every head stores its share, and one program can make all gradients of a head.
    """
    loops: Counter[frozenset[str]] = Counter()
    wanted = set(roots.values())
    for n in ir.topological(roots.values()):
        if isinstance(n, ir.Reduce) and structure.is_sweep(n) and _virtual_operand(n, structure):
            loops[frozenset(n.over) - structure.whole] += n in wanted
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        memo[n] = _nest(new, loops, structure, _table(new, structure), shares) if isinstance(new, ir.Reduce) and new.op == "sum" else new
    return {name: memo[n] for name, n in roots.items()}


def _table(n: ir.Reduce, structure: Structure) -> Axes:
    """The axis by which a sum scatters."""
    scattered = scatter_axis(n)
    return frozenset([scattered[0]]) & structure.whole if scattered is not None else frozenset()


def merge_sums(roots: dict[str, ir.Node], structure: Structure) -> dict[str, ir.Node]:
    """A sum of sums that no tensor could hold becomes one sum.

    Before: d_slope[h] = sum[i, j]((i - j) * sum[b](ds)). After: d_slope[h] = sum[b, i, j]((i - j) * ds).
    A contraction (no factor of the inner sum has every axis) stays: it is a matrix product. So does a sum over features
    that others are multiplied to: it folds a tile before more is made of it.
    """
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        memo[n] = _merge(new, structure) if isinstance(new, ir.Reduce) and new.op == "sum" else new
    return {name: memo[n] for name, n in roots.items()}


def contract_blocks(roots: dict[str, ir.Node]) -> dict[str, ir.Node]:
    """Where steps go in blocks, a sum of a product takes the steps of a block first, if not all of its factors need them.

    Before: d_k[c2, r2, d] = sum[c, r](p * q * exp(e)), where e lacks the step r of a block c. After: sum[c](exp(e) * sum[r](p * q)),
    with a matrix product inside.
    """
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(roots.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        blocks = isinstance(new, ir.Reduce) and new.op == "sum" and len(new.over) > 1 and any(is_few(a) for a in (*new.axes, *new.over))
        memo[n] = _contract_block(new) if isinstance(new, ir.Reduce) and blocks else new
    return {name: memo[n] for name, n in roots.items()}


def _contract_block(n: ir.Reduce) -> ir.Node:
    parts = factors(n.x)
    tested = {a for c in conjuncts(n.where) for a in c.axes}
    choices = []
    for axis in sorted(a for a in n.over if ir.fixed_extent(a) and not is_few(a) and a not in tested):
        have = [f for f in parts if axis in f.axes]
        apart = [f for f in parts if not any(set(f.axes) <= set(h.axes) for h in have)]  # nothing that is multiplied to one of them
        if len(have) > 1 and apart:
            choices.append((len({a for f in have for a in f.axes}), axis, apart))
    if not choices:
        return n
    _, axis, apart = min(choices, key=lambda c: c[:2])
    inner = reduce_sum([axis], product(f for f in parts if f not in apart))
    return reduce_sum(set(n.over) - {axis}, product([*apart, inner]), n.where)


def _merge(n: ir.Reduce, structure: Structure) -> ir.Node:
    over, parts = set(n.over), factors(n.x)
    for place, f in enumerate(parts):
        if not (isinstance(f, ir.Reduce) and f.op == "sum" and over & set(f.axes)) or structure.storable(f.axes):
            continue
        others = parts[:place] + parts[place + 1 :]
        if set(f.over) <= structure.features and any(set(o.axes) - set(f.axes) for o in others):
            continue
        blocks = any(ir.fixed_extent(a) for a in f.axes)
        clash = over & set(f.over) or any(set(f.over) & set(o.axes) for o in (*others, *conjuncts(n.where)))
        full = {*f.axes, *f.over}
        if not clash and (any(full <= set(g.axes) for g in factors(f.x)) or (blocks and _is_elementwise(f))):
            merged = reduce_sum(over | set(f.over), product([*others, f.x]), conjunction([n.where, f.where]))
            return _merge(merged, structure) if isinstance(merged, ir.Reduce) else merged
    return n


def _is_elementwise(n: ir.Reduce) -> bool:
    """Whether a sum of a product of several factors is no matrix product: however they are taken together in two, one of the two has all
    axes, as in sum[b](p[b,i,j] * q[b,i,d] * k[b,j,d])."""
    parts = factors(n.x)
    kept = set(n.axes)
    for size in range(1, len(parts) // 2 + 1):
        for some in combinations(parts, size):
            left, right = ({a for f in group for a in f.axes} & kept for group in (some, [f for f in parts if f not in some]))
            if kept not in (left, right):
                return False
    return len(parts) > 2


def _nest(n: ir.Reduce, loops: Counter[frozenset[str]], structure: Structure, table: Axes, shares: bool) -> ir.Node:
    mine = frozenset(n.over) - structure.whole
    if len(mine) < 2 or not structure.is_sweep(n):
        return n
    rest = set(n.over) - mine
    tiled = frozenset([pick_tiled(mine, structure)])
    virtual = _virtual_operand(n, structure)
    choices = ([c for c in loops if c < mine] or [frozenset(structure.sort(mine)[-1:])]) if virtual else [tiled]
    if table & structure.tables:
        choices = [c for c in [frozenset().union(*(c for c in loops if c < mine))] if c and c < mine]
    # A table goes with the sweep that carries the least besides.
    choices.sort(key=lambda c: (loops[c] if table else 0, -len(c), sorted(c)))
    for inner_axes in choices + [tiled] * (virtual and shares):
        inner = reduce_sum(inner_axes | rest, n.x, n.where)
        if not isinstance(inner, ir.Reduce):
            continue
        share = inner_axes == tiled and shares and _is_share(n, inner, structure)
        if share and not structure.storable(inner.axes):
            structure.shares.append(frozenset(inner.axes))
        if share or structure.storable(set(inner.axes) - table):
            outer = reduce_sum(mine - inner_axes, inner)
            return _nest(outer, loops, structure, table, shares) if isinstance(outer, ir.Reduce) else outer
    return n


def _is_share(n: ir.Reduce, inner: ir.Reduce, structure: Structure) -> bool:
    """Whether ``inner`` sums over the rows of a head, one sum for each of its columns, and ``n`` over heads that share the columns.

    There are as many such sums as elements of a tensor that holds the rows of every head. Where heads share in groups, there is a
    program for every group.
    """
    kept, swept = frozenset(inner.axes) - structure.whole, frozenset(inner.over) - structure.whole
    for column in kept & frozenset(n.axes):
        if not structure.storable(swept | {column}) and structure.storable(kept - {column} | swept):
            return len(frozenset(n.axes) - structure.whole - {column}) < PROGRAMS <= len(kept - {column})
    return False


def _virtual_operand(n: ir.Reduce, structure: Structure) -> bool:
    where = n.where.axes if n.where is not None else ()
    return not structure.storable({*n.x.axes, *n.over, *where})


def pick_tiled(axes: Iterable[str], structure: Structure) -> str:
    """The axis to tile: not one of a few indices, one whose positions are compared, rather not a later part of a split dimension, the last
    in memory."""

    def rank(a: str) -> tuple[bool, bool, bool, bool, int, str]:
        return not is_few(a), a in structure.related, a in structure.pair, a not in structure.minor, structure.order.get(a, 0), a

    return max(axes, key=rank)


def is_few(axis: str) -> bool:
    """Whether an axis has so few indices in every call that loops take them one by one."""
    extent = ir.fixed_extent(axis)
    return extent is not None and extent < NARROW


class Planner:
    """Finds the tasks of a set of roots."""

    def __init__(self, structure: Structure, available: dict[ir.Node, str], temporaries: int = 0, alone: Collection[ir.Node] = ()) -> None:
        self.structure = structure
        self.available = available
        self.tasks: dict[ir.Node, Task] = {}
        self.spread: list[Task] = []
        """Roots whose value another task with fewer axes has too (a constant gradient)."""
        self.temporaries = temporaries
        self.alone = alone
        """Sweeps that have kernels of their own."""

    def add_root(self, node: ir.Node, buffer: str, axes: Iterable[str]) -> None:
        kept = frozenset(axes) - self.structure.whole
        same = next((t for t in (*self.tasks.values(), *self.spread) if t.node is node and t.kept == kept), None)
        if same is not None:
            same.also.append(buffer)
            return
        task = Task(node, buffer, kept)
        if node in self.tasks:
            self.spread.append(task)
        else:
            self.tasks[node] = task
        self._walk_row(node, task, set())

    def separate(self) -> set[ir.Node]:
        """Sums over a whole head's pairs become tasks of their own where another task sums the same pairs the other way: one program
        can then make both. Returns these sums."""
        plain = [
            t for t in self.tasks.values() if t.sweeps and all(s.op == "sum" and _virtual_operand(s, self.structure) for s in t.sweeps)
        ]
        products = {s: t.kept for t in plain for s in t.sweeps if self.structure.whole & set(s.axes)}
        count = Counter((kept, self._swept(s)) for s, kept in products.items())
        found: set[ir.Node] = set()
        for task in plain:
            mirrored = [
                s
                for s in task.sweeps
                if s in products
                and any(
                    self._mirrors(s, m, task.kept) and count[task.kept, self._swept(s)] < count[k, self._swept(m)]
                    for m, k in products.items()
                )
            ]
            if mirrored and task.sweeps != [task.node]:
                found.update([task.node] if task.node in mirrored else mirrored)
                self._alone(task)
        return found

    def _swept(self, s: ir.Reduce) -> frozenset[str]:
        return frozenset(s.over) - self.structure.whole

    def _mirrors(self, s: ir.Reduce, m: ir.Reduce, kept: frozenset[str]) -> bool:
        """Whether ``m`` sums over the pairs that ``s`` sums over, and keeps what ``s`` sweeps."""
        other = frozenset(m.axes) - self.structure.whole
        together = kept | self._swept(s) == other | self._swept(m)
        return together and self._swept(s) <= other and len(kept & other) >= PROGRAMS

    def _alone(self, task: Task) -> None:
        """Every sweep of a task but its own node's becomes a task."""
        others = [s for s in task.sweeps if s is not task.node]
        for s in others:
            self._need(s, task)
        _prune(task)
        for s in others:
            if s in self.tasks:
                self._alone(self.tasks[s])

    def _need(self, node: ir.Node, task: Task) -> None:
        """``node`` is to be read from memory by ``task``."""
        if node not in task.needs:
            task.needs.append(node)
        if node in self.available or node in self.tasks:
            return
        if not self.structure.storable(node.axes):
            raise NotFused(f"a value over {', '.join(node.axes)} would have to be stored")
        self.temporaries += 1
        made = Task(node, f"t{self.temporaries}", frozenset(node.axes) - self.structure.whole)
        self.tasks[node] = made
        self._walk_row(node, made, set())

    def _walk_row(self, node: ir.Node, task: Task, seen: set[ir.Node]) -> None:
        """Values that do not vary along the swept axes."""
        if node in seen or isinstance(node, LEAVES):
            return
        seen.add(node)
        if (node in self.available and node is not task.node) or self._is_shared(node, task):
            self._need(node, task)
            return
        made = self.tasks.get(node)
        if made is not None and made is not task and (made.kept != task.kept or self._is_contraction(node)):
            self._need(node, task)
            return
        match node:
            case ir.Reduce() if self.structure.is_sweep(node):
                kept = frozenset(node.axes) - self.structure.whole
                clash = task.kept & set(node.over) or (node in self.alone and node is not task.node)
                again = kept < task.kept and _is_plain(node) and not (is_const(node.x, 1) and self.structure.features & task.kept - kept)
                if clash or (kept != task.kept and not again):  # no row is counted again for every one of its features
                    self._need(node, task)
                    return
                if node not in task.sweeps:
                    loops = frozenset(node.over) - self.structure.whole
                    for part in (*factors(node.x), *conjuncts(node.where)):
                        self._walk_loop(part, task, loops, seen)
                    task.sweeps.append(node)
            case ir.Read(x=x, at=at):
                self._stored(x, task)
                for _, e in at:
                    self._walk_row(e, task, seen)
            case ir.Pointwise() | ir.Reduce():
                for c in ir.children(node):
                    self._walk_row(c, task, seen)
            case _:
                raise NotFused(f"{type(node).__name__.lower()} over {', '.join(node.axes)} is not a sum, maximum or pointwise operation")

    def _stored(self, x: ir.Node, task: Task) -> None:
        if not isinstance(x, ir.Input):
            self._need(x, task)

    def _walk_loop(self, node: ir.Node, task: Task, loops: frozenset[str], seen: set[ir.Node]) -> None:
        """Values inside a sweep over ``loops``."""
        if isinstance(node, LEAVES) or node in seen:
            return
        if not loops & set(node.axes):
            if task.node in self.alone and self._contracts(node) and self.structure.storable(node.axes):
                self._need(node, task)
            elif set(node.axes) <= task.kept | self.structure.whole:
                self._walk_row(node, task, seen)
            else:
                self._need(node, task)
            return
        if node in self.available or node in self.tasks or self.structure.is_sweep(node):
            self._need(node, task)
            return
        if self.structure.storable(node.axes) and not self._cheap(node) and not isinstance(node, ir.Read):
            self._need(node, task)
            return
        seen.add(node)
        match node:
            case ir.Read(x=x, at=at):
                self._stored(x, task)
                for _, e in at:
                    self._walk_loop(e, task, loops, seen)
            case ir.Reduce(op="sum"):
                for part in factors(node.x):
                    self._walk_loop(part, task, loops, seen)
                for part in conjuncts(node.where):
                    self._walk_loop(part, task, loops, seen)
            case ir.Pointwise() | ir.Reduce():
                for c in ir.children(node):
                    self._walk_loop(c, task, loops, seen)
            case _:
                raise NotFused(f"{type(node).__name__.lower()} over {', '.join(node.axes)} inside a sweep over {', '.join(sorted(loops))}")

    def _is_shared(self, node: ir.Node, task: Task) -> bool:
        """Whether every step of a block would make the same matrix product of all steps of the block again."""
        steps = {a for a in task.kept - set(node.axes) if ir.fixed_extent(a) and not is_few(a)}
        again = any(ir.fixed_extent(a) for a in self.structure.whole & set(node.axes))
        return node is not task.node and bool(steps) and again and self._contracts(node) and self.structure.storable(node.axes)

    def _contracts(self, node: ir.Node) -> bool:
        """Whether a task that computes a value has a matrix product to make besides sweeps."""
        stack, seen = [node], {node}
        while stack:
            n = stack.pop()
            if n in self.available or n in self.tasks or (isinstance(n, ir.Reduce) and self.structure.is_sweep(n)):
                continue
            if isinstance(n, ir.Reduce) and n.op == "sum" and len(factors(n.x)) > 1:
                return True
            below = [c for c in ir.children(n) if c not in seen]
            stack += below
            seen.update(below)
        return False

    def _is_contraction(self, node: ir.Node) -> bool:
        """Made by a matrix product of rows, without a sweep: worth reading where another task stores it."""
        made = [n for n in self._computed(node) if isinstance(n, ir.Reduce)]
        return bool(made) and not any(self.structure.is_sweep(n) for n in made)

    def _computed(self, node: ir.Node) -> list[ir.Node]:
        """The nodes under ``node`` that are neither leaves nor stored."""
        found: list[ir.Node] = []
        stack = [node]
        while stack:
            n = stack.pop()
            if isinstance(n, LEAVES) or n in self.available or n in found:
                continue
            found.append(n)
            stack.extend(ir.children(n))
        return found

    def _cheap(self, node: ir.Node) -> bool:
        """Cheaper to compute again in every tile than to store: pointwise, and without a whole axis or of two plain operations at most."""
        inner = self._computed(node)
        if any(isinstance(n, ir.Reduce) for n in inner):
            return False
        if not self.structure.whole & set(node.axes):
            return True
        return len(inner) <= 2 and all(isinstance(n, ir.Read) or (isinstance(n, ir.Pointwise) and n.op in CHEAP) for n in inner)


def _is_plain(node: ir.Reduce) -> bool:
    """No contraction inside: cheap enough to compute in every program that wants it (the length of a row, say)."""
    return not any(isinstance(n, ir.Reduce) for part in (node.x, *conjuncts(node.where)) for n in ir.topological([part]))


def group_tasks(tasks: list[Task], structure: Structure, *, chains: bool = False, alone: Collection[ir.Node] = ()) -> list[Group]:
    """Kernels in order of launch: tasks with the same kept axes and loops together, as far as dependencies allow, but for sweeps that are
    to be ``alone``. With ``chains``, so are tasks without loops that read one another: their tiles are there."""
    import networkx as nx

    owner = {task.node: task for task in tasks}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(tasks)))
    number = {id(task): n for n, task in enumerate(tasks)}
    for n, task in enumerate(tasks):
        for needed in task.needs:
            if needed in owner and owner[needed] is not task:
                graph.add_edge(number[id(owner[needed])], n)
    order = list(nx.lexicographical_topological_sort(graph))
    groups: list[list[int]] = []
    keys: list[tuple[object, bool]] = []
    for n in order:
        key = group_key(tasks[n], structure), tasks[n].node in alone
        place = None
        for g in range(len(groups)):
            fits = keys[g] == key or (keys[g][1] == key[1] and any(_nested(tasks[m], tasks[n]) for m in groups[g]))
            if fits and not any(nx.has_path(graph, m, n) for m in groups[g]):
                place = g
                break
            if chains and keys[g] == key and not tasks[n].sweeps and _follows(graph, groups[g], n):
                made = {tasks[m].node for m in groups[g]}
                tasks[n].needs = [x for x in tasks[n].needs if x not in made]
                place = g
                break
        if place is None:
            groups.append([n])
            keys.append(key)
        else:
            groups[place].append(n)
    ordered = _in_order([Group([tasks[n] for n in g]) for g in groups])
    _read_stored_sums(ordered)
    return ordered


def _follows(graph: nx.DiGraph[int], group: list[int], n: int) -> bool:
    """Whether what a task reads of a group, it reads from it directly, and not by way of another one."""
    import networkx as nx

    return all(p in group or not any(nx.has_path(graph, m, p) for m in group) for p in graph.predecessors(n))


def _read_stored_sums(groups: list[Group]) -> None:
    """A sum that an earlier kernel stores for another reader is read, where the same sweep would only compute it again."""
    stored: dict[ir.Node, Task] = {}
    for group in groups:
        for task in group.tasks:
            again = [s for s in task.sweeps if s in stored and s is not task.node]
            if again:
                task.needs += [s for s in again if s not in task.needs]
                _prune(task)
        stored.update((task.node, task) for task in group.tasks if task.node in task.sweeps)


def _prune(task: Task) -> None:
    """Takes out what a task no longer sweeps or reads, as it reads from memory what that was for."""
    found = reached(task)
    task.sweeps = [s for s in task.sweeps if s in found and s not in task.needs]
    task.needs = [n for n in task.needs if n in found]


def reached(task: Task) -> set[ir.Node]:
    """The nodes under a task's, down to those that it reads from memory."""
    found = {task.node}
    stack = [task.node]
    while stack:
        node = stack.pop()
        new = [c for c in ir.children(node) if c not in found] if node is task.node or node not in task.needs else []
        found.update(new)
        stack += new
    return found


def _nested(a: Task, b: Task) -> bool:
    """The sweeps of one are among the sweeps of the other, and they keep the same axes."""
    return a.kept == b.kept and bool(a.sweeps) and bool(b.sweeps) and (set(a.sweeps) <= set(b.sweeps) or set(b.sweeps) <= set(a.sweeps))


def group_key(task: Task, structure: Structure) -> object:
    return task.kept, frozenset(frozenset(s.over) - structure.whole for s in task.sweeps), not task.sweeps


def _in_order(groups: list[Group]) -> list[Group]:
    """Groups sorted so that each comes after those that it reads from; a group that would close a cycle is split into its tasks."""
    import networkx as nx

    made = {task.node: n for n, group in enumerate(groups) for task in group.tasks}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(groups)))
    for n, group in enumerate(groups):
        for task in group.tasks:
            graph.add_edges_from((made[m], n) for m in task.needs if m in made and made[m] != n)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = nx.find_cycle(graph)
        broken = next((n for n, _ in cycle if len(groups[n].tasks) > 1), None)
        if broken is None:
            raise NotFused("tasks that need each other")
        parts = [Group([task]) for task in groups[broken].tasks]
        return _in_order([*groups[:broken], *parts, *groups[broken + 1 :]])
    return [groups[n] for n in nx.lexicographical_topological_sort(graph)]
