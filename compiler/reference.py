"""The reference: the equation graph, unscheduled, evaluated in PyTorch. It is the meaning of a spec.

Any dtype, any device, differentiable by autograd. In float64 it is the number a kernel is judged by; in float32 and
half precision it is what a careful PyTorch program would give: running sums, normalisers and states are kept in
float32, contractions run as matrix products in the dtype of their operands.

A node that states do not enter is computed once, for all steps; states step together with the states they depend on,
and what others read of them is stacked along their time axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, overload

import torch
from torch import Tensor

from ..dsl import typed
from . import errors, ir
from . import reference_ops as ops
from .choices import Chosen
from .choices import current as watched
from .reference_ops import Setting, Value
from .route_tables import Tables

Number = bool | int | float
StateKey = tuple[str, int]
"""A state and how many updates of the present step it has had."""
StepKey = ir.Node | StateKey


@overload
def evaluate(
    graph: ir.Graph,
    inputs: Mapping[str, Tensor],
    params: Mapping[str, Number],
    extents: Mapping[str, int],
    *,
    origin: Mapping[str, int] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    return_final: Literal[False] = False,
    dtype: torch.dtype | None = None,
    declared_dtypes: bool = True,
) -> dict[str, Tensor]: ...
@overload
def evaluate(
    graph: ir.Graph,
    inputs: Mapping[str, Tensor],
    params: Mapping[str, Number],
    extents: Mapping[str, int],
    *,
    origin: Mapping[str, int] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    return_final: Literal[True],
    dtype: torch.dtype | None = None,
    declared_dtypes: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...
def evaluate(
    graph: ir.Graph,
    inputs: Mapping[str, Tensor],
    params: Mapping[str, Number],
    extents: Mapping[str, int],
    *,
    origin: Mapping[str, int] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    return_final: bool = False,
    dtype: torch.dtype | None = None,
    declared_dtypes: bool = True,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs of a graph by name and, with ``return_final``, the final value of every state.

    ``inputs`` have their declared dimensions; an input that the kernel does not declare (of a derived graph) has its
    axes in sorted order. ``params`` and ``extents`` are complete (``extents.bind``). ``initial`` overrides the start
    of a state; it and the final values have the axes of the state in declared order, and composite ones may be merged
    in ``initial``. ``dtype`` casts the floating inputs first. Outputs have their declared dimensions (else sorted
    axes) and their declared dtype, or the promoted one of the floating inputs where real, bool and int64 otherwise;
    ``declared_dtypes=False`` leaves real ones as they were computed.
    """
    roots = [node for name, node in graph.outputs.items() if not _is_final(graph, name)]
    ended = graph.states if return_final else [n.name for n in graph.outputs.values() if isinstance(n, ir.StateValue)]
    run = _Evaluation(graph, inputs, params, extents, origin or {}, initial or {}, dtype, roots, ended)
    outputs = {name: _finish_output(run, name, declared_dtypes) for name in graph.outputs}
    if not return_final:
        return outputs
    finals = {name: _permuted(run.final(name), state.axes, run.setting) for name, state in graph.states.items()}
    return outputs, finals


def evaluate_nodes(
    graph: ir.Graph,
    nodes: Sequence[ir.Node],
    inputs: Mapping[str, Tensor],
    params: Mapping[str, Number],
    extents: Mapping[str, int],
    *,
    origin: Mapping[str, int] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The values of some nodes of a graph, with their axes in sorted order and in full extent."""
    run = _Evaluation(graph, inputs, params, extents, origin or {}, initial or {}, dtype, nodes)
    return [ops.expand(run.value(node), node.axes, run.setting) for node in nodes]


def _declared(graph: ir.Graph, name: str) -> typed.Tensor | None:
    return next((output for output in graph.kernel.outputs if output.name == name), None)


def _missing_time(graph: ir.Graph, name: str) -> list[str]:
    """The time axes that the node of an output has and its declaration has not."""
    node, tensor = graph.outputs[name], _declared(graph, name)
    if tensor is None or not isinstance(node, ir.StateValue):
        return []
    return [a for a in graph.states[node.name].along if a not in tensor.axes]


def _is_final(graph: ir.Graph, name: str) -> bool:
    node = graph.outputs[name]
    missing = _missing_time(graph, name)
    return isinstance(node, ir.StateValue) and missing == list(graph.states[node.name].along)


def _finish_output(run: _Evaluation, name: str, declared_dtypes: bool) -> Tensor:
    """The tensor of an output: last steps taken, dimensions ordered and merged, cast."""
    graph, node, tensor = run.graph, run.graph.outputs[name], _declared(run.graph, name)
    if isinstance(node, ir.StateValue) and _is_final(graph, name):
        value = run.final(node.name)
    else:
        value = run.value(node)
        for axis in _missing_time(graph, name):
            assert isinstance(node, ir.StateValue)
            last = 0 if graph.states[node.name].reverse else run.setting.extents[axis] - 1
            value = Value(value.data.select(value.axes.index(axis), last), tuple(a for a in value.axes if a != axis))
    axes = value.axes if tensor is None else tensor.axes
    data = _permuted(value, axes, run.setting)
    if tensor is not None:
        data = data.reshape([math.prod(run.setting.extents[a] for a in dim) for dim in tensor.dims])
    return data.to(_output_dtype(run, tensor, data.dtype, declared_dtypes))


def _permuted(value: Value, axes: Sequence[str], setting: Setting) -> Tensor:
    ordered = tuple(sorted(axes))
    return ops.expand(value, ordered, setting).permute([ordered.index(a) for a in axes])


def _output_dtype(run: _Evaluation, tensor: typed.Tensor | None, dtype: torch.dtype, declared_dtypes: bool) -> torch.dtype:
    if tensor is None or (dtype.is_floating_point and not declared_dtypes):
        return dtype
    if tensor.dtype is not None:
        return _TORCH[tensor.dtype]
    if not dtype.is_floating_point:
        return dtype
    return run.setting.wide if tensor.name in run.graph.states else run.promoted


_TORCH = {
    "bool": torch.bool, "int": torch.int64, "float": torch.float32, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
    "float64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """States that step together: ``order`` is what one step computes, ``frontier`` the nodes it takes from outside."""

    states: tuple[ir.State, ...]
    order: tuple[StepKey, ...]
    frontier: tuple[ir.Node, ...]

    @property
    def along(self) -> tuple[str, ...]:
        return self.states[0].along

    @property
    def reverse(self) -> bool:
        return self.states[0].reverse


class _Evaluation:
    """One evaluation: every node's value by need, each once. Iterative, since a graph may be deep."""

    def __init__(
        self,
        graph: ir.Graph,
        inputs: Mapping[str, Tensor],
        params: Mapping[str, Number],
        extents: Mapping[str, int],
        origin: Mapping[str, int],
        initial: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        roots: Sequence[ir.Node],
        ended: Iterable[str] = (),
    ) -> None:
        """``roots`` and the final values of the states ``ended`` are what may be asked for."""
        self.graph, self.params, self.initial = graph, params, initial
        self.inputs = {name: _cast(tensor, dtype) for name, tensor in inputs.items()}
        floats = [t.dtype for t in self.inputs.values() if t.is_floating_point()]
        self.promoted = reduce(torch.promote_types, floats) if floats else dtype or torch.get_default_dtype()
        device = next((t.device for t in inputs.values()), torch.device("cpu"))
        wide = torch.float64 if self.promoted == torch.float64 else torch.float32
        self.setting = Setting(extents, origin, device, wide)
        for name in initial:
            if name not in graph.states:
                raise errors.UnknownState(graph.kernel.name, name, graph.states)
        self._memo: dict[ir.Node, Value] = {}
        self._operands: dict[ir.Node, tuple[ir.Node, ...]] = {}
        self._groups: dict[str, _Group] = {}
        self._finals: dict[str, Value] = {}
        needed = itertools.chain(roots, *(self._group_operands(name) for name in ended))
        self._wanted = [n for n in self._reachable(needed) if isinstance(n, ir.StateValue)]

    def value(self, root: ir.Node) -> Value:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._memo:
                stack.pop()
                continue
            missing = [n for n in self.operands(node) if n not in self._memo]
            if missing:
                stack.extend(missing)
            elif isinstance(node, ir.StateValue):
                self._run(self.group(node.name))
            else:
                self._memo[node] = self._compute(node, self._memo.__getitem__)
        return self._memo[root]

    def final(self, name: str) -> Value:
        """The value of a state after its last step."""
        if name not in self._finals:
            for node in self._group_operands(name):
                self.value(node)
            if name not in self._finals:
                self._run(self.group(name))
        return self._finals[name]

    def operands(self, node: ir.Node) -> tuple[ir.Node, ...]:
        """What must be computed before a node: for a sum of a product its factors, for a state all that its steps use."""
        if node not in self._operands:
            found = self._group_operands(node.name) if isinstance(node, ir.StateValue) else _plain_operands(node)
            self._operands[node] = found
        return self._operands[node]

    def _group_operands(self, name: str) -> tuple[ir.Node, ...]:
        group = self.group(name)
        return (*group.frontier, *(s.init for s in group.states if s.init is not None and s.name not in self.initial))

    def group(self, name: str) -> _Group:
        if name not in self._groups:
            states = _stepping_together(self.graph, name)
            group = self._plan(states)
            self._groups.update((s.name, group) for s in states)
        return self._groups[name]

    def _reachable(self, roots: Iterable[ir.Node]) -> set[ir.Node]:
        seen: set[ir.Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(self.operands(node))
        return seen

    # One node ---------------------------------------------------------------------------------------------------------

    def _compute(self, node: ir.Node, get: Callable[[ir.Node], Value]) -> Value:
        setting = self.setting
        match node:
            case ir.Input():
                return self._input(node)
            case ir.Param(name=name):
                return self._scalar(self.params[name])
            case ir.Size(axis=axis):
                return self._scalar(setting.extents[axis])
            case ir.Const(value=value):
                return self._scalar(value)
            case ir.Position(axis=axis):
                positions = torch.arange(setting.extents[axis], device=setting.device) + setting.origin.get(axis, 0)
                return Value(positions, (axis,))
            case ir.Pointwise(op=op, args=args):
                return ops.pointwise(op, [get(a) for a in args], setting)
            case ir.Reduce(op="sum", over=over, where=where):
                factors = _factors(node)
                restricted = any(_is_zero_outside(f, where) for f in factors)
                return ops.sum_of_product([get(f) for f in factors], _maybe(where, get), over, setting, restricted)
            case ir.Reduce(op=op, over=over, x=x, where=where):
                return ops.reduce_over(op, over, get(x), _maybe(where, get), setting)
            case ir.Scan(op=op, axis=axis, x=x, where=where, reverse=reverse, exclusive=exclusive):
                return ops.scan(op, axis, get(x), _maybe(where, get), reverse, exclusive, setting)
            case ir.Read(x=x, at=at):
                return self._read(get(x), at, get)
            case ir.Route(condition=condition, tokens=tokens, experts=experts):
                chosen = get(condition)
                order = tuple(sorted((*tokens, *experts)))
                data = ops.expand(chosen, order, setting).permute([order.index(a) for a in (*tokens, *experts)])
                return Value(data, (*tokens, *experts))
            case ir.Table(route=ir.Route() as route, name=name):
                return Value(Tables(get(route).data, route, setting.extents, setting.origin).table(name, node.axes), node.axes)
            case ir.Select(over=over, x=x, k=k, where=where):
                return self._select(node, get(x), get(k), _maybe(where, get))
            case _:
                raise AssertionError(f"not a node of the equation graph: {node!r}")

    def _select(self, node: ir.Select, x: Value, k: Value, where: Value | None) -> Value:
        """A selection, or what it is told to choose; noted where somebody watches. Those of steps have no tensor, and are neither."""
        found = ops.select(node.over, x, k, where, self.setting)
        choices = watched()
        if choices is None or any(node in g.order for g in self._groups.values()):
            return found
        usual, scores, condition = (None if v is None else ops.expand(v, node.axes, self.setting).detach() for v in (found, x, where))
        taken = choices.given.get(node, usual)
        assert taken is not None
        choices.seen.append(Chosen(node, taken, usual, scores, condition))
        return Value(taken, node.axes)

    def _scalar(self, value: Number) -> Value:
        dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
        return Value(torch.tensor(value, dtype=dtype, device=self.setting.device), ())

    def _input(self, node: ir.Input) -> Value:
        tensor = next((t for t in self.graph.kernel.inputs if t.name == node.name), None)
        extents = self.setting.extents
        if tensor is None:
            return Value(self.inputs[node.name], node.axes)
        if node.name in self.inputs:
            data = self.inputs[node.name].reshape([extents[a] for a in tensor.axes])
        elif tensor.default is not None:
            dtype = torch.bool if node.kind == "bool" else torch.int64 if node.kind == "int" else self.promoted
            data = torch.full([extents[a] for a in tensor.axes], tensor.default, dtype=dtype, device=self.setting.device)
        else:
            raise errors.MissingInput(self.graph.kernel.name, node.name)
        return Value(data.permute([tensor.axes.index(a) for a in node.axes]), node.axes)

    def _read(self, x: Value, at: tuple[tuple[str, ir.Node], ...], get: Callable[[ir.Node], Value]) -> Value:
        """A read; axes that ``x`` is constant along need only the test that the position is inside."""
        missing = [a for a, _ in at if a not in x.axes]
        if missing:
            axes = ops.union([x], missing)
            x = Value(ops.expand(x, axes, self.setting), axes)
        if len(at) == 1 and isinstance(at[0][1], ir.Position):
            old, new = at[0][0], at[0][1].axis
            if new not in x.axes and self._same_positions(old, new):
                return ops.rename(x, old, new)
        return ops.read(x, [(a, get(e)) for a, e in at], self.setting)

    def _same_positions(self, a: str, b: str) -> bool:
        extents, origin = self.setting.extents, self.setting.origin
        return extents[a] == extents[b] and origin.get(a, 0) == origin.get(b, 0)

    # States -----------------------------------------------------------------------------------------------------------

    def _plan(self, states: tuple[ir.State, ...]) -> _Group:
        """What a step of some states computes: all that depends on them, and what is cheaper step by step (``_grows``)."""
        names = {s.name for s in states}
        time = set(states[0].along)
        finals: list[StepKey] = [(s.name, len(s.updates)) for s in states]
        everything = list(_topological(finals, lambda key: self._step_operands(key, names)))
        in_step: set[StepKey] = set()
        late: set[StepKey] = set()
        for key in everything:
            operands = self._step_operands(key, names)
            if isinstance(key, tuple) or any(o in in_step for o in operands):
                in_step.add(key)
            elif isinstance(key, ir.Pointwise) and time & set(key.axes) and (any(o in late for o in operands) or self._grows(key)):
                late.add(key)
        computed: set[StepKey] = set()
        stack: list[StepKey] = list(finals)
        frontier: dict[ir.Node, None] = {}
        while stack:
            key = stack.pop()
            if key in computed:
                continue
            if isinstance(key, tuple) or key in in_step or key in late:
                computed.add(key)
                stack.extend(self._step_operands(key, names))
            else:
                frontier[key] = None
        order = tuple(key for key in everything if key in computed)
        return _Group(states, order, tuple(frontier))

    def _grows(self, node: ir.Pointwise) -> bool:
        """Whether a node is larger than what it is made of, so that its steps had better not exist all at once."""
        return all(set(a.axes) < set(node.axes) for a in node.args)

    def _step_operands(self, key: StepKey, names: set[str]) -> tuple[StepKey, ...]:
        if isinstance(key, tuple):
            name, version = key
            state = self.graph.states[name]
            if version == 0:
                return ()
            where = () if state.where is None else (state.where,)
            return (state.updates[version - 1], *where, (name, version - 1))
        operands = () if isinstance(key, ir.StateValue) else _plain_operands(key)
        return tuple(_step_key(o, names) for o in operands)

    def _run(self, group: _Group) -> None:
        """Steps the states of a group from first to last; leaves their final values and the wanted trajectories."""
        names = {s.name for s in group.states}
        shape = [self.setting.extents[a] for a in group.along]
        steps = range(math.prod(shape))
        take = {node: self._slices(self._memo[node], group.along) for node in group.frontier}
        current = {s.name: self._start(s) for s in group.states}
        wanted = [n for n in self._wanted if n.name in names]
        record: dict[ir.StateValue, list[Tensor]] = {n: [] for n in wanted}
        for step in reversed(steps) if group.reverse else steps:
            done = self._step(group, names, current, take, step)
            for node in wanted:
                record[node].append(done[node.name, node.version].data)
            current = {s.name: done[s.name, len(s.updates)] for s in group.states}
        self._finals.update(current)
        for node, history in record.items():
            self._memo[node] = self._trajectory(node, history[::-1] if group.reverse else history, group.along)

    def _step(
        self, group: _Group, names: set[str], current: Mapping[str, Value], take: Mapping[ir.Node, Callable[[int], Value]], step: int
    ) -> dict[StepKey, Value]:
        done: dict[StepKey, Value] = {(name, 0): value for name, value in current.items()}

        def get(node: ir.Node) -> Value:
            key = _step_key(node, names)
            found = done.get(key)
            return found if found is not None else take[node](step)

        for key in group.order:
            if not isinstance(key, tuple):
                done[key] = self._compute(key, get)
            elif key[1] > 0:
                state, before = self.graph.states[key[0]], done[key[0], key[1] - 1]
                value = get(state.updates[key[1] - 1])
                if state.where is not None:
                    value = ops.pointwise("where", (get(state.where), value, before), self.setting)
                done[key] = self._as_state(state, value)
        return done

    def _as_state(self, state: ir.State, value: Value) -> Value:
        axes = tuple(sorted(state.axes))
        return Value(ops.expand(value, axes, self.setting).to(self.setting.wide), axes)

    def _start(self, state: ir.State) -> Value:
        extents = self.setting.extents
        if state.name in self.initial:
            given, shape = self.initial[state.name], [extents[a] for a in state.axes]
            if given.numel() != math.prod(shape):
                names = ", ".join(state.axes)
                what = f"the initial value of state '{state.name}'"
                raise errors.WrongShape(self.graph.kernel.name, what, tuple(given.shape), tuple(shape), names)
            return self._sorted(given.reshape(shape).to(self.setting.wide), state)
        start = self._scalar(0.0) if state.init is None else self._memo[state.init]
        # In memory a state has its declared order, so that its steps do not keep permuting it.
        return self._sorted(_permuted(start, state.axes, self.setting).to(self.setting.wide).contiguous(), state)

    def _sorted(self, data: Tensor, state: ir.State) -> Value:
        axes = tuple(sorted(state.axes))
        return Value(data.permute([state.axes.index(a) for a in axes]), axes)

    def _slices(self, value: Value, along: tuple[str, ...]) -> Callable[[int], Value]:
        """The value at a step. Half precision becomes float32: states are computed in it."""
        data = value.data
        if data.is_floating_point():
            data = data.to(ops.at_least_float32(data.dtype))
        time = [a for a in along if a in value.axes]
        axes = tuple(a for a in value.axes if a not in time)
        if not time:
            constant = Value(data, axes)
            return lambda step: constant
        order = [value.axes.index(a) for a in (*time, *axes)]
        shape = [self.setting.extents[a] for a in axes]
        slices = data.permute(order).reshape(-1, *shape).unbind(0)
        if len(time) == len(along):
            return lambda step: Value(slices[step], axes)
        inner = math.prod(self.setting.extents[a] for a in along[1:])
        if time[0] == along[0]:
            return lambda step: Value(slices[step // inner], axes)
        return lambda step: Value(slices[step % inner], axes)

    def _trajectory(self, node: ir.StateValue, history: Sequence[Tensor], along: tuple[str, ...]) -> Value:
        extents = self.setting.extents
        axes = self.graph.states[node.name].axes
        stored = tuple(sorted(axes))
        if history:
            data = torch.stack([h.permute([stored.index(a) for a in axes]) for h in history])
        else:
            data = torch.zeros([0, *(extents[a] for a in axes)], dtype=self.setting.wide, device=self.setting.device)
        source = (*along, *axes)
        data = data.reshape([extents[a] for a in source])
        return Value(data.permute([source.index(a) for a in node.axes]), node.axes)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.is_floating_point():
        return tensor if dtype is None else tensor.to(dtype)
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _maybe(node: ir.Node | None, get: Callable[[ir.Node], Value]) -> Value | None:
    return None if node is None else get(node)


def _factors(node: ir.Reduce) -> tuple[ir.Node, ...]:
    """The factors of what a sum sums, in order."""
    found: list[ir.Node] = []
    stack = [node.x]
    while stack:
        current = stack.pop()
        if isinstance(current, ir.Pointwise) and current.op == "mul":
            stack.extend(reversed(current.args))
        else:
            found.append(current)
    return tuple(found)


def _is_zero_outside(node: ir.Node, condition: ir.Node | None) -> bool:
    match node:
        case ir.Pointwise(op="where", args=(c, _, ir.Const(value=0))):
            return c is condition
        case _:
            return False


def _plain_operands(node: ir.Node) -> tuple[ir.Node, ...]:
    if isinstance(node, ir.Reduce) and node.op == "sum":
        return _factors(node) if node.where is None else (*_factors(node), node.where)
    return ir.children(node)


def _step_key(node: ir.Node, names: set[str]) -> StepKey:
    return (node.name, node.version) if isinstance(node, ir.StateValue) and node.name in names else node


def _topological(roots: Iterable[StepKey], operands: Callable[[StepKey], Iterable[StepKey]]) -> Iterator[StepKey]:
    seen: set[StepKey] = set()
    stack = [(root, False) for root in roots]
    while stack:
        key, ready = stack.pop()
        if ready:
            yield key
        elif key not in seen:
            seen.add(key)
            stack.append((key, True))
            stack.extend((o, False) for o in operands(key))


def _stepping_together(graph: ir.Graph, name: str) -> tuple[ir.State, ...]:
    """The states that depend on the state and that it depends on, itself among them, in their order."""
    needs = {s.name: _states_in(s) for s in graph.states.values()}
    reached = {n: _closure(n, needs) for n in graph.states}
    return tuple(s for s in graph.states.values() if s.name == name or (s.name in reached[name] and name in reached[s.name]))


def _closure(name: str, needs: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    stack = [name]
    while stack:
        for other in needs[stack.pop()]:
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return seen


def _states_in(state: ir.State) -> set[str]:
    roots = itertools.chain(state.updates, [n for n in (state.init, state.where) if n is not None])
    return {n.name for n in ir.topological(roots) if isinstance(n, ir.StateValue)}
