"""Calls that pass states in or out: the kernel with initial values as inputs and final values as outputs is a kernel like any other.

Its extra inputs are called ``initial.S`` and its extra outputs ``final.S``; no name of a spec has a dot.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..compiler import errors as compiler_errors
from ..compiler import ir
from ..dsl import typed
from .arguments import Bound, Call
from .cache import digest
from .kernel import Kernel, SpecFile

if TYPE_CHECKING:
    from collections.abc import Mapping


class StatefulKernel(Kernel):
    """``base`` with initial values of the states ``given`` as inputs and, with ``final``, final values of all states as outputs."""

    def __init__(self, base: Kernel, given: tuple[str, ...], final: bool) -> None:
        self._base, self._given, self._final = base, given, final
        inputs = (*base.input_names, *(f"initial.{s}" for s in given))
        outputs = (*base.output_names, *(f"final.{s}" for s in base.states if final))
        head = base.header()._replace(identity=digest(base.identity, repr(given), repr(final)), inputs=inputs, outputs=outputs)
        super().__init__(head, SpecFile(base.file.filename, base.spec))

    @property
    def typed(self) -> typed.Kernel:
        """The declaration, with the states that go in and out."""
        base = self._base.typed
        states = {s.name: s for s in base.body if isinstance(s, typed.State)}
        began = tuple(_tensor(f"initial.{s}", states[s]) for s in self._given)
        ended = tuple(_tensor(f"final.{s}", states[s]) for s in self._base.states if self._final)
        return replace(base, inputs=(*base.inputs, *began), outputs=(*base.outputs, *ended))

    @property
    def graph(self) -> ir.Graph:
        """The equations, with the states that go in and out."""
        base = self._base.graph
        states = dict(base.states)
        for name in self._given:
            start = ir.make(ir.Input, states[name].axes, "real", f"initial.{name}")
            states[name] = replace(states[name], init=start)
        outputs = dict(base.outputs)
        for name in self._base.states if self._final else ():
            s = states[name]
            outputs[f"final.{name}"] = ir.make(ir.StateValue, (*s.axes, *s.along), "real", name, len(s.updates))
        return ir.Graph(self.typed, outputs, states, base.names, base.spans)

    def __reduce__(self) -> tuple[object, ...]:
        return _stateful, (self._base, self._given, self._final)


def _tensor(name: str, state: typed.State) -> typed.Tensor:
    return typed.Tensor(name, tuple((a,) for a in state.axes), "float32", None, state.span)


def _stateful(base: Kernel, given: tuple[str, ...], final: bool) -> StatefulKernel:
    return StatefulKernel(base, given, final)


def with_states(call: Call) -> Call:
    """The same call of the kernel whose states are inputs and outputs. Raises ``WrongShape`` for an initial value of another size."""
    kernel = call.kernel
    given = tuple(s for s in kernel.states if s in call.initial)
    key = (given, call.return_final)
    found = kernel.families.stateful.get(key)
    if found is None:
        with kernel.families.lock:
            found = kernel.families.stateful.setdefault(key, StatefulKernel(kernel, given, call.return_final))
    began = {f"initial.{s}": _value(kernel, s, call.initial[s], call.bound.extents) for s in given}
    bound = call.bound
    fresh = Bound(bound.extents, bound.params, bound.promoted, bound.device)
    return replace(call, kernel=found, inputs={**call.complete_inputs(), **began}, bound=fresh, initial={}, return_final=False)


def _value(kernel: Kernel, name: str, given: Tensor, extents: Mapping[str, int]) -> Tensor:
    axes = kernel.graph.states[name].axes
    shape = [extents[a] for a in axes]
    if given.numel() != math.prod(shape):
        what = f"the initial value of state '{name}'"
        raise compiler_errors.WrongShape(kernel.name, what, tuple(given.shape), tuple(shape), ", ".join(axes))
    return given.reshape(shape).to(torch.float32)
