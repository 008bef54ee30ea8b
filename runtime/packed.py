"""Packed calls of recurrences: sequences one after the other along a time axis, and every state begins anew with each.

The kernel with the place of every step in its sequence as an input is a kernel like any other; the input is called ``place.t``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..compiler import errors as compiler_errors
from ..compiler import ir
from ..compiler.algebra import substitute, where
from ..compiler.scans import scans_as_states
from ..dsl import typed
from . import errors
from .cache import digest
from .kernel import Kernel, SpecFile


class PackedKernel(Kernel):
    """``base`` on sequences packed along ``axis``. Raises ``NotSupported`` where more than its states would have to know of sequences."""

    def __init__(self, base: Kernel, axis: str) -> None:
        self._base, self._axis = base, axis
        _check(base, axis)
        head = base.header()._replace(identity=digest(base.identity, "packed", axis), inputs=(*base.input_names, _place(axis)), states=())
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


def _check(base: Kernel, axis: str) -> None:
    """Sizes of sequences and what other steps hold are nothing that a step knows."""

    def refuse(what: str) -> errors.NotSupported:
        return errors.NotSupported(
            base.name, f"packed sequences along {axis}, where {what}, are", "Call the kernel on each sequence by itself."
        )

    if axis not in base.axis_names:
        raise compiler_errors.UnknownAxis(base.name, axis, base.axis_names)
    graph = scans_as_states(base.graph)
    if not any(axis in s.along for s in graph.states.values()):
        raise refuse("no state goes")
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
            case ir.Read(at=at) if axis in dict(at):
                raise refuse("other steps are read")
            case ir.Reduce(over=over) | ir.Select(over=over) if axis in over:
                raise refuse("all steps are reduced")
            case ir.Scan(axis=a) if a == axis:
                raise refuse("steps are scanned")
            case _:
                pass


def packed(kernel: Kernel, inputs: dict[str, Any], cu_seqlens: Mapping[str, object]) -> tuple[Kernel, dict[str, Any]]:
    """The kernel of a packed call, and its inputs. Raises ``CallError``."""
    if len(cu_seqlens) > 1:
        raise errors.NotSupported(kernel.name, "sequences packed along several axes are", "Pack along one of them.")
    ((axis, bounds),) = cu_seqlens.items()
    made = kernel.families.packed.get(axis)
    if made is None:
        with kernel.families.lock:
            made = kernel.families.packed.setdefault(axis, PackedKernel(kernel, axis))
    return made, {**inputs, _place(axis): _places(kernel, inputs, axis, bounds)}


def _places(kernel: Kernel, inputs: Mapping[str, Any], axis: str, bounds: object) -> Tensor:
    """How many steps of its sequence came before each step."""
    if not isinstance(bounds, Tensor) or bounds.ndim != 1 or bounds.dtype not in (torch.int32, torch.int64) or not bounds.numel():
        raise errors.BadSequences(kernel.name, axis, "is no tensor of ints with one dimension")
    length = _length(kernel, inputs, axis)
    ends = bounds.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise errors.BadSequences(kernel.name, axis, f"does not rise from 0 to {length}, the extent of {axis}")
    device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), bounds.device)
    places = [torch.arange(stop - start) for start, stop in pairwise(ends)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *places]).to(device)


def _length(kernel: Kernel, inputs: Mapping[str, Any], axis: str) -> int:
    for t in kernel.typed.inputs:
        value = inputs.get(t.name)
        if (axis,) in t.dims and isinstance(value, Tensor) and value.ndim == len(t.dims):
            return int(value.shape[t.dims.index((axis,))])
    raise errors.BadSequences(kernel.name, axis, "is for an axis that is no dimension of an input by itself")
