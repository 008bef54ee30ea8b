"""What the printed Triton of recurrences looks like: places in a chunk need no masks, and which products are rounded. Needs no Triton."""

from __future__ import annotations

import pytest
import torch

from tests.codegen import sample_plans as samples
from tests.evidence.library import kernel
from weft.codegen.print_triton import print_triton
from weft.compiler import ir
from weft.compiler.plan import Compute, Contract, Load, Loop, Origin, Plan, Store, inner_statements, read_nodes
from weft.runtime.chunked import posed_in_chunks
from weft.runtime.kernel import Kernel
from weft.runtime.problem import Problem, Usual, pose


def posed(made: Kernel) -> tuple[Kernel, Problem]:
    found = posed_in_chunks(made, pose(made.graph, {}, {}, Usual(feature=64)))
    assert found is not None
    return found


def plans(made: Kernel, problem: Problem) -> tuple[Plan, Plan]:
    lowered = made.lowered("sm_90", dtype=torch.float16, extents=problem.extents, params=problem.params)
    assert lowered.forward is not None
    return lowered.forward, lowered.backward(frozenset(t.name for t in made.typed.inputs))


def text(plan: Plan, problem: Problem, dtype: str) -> str:
    return print_triton(plan, samples.specialization(plan, dtype, problem.extents, {})).text


@pytest.mark.parametrize("name", ["simple_gla", "gated_delta"])
def test_places_in_a_chunk_are_counted_from_0_and_always_as_many(name: str) -> None:
    made, problem = posed(kernel(name))
    for plan in plans(made, problem):
        for k in plan.kernels:
            for s in inner_statements(k.body):
                assert not any(isinstance(n, Origin) and ".in64" in n.axis for n in ir.topological(read_nodes(s)))
                assert not isinstance(s, Load | Store) or not any(".in64" in a for a in s.checked), k.name
        printed = text(plan, problem, "float16")
        assert "in64_origin" not in printed
        assert "in64_size" not in printed


def test_a_sweep_of_a_chunk_has_no_loop_that_never_runs() -> None:
    """Pairs of a step and those before it: tiles on the border and full tiles, and no tail."""
    _, backward = plans(*posed(kernel("gated_delta")))
    for k in backward.kernels:
        loops = [s for s in inner_statements(k.body) if isinstance(s, Loop) and s.block and ".in64" in s.axis]
        assert len(loops) <= 2, k.name


def test_steps_within_steps_are_matrix_products_along_the_steps() -> None:
    """That heads share the places of steps makes no tile of heads, and that a place says what a state loses no sum of single products."""
    made, problem = posed(kernel("gated_delta_product"))
    forward, backward = plans(made, problem)
    assert all(k.rows != "h" for k in (*forward.kernels, *backward.kernels))
    (carried,) = [k for k in backward.kernels if k.note.startswith("steps of d_S")]
    assert sum(isinstance(s, Contract) for s in inner_statements(carried.body)) == 2


def test_float32_temporaries_meet_in_tf32_where_the_call_is_of_half_precision() -> None:
    made, problem = posed(kernel("gated_delta"))
    _, backward = plans(made, problem)
    assert 'input_precision="tf32"' in text(backward, problem, "float16")
    assert 'input_precision="ieee"' not in text(backward, problem, "bfloat16")
    assert 'input_precision="tf32"' not in text(backward, problem, "float32")


def test_what_steps_carry_meets_weights_unrounded() -> None:
    made = kernel("gru")
    problem = pose(made.graph, {}, {}, Usual(feature=64))
    forward, _ = plans(made, problem)
    half, single = text(forward, problem, "bfloat16"), text(forward, problem, "float32")
    assert half.count("_rest = (") == 2  # of the state, for two of its products, and of the reset state
    assert half.count("tl.dot(") == 6
    assert "_rest = (" not in single
    assert single.count("tl.dot(") == 3


def test_what_chunks_carry_meets_what_only_one_of_them_has_in_one_product() -> None:
    made, problem = posed(kernel("gated_delta"))
    forward, backward = plans(made, problem)
    for plan in (forward, backward):
        assert "_rest = (" not in text(plan, problem, "float16")


def test_steps_of_different_blocks_meet_in_matrix_products() -> None:
    """Decays by feature: one program for the steps of a block, and the blocks before it one by one; the pairs within a block apart."""
    made, problem = posed(kernel("gla"))
    forward, backward = plans(made, problem)
    (blocks,) = [k for k in forward.kernels if "t.chunk.in4.2, t.in16.2" in k.note]
    assert (blocks.rows, blocks.tiled) == ("t.in16", {"t.in16": 16, "t.in16.2": 16})
    assert sum(isinstance(s, Contract) for s in inner_statements(blocks.body)) == 2  # with the state, and of the weights
    (loop,) = [s for s in inner_statements(blocks.body) if isinstance(s, Loop) and s.axis == "t.chunk.in4.2"]
    assert loop.block is None
    assert not [s for s in inner_statements(loop.body) if isinstance(s, Compute) and s.node.kind == "bool" and "t.in16.2" in s.node.axes]
    assert all(b.axes.count("t.chunk.in4") == 0 for b in forward.buffers.values() if {"d", "e"} <= set(b.axes))
    for k in backward.kernels:  # where a step has a program of its own, no matrix meets the steps of its block again
        if any(a.startswith("t.in16") for a in k.grid):
            products = [s for s in inner_statements(k.body) if isinstance(s, Contract)]
            assert not any({"d", "e"} <= set(n.axes) for s in products for n in (s.lhs, s.rhs)), k.name
    for plan in (forward, backward):
        assert not any(".in4" in a for k in plan.kernels for a in k.tiled)
        printed = text(plan, problem, "float16")
        assert "t_chunk_in4" in printed
        assert "in4_size" not in printed
        assert "in4_origin" not in printed
