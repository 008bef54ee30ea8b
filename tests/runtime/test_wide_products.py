"""Layers with more features than a tile of rows keeps: matrix products in tiles, with what follows fused."""

from __future__ import annotations

import pytest
import torch

from tests.evidence.library import kernel
from tests.runtime.test_routed import both, close, drawn
from weft.runtime.problem import Usual, pose

NAMES = ("swiglu", "geglu", "reglu", "relu2_mlp", "cats", "bitlinear", "bitlinear_glu", "fake_quant")


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_float64(name: str) -> None:
    made = kernel(name)
    extents = pose(made.graph, {"t": 37, "d": 300, "f": 270}, {}, Usual()).extents
    for quantity, found, wanted in both(made, drawn(made, extents), {}):
        close(quantity, found, wanted)


def test_outputs_that_are_read_again_lie_as_declared() -> None:
    """Its output has its axes the other way round than they lie in the other tensors' order."""
    made = kernel("attention_residual")
    extents = pose(made.graph, {"t": 60, "l": 5, "d": 300}, {}, Usual()).extents
    inputs = {name: x * 0.2 for name, x in drawn(made, extents).items()}
    for quantity, found, wanted in both(made, inputs, {}):
        close(quantity, found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_planned_for_gpus(name: str) -> None:
    made = kernel(name)
    extents = pose(made.graph, {"t": 4096, "d": 1024, "f": 4096}, {}, Usual()).extents
    lowered = made.lowered("sm_90", dtype=torch.bfloat16, extents=extents)
    assert lowered.forward is not None and not lowered.reasons and lowered.in_products


def test_scores_are_never_stored() -> None:
    for name in ("softmax_attention", "full", "retention", "multi_token"):
        made = kernel(name)
        extents = pose(made.graph, {"d": 512}, {}, Usual(512)).extents
        lowered = made.lowered("c", extents=extents)
        plans = [] if lowered.forward is None else [lowered.forward, lowered.backward(frozenset(lowered.differentiable))]
        assert not any({"i", "j"} <= set(b.axes) for plan in plans for b in plan.buffers.values()), name
