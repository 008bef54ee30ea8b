"""What plans come to: the algorithms an expert would write, checked by their shape, not by their text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.evidence.library import REQUIRED, kernel
from weft.compiler import ir
from weft.compiler.fit import multiplies
from weft.compiler.pipeline import Hints, Lowered, Target, lower
from weft.compiler.plan import Accumulate, Begin, Compute, Contract, Fold, Kernel, Loop, Plan, Statement, inner_statements
from weft.compiler.tasks import NotFused
from weft.compiler.verify import verify
from weft.runtime.problem import Usual, pose


def _lowered(name: str, target: str = "c") -> Lowered:
    made = kernel(name)
    params = tuple((p.name, p.default) for p in made.typed.params if isinstance(p.default, int))
    return lower(made.graph, Target(target), Hints(params))


def _forward(name: str, target: str = "c") -> Plan:
    plan = _lowered(name, target).forward
    assert plan is not None
    return plan


def _backward(name: str, target: str = "c") -> Plan:
    lowered = _lowered(name, target)
    return lowered.backward(frozenset(lowered.differentiable))


def _sweeping(plan: Plan) -> list[Kernel]:
    return [k for k in plan.kernels if any(isinstance(s, Loop) for s in k.body)]


def _products(statements: list[Statement]) -> int:
    return sum(isinstance(s, Contract) or (isinstance(s, Accumulate) and s.rhs is not None) for s in statements)


@pytest.mark.parametrize("name", ["softmax_attention", "full", "alibi", "kitchen_sink", "attention_entropy"])
def test_softmax_is_one_sweep_in_one_kernel(name: str) -> None:
    assert len(_forward(name).kernels) == 1


def test_the_backward_of_softmax_needs_no_sweep_for_its_row_statistic() -> None:
    """delta = d_o . o by contraction exchange: the only kernels that sweep make gradients."""
    cpu = _sweeping(_backward("full"))
    assert len(cpu) == 1, "on a CPU one program owns a head and adds dq in place"
    gpu = _sweeping(_backward("full", "sm_90"))
    assert len(gpu) == 2


def test_owning_a_head_saves_two_of_seven_matrix_products() -> None:
    def products(plan: Plan) -> int:
        total = 0
        for k in _sweeping(plan):
            (loop,) = [s for s in k.body if isinstance(s, Loop) and s.note.startswith("full")]
            total += _products(inner_statements(loop.body))
        return total

    assert products(_backward("full")) == 5
    assert products(_backward("full", "sm_90")) == 7


@pytest.mark.parametrize("name", ["softmax_attention", "sliding_window", "alibi", "prefix_lm"])
def test_full_tiles_have_no_mask(name: str) -> None:
    for plan in (_forward(name), _backward(name)):
        full = [s for k in plan.kernels for s in inner_statements(k.body) if isinstance(s, Loop) and s.note.startswith("full")]
        assert full
        for loop in full:
            conditions = [s for s in inner_statements(loop.body) if isinstance(s, Compute) and s.node.kind == "bool"]
            assert not conditions


@pytest.mark.parametrize("name", REQUIRED)
def test_nothing_with_query_and_key_axes_is_stored(name: str) -> None:
    """Memory beyond inputs and outputs grows with the length, not with its square."""
    given = [set(t.axes) for t in (*kernel(name).typed.inputs, *kernel(name).typed.outputs)]
    tables = {a for n in ir.topological(kernel(name).graph.outputs.values()) if isinstance(n, ir.Read) for a, _ in n.at}
    for plan in (_forward(name), _backward(name)):
        whole = {a for k in plan.kernels for a in k.whole}
        for buffer in plan.buffers.values():
            if buffer.role in ("saved", "temporary") and name != "maxsim":
                axes = set(buffer.axes) - tables
                # or as large as a given tensor, with keys instead of queries: the share of a head in a sum over heads
                shares = (axes - {a} | {b} == g for g in given for a in axes - g - whole for b in g - axes - whole)
                assert any(axes <= g for g in given) or any(shares), f"{buffer.name} over {buffer.axes}"


def test_sums_in_place_begin_in_memory() -> None:
    (owner,) = _sweeping(_backward("full"))
    assert owner.owner
    assert [s.buffer for s in inner_statements(owner.body) if isinstance(s, Begin) and s.buffer] == ["d_q"]


def test_a_key_that_heads_share_is_summed_from_the_shares_of_heads() -> None:
    """The scores are computed in one kernel, which keeps the heads; what sums over heads reads what they stored."""
    sweeps = [k for k in _backward("mla_full").kernels if "sweeps i" in k.note]
    assert [k.owner for k in sweeps] == [True]
    assert "h" in sweeps[0].grid


@pytest.mark.parametrize(("name", "scaled"), [("shaped", "d_q"), ("hierarchical", "d_q"), ("fastgen", "")])
def test_sums_that_another_kernel_can_make_are_taken_along(name: str, scaled: str) -> None:
    """Where more is to be done with a sum of rows, it is stored, and a kernel without a sweep does the rest."""
    kernels = _backward(name).kernels
    assert any(k.owner for k in kernels)
    if scaled:
        (last,) = [k for k in kernels if k.name.endswith(scaled)]
        assert "sweeps" not in last.note


@pytest.mark.parametrize("name", ["tree", "document_mask", "global_window"])
def test_whole_tiles_of_masks_without_a_range_have_no_mask(name: str) -> None:
    for plan in (_forward(name), _backward(name)):
        loops = [s for k in plan.kernels for s in inner_statements(k.body) if isinstance(s, Loop) and s.note.startswith("if all")]
        assert loops
        for loop in loops:
            assert not [s for s in inner_statements(loop.body) if isinstance(s, Compute) and s.node.kind == "bool"]


def test_a_sum_over_one_tile_is_not_taken_for_the_whole_sum() -> None:
    """The verifier refuses a kernel that folds an axis of which it holds a tile; bounds of a mask's data may be folded so."""
    plan = _forward("full")
    (made,) = plan.kernels
    assert made.rows is not None
    tile = ir.make(ir.Input, (made.rows,), "real", "tile")
    for op, refused in (("sum", True), ("max", False)):
        fold = Fold(ir.reduce(op, [made.rows], tile), op, tile, (made.rows,))
        plan.kernels[:] = [replace(made, body=(*made.body, fold))]
        if refused:
            with pytest.raises(NotFused, match="a sum over a tile"):
                verify(plan)
        else:
            verify(plan)


def test_a_total_that_every_sequence_has_is_not_summed_over_the_sequences_of_a_program() -> None:
    """A tile of sequences keeps its totals apart where their sum is another kernel's. The verifier refuses what adds them up for each."""
    plan = _backward("gru", "sm_90")
    kept = [(k, s) for k in plan.kernels for s in inner_statements(k.body) if isinstance(s, Accumulate) and k.rows in s.local.axes]
    assert kept and all(k.rows not in s.over for k, s in kept)
    made, total = kept[0]
    assert made.rows is not None
    plan.kernels[:] = [replace(made, body=(*made.body, replace(total, over=(made.rows,))))]
    with pytest.raises(NotFused, match="to every part of that sum"):
        verify(plan)


def test_a_row_statistic_stored_as_its_reciprocal_is_read_where_it_stands_in_a_quotient() -> None:
    made = kernel("hedgehog")
    sizes = {"b": 2, "h": 2, "i": 65, "d": 16, "j": 65, "e": 16, "f": 8}
    backward = lower(made.graph, Target("c"), Hints((), tuple(sizes.items()))).backward(frozenset(["v"]))
    sums = [s for k in backward.kernels for s in inner_statements(k.body) if isinstance(s, Fold) and s.op == "sum"]
    assert backward.kernels and not any("j" in s.over or "i" in s.over for s in sums)


def test_a_matrix_product_beside_a_sum_that_is_too_large_for_tiles_keeps_its_own() -> None:
    """The rows of ``multi_lora`` gather matrices of adapters, one row a program; the weights that all rows share do not."""
    made = kernel("multi_lora")
    problem = pose(made.graph, {}, {}, Usual(feature=64))
    plan = made.lowered("sm_90", dtype=torch.float16, extents=problem.extents, params=problem.params).forward
    assert plan is not None
    shared, gathered = plan.kernels
    assert (shared.rows, shared.tiled) == ("t", {"t": 64, "d": 32})
    assert multiplies(shared)
    assert gathered.rows is None
