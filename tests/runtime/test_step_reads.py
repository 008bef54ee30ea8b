"""Steps that read, scan or choose along axes of what they make of their states run in generated kernels, in both directions."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.runtime.step_reads import STEP_READS
from weft.runtime.check import check_kernel, render


@pytest.mark.parametrize("name", STEP_READS)
def test_kernels_agree_with_the_reference(name: str) -> None:
    report = check_kernel(weft.loads(STEP_READS[name]).a, backend="c", trials=3, quick=True, strict=True)
    assert report.passed, render(report)


def test_gates_of_one_tensor_are_the_products_of_an_lstm() -> None:
    """A read of a gate reads the weights: four products of matrices, and no sum over gates."""
    made = weft.loads(STEP_READS["gates of one tensor"]).a
    plan = str(made.lowered("c").forward)
    assert plan.count("sum[m]") == 4
    assert "g.read" not in plan


def test_the_gradient_of_weights_of_several_gates_is_one_product_for_each() -> None:
    made = weft.loads(STEP_READS["gates of one tensor"]).a
    plan = made.lowered("c").backward(frozenset({"w"}))
    (kernel,) = [k for k in plan.kernels if k.name == "backward_d_w"]
    assert "g" in kernel.grid and kernel.rows in ("m", "n")
    assert str(plan).split("kernel backward_d_w")[1].count("sum[t]") == 2  # of full tiles, and of the tail


SQUARES = '''"""Weights at several places: each meets another power of the same value."""

kernel a(x[b,t,n], w[g,n]) -> y[b,t,n]:
    axis g = 3
    y = sin(x * x * w[g -> 0]) + cos(x * w[g -> 1]) * x + exp(-x * x) * w[g -> 2] * x
'''


def test_what_gradients_at_several_places_share_counts_as_often_as_each_has_it() -> None:
    report = check_kernel(weft.loads(SQUARES).a, backend="c", trials=2, quick=True, strict=True)
    assert report.passed, render(report)


def test_an_lstm_with_gates_of_one_tensor_is_the_one_with_four() -> None:
    torch.manual_seed(0)
    rnn = torch.nn.LSTM(12, 12, batch_first=True, bias=False)
    x = torch.randn(2, 9, 12)
    expected = rnn(x)[0]
    weight = rnn.weight_hh_l0.detach().unflatten(0, (4, 12))[[0, 1, 3, 2]].permute(2, 0, 1)  # torch: i, f, g, o
    given = (x @ rnn.weight_ih_l0.T).unflatten(-1, (4, 12))[:, :, [0, 1, 3, 2]]
    found = weft.loads(STEP_READS["gates of one tensor"]).a(given.detach(), weight, strict=True)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_states_go_in_and_come_out() -> None:
    made = weft.loads(STEP_READS["tape"]).a
    torch.manual_seed(0)
    inputs = [torch.randn(2, 8, *rest) for rest in ((5,), (), (3,), (5,), (5,))]
    whole = made(*inputs, strict=True)
    first, states = made(*[t[:, :3] for t in inputs], return_final=True, strict=True)
    second = made(*[t[:, 3:] for t in inputs], initial=states, strict=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
