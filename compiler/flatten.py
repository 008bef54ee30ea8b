"""Pass: steps within steps, numbered along one axis.

Before: states along (t u), the steps u of a token t. After: states along one axis of t * u steps, which is what chunks are made of. A
value that all steps of a token share is given once for each of them, and an output of a token is that of its last step (of its first,
backwards). So several Householder steps a token (Siems et al., 2025) go in the chunks of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..dsl import typed
from . import ir
from .algebra import map_state, with_children
from .recurrence import mixes_steps

LAST, FIRST = -1, 0


class Unflattenable(Exception):
    """Why the steps within steps of a kernel are not numbered along one axis."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A kernel with one axis ``time`` for the steps ``inner`` of every step of ``outer``."""

    outer: str
    inner: str
    time: str
    graph: ir.Graph
    place: str
    """The input with the number of every inner step, if steps need that; else empty. Counted from the number of a step it would be no
    value of the step alone, but one of its chunk as well."""
    taken: dict[str, int]
    """``LAST`` or ``FIRST``: the inner step at which an output is what the kernel gives; outputs that have all steps, or none, are not in
    it."""


def find_flat(graph: ir.Graph) -> Flat:
    """The kernel of a graph with one axis of steps. Raises ``Unflattenable``."""
    along = {s.along for s in graph.states.values()}
    if len(along) != 1 or len(next(iter(along))) != 2:
        raise Unflattenable("its states do not all go along the same two axes")
    ((outer, inner),) = along
    if any(a.name == inner and a.extent is None for a in graph.kernel.axes):
        raise Unflattenable(f"the extent of {inner} is not declared")
    return _Maker(graph, outer, inner).made()


@dataclass(slots=True)
class _Maker:
    graph: ir.Graph
    outer: str
    inner: str
    _along: dict[ir.Node, ir.Node] = field(default_factory=dict)
    _names: dict[ir.Node, str] = field(default_factory=dict)
    _at: set[int] = field(default_factory=set)
    """Inner steps that the output at hand reads."""
    _counts: bool = False

    @property
    def time(self) -> str:
        return f"{self.outer}.{self.inner}"

    @property
    def place(self) -> str:
        return f"step.{self.inner}"

    @property
    def pair(self) -> set[str]:
        return {self.outer, self.inner}

    def made(self) -> Flat:
        states = {
            name: replace(map_state(s, self._flat), along=(self.time,), init=None if s.init is None else self._begun(name, s.init))
            for name, s in self.graph.states.items()
        }
        if self._at:
            raise Unflattenable(f"a step reads another step of {self.inner}")
        taken: dict[str, int] = {}
        outputs = {t.name: self._output(t, taken) for t in self.graph.kernel.outputs}
        made = ir.Graph(self._declared(), outputs, states, self._names)
        return Flat(self.outer, self.inner, self.time, made, self.place if self._counts else "", taken)

    def _begun(self, name: str, init: ir.Node) -> ir.Node:
        if self.pair & set(init.axes):
            raise Unflattenable(f"what {name} begins with depends on the steps")
        return self._flat(init)

    def _output(self, t: typed.Tensor, taken: dict[str, int]) -> ir.Node:
        node = self.graph.outputs[t.name]
        if isinstance(node, ir.StateValue) and not self.pair & set(t.axes):  # as the last step leaves it
            return self._flat(node)
        self._along.clear()  # what an output reads is its own
        self._at.clear()
        made = self._flat(node)
        if self.inner in t.axes:
            if self._at:
                raise Unflattenable(f"{t.name} has every step of {self.inner} and reads one of them")
        elif self.outer in t.axes:
            if len(self._at) > 1:
                raise Unflattenable(f"{t.name} reads several steps of {self.inner}")
            taken[t.name] = next(iter(self._at), LAST)
        return made

    def _flat(self, root: ir.Node) -> ir.Node:
        for n in ir.topological([root]):
            if n not in self._along:
                self._along[n] = self._step(n)
                if n in self.graph.names:
                    self._names[self._along[n]] = self.graph.names[n]
        return self._along[root]

    def _step(self, n: ir.Node) -> ir.Node:
        """A node at a step, by the number of the step."""
        children = tuple(self._along[c] for c in ir.children(n))
        match n:
            case ir.Input(name=name, axes=axes) if self.pair & set(axes):
                return ir.make(ir.Input, self._renamed(axes), n.kind, name)
            case ir.StateValue(name=name, version=version):
                return ir.make(ir.StateValue, self._renamed(n.axes), n.kind, name, version)
            case ir.Position(axis=axis) if axis == self.inner:
                self._counts = True
                return ir.make(ir.Input, (self.time,), "int", self.place)
            case ir.Position(axis=axis) if axis == self.outer:
                return ir.pointwise("floordiv", ir.position(self.time), ir.size(self.inner))
            case ir.Size(axis=axis) if axis == self.outer:
                return ir.pointwise("floordiv", ir.size(self.time), ir.size(self.inner))
            case ir.Read(x=x, at=((axis, at),)) if axis == self.inner:
                self._at.add(self._step_read(at))
                return self._along[x]
            case _ if why := mixes_steps(n, self.pair):
                raise Unflattenable(why)
            case _:
                return with_children(n, children)

    def _step_read(self, at: ir.Node) -> int:
        if at is ir.pointwise("sub", ir.size(self.inner), ir.const(1)):
            return LAST
        if at is ir.const(0):
            return FIRST
        raise Unflattenable(f"a step of {self.inner} is read that is neither the first nor the last")

    def _renamed(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return (*(a for a in axes if a not in self.pair), self.time)

    def _declared(self) -> typed.Kernel:
        kernel = self.graph.kernel
        inputs = tuple(replace(t, dims=self._dims(t)) for t in kernel.inputs)
        if self._counts:
            inputs += (typed.Tensor(self.place, ((self.time,),), "int", None, kernel.span),)
        outputs = tuple(replace(t, dims=self._dims(t)) for t in kernel.outputs)
        axes = [a for a in kernel.axes if a.name != self.outer]
        if any(a.name == self.outer and a.extent is not None for a in kernel.axes):
            raise Unflattenable(f"the extent of {self.outer} is declared")
        return replace(kernel, inputs=inputs, outputs=outputs, axes=(*axes, typed.Axis(self.time, None, kernel.span)))

    def _dims(self, t: typed.Tensor) -> tuple[tuple[str, ...], ...]:
        """The dimensions of a tensor with one of all steps."""
        both = (self.outer, self.inner)
        if not self.pair & set(t.axes):
            return t.dims
        if both in t.dims:
            return tuple((self.time,) if dim == both else dim for dim in t.dims)
        if any(len(dim) > 1 and self.pair & set(dim) for dim in t.dims) or self.inner in t.axes:
            raise Unflattenable(f"{self.inner} is a dimension of {t.name} by itself, or a part of another one")
        return tuple((self.time,) if dim == (self.outer,) else dim for dim in t.dims)
