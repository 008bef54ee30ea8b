"""What a bench compares attention with computes what the reference does, gradients included: at small sizes, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from benchmarks.eager_attention import HAND_WRITTEN
from benchmarks.peers_attention import VARIANTS, peers
from benchmarks.shapes import NAMES, SPECS
from weft.runtime import bench
from weft.runtime.library import find
from weft.runtime.problem import Usual, pose

WITHOUT_FLEX = {"maxsim"}
USUAL = Usual(length=32, feature=8, heads=2, batch=2)
SHAPES: dict[str, tuple[dict[str, int], dict[str, bool | int | float]]] = {
    "block_causal": ({}, {"block": 8}),
    "chunked": ({}, {"chunk": 8}),
    "deberta": ({"n": 15}, {"buckets": 8, "longest": 32}),
    "dilated_window": ({}, {"window": 6}),
    "global_window": ({}, {"window": 3}),
    "hierarchical": ({"n": 11}, {}),
    "kitchen_sink": ({"g": 2, "r": 3}, {"window": 9, "cap": 3.0}),
    "mla": ({"l": 6, "r": 4}, {}),
    "mla_full": ({"d": 6, "r": 4, "e": 5}, {}),
    "natten1d": ({}, {"window": 5}),
    "natten2d": ({"y": 5, "yk": 5, "x": 6, "xk": 6}, {"window": 3}),
    "natten3d": ({"z": 3, "zk": 3, "y": 4, "yk": 4, "x": 5, "xk": 5}, {"window": 3, "depth": 2}),
    "relu2_attention": ({"g": 2, "r": 3}, {}),
    "sigmoid_attention": ({"g": 2, "r": 3}, {}),
    "sliding_window": ({}, {"window": 9}),
    "softcap": ({}, {"cap": 2.0}),
    "softmax_attention": ({"g": 2, "r": 3}, {}),
    "spacetime": ({"f": 5, "g": 5, "y": 2, "x": 3, "n": 9}, {}),
    "sta2d": ({"i": 36, "j": 36}, {"tile": 3, "tiles_x": 4, "tiles_y": 3, "wy": 1}),
    "streaming": ({}, {"sinks": 2, "window": 5}),
    "t5_bias": ({"n": 8}, {"longest": 20}),
    "t5_bias causal": ({"n": 8}, {"longest": 20, "causal": True}),
    "tree": ({"i": 9, "n": 9}, {"prefix": 23}),
}
CASES = sorted({*(SPECS.get(n, n) for n in NAMES), *VARIANTS, *HAND_WRITTEN, *SHAPES})


@cache
def entered(case: str) -> dict[str, bench.Contender]:
    """Everything that a bench compares, in float64 and without compilation."""
    name = case.partition(" ")[0]
    kernel = getattr(weft.load(find(name)), name)
    problem = pose(kernel.graph, *SHAPES.get(case, ({}, {})), USUAL)

    def uncompiled(
        kernel: str, inputs: Mapping[str, Tensor], params: Mapping[str, Any], extents: Mapping[str, int]
    ) -> Sequence[bench.Peer]:
        return peers(kernel, inputs, params, extents, compiled=False)

    return {c.name: c for c in bench.contenders(kernel, problem, "float64", "c", uncompiled, (), seed=5)}


@pytest.mark.parametrize("case", CASES)
def test_eager_torch_has_the_outputs_and_gradients_of_the_reference(case: str) -> None:
    reference, eager = entered(case)["eager"], entered(case)["eager-torch"]
    wanted = tensors(reference.forward())[: len(tensors(eager.forward()))]
    cotangents = [torch.randn_like(o) for o in wanted]
    wanted_gradients = torch.autograd.grad(wanted, reference.leaves, cotangents)
    for _ in range(2):  # nothing that has a gradient is made outside the call
        outputs = tensors(eager.forward())
        torch.testing.assert_close(outputs, wanted, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(torch.autograd.grad(outputs, eager.leaves, cotangents), wanted_gradients, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_sdpa_and_flex_attention_have_the_output_of_the_reference(case: str) -> None:
    found = [entered(case)[name] for name in ("sdpa", "flex") if name in entered(case)]
    assert (found[-1:] and found[-1].name == "flex") or case in WITHOUT_FLEX
    for peer in found:
        with torch.no_grad():
            output = peer.forward()
        torch.testing.assert_close(output, peer.expected, rtol=1e-6, atol=1e-6)


def test_every_attention_that_is_benched_has_its_peers() -> None:
    assert {SPECS.get(n, n) for n in NAMES} <= VARIANTS.keys() | WITHOUT_FLEX
    assert HAND_WRITTEN.keys() >= WITHOUT_FLEX


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
