"""Recurrences with weights when there is one program: threads share out the units of a step (``codegen/c_shared.py``)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from tests.evidence.library import kernel
from weft.runtime import generated
from weft.runtime.problem import Usual, pose

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weft.runtime.kernel import Kernel
    from weft.runtime.problem import Problem

SHARED = {"lstm_np": 192, "lstm": 192, "lstm_fgr": 192, "lstm_coupled": 192, "gru": 192, "gru_torch": 192, "slstm": 192, "rnn": 320}
"""Units with which a step has enough to do."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _posed(made: Kernel, units: int, batch: int, steps: int = 11) -> Problem:
    return pose(made.graph, {}, {}, Usual(length=steps, feature=units, heads=1, batch=batch))


def _tensors(made: Kernel, problem: Problem) -> list[Tensor]:
    """Inputs, weights scaled by the number of units that they sum."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for t in made.typed.inputs:
        x = torch.randn(problem.shape(t.name), generator=generator)
        found.append(x / x.shape[-2] ** 0.5 if "t" not in t.axes and x.dim() > 1 else x)
    return found


def _both(made: Kernel, given: list[Tensor], threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    inputs = [x.clone().requires_grad_() for x in given]
    result = made(*inputs, strict=True)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    total = sum((y * torch.arange(1.0, y.numel() + 1).reshape(y.shape).cos()).sum() for y in outputs)
    assert isinstance(total, Tensor)
    return [y.detach() for y in outputs] + list(torch.autograd.grad(total, inputs))


def _sources(made: Kernel, problem: Problem) -> list[str]:
    variant = generated.usual_variant(made, "c", torch.float32, problem.extents, problem.params)
    return [generated.record_of(variant, part).text for part in generated.directions(variant)]


@pytest.mark.parametrize("name", SHARED)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    """Bit by bit, for one row and several, of one program and of more than there are threads; and they agree with the reference."""
    made = kernel(name)
    for text in _sources(made, _posed(made, SHARED[name], 1)):
        assert "#pragma omp parallel num_threads(members)" in text
    for batch in (1, 3, 20):
        given = _tensors(made, _posed(made, SHARED[name], batch))
        alone = _both(made, given, 1)
        for threads in (2, 3):
            for x, y in zip(alone, _both(made, given, threads), strict=True):
                assert torch.equal(x, y)
        expected = made.reference(*(x.double() for x in given))
        for x, y in zip(alone, [expected] if isinstance(expected, Tensor) else list(expected), strict=False):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_again_and_again() -> None:
    """What one thread wrote while another still read it would show sooner or later."""
    made = kernel("lstm_np")
    given = _tensors(made, _posed(made, 256, 1, steps=64))
    expected = _both(made, given, 1)
    for _ in range(30):
        assert all(torch.equal(x, y) for x, y in zip(expected, _both(made, given, 4), strict=True))


def test_threads_wait_before_they_read_what_others_wrote() -> None:
    """Twice in a step of an LSTM: for the old output, and before it is overwritten."""
    made = kernel("lstm_np")
    forward = _sources(made, _posed(made, 256, 1))[0]
    function = forward[forward.index("_shared(") : forward.index("\n}\n", forward.index("_shared("))]
    loop = function[function.index("for (int t = 0") :]
    events = re.findall(r"omp barrier|product\(|y\[b\]\[n\] =|value\[b\]\[m\] =", loop)
    assert events[:2] == ["value[b][m] =", "omp barrier"]
    assert events[2:6] == ["product("] * 4
    assert events[6:8] == ["y[b][n] =", "omp barrier"]


@pytest.mark.parametrize(("name", "units"), [("lstm_np", 128), ("gru_torch", 128), ("lstm_np", 200), ("simple_gla", 128)])
def test_little_work_is_not_shared(name: str, units: int) -> None:
    """Too few weights to be worth the waiting, or units that are no whole vectors."""
    made = kernel(name)
    assert all("num_threads(members)" not in text for text in _sources(made, _posed(made, units, 1)))


@pytest.mark.parametrize("name", ["lstm_np", "lstm", "rnn"])
def test_gradients_of_more_weights_than_a_tile_holds(name: str) -> None:
    """Products of whole tiles, as with fewer: no loop goes through the units one by one."""
    made = kernel(name)
    problem = _posed(made, 300, 3, steps=70)
    backward = _sources(made, problem)[1]
    kernels = [text for text in backward.split("\nvoid ")[1:] if "every t" not in text]
    assert any("product_ahead(" in text for text in kernels)
    assert all("for (int n = 0; n < 300; n++)\n        for (int m_start" not in text for text in kernels)
    given = _tensors(made, problem)
    found = _both(made, given, 2)
    inputs = [x.double().requires_grad_() for x in given]
    result = made.reference(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    total = sum((y * torch.arange(1.0, y.numel() + 1).reshape(y.shape).cos().double()).sum() for y in outputs)
    assert isinstance(total, Tensor)
    for x, y in zip(found[len(outputs) :], torch.autograd.grad(total, inputs), strict=True):
        assert (x.double() - y).abs().max() < 1e-4 * y.abs().max()
