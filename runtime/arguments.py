"""A call's arguments, checked and completed: what every path of execution starts from.

The checks that a tensor's data does not enter (shapes, dtypes, devices, params, extents) are remembered by what they
depend on, so that a call like an earlier one costs a lookup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler import extents as axis_extents
from ..dsl import typed
from . import errors

if TYPE_CHECKING:
    from .kernel import Kernel
    from .variants import Variant

Number = bool | int | float

TORCH_DTYPES = {
    "bool": torch.bool, "int": torch.int64, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
    "uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
INTS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


@dataclass(frozen=True, slots=True)
class Bound:
    """What shapes, dtypes and params come to. ``extents`` has every axis, ``params`` every param.

    ``variants`` remembers, by the backend asked for, which generated variant it came to.
    """

    extents: dict[str, int]
    params: dict[str, Number]
    promoted: torch.dtype
    device: torch.device
    variants: dict[str | None, Variant] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a kernel. ``inputs`` has those that were passed, in declared order; ``origin`` only axes it was given for."""

    kernel: Kernel
    inputs: dict[str, Tensor]
    bound: Bound
    origin: dict[str, int]
    initial: dict[str, Tensor]
    return_final: bool
    backend: str | None
    strict: bool

    def complete_inputs(self) -> dict[str, Tensor]:
        """Every input in declared order; one that was left out is its default, expanded."""
        if len(self.inputs) == len(self.kernel.typed.inputs):
            return self.inputs
        return {t.name: self.inputs[t.name] if t.name in self.inputs else self._default(t) for t in self.kernel.typed.inputs}

    def _default(self, tensor: typed.Tensor) -> Tensor:
        assert tensor.default is not None
        dtype = self.bound.promoted if tensor.dtype is None else TORCH_DTYPES[tensor.dtype]
        value = torch.full((), tensor.default, dtype=dtype, device=self.bound.device)
        return value.expand(axis_extents.shape(tensor, self.bound.extents))


def named_inputs(kernel: Kernel, tensors: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name in declared order, taken out of ``keywords``; what is left there are params."""
    names = kernel.input_names
    if len(tensors) > len(names):
        raise errors.TooManyInputs(kernel.name, len(tensors), names)
    found = {}
    for index, name in enumerate(names):
        if index < len(tensors):
            if name in keywords:
                raise errors.InputGivenTwice(kernel.name, name, index)
            found[name] = tensors[index]
        elif name in keywords:
            found[name] = keywords.pop(name)
    for name in keywords:
        if name not in kernel.param_names:
            raise errors.UnknownKeyword(kernel.name, name, names, kernel.param_names)
    return found


def bind(kernel: Kernel, inputs: Mapping[str, Any], params: Mapping[str, Any], sizes: Mapping[str, Any] | None) -> Bound:
    """Checks inputs, params and sizes against the declaration. Raises the subclasses of ``CallError``."""
    for tensor in kernel.typed.inputs:
        if tensor.name in inputs:
            _check_tensor(kernel, tensor.name, inputs[tensor.name])
            _check_dtype(kernel, tensor, inputs[tensor.name].dtype)
    complete = axis_extents.bind_params(kernel.typed, params)
    if sizes is not None and not isinstance(sizes, Mapping):
        raise errors.BadOption(kernel.name, "sizes", "a dict of axis names and ints", sizes)
    extents = axis_extents.bind(kernel.typed, {name: t.shape for name, t in inputs.items()}, params, sizes)
    return Bound(extents, complete, promoted_dtype(inputs), _one_device(kernel, inputs))


def promoted_dtype(inputs: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of real outputs: the floating inputs' promoted one, or the default dtype where there are none."""
    floats = [t.dtype for t in inputs.values() if t.dtype.is_floating_point]
    return reduce(torch.promote_types, floats) if floats else torch.get_default_dtype()


def signature_of(inputs: Mapping[str, Any], params: Mapping[str, Any], sizes: Mapping[str, Any] | None) -> tuple[object, ...] | None:
    """What ``bind`` depends on, as a key; None where it cannot be one (then ``bind`` says what is wrong)."""
    try:
        tensors = tuple([(name, t.shape, t.dtype, t.device, t.layout) for name, t in inputs.items()])
        numbers = tuple([(name, type(v), v) for name, v in params.items()])
        key = (tensors, numbers, tuple(sizes.items()) if sizes else (), torch.get_default_dtype())
        hash(key)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return key


def check_origin(kernel: Kernel, origin: object) -> dict[str, int]:
    if origin is None:
        return {}
    if not isinstance(origin, Mapping):
        raise errors.BadOption(kernel.name, "origin", "a dict of axis names and ints", origin)
    for axis, value in origin.items():
        if axis not in kernel.axis_names:
            raise errors.UnknownAxis(kernel.name, axis, kernel.axis_names)
        if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
            raise errors.BadOrigin(kernel.name, axis, value)
    return {axis: int(value) for axis, value in origin.items()}


def check_initial(kernel: Kernel, initial: object, bound: Bound) -> dict[str, Tensor]:
    """The initial values of states: their names, dtypes, devices and shapes."""
    if initial is None:
        return {}
    if not isinstance(initial, Mapping):
        raise errors.BadOption(kernel.name, "initial", "a dict of state names and tensors", initial)
    if initial and not kernel.states:
        raise errors.NoStates(kernel.name, "initial=")
    for name, value in initial.items():
        if name not in kernel.states:
            raise errors.UnknownState(kernel.name, name, kernel.states)
        what = f"initial['{name}']"
        _check_tensor(kernel, what, value)
        if value.dtype not in FLOATS:
            raise errors.WrongDtype(kernel.name, what, "a floating dtype", value.dtype, "Convert it with .float().")
        if value.device != bound.device:
            raise errors.MixedDevices(kernel.name, kernel.input_names[0], bound.device, what, value.device)
    return dict(initial)


def check_unsupported(kernel: Kernel, cu_seqlens: object, history: object, return_final: bool, deterministic: bool) -> None:
    """Raises for the parts of a call that the language promises and no class of kernels can do yet."""
    if cu_seqlens is not None and not isinstance(cu_seqlens, Mapping):
        raise errors.BadOption(kernel.name, "cu_seqlens", "a dict of axis names and tensors", cu_seqlens)
    if history is not None and not isinstance(history, Mapping):
        raise errors.BadOption(kernel.name, "history", "a dict of tensors", history)
    if history:
        raise errors.NotSupported(
            kernel.name,
            "a history for shifted reads (history=) is",
            "It is planned; until then, pass the earlier elements in front of the input and drop their outputs.",
        )
    if not deterministic:
        raise errors.NotSupported(
            kernel.name, "deterministic=False is", "Every kernel is deterministic, and none is faster without that. Leave it out."
        )
    if return_final and not kernel.states:
        raise errors.NoStates(kernel.name, "return_final=True")


def _check_tensor(kernel: Kernel, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise errors.NotATensor(kernel.name, name, value)
    if value.is_nested:
        raise errors.UnsupportedLayout(kernel.name, name, "nested")
    if value.is_quantized:
        raise errors.UnsupportedLayout(kernel.name, name, "quantized")
    if value.layout is not torch.strided:
        raise errors.UnsupportedLayout(kernel.name, name, "sparse")
    if value.device.type == "meta":
        raise errors.MetaInput(kernel.name, name)


def _check_dtype(kernel: Kernel, tensor: typed.Tensor, dtype: torch.dtype) -> None:
    """A declared kind (``int``, or none: floating) allows every dtype of the kind, a declared dtype only itself."""
    name, declared = tensor.name, tensor.dtype
    if declared is None:
        allowed, wanted, mend = FLOATS, "a floating dtype", f"Convert it with {name}.float(), or declare {name}{_dims(tensor)}: int."
        if dtype == torch.bool:
            mend = f"Convert it with {name}.float(), or declare {name}{_dims(tensor)}: bool."
        elif dtype.is_complex:
            mend = f"Pass real and imaginary part as torch.view_as_real({name}), with an axis for the two."
        elif dtype.is_floating_point:
            mend = f"Convert it with {name}.float()."
    elif declared == "int":
        allowed, wanted, mend = INTS, "an integer dtype", f"Convert it with {name}.long()."
    elif declared == "bool":
        allowed, wanted, mend = frozenset((torch.bool,)), "bool", f"Write the condition, as in {name} != 0."
    else:
        allowed, wanted, mend = frozenset((TORCH_DTYPES[declared],)), declared, f"Convert it with {name}.to(torch.{declared})."
    if dtype not in allowed:
        raise errors.WrongDtype(kernel.name, name, wanted, dtype, mend)


def _dims(tensor: typed.Tensor) -> str:
    return axis_extents.show_dims(tensor.dims)


def _one_device(kernel: Kernel, inputs: Mapping[str, Tensor]) -> torch.device:
    first, device = next(((name, t.device) for name, t in inputs.items()), ("", torch.device("cpu")))
    for name, tensor in inputs.items():
        if tensor.device != device:
            raise errors.MixedDevices(kernel.name, first, device, name, tensor.device)
    return device
