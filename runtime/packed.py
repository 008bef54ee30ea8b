"""Packed calls of recurrences: sequences one after the other along a time axis, and every state begins anew with each.

The kernel with the place of every step in its sequence as an input is a kernel like any other; the input is called ``place.t``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler import errors as compiler_errors
from ..compiler import ir
from ..compiler.algebra import substitute, where
from ..compiler.recurrence import mixes_steps
from ..compiler.scans import scans_as_states
from ..dsl import typed
from . import errors
from .arguments import bind
from .cache import digest
from .kernel import Kernel, SpecFile

if TYPE_CHECKING:
    from .kernel import Backend, Result


class PackedKernel(Kernel):
    """``base`` on sequences packed along ``axis``. Raises ``NotSupported`` where more than its states would have to know of sequences."""

    def __init__(self, base: Kernel, axis: str) -> None:
        self._base, self._axis = base, axis
        _check(base, axis)
        head = base.header()._replace(identity=digest(base.identity, "packed", axis), inputs=(*base.input_names, _place(axis)))
        super().__init__(head, SpecFile(base.file.filename, base.spec))

    @property
    def typed(self) -> typed.Kernel:
        """The declaration, with the places of steps."""
        base = self._base.typed
        places = typed.Tensor(_place(self._axis), ((self._axis,),), "int", None, base.span)
        return replace(base, inputs=(*base.inputs, places))

    @property
    def graph(self) -> ir.Graph:
        """The equations, with states that begin anew."""
        base = scans_as_states(self._base.graph)
        place = ir.make(ir.Input, (self._axis,), "int", _place(self._axis))
        first = ir.pointwise("eq", place, ir.const(0))
        anew: dict[ir.Node, ir.Node] = {ir.position(self._axis): place}
        for s in base.states.values():
            before = ir.state_before(s.name, (*s.axes, *s.along))
            anew[before] = where(first, ir.const(0.0) if s.init is None else s.init, before)
        states = {name: _begun(s, anew) for name, s in base.states.items()}
        outputs = {name: substitute(node, anew) for name, node in base.outputs.items()}
        return ir.Graph(self.typed, outputs, states, base.names, base.spans)

    def __reduce__(self) -> tuple[object, ...]:
        return PackedKernel, (self._base, self._axis)


def _place(axis: str) -> str:
    return f"place.{axis}"


def _begun(state: ir.State, anew: dict[ir.Node, ir.Node]) -> ir.State:
    """A state whose steps see what it begins with; a masked step leaves that as well."""
    updates = []
    for number, update in enumerate(state.updates):
        value = substitute(update, anew)
        if state.where is not None:
            before = ir.make(ir.StateValue, (*state.axes, *state.along), "real", state.name, number)
            value = where(substitute(state.where, anew), value, anew.get(before, before))
        updates.append(value)
    return replace(state, updates=tuple(updates), where=None)


def _refuse(kernel: Kernel, axis: str, what: str) -> errors.NotSupported:
    return errors.NotSupported(
        kernel.name, f"packed sequences along {axis}, where {what}, are", "Call the kernel on each sequence by itself."
    )


def _check(base: Kernel, axis: str) -> None:
    """Sizes of sequences and what other steps hold are nothing that a step knows."""

    def refuse(what: str) -> errors.NotSupported:
        return _refuse(base, axis, what)

    graph = scans_as_states(base.graph)
    if any(s.along != (axis,) for s in graph.states.values()):
        raise refuse("states go along other axes too")
    if any(axis not in t.axes for t in base.typed.outputs):
        raise refuse("an output lacks that axis")
    roots = [*graph.outputs.values(), *(u for s in graph.states.values() for u in s.updates)]
    roots += [x for s in graph.states.values() for x in (s.init, s.where) if x is not None]
    for n in ir.topological(roots):
        match n:
            case ir.Size(axis=a) if a == axis:
                raise refuse("the length of a sequence matters")
            case _ if why := mixes_steps(n, [axis]):
                raise refuse(why)
            case _:
                pass


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a packed call that are those of each of its sequences."""

    sizes: Mapping[str, int] | None
    origin: Mapping[str, int] | None
    initial: Mapping[str, Tensor] | None
    return_final: bool
    backend: Backend | None
    strict: bool


def call_packed(
    kernel: Kernel, inputs: dict[str, Any], params: Mapping[str, Any], cu_seqlens: Mapping[str, object], options: Options
) -> Result:
    """A packed call: in one go where only states know of sequences and none goes in or out, else one sequence after the other.

    Raises ``CallError``.
    """
    if len(cu_seqlens) > 1:
        raise errors.NotSupported(kernel.name, "sequences packed along several axes are", "Pack along one of them.")
    ((axis, bounds),) = cu_seqlens.items()
    if axis not in kernel.axis_names:
        raise compiler_errors.UnknownAxis(kernel.name, axis, kernel.axis_names)
    if not any(axis in s.along for s in scans_as_states(kernel.graph).states.values()):
        raise _refuse(kernel, axis, "no state goes")
    made = None if options.initial or options.return_final else _in_one_go(kernel, axis)
    if made is None:
        return _by_sequence(kernel, inputs, params, axis, bounds, options)
    given = {**inputs, _place(axis): _places(kernel, inputs, axis, bounds)}
    return made(**given, **params, sizes=options.sizes, origin=options.origin, backend=options.backend, strict=options.strict)


def _in_one_go(kernel: Kernel, axis: str) -> PackedKernel | None:
    """The kernel that begins anew with every sequence; None where more than its states would have to know of them."""
    found = kernel.families.packed.get(axis)
    if found is None:
        try:
            made = PackedKernel(kernel, axis)
        except errors.NotSupported:
            return None
        with kernel.families.lock:
            found = kernel.families.packed.setdefault(axis, made)
    return found


def _by_sequence(
    kernel: Kernel, inputs: Mapping[str, Any], params: Mapping[str, Any], axis: str, bounds: object, options: Options
) -> Result:
    """A call for every sequence. Outputs without the packed axis, and states, have the sequences in front of their dimensions."""
    other = _other_name(kernel, axis)
    if other is not None:
        raise _refuse(kernel, axis, f"steps are read by the position along {other}")
    dims = {t.name: t.dims for t in (*kernel.typed.inputs, *kernel.typed.outputs)}
    if any(axis in dim[1:] for own in dims.values() for dim in own):
        raise _refuse(kernel, axis, "it is not the first axis of a dimension")
    bind(kernel, dict(inputs), params, options.sizes)  # before they are cut
    length, ends = _length(kernel, inputs, axis), _ends(kernel, inputs, axis, bounds)
    count = len(ends) - 1
    for name, value in (options.initial or {}).items():
        if not isinstance(value, Tensor) or not value.ndim or len(value) != count:
            raise errors.BadInitial(kernel.name, name, count, value)
    along = {name: next((n for n, axes in enumerate(own) if axis in axes), None) for name, own in dims.items()}
    results: list[tuple[Tensor, ...]] = []
    finals: list[dict[str, Tensor]] = []
    for number, (start, stop) in enumerate(pairwise(ends) if count else [(0, 0)]):  # without a sequence, for the shapes
        own: dict[str, Any] = {}
        for name, value in inputs.items():
            dim = along.get(name)
            if isinstance(value, Tensor) and dim is not None:
                steps = value.shape[dim] // length if length else 0  # of a step, where it has several
                value = value.narrow(dim, start * steps, (stop - start) * steps)
            own[name] = value
        began = {name: value[number] for name, value in (options.initial or {}).items()} if count else {}
        result = kernel(
            **own, **params, sizes=options.sizes, origin=options.origin, initial=began or None, return_final=options.return_final,
            backend=options.backend, strict=options.strict,
        )  # fmt: skip
        if options.return_final:
            result, final = result
            finals.append(final)
        results.append(result if isinstance(result, tuple) else (result,))
    joined = [
        torch.stack(parts)[:count] if (n := along[name]) is None else torch.cat(parts, n)
        for name, parts in zip(kernel.output_names, (list(p) for p in zip(*results, strict=True)), strict=True)
    ]
    if any(len({final[name].shape for final in finals}) > 1 for name in (kernel.states if options.return_final else ())):
        raise _refuse(kernel, axis, "a state has a value for every step")
    ended = [torch.stack([final[name] for final in finals])[:count] for name in (kernel.states if options.return_final else ())]
    return kernel.result_of([*joined, *ended], options.return_final)


def _other_name(kernel: Kernel, axis: str) -> str | None:
    """An axis of inputs or outputs by whose positions steps are read: it has the sequences, too."""
    graph = kernel.graph
    outer = {a for t in (*kernel.typed.inputs, *kernel.typed.outputs) for a in t.axes} - {axis}
    for n in ir.topological([*graph.outputs.values(), *(u for s in graph.states.values() for u in s.updates)]):
        for e in (e for a, e in n.at if a == axis) if isinstance(n, ir.Read) else ():
            found = {m.axis for m in ir.topological([e]) if isinstance(m, ir.Position)} & outer
            if found:
                return min(found)
    return None


def _ends(kernel: Kernel, inputs: Mapping[str, Any], axis: str, bounds: object) -> list[int]:
    """The bounds of the sequences, as numbers."""
    if not isinstance(bounds, Tensor) or bounds.ndim != 1 or bounds.dtype not in (torch.int32, torch.int64) or not bounds.numel():
        raise errors.BadSequences(kernel.name, axis, "is no tensor of ints with one dimension")
    length = _length(kernel, inputs, axis)
    ends: list[int] = bounds.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise errors.BadSequences(kernel.name, axis, f"does not rise from 0 to {length}, the extent of {axis}")
    return ends


def _places(kernel: Kernel, inputs: Mapping[str, Any], axis: str, bounds: object) -> Tensor:
    """How many steps of its sequence came before each step."""
    ends = _ends(kernel, inputs, axis, bounds)
    assert isinstance(bounds, Tensor)
    device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), bounds.device)
    places = [torch.arange(stop - start) for start, stop in pairwise(ends)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *places]).to(device)


def _length(kernel: Kernel, inputs: Mapping[str, Any], axis: str) -> int:
    for t in kernel.typed.inputs:
        value = inputs.get(t.name)
        if (axis,) in t.dims and isinstance(value, Tensor) and value.ndim == len(t.dims):
            return int(value.shape[t.dims.index((axis,))])
    raise errors.BadSequences(kernel.name, axis, "is for an axis that is no dimension of an input by itself")
