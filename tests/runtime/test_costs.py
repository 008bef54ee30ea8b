"""The counted cost of a plan against what the algorithm is known to cost."""

import pytest
import torch

from weft.runtime.costs import KernelCost, plan_cost, totals
from weft.runtime.library import find
from weft.runtime.load import only_kernel
from weft.runtime.problem import Usual, pose

T, D, H = 1024, 64, 2


def forward(name: str, params: dict[str, int] | None = None, length: int = T) -> list[KernelCost]:
    kernel = only_kernel(find(name))
    problem = pose(kernel.graph, {}, params or {}, Usual(length, D, H))
    plan = kernel.plan("forward", target="c", dtype=torch.float32, extents=problem.extents, params=problem.params)
    return plan_cost(plan, problem.extents, problem.params, "float32")


def test_full_attention_is_two_products_of_every_pair() -> None:
    assert totals(forward("full")).products == 2 * 2 * H * T * T * D


def test_a_causal_mask_halves_the_work_up_to_the_diagonal_tiles() -> None:
    causal, full = totals(forward("softmax_attention")), totals(forward("full"))
    assert 0.5 < causal.products / full.products < 0.6


def test_a_window_costs_linear_time() -> None:
    once, twice = totals(forward("sliding_window")), totals(forward("sliding_window", length=2 * T))
    assert twice.products == pytest.approx(2 * once.products, rel=0.1)


def test_a_window_in_two_dimensions_is_solved_in_both() -> None:
    narrow, wide = totals(forward("natten2d", {"window": 3})), totals(forward("natten2d", {"window": 15}))
    assert narrow.products < wide.products / 3


def test_queries_and_outputs_are_moved_once() -> None:
    (kernel,) = forward("full")
    assert kernel.cost.stored == H * T * (D + 1) * 4
    assert kernel.cost.loaded >= H * T * D * 4


def test_bounds_that_follow_from_data_are_said_to() -> None:
    assert not any(k.data_dependent for k in forward("sliding_window"))
    assert any(k.data_dependent for k in forward("prefix_lm"))


def test_sweeps_are_counted() -> None:
    assert max(k.sweeps.get("j", 0) for k in forward("softmax_attention")) == 1
    assert max(k.sweeps.get("j", 0) for k in forward("centred_relu")) == 2
