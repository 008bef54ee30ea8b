"""The bytes that ``explain`` says are saved for the backward pass are those that autograd holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weft
import weft.specs
from weft.compiler.sampling import sample
from weft.runtime.explain import explain
from weft.runtime.problem import Usual, pose

SPECS = ("softmax_attention", "gla", "moe_mixtral", "moe_deepseek", "moe_capacity", "moe_top_p", "switch_head", "swiglu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_what_explain_prints_is_what_is_held(spec: str, dtype: torch.dtype) -> None:
    kernel: weft.Kernel = getattr(weft.specs, spec)
    problem = pose(kernel.graph, {}, {}, Usual(32, 16, 2, 1, 4))
    drawn = sample(kernel.typed, problem.extents, torch.Generator().manual_seed(0), dtype, params=problem.params)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in drawn.values()]
    held: dict[int, Tensor] = {}

    def hold(t: Tensor) -> Tensor:
        held[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        found = kernel(*leaves, **problem.params, strict=True)
    outputs = {t.data_ptr() for t in (found if isinstance(found, tuple) else (found,))}
    given = {t.data_ptr() for t in leaves}
    bytes_held = {
        whose: sum(t.nbytes for place, t in held.items() if place not in given and (place in outputs) == whose) for whose in (False, True)
    }
    said = explain(kernel, problem, "c", str(dtype).removeprefix("torch.")).saved
    assert bytes_held == {whose: sum(s.bytes for s in said if s.output == whose) for whose in (False, True)}
