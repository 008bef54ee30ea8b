"""Every spec that ships evaluates and differentiates in float64 at a tiny shape, with inputs drawn by its own lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import weft.dsl
from tests.specs_sizes import SIZES, tiny
from weft.compiler import extents, ir, reference, sampling
from weft.compiler.build import build
from weft.dsl import typed

FOLDER = Path(__file__).parents[2] / "specs"
SPECS = sorted(path.stem for path in FOLDER.glob("*.weft"))
STRAIGHT_THROUGH = {"stopgrad", "clipgrad"}
"""Operations whose gradient is by intent not the derivative."""


def kernels(spec: str) -> tuple[typed.Kernel, ...]:
    return weft.dsl.load_file(FOLDER / f"{spec}.weft").kernels


def operations(graph: ir.Graph) -> set[str]:
    updates = [u for s in graph.states.values() for u in s.updates]
    return {n.op for n in ir.topological([*graph.outputs.values(), *updates]) if isinstance(n, ir.Pointwise)}


def test_sizes_are_of_specs_that_exist() -> None:
    assert set(SIZES) <= set(SPECS)


@pytest.mark.parametrize("spec", SPECS)
def test_spec_evaluates_and_differentiates(spec: str) -> None:
    for kernel in kernels(spec):
        check_kernel(kernel, spec)


def check_kernel(kernel: typed.Kernel, spec: str) -> None:
    bound, params = tiny(kernel, spec)
    graph = build(kernel)
    generator = torch.Generator().manual_seed(0)
    inputs = sampling.sample(kernel, bound, generator, torch.float64, params=params)
    assert extents.bind(kernel, {n: t.shape for n, t in inputs.items()}, params, bound) == bound
    assert sampling.violated(kernel, inputs, params, bound) == []
    floats = {n: t.requires_grad_() for n, t in inputs.items() if t.is_floating_point()}
    out = reference.evaluate(graph, inputs, params, bound)
    for tensor in kernel.outputs:
        assert out[tensor.name].shape == extents.shape(tensor, bound)
        assert out[tensor.name].isfinite().all()
        assert out[tensor.name].any(), f"{tensor.name} is 0 everywhere: the tiny size says nothing"
    real = {n: t for n, t in out.items() if t.requires_grad}
    if not real:
        assert all(t.dtype in (torch.bool, torch.int64) for t in out.values())
        return
    weights = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in real.items()}
    gradients = torch.autograd.grad(weighted(out, weights), list(floats.values()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    if operations(graph) & STRAIGHT_THROUGH:
        return
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in floats.values()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)

    def moved(step: float) -> float:
        shifted = {n: t.detach() + step * d for (n, t), d in zip(floats.items(), directions, strict=True)}
        return float(weighted(reference.evaluate(graph, {**inputs, **shifted}, params, bound), weights))

    step = 1e-6
    assert slope == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=2e-6, abs=2e-6)


def weighted(out: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    return torch.stack([(out[n] * w).sum() for n, w in weights.items()]).sum()


@pytest.mark.parametrize("spec", SPECS)
def test_lower_precision_runs(spec: str) -> None:
    kernel = kernels(spec)[-1]
    bound, params = tiny(kernel, spec)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = sampling.sample(kernel, bound, torch.Generator().manual_seed(0), dtype, params=params)
        out = reference.evaluate(build(kernel), inputs, params, bound)
        for tensor in kernel.outputs:
            value = out[tensor.name]
            if tensor.dtype is None and value.is_floating_point():
                states = {s.name for s in kernel.body if isinstance(s, typed.State)}
                assert value.dtype == (torch.float32 if tensor.name in states else dtype)
