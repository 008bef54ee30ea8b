"""What a GPU program holds at once, and what is planned where that is too much."""

from __future__ import annotations

import math

import pytest
import torch

import weft
from tests.evidence import library
from weft.compiler import ir, plan
from weft.compiler.fit import HELD_LIMIT, REGISTERS
from weft.compiler.pipeline import Lowered
from weft.compiler.plan import Begin, Compute, Kernel, Load, Loop, Refinement, Store
from weft.compiler.pressure import pressure
from weft.runtime.problem import Usual, pose

A, B, C = (ir.make(ir.Input, ("i", "d"), "real", name) for name in "abc")
SIZES = {"i": 1000, "d": 20}
TILE = 16 * 32  # i by 16; d padded to 32


def kernel(*body: plan.Statement) -> Kernel:
    return Kernel("kernel", (), "i", {"i": 16}, ("d",), ("i", "d"), body, "")


def load(node: ir.Node) -> Load:
    return Load(node, "buffer", (), ())


def test_a_value_is_alive_until_it_is_last_read() -> None:
    total, twice = ir.pointwise("add", A, B), ir.pointwise("add", ir.pointwise("add", A, B), C)
    early = kernel(load(A), load(B), Compute(total), load(C), Compute(twice), Store("out", twice, ()))
    late = kernel(load(A), load(B), load(C), Compute(total), Compute(twice), Store("out", twice, ()))
    assert pressure(early, SIZES) == 3 * TILE
    assert pressure(late, SIZES) == 4 * TILE


def test_what_a_loop_reads_is_alive_in_all_of_it() -> None:
    acc = plan.local("acc", ("i", "d"))
    total = ir.pointwise("add", A, B)
    loop = Loop("j", None, ir.const(0), ir.const(9), (load(B), Compute(total), load(C), Compute(ir.pointwise("mul", total, C))), "")
    assert pressure(kernel(load(A), loop), SIZES) == 4 * TILE
    assert pressure(kernel(load(A), Begin(acc, "sum"), loop, Store("out", acc, ())), SIZES) == 5 * TILE


def lowered(name: str, target: str, **sizes: int) -> Lowered:
    found = library.kernel(name)
    posed = pose(found.graph, sizes, {}, Usual())
    return found.lowered(target, dtype=torch.float16, extents=posed.extents, params=posed.params)


PLANE = """
kernel plane(x[t,d], w[n,d,f], v[n,f,d]) -> y[t,d]:
    y = sum[n](sum[f](gelu(sum[d](x * w)) * v))
"""


def test_a_program_that_no_multiprocessor_holds_is_refused_with_a_reason() -> None:
    kernel = weft.loads(PLANE)["plane"]
    sizes = {"t": 2048, "d": 64, "n": 32, "f": 64}
    assert kernel.lowered("c", dtype=torch.float16, extents=sizes).forward is not None
    refused = kernel.lowered("sm_90", dtype=torch.float16, extents=sizes)
    assert refused.forward is None
    assert any(f"a multiprocessor has {REGISTERS} registers" in reason for reason in refused.reasons), refused.reasons


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_axes_that_all_results_have_get_programs_of_their_own(heads: int) -> None:
    """Rather than one program that holds every head of a gradient by head."""
    made = lowered("ssd", "sm_90", h=heads)
    kernels = made.backward(frozenset(made.differentiable)).kernels
    (by_head,) = [k for k in kernels if k.name.endswith("d_a_d_skip")]
    assert pressure(by_head, {"b": 1, "t": 2048, "h": heads, "p": 64, "n": 64}) <= HELD_LIMIT
    assert by_head.grid == ("h",)


def test_a_plan_is_refined_by_name() -> None:
    """Finer tiles, or a kernel for each half of the results; the other kernels stay as they are."""
    made = library.kernel("full")
    problem = pose(made.graph, {}, {}, Usual(feature=64))
    lowered = made.lowered("sm_80", dtype=torch.float16, extents=problem.extents, params=problem.params)
    usual = lowered.backward(frozenset(lowered.differentiable))
    assert usual.refined is not None
    kernels = {k.name: k for k in usual.kernels}
    finer = {k.name: k for k in usual.refined(Refinement(finer=(("backward_d_k_d_v", 1),))).kernels}
    assert finer.keys() == kernels.keys()
    assert [name for name, k in finer.items() if k.tiled != kernels[name].tiled] == ["backward_d_k_d_v"]
    assert math.prod(finer["backward_d_k_d_v"].tiled.values()) < math.prod(kernels["backward_d_k_d_v"].tiled.values())
    last = {k.name: k for k in usual.refined(Refinement(finer=(("backward_d_k_d_v", 1000),))).kernels}
    assert set(last["backward_d_k_d_v"].tiled.values()) == {16}
    apart = {k.name for k in usual.refined(Refinement(apart=frozenset(["backward_d_k_d_v"]))).kernels}
    assert apart == {*kernels, "backward_d_k", "backward_d_v"} - {"backward_d_k_d_v"}
