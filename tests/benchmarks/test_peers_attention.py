"""Every row of the table of peers computes what the spec of its name means: at small sizes, in eager mode, in float32."""

import pytest
import torch

from benchmarks.peers_attention import VARIANTS, peers
from weft.compiler.build import build
from weft.compiler.reference import evaluate
from weft.dsl.load import load_file
from weft.runtime.library import shipped
from weft.runtime.problem import Usual, pose

PARAMS = {"window": 5, "dilation": 2, "chunk": 16, "block": 8, "depth": 3}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_peers_agree_with_the_reference(name: str) -> None:
    kernel = next(k for k in load_file(shipped()[name]).kernels if k.name == name)
    graph = build(kernel)
    params = {p.name: PARAMS[p.name] for p in kernel.params if p.name in PARAMS}
    problem = pose(graph, {}, params, Usual(length=64, feature=16, heads=2, batch=2))
    inputs = problem.inputs(torch.float32, seed=3)
    wanted = evaluate(graph, inputs, problem.params, problem.extents)[kernel.outputs[0].name]
    found = peers(name, inputs, problem.params, problem.extents, compiled=False)
    assert {p.name for p in found} >= {"flex"}
    for peer in found:
        torch.testing.assert_close(peer.forward(), wanted, rtol=1e-4, atol=1e-4, msg=lambda m, peer=peer: f"{peer.name}: {m}")
