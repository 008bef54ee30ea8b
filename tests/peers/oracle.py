"""Comparing a spec with somebody else's program: outputs, and gradients under random cotangents, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.specs_sizes import SIZES, tiny
from weft.compiler import build, extents, ir, reference, sampling
from weft.dsl import load_file, typed

SPECS = Path(__file__).parents[2] / "specs"
Outputs = Tensor | Mapping[str, Tensor]
Oracle = Callable[..., Outputs]


@functools.cache
def kernel_of(spec: str) -> typed.Kernel:
    return load_file(SPECS / f"{spec}.weft").kernels[0]


@functools.cache
def graph_of(spec: str) -> ir.Graph:
    return build.build(kernel_of(spec))


def draw(spec: str, seed: int = 0, sizes: Mapping[str, int] | None = None, params: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Inputs of a spec in float64, at its tiny size or with other extents and params."""
    kernel = kernel_of(spec)
    usual, usual_params = tiny(kernel, spec)
    chosen = usual_params | dict(params or {})
    declared = {a.name for a in kernel.axes if a.extent is not None}
    free = {axis: n for axis, n in (usual | dict(sizes or {})).items() if axis not in declared}
    complete = extents.complete(kernel, chosen, free)
    generator = torch.Generator().manual_seed(seed)
    return sampling.sample(kernel, complete, generator, torch.float64, params=chosen)


def agree(
    spec: str,
    oracle: Oracle,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    sizes: Mapping[str, int] | None = None,
    params: Mapping[str, Any] | None = None,
    origin: Mapping[str, int] | None = None,
    gradients: bool = True,
    constants: tuple[str, ...] = (),
    tol: float = 1e-9,
) -> None:
    """Asserts that a spec and ``oracle(**inputs)`` are the same function, forward and in every gradient.

    ``inputs`` default to ``draw(spec)``, and ``params`` to those of its tiny size. The oracle returns its outputs by
    name, or the tensor of the first one; outputs that it leaves out are not compared. It has no gradient for
    ``constants``, and may change its inputs in place. Errors are relative to one plus the largest entry.
    """
    kernel = kernel_of(spec)
    tensors = dict(draw(spec, sizes=sizes, params=params) if inputs is None else inputs)
    complete = extents.bind_params(kernel, SIZES.get(spec, {}).get("params", {}) | dict(params or {}))
    bound = extents.bind(kernel, {name: x.shape for name, x in tensors.items()}, complete, {})
    ours, theirs = _leaves(tensors), _leaves(tensors)
    got = reference.evaluate(graph_of(spec), ours, complete, bound, origin=origin)
    answer = oracle(**{name: x.clone() for name, x in theirs.items()})
    wanted = {kernel.outputs[0].name: answer} if isinstance(answer, Tensor) else dict(answer)
    assert wanted.keys() <= got.keys(), f"{spec} has no output {sorted(wanted.keys() - got.keys())}"
    for name, value in wanted.items():
        _close(f"{spec}: output {name}", got[name], value, tol)
    if not gradients:
        return
    generator = torch.Generator().manual_seed(1)
    names = [name for name, value in wanted.items() if value.is_floating_point()]
    cotangents = [torch.randn(got[name].shape, generator=generator, dtype=torch.float64) for name in names]
    expected = _gradients([wanted[name] for name in names], theirs, cotangents)
    for name, value in _gradients([got[name] for name in names], ours, cotangents).items():
        if name not in constants:
            _close(f"{spec}: gradient of {name}", value, expected[name], tol)
    assert any(g.abs().max() > 0 for g in expected.values() if g.numel()), f"{spec}: the oracle passes no gradient at all"


def _leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}


def _gradients(outputs: list[Tensor], inputs: Mapping[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    total = torch.stack([(o.double() * c).sum() for o, c in zip(outputs, cotangents, strict=True)]).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), found, strict=True)}


def _close(what: str, got: Tensor, wanted: Tensor, tol: float) -> None:
    assert got.shape == wanted.shape, f"{what}: shapes {tuple(got.shape)} and {tuple(wanted.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got, wanted.to(got.dtype)), what
        return
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    error = torch.where(same, 0.0, (got - wanted).abs()).amax().item() if got.numel() else 0.0
    scale = 1 + torch.where(wanted.isfinite(), wanted.abs(), 0.0).amax().item() if wanted.numel() else 1.0
    assert error <= tol * scale, f"{what}: differs by {error:.3g} of {scale:.3g}"


class InFloat64(TorchFunctionMode):
    """Runs code that casts to float32 inside in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its internal float32 raised to float64, and tensors that it makes float64 by default."""

    @functools.wraps(function)
    def raised(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with InFloat64():
                return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return raised


def swap(x: Tensor) -> Tensor:
    """[b,h,t,...] to [b,t,h,...] and back."""
    return x.transpose(1, 2)
