"""Makes the tensors of a case: values, strides, cotangents, and NaN where nothing may read.

Values are drawn by the spec's ``sample`` lines; only inputs without one are scaled or made special. Layouts change how
values lie in memory and surround them with NaN, so that a load outside its tensor is seen. Everything follows from the case.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.reference import Number
from ..compiler.sampling import sample, violated
from ..dsl import typed
from .check_shapes import Case, Layout, complete_extents, differentiable_inputs, shape_of

LARGE, TINY = 8.0, 2.0**-6
SPIKES = (0.0, 1.0, -1.0, 0.0, 16.0)
LAYOUTS: tuple[Layout, ...] = ("contiguous", "transposed", "expanded", "sliced", "gapped")
FAR = 2**31
GUARD = {torch.bool: True, torch.int64: 2**40, torch.int32: 2**30}
"""What surrounds the elements of a tensor that has no NaN."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a call by name, without those left out, and what else the call needs."""

    tensors: dict[str, Tensor]
    params: dict[str, Number]
    extents: dict[str, int]
    origin: dict[str, int]

    def detached(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.tensors.items()}


def make_inputs(kernel: typed.Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The inputs of a case, in its layout. Raises ``CallError`` where the case does not fit the kernel."""
    extents = complete_extents(kernel, case.sizes, case.params)
    params = complete_params(kernel, case.params)
    generator = torch.Generator().manual_seed(case.seed)
    drawn = sample(kernel, extents, generator, torch.float64, "cpu", params=params)
    drawn = {name: tensor for name, tensor in drawn.items() if name not in case.omit}
    special = _special_values(kernel, case, drawn, generator)
    if violated(kernel, special, params, extents):
        special = drawn
    chooser = random.Random(case.seed)
    layouts = _layouts(case, special, chooser)
    tensors = {}
    for tensor in kernel.inputs:
        if tensor.name in special:
            value = special[tensor.name].to(_declared_dtype(tensor, dtype)).to(device)
            tensors[tensor.name] = lay_out(value, layouts[tensor.name], chooser)
    return Inputs(tensors, params, extents, dict(case.origin))


def complete_params(kernel: typed.Kernel, given: Mapping[str, Number]) -> dict[str, Number]:
    """Every param of a kernel that is given or has a default."""
    values = {p.name: given.get(p.name, p.default) for p in kernel.params}
    return {name: value for name, value in values.items() if value is not None}


def broken_assumptions(kernel: typed.Kernel, inputs: Inputs, text: str) -> list[str]:
    """The ``assume`` lines, as written, that these inputs do not keep: then the spec's ``sample`` lines are at fault."""
    found = violated(kernel, inputs.detached(), inputs.params, inputs.extents)
    lines = text.splitlines()
    return [lines[e.span.line - 1].strip() if e.span.line <= len(lines) else "assume" for e in found]


def _declared_dtype(tensor: typed.Tensor, dtype: torch.dtype) -> torch.dtype:
    match tensor.dtype:
        case None:
            return dtype
        case "int":
            return torch.int64
        case "float":
            return torch.float32
        case name:
            declared = getattr(torch, name)
            assert isinstance(declared, torch.dtype)
            return declared


def _special_values(kernel: typed.Kernel, case: Case, drawn: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The values of a case: what has no ``sample`` line is scaled, made constant or spiky; ``empty`` clears slices of bools."""
    free = set(drawn) - {name for name, _ in kernel.samples}
    result = dict(drawn)
    for name in sorted(free):
        tensor = drawn[name]
        if tensor.is_floating_point():
            result[name] = _special_floats(case, tensor, generator)
        elif tensor.dtype == torch.bool and case.values == "empty" and tensor.dim() > 0:
            result[name] = _clear_slices(tensor, generator)
    return result


def _special_floats(case: Case, tensor: Tensor, generator: torch.Generator) -> Tensor:
    match case.values:
        case "large":
            return tensor * LARGE
        case "tiny":
            return tensor * TINY
        case "constant":
            # A power of two keeps sums of equal numbers exact, so that ties are ties in every precision.
            constant = bool(torch.randint(2, (), generator=generator))
            return torch.full_like(tensor, 0.5) if constant else tensor
        case "spiky":
            spikes = torch.tensor(SPIKES, dtype=tensor.dtype)
            chosen = spikes[torch.randint(len(SPIKES), tensor.shape, generator=generator)]
            return torch.where(torch.rand(tensor.shape, generator=generator) < 0.1, chosen, tensor)
        case "normal" | "empty":
            return tensor


def _clear_slices(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """False on about half of the indices of the first dimension and a third of those of the last."""
    first = torch.rand(tensor.shape[0], generator=generator) < 0.5
    last = torch.rand(tensor.shape[-1], generator=generator) < 0.67
    kept = tensor & last
    return torch.where(first.view(-1, *[1] * (tensor.dim() - 1)), kept, False) if tensor.dim() > 1 else kept


# Memory -----------------------------------------------------------------------------------------------------------


def _layouts(case: Case, tensors: Mapping[str, Tensor], chooser: random.Random) -> dict[str, Layout]:
    """The layout of every tensor. Only one is ``far``: its address space is large."""
    match case.layout:
        case "mixed":
            return {name: chooser.choice(LAYOUTS) for name in tensors}
        case "far":
            chosen = chooser.choice([n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 1] or list(tensors))
            return {name: "far" if name == chosen else "contiguous" for name in tensors}
        case layout:
            return dict.fromkeys(tensors, layout)


def lay_out(tensor: Tensor, layout: Layout, chooser: random.Random) -> Tensor:
    """The values in another memory order. ``expanded`` first makes them constant along one dimension."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    match layout:
        case "transposed":
            order = list(range(tensor.dim()))[::-1]
            return tensor.permute(order).contiguous().permute(order)
        case "expanded":
            dim = chooser.randrange(tensor.dim())
            return tensor.narrow(dim, 0, 1).clone().expand(tensor.shape)
        case "sliced":
            return _inside(tensor, [(1, n + 2) for n in tensor.shape])
        case "far":
            return _far_apart(tensor)
        case "gapped":
            gapped = _guarded([*tensor.shape[:-1], 2 * tensor.shape[-1]], tensor)[..., 1::2]
            return gapped.copy_(tensor)
        case _:
            return tensor.contiguous()


def _inside(tensor: Tensor, frame: Sequence[tuple[int, int]]) -> Tensor:
    """A copy that starts at some offset inside a larger tensor of NaN."""
    view = _guarded([whole for _, whole in frame], tensor)
    for dim, (start, _) in enumerate(frame):
        view = view.narrow(dim, start, tensor.shape[dim])
    return view.copy_(tensor)


def _far_apart(tensor: Tensor) -> Tensor:
    """A copy whose last element lies beyond 2**31 elements of its first. The memory between is never touched, so it costs addresses only;
    where even these cannot be had, the tensor stays as it is."""
    dims = [d for d, n in enumerate(tensor.shape) if n > 1]
    if not dims:
        return tensor
    dim = min(dims, key=lambda d: tensor.shape[d])
    strides = list(torch.empty([n for d, n in enumerate(tensor.shape) if d != dim], device="meta").stride())
    strides.insert(dim, FAR // (tensor.shape[dim] - 1) + tensor.numel())
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    try:
        return torch.empty(reach, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, strides).copy_(tensor)
    except (RuntimeError, MemoryError):
        return tensor


def _guarded(shape: Sequence[int], like: Tensor) -> Tensor:
    fill = float("nan") if like.is_floating_point() else GUARD.get(like.dtype, 1)
    return torch.full(list(shape), fill, dtype=like.dtype, device=like.device)


def with_gradients(inputs: Inputs, kernel: typed.Kernel, wrt: Sequence[str] | None) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors as leaves, strides kept, and the names of those that require gradients."""
    names = [n for n in differentiable_inputs(kernel) if n in inputs.tensors and (wrt is None or n in wrt)]
    leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.tensors.items()}
    return leaves, names


def draw_cotangents(kernel: typed.Kernel, extents: Mapping[str, int], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A random cotangent for every output, rounded to ``dtype``."""
    found = {}
    for n, output in enumerate(kernel.outputs):
        generator = torch.Generator().manual_seed(seed * 31 + n)
        found[output.name] = torch.randn(shape_of(output, extents), generator=generator, dtype=torch.float64).to(dtype)
    return found


# Values that must not matter ------------------------------------------------------------------------------------


def dead_slices(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where inputs may not matter: per input the indices of one dimension at which its whole gradient is exactly 0, as a bool mask.

    A zero gradient does not prove it: whoever uses this tries NaN there on the reference first.
    """
    found = {}
    for name, gradient in gradients.items():
        for dim in range(gradient.dim()):
            if gradient.shape[dim] < 2:
                continue
            others = [d for d in range(gradient.dim()) if d != dim]
            dead = (gradient == 0).all(dim=others) if others else gradient == 0
            if bool(dead.any()) and not bool(dead.all()):
                shape = [-1 if d == dim else 1 for d in range(gradient.dim())]
                found[name] = dead.view(shape).expand(gradient.shape)
                break
    return found


def with_nan(inputs: Inputs, where: Mapping[str, Tensor], *, infinities: bool = True) -> Inputs:
    """The inputs with NaN and, at every other place, infinities at some places; others keep their strides."""
    tensors = dict(inputs.tensors)
    for name, mask in where.items():
        poison = torch.full_like(tensors[name], float("nan"), memory_format=torch.contiguous_format)
        if infinities:
            poison.view(-1)[1::2] = float("inf")
        tensors[name] = torch.where(mask.to(poison.device), poison, tensors[name])
    return Inputs(tensors, inputs.params, inputs.extents, inputs.origin)
