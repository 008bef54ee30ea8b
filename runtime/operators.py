"""Kernels as PyTorch operators, so that autograd, ``torch.compile`` and fake tensors know them.

    weft::forward   (variant, tensors, params, extents, origin) -> outputs, then what is saved for the backward pass
    weft::backward  the same with saved tensors and cotangents -> the wanted gradients
    weft::reference one evaluation of the reference as a single operator, for graphs that are being recorded
    weft::call      a whole call with unchecked arguments, which Dynamo records in place of the Python around it

A kernel or variant is named by a string that holds a content hash, so recorded graphs mean the same in every process
that has loaded the kernel. Transforms that would be silently wrong raise (see ``transforms``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler import extents as axis_extents
from . import reference, transforms
from .arguments import TORCH_DTYPES, Bound, Call, promoted_dtype
from .registry import KERNELS, VARIANTS

if TYPE_CHECKING:
    from .variants import Variant

_library: Any = torch.library.Library("weft", "DEF")  # type: ignore[no-untyped-call]
_library.define("forward(str variant, Tensor[] tensors, float[] params, SymInt[] extents, SymInt[] origin) -> Tensor[]")
_library.define(
    "backward(str variant, Tensor[] tensors, Tensor[] saved, Tensor?[] cotangents, bool[] wanted, float[] params, SymInt[] extents, "
    "SymInt[] origin) -> Tensor[]"
)
_library.define("reference(str settings, Tensor[] tensors) -> Tensor[]")
_library.define("reference_backward(str settings, Tensor[] tensors, Tensor?[] cotangents, bool[] wanted) -> Tensor[]")
_library.define(
    "call(str kernel, Tensor[] inputs, str[] input_names, Tensor[] initial, str[] initial_names, Scalar[] params, str[] param_names, "
    "SymInt[] sizes, str[] size_names, SymInt[] origin, str[] origin_names, bool return_final, str backend, bool strict) -> Tensor[]"
)
_ops: Any = torch.ops.weft


# Generated kernels ------------------------------------------------------------------------------------------------


def fused_operator(call: Call, variant: Variant, tensors: list[Tensor], watched: bool) -> list[Tensor]:
    """The outputs of the generated forward kernels for complete inputs, with gradients.

    Where nothing watches, PyTorch's dispatcher has nothing to add and is skipped for speed.
    """
    bound = call.bound
    params = [float(bound.params[name]) for name in variant.float_params]
    extents = [bound.extents[a] for a in variant.axes]
    origin = [call.origin.get(a, 0) for a in variant.axes] if call.origin else variant.no_origin
    if watched:
        values: Sequence[Tensor] = _ops.forward.default(variant.key, tensors, params, extents, origin)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        values = _Forward.apply(variant.key, variant.forward, params, extents, origin, *tensors)  # type: ignore[no-untyped-call]
    else:
        values = variant.forward(tensors, params, extents, origin)
    return list(values[: variant.output_count])


def is_watched(tensors: Iterable[Tensor]) -> bool:
    """Whether anything but autograd takes part: a mode, a transform, a tracer, or tensors that are not plain ones."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def is_recording(tensors: Iterable[Tensor]) -> bool:
    """Whether operators are watched by a mode, or tensors may have no numbers to decide anything by."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _forward(variant: str, tensors: list[Tensor], params: list[float], extents: list[int], origin: list[int]) -> list[Tensor]:
    return VARIANTS[variant].forward(tensors, params, extents, origin)


def _forward_fake(variant: str, tensors: list[Tensor], params: list[float], extents: list[int], origin: list[int]) -> list[Tensor]:
    return VARIANTS[variant].empty_results(extents, tensors[0].device)


def _forward_autograd(variant: str, tensors: list[Tensor], params: list[float], extents: list[int], origin: list[int]) -> list[Tensor]:
    transforms.refuse_tangents(VARIANTS[variant].kernel.name, tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        run = partial(_below_autograd, variant)
        return list(_Forward.apply(variant, run, params, extents, origin, *tensors))  # type: ignore[no-untyped-call]
    return _below_autograd(variant, tensors, params, extents, origin)


def _below_autograd(variant: str, tensors: Sequence[Tensor], params: list[float], extents: list[int], origin: list[int]) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        values: list[Tensor] = _ops.forward.default(variant, tensors, params, extents, origin)
    return values


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: str, run: Callable[..., list[Tensor]], params: list[float], extents: list[int], origin: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        values = run(tensors, params, extents, origin)
        variant = VARIANTS[key]
        ctx.call = key, params, extents, origin, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for i, v in enumerate(values) if i >= variant.output_count or not v.is_floating_point()))
        ctx.save_for_backward(*tensors, *(values[i] for i in variant.saved_results))
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        key, params, extents, origin, count = ctx.call
        variant = VARIANTS[key]
        wanted = [need and able for need, able in zip(ctx.needs_input_grad[5:], variant.differentiable_inputs, strict=True)]
        given = list(cotangents[: variant.output_count])
        gradients: list[Tensor] = []
        if any(wanted) and any(c is not None for c in given):
            saved = list(ctx.saved_tensors)
            gradients = _ops.backward.default(key, saved[:count], saved[count:], given, wanted, params, extents, origin)
        found = iter(gradients)
        return (None, None, None, None, None, *(next(found, None) if want else None for want in wanted))


def _backward(
    variant: str,
    tensors: list[Tensor],
    saved: list[Tensor],
    cotangents: list[Tensor | None],
    wanted: list[bool],
    params: list[float],
    extents: list[int],
    origin: list[int],
) -> list[Tensor]:
    return VARIANTS[variant].backward(tensors, saved, cotangents, wanted, params, extents, origin)


def _backward_fake(variant: str, tensors: list[Tensor], saved: list[Tensor], cotangents: Any, wanted: list[bool], *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip(tensors, wanted, strict=True) if want]


def _backward_autograd(
    variant: str, tensors: list[Tensor], saved: list[Tensor], cotangents: list[Tensor | None], *rest: Any
) -> list[Tensor]:
    kernel = VARIANTS[variant].kernel.name
    present = [*tensors, *saved, *(c for c in cotangents if c is not None)]
    transforms.refuse_tangents(kernel, present)
    with torch._C._AutoDispatchBelowAutograd():
        gradients: list[Tensor] = _ops.backward.default(variant, tensors, saved, cotangents, *rest)
    return transforms.once_differentiable(kernel, gradients, present)


# The reference as one operator ------------------------------------------------------------------------------------


def reference_operator(call: Call) -> list[Tensor]:
    """``reference.evaluate_call`` as one operator, whose backward pass evaluates again."""
    settings = _settings(call, "")
    values: list[Tensor] = _ops.reference.default(settings, [*call.inputs.values(), *call.initial.values()])
    return values


def outside_operator(call: Call, variant: Variant) -> dict[str, Tensor]:
    """``reference.evaluate_outside`` as one operator."""
    values: list[Tensor] = _ops.reference.default(_settings(call, variant.key), list(call.inputs.values()))
    return dict(zip(variant.outside, values, strict=True))


def _settings(call: Call, variant: str) -> str:
    plain = {
        "kernel": call.kernel.key,
        "inputs": list(call.inputs),
        "initial": list(call.initial),
        "params": call.bound.params,
        "extents": call.bound.extents,
        "origin": call.origin,
        "final": call.return_final,
        "outside": variant,
    }
    return json.dumps(plain)


def _restored(settings: str, tensors: Sequence[Tensor]) -> tuple[Call, Variant | None]:
    plain = json.loads(settings)
    names = plain["inputs"]
    inputs = dict(zip(names, tensors, strict=False))
    initial = dict(zip(plain["initial"], tensors[len(names) :], strict=True))
    device = tensors[0].device if tensors else torch.device("cpu")
    bound = Bound(plain["extents"], plain["params"], promoted_dtype(inputs), device)
    call = Call(KERNELS[plain["kernel"]], inputs, bound, plain["origin"], initial, plain["final"], None, False)
    return call, VARIANTS.get(plain["outside"])


def _evaluate(settings: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    call, variant = _restored(settings, tensors)
    values = reference.evaluate_call(call) if variant is None else list(reference.evaluate_outside(call, variant).values())
    known = {id(t) for t in tensors}
    return [v.clone(memory_format=torch.contiguous_format) if id(v) in known or v._base is not None else v.contiguous() for v in values]


def _reference(settings: str, tensors: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _evaluate(settings, tensors)


def _reference_fake(settings: str, tensors: list[Tensor]) -> list[Tensor]:
    call, variant = _restored(settings, tensors)
    extents, device = call.bound.extents, call.bound.device
    if variant is not None:
        shapes = [([extents[a] for a in node.axes], reference.outside_dtype(node)) for node in variant.outside.values()]
    else:
        shapes = list(_output_shapes(call))
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]


def _output_shapes(call: Call) -> Any:
    kernel, extents, promoted = call.kernel, call.bound.extents, call.bound.promoted
    wide = torch.float64 if promoted == torch.float64 else torch.float32
    for tensor in kernel.typed.outputs:
        kind = kernel.graph.outputs[tensor.name].kind
        real = wide if tensor.name in kernel.states else promoted
        dtype = {"real": real, "int": torch.int64, "bool": torch.bool}[kind] if tensor.dtype is None else TORCH_DTYPES[tensor.dtype]
        yield list(axis_extents.shape(tensor, extents)), dtype
    for state in kernel.graph.states.values() if call.return_final else ():
        yield [extents[a] for a in state.axes], wide


def _reference_autograd(settings: str, tensors: list[Tensor]) -> list[Tensor]:
    transforms.refuse_tangents(KERNELS[json.loads(settings)["kernel"]].name, tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return list(_Reference.apply(settings, *tensors))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        values: list[Tensor] = _ops.reference.default(settings, tensors)
    return values


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            values: list[Tensor] = _ops.reference.default(settings, tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for v in values if not v.is_floating_point()))
        ctx.save_for_backward(*tensors)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        wanted = list(ctx.needs_input_grad[1:])
        gradients = iter(_ops.reference_backward.default(ctx.settings, ctx.saved_tensors, list(cotangents), wanted))
        return (None, *(next(gradients) if want else None for want in wanted))


def _reference_backward(settings: str, tensors: list[Tensor], cotangents: list[Tensor | None], wanted: list[bool]) -> list[Tensor]:
    with torch.enable_grad(), _recording():
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        values = _evaluate(settings, leaves)
        pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if c is not None and v.requires_grad]
        sources = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        if not pairs:
            return [torch.zeros_like(s, memory_format=torch.contiguous_format) for s in sources]
        found = torch.autograd.grad([v for v, _ in pairs], sources, [c for _, c in pairs], allow_unused=True, materialize_grads=True)
    return [g.clone(memory_format=torch.contiguous_format) for g in found]


def _recording() -> Any:
    """Below the autograd layer nothing is recorded; this brings it back for the inside of an operator."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in keys:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _reference_backward_fake(settings: str, tensors: list[Tensor], cotangents: Any, wanted: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip(tensors, wanted, strict=True) if want]


def _reference_backward_autograd(settings: str, tensors: list[Tensor], cotangents: list[Tensor | None], wanted: list[bool]) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        gradients: list[Tensor] = _ops.reference_backward.default(settings, tensors, cotangents, wanted)
    present = [*tensors, *(c for c in cotangents if c is not None)]
    return transforms.once_differentiable(KERNELS[json.loads(settings)["kernel"]].name, gradients, present)


# A whole call -----------------------------------------------------------------------------------------------------


def traced_call(
    kernel: str,
    inputs: dict[str, Tensor],
    params: dict[str, Any],
    sizes: Mapping[str, int] | None,
    origin: Mapping[str, int] | None,
    initial: Mapping[str, Tensor] | None,
    return_final: bool,
    backend: str | None,
    strict: bool,
) -> list[Tensor]:
    """The call as one operator: Dynamo records it and does not look inside."""
    values: list[Tensor] = _ops.call.default(
        kernel,
        list(inputs.values()),
        list(inputs.keys()),
        list(initial.values()) if initial else [],
        list(initial.keys()) if initial else [],
        list(params.values()),
        list(params.keys()),
        list(sizes.values()) if sizes else [],
        list(sizes.keys()) if sizes else [],
        list(origin.values()) if origin else [],
        list(origin.keys()) if origin else [],
        return_final,
        backend or "",
        strict,
    )
    return values


def _call(
    kernel: str,
    inputs: list[Tensor],
    input_names: list[str],
    initial: list[Tensor],
    initial_names: list[str],
    params: list[bool | int | float],
    param_names: list[str],
    sizes: list[int],
    size_names: list[str],
    origin: list[int],
    origin_names: list[str],
    return_final: bool,
    backend: str,
    strict: bool,
) -> list[Tensor]:
    from .execute import execute

    call = KERNELS[kernel].prepare(
        dict(zip(input_names, inputs, strict=True)),
        dict(zip(param_names, params, strict=True)),
        dict(zip(size_names, sizes, strict=True)),
        dict(zip(origin_names, origin, strict=True)),
        dict(zip(initial_names, initial, strict=True)),
        return_final,
        backend or None,
        strict,
    )
    return execute(call, tracing=True)


def _register() -> None:
    parts = (
        ("forward", _forward, _forward_fake, _forward_autograd),
        ("backward", _backward, _backward_fake, _backward_autograd),
        ("reference", _reference, _reference_fake, _reference_autograd),
        ("reference_backward", _reference_backward, _reference_backward_fake, _reference_backward_autograd),
    )
    for name, run, fake, autograd in parts:
        _library.impl(name, run, "CompositeExplicitAutograd")
        _library.impl(name, autograd, "Autograd")
        torch.library.register_fake(f"weft::{name}", fake, lib=_library)
    _library.impl("call", _call, "CompositeImplicitAutograd")
    _library.impl("call", transforms.refuse_batch, "FuncTorchBatched")


_register()
