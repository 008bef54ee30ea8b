"""The kernel: what a user holds and calls."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..compiler.extents import show_dims
from ..dsl import typed
from . import arguments, errors, pickling
from .arguments import Bound, Call, Number
from .cache import digest
from .families import Families
from .identity import Header
from .registry import KERNELS
from .version import compiler_digest

if TYPE_CHECKING:
    from ..compiler import ir
    from ..compiler.pipeline import Lowered
    from ..compiler.plan import Plan
    from .check_report import Report

Backend = Literal["c", "triton", "reference"]
Result = Any
"""A tensor, or a named tuple of tensors in the declared order of the outputs."""

_REMEMBERED = 256
"""Calls that differ in shapes, dtypes or params and are kept checked."""


class SpecFile:
    """A parsed file. From the cache it comes as bytes, which are restored when its equations are first looked at."""

    def __init__(self, filename: str, spec: typed.Spec | bytes) -> None:
        self.filename = filename
        self._spec = spec

    @property
    def spec(self) -> typed.Spec:
        if isinstance(self._spec, bytes):
            restored: typed.Spec = pickling.restore(self._spec)
            self._spec = replace(restored, filename=self.filename)
        return self._spec

    def __reduce__(self) -> tuple[object, ...]:
        return SpecFile, (self.filename, self._spec)


class Kernel:
    """One kernel of a spec, ready to be called on tensors.

    Nothing is compiled until the first call. A kernel is immutable, can be shared between threads, and can be copied
    and pickled (its spec travels with it).
    """

    def __init__(self, head: Header, file: SpecFile) -> None:
        self.file = file
        self.name = head.name
        self.doc = self.__doc__ = head.doc
        self.identity = head.identity
        self.input_names = head.inputs
        self.output_names = head.outputs
        self.param_names = head.params
        self.axis_names = head.axes
        self.states = head.states
        self.families = Families()
        self.key = f"{head.name}_{digest(head.identity, compiler_digest())[:16]}"
        self._head = head
        self._bound: dict[tuple[object, ...], Bound] = {}
        self._tuple = namedtuple(f"{head.name}_outputs", head.outputs, rename=True) if len(head.outputs) > 1 else None
        KERNELS[self.key] = self

    def header(self) -> Header:
        """What is said about the kernel without its equations."""
        return self._head

    @property
    def spec(self) -> typed.Spec:
        """The whole file that the kernel comes from."""
        return self.file.spec

    @cached_property
    def typed(self) -> typed.Kernel:
        """The equations as they were resolved."""
        return next(kernel for kernel in self.spec.kernels if kernel.name == self.name)

    @cached_property
    def graph(self) -> ir.Graph:
        """The equation graph."""
        from ..compiler.build import build

        return build(self.typed)

    @cached_property
    def renamed_axes(self) -> frozenset[str]:
        """Axes by whose other name a state is read (``y[n -> m]``), with these names: generated steps take their positions for the same."""
        from ..compiler import ir

        found: set[str] = set()
        for node in ir.topological([u for s in self.graph.states.values() for u in s.updates]):
            if isinstance(node, ir.Read):
                found.update(a for axis, position in node.at for a in (axis, *position.axes))
        return frozenset(found)

    @cached_property
    def fixed_axes(self) -> frozenset[str]:
        """Axes along which a value is read at a position that the spec names (``y[n -> 0]``): plans take them to begin at 0."""
        from ..compiler import ir

        nodes = ir.topological(self.graph.outputs.values())
        return frozenset(a for n in nodes if isinstance(n, ir.Read) for a, e in n.at if isinstance(e, ir.Const))

    @cached_property
    def contraction_inputs(self) -> frozenset[str]:
        """The inputs that autocast casts."""
        from .autocast import contraction_inputs

        return contraction_inputs(self.graph)

    def __call__(
        self,
        *tensors: Tensor,
        sizes: Mapping[str, int] | None = None,
        origin: Mapping[str, int] | None = None,
        cu_seqlens: Mapping[str, Tensor] | None = None,
        initial: Mapping[str, Tensor] | None = None,
        history: Mapping[str, Tensor] | None = None,
        return_final: bool = False,
        backend: Backend | None = None,
        strict: bool = False,
        deterministic: bool = True,
        **named: Any,
    ) -> Result:
        """Runs the kernel on ``tensors``, its inputs in declared order; inputs may also be given by name, params are.

        Returns the output, or a named tuple of the outputs. ``sizes`` gives the extents of axes that no input has and
        ``origin`` the first position along an axis. ``initial`` starts states at given values; with ``return_final``
        the result is a pair of what it is otherwise and a dict of final values, which the next call takes as
        ``initial``. ``cu_seqlens`` gives the bounds of sequences packed along the time axis of a recurrence, whose states begin
        anew with each; initial and final values, and outputs without that axis, then have the sequences as their first
        dimension. ``backend`` is ``"triton"`` (default on GPUs), ``"c"`` (default on CPUs) or ``"reference"``; what no
        generated kernel covers runs as PyTorch, and with ``strict`` raises ``NotFused``. float64 inputs always run as
        the reference, because generated kernels compute in float32. Raises ``CallError`` for arguments that the
        declaration does not allow and ``NotSupported`` for what this version cannot do.
        """
        from .execute import execute, traced_call

        arguments.check_unsupported(self, cu_seqlens, history, return_final, deterministic)
        inputs = arguments.named_inputs(self, tensors, named)
        if cu_seqlens:
            from .packed import Options, call_packed

            return call_packed(self, inputs, named, cu_seqlens, Options(sizes, origin, initial, return_final, backend, strict))
        if torch.compiler.is_dynamo_compiling():
            values = traced_call(self.key, inputs, named, sizes, origin, initial, return_final, backend, strict)
            return self.result_of(values, return_final)
        call = self.prepare(inputs, named, sizes, origin, initial, return_final, backend, strict)
        return self.result_of(execute(call), return_final)

    def reference(
        self,
        *tensors: Tensor,
        sizes: Mapping[str, int] | None = None,
        origin: Mapping[str, int] | None = None,
        initial: Mapping[str, Tensor] | None = None,
        return_final: bool = False,
        **named: Any,
    ) -> Result:
        """The meaning of the kernel, evaluated in PyTorch in the dtype of the inputs, on any device, differentiable."""
        result = self(*tensors, sizes=sizes, origin=origin, initial=initial, return_final=return_final, backend="reference", **named)
        return result

    def prepare(
        self,
        inputs: dict[str, Any],
        params: Mapping[str, Any],
        sizes: Mapping[str, int] | None = None,
        origin: Mapping[str, int] | None = None,
        initial: Mapping[str, Tensor] | None = None,
        return_final: bool = False,
        backend: str | None = None,
        strict: bool = False,
    ) -> Call:
        """Checks and completes the arguments of one call. Raises ``CallError``."""
        if backend not in (None, "c", "triton", "reference"):
            raise errors.UnknownBackend(self.name, backend)
        key = arguments.signature_of(inputs, params, sizes)
        bound = self._bound.get(key) if key is not None else None
        if bound is None:
            bound = arguments.bind(self, inputs, params, sizes)
            if key is not None:
                if len(self._bound) >= _REMEMBERED:
                    self._bound.clear()
                self._bound[key] = bound
        begin = arguments.check_initial(self, initial, bound)
        return Call(self, inputs, bound, arguments.check_origin(self, origin), begin, return_final, backend, strict)

    def lowered(
        self,
        target: str = "c",
        *,
        dtype: torch.dtype = torch.float32,
        extents: Mapping[str, int] | None = None,
        params: Mapping[str, Number] | None = None,
    ) -> Lowered:
        """What the compiler makes of the kernel on a target, for inputs of one dtype; ``extents`` of axes default to typical ones."""
        from .generated import lowered

        return lowered(self, target, dtype, extents or {}, params or {})

    def plan(
        self,
        direction: Literal["forward", "backward"] = "forward",
        backend: Backend | None = None,
        *,
        target: str | None = None,
        dtype: torch.dtype = torch.float32,
        extents: Mapping[str, int] | None = None,
        params: Mapping[str, Number] | None = None,
    ) -> Plan:
        """The plan of one direction; ``str`` of it reads like an algorithm. Raises ``NotFused`` where there is none."""
        from .generated import plan

        return plan(self, direction, backend, target, dtype, extents or {}, params or {})

    def source(
        self,
        backend: Backend | None = None,
        part: Literal["forward", "backward"] = "forward",
        *,
        target: str | None = None,
        dtype: torch.dtype = torch.float32,
        extents: Mapping[str, int] | None = None,
        params: Mapping[str, Number] | None = None,
    ) -> str:
        """The generated source of one direction. Raises ``NotFused`` where there is none."""
        from .generated import source

        return source(self, part, backend, target, dtype, extents or {}, params or {})

    def check(self, **options: Any) -> Report:
        """Compares the kernel with its float64 reference, forward and backward; see ``weft.check``."""
        from .check import check_kernel

        return check_kernel(self, **options)

    def result_of(self, values: Sequence[Tensor], return_final: bool) -> Result:
        """What a call returns, from the outputs and, with ``return_final``, the final values of the states."""
        count = len(self.output_names)
        result = values[0] if self._tuple is None else self._tuple(*values[:count])
        return (result, dict(zip(self.states, values[count:], strict=True))) if return_final else result

    def __repr__(self) -> str:
        return f"<weft kernel {self}>"

    def __str__(self) -> str:
        inputs = ", ".join(show_tensor(t) for t in self.typed.inputs)
        return f"{self.name}({inputs}) -> {', '.join(show_tensor(t) for t in self.typed.outputs)}"

    def __reduce__(self) -> tuple[object, ...]:
        return Kernel, (self._head, self.file)

    def __copy__(self) -> Kernel:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Kernel:
        return self


def show_tensor(tensor: typed.Tensor) -> str:
    """A tensor as it is declared: ``bias[n]: float32 = 0``."""
    dtype = f": {tensor.dtype}" if tensor.dtype else ""
    default = f" = {tensor.default}" if tensor.default is not None else ""
    return f"{tensor.name}{show_dims(tensor.dims)}{dtype}{default}"
