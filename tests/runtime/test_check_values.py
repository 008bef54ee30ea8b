"""The tensors of a case: values, strides, and what surrounds them."""

from __future__ import annotations

import random

import pytest
import torch

from weft.dsl.load import parse
from weft.runtime.check_noise import Nudged, amplification
from weft.runtime.check_shapes import Case
from weft.runtime.check_values import (
    LAYOUTS,
    SPIKES,
    broken_assumptions,
    dead_slices,
    draw_cotangents,
    lay_out,
    make_inputs,
    with_gradients,
    with_nan,
)

SPEC = parse("""
kernel gated(q[b,i,d], k[b,j,d], v[b,j,e], g[b,j], keep[b,j]: bool, scale[]: float32 = 1) -> o[b,i,e]:
    assume g <= 0
    sample g = -uniform(0.5, 1)
    mask keep
    s = scale * sum[d](q * k) + g
    o = sum[j](softmax[j](s) * v)
""")
KERNEL = SPEC.kernels[0]
SIZES = {"b": 2, "i": 4, "j": 6, "d": 3, "e": 5}
CPU = torch.device("cpu")


def inputs_of(**changes: object) -> dict[str, torch.Tensor]:
    return make_inputs(KERNEL, Case(SIZES, **changes), torch.float16, CPU).tensors  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [*LAYOUTS, "far", "mixed"])
def test_layouts_keep_shapes_dtypes_and_seed(layout: str) -> None:
    made, again = inputs_of(layout=layout, seed=5), inputs_of(layout=layout, seed=5)
    assert {n: t.dtype for n, t in made.items()} == dict.fromkeys("qkvg", torch.float16) | {"keep": torch.bool, "scale": torch.float32}
    for name, tensor in made.items():
        assert torch.equal(tensor, again[name])
        assert tensor.stride() == again[name].stride()
        assert layout == "expanded" or layout == "mixed" or torch.equal(tensor, inputs_of(seed=5)[name])


def test_layouts_are_what_they_say() -> None:
    tensor = torch.randn(3, 4, 5)
    chooser = random.Random(0)
    assert lay_out(tensor, "transposed", chooser).stride() == (1, 3, 12)
    assert 0 in lay_out(tensor, "expanded", chooser).stride()
    assert lay_out(tensor, "sliced", chooser).storage_offset() > 0
    assert lay_out(tensor, "gapped", chooser).stride(-1) == 2


def test_far_apart_reaches_beyond_32_bits() -> None:
    tensor = torch.randn(2, 3)
    far = lay_out(tensor, "far", random.Random(0))
    if far is tensor:
        pytest.skip("this machine does not give away 8 GiB of addresses")
    assert sum((n - 1) * s for n, s in zip(far.shape, far.stride(), strict=True)) > 2**31
    assert torch.equal(far, tensor)


@pytest.mark.parametrize("layout", ["sliced", "gapped"])
def test_neighbouring_memory_is_nan(layout: str) -> None:
    tensor = lay_out(torch.ones(3, 4), layout, random.Random(0))  # type: ignore[arg-type]
    memory = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    assert int(memory.isnan().sum()) == memory.numel() - 12 > 0


def test_special_values_leave_sampled_inputs_alone() -> None:
    plain, large = inputs_of(seed=2), inputs_of(seed=2, values="large")
    assert torch.equal(plain["g"], large["g"])
    assert torch.equal((plain["q"] * 8), large["q"])
    assert inputs_of(seed=2, values="tiny")["q"].abs().max() < 0.1
    assert set(inputs_of(seed=2, values="spiky")["v"][plain["v"] != inputs_of(seed=2, values="spiky")["v"]].tolist()) <= set(SPIKES)
    assert any(inputs_of(seed=s, values="spiky")["v"].abs().max() == 16 for s in range(20))


def test_empty_values_leave_rows_without_keys() -> None:
    rows = [inputs_of(seed=s, values="empty")["keep"].any(-1) for s in range(6)]
    assert not torch.stack(rows).all()


def test_special_values_that_break_an_assumption_are_not_used() -> None:
    spec = parse("kernel f(a[i], x[i]) -> o[i]:\n    assume a < 6\n    o = a * x\n")
    made = make_inputs(spec.kernels[0], Case({"i": 64}, values="large", seed=1), torch.float32, CPU)
    assert not broken_assumptions(spec.kernels[0], made, spec.text)
    assert float(made.tensors["a"].abs().max()) < 6


def test_samples_that_break_an_assumption_are_told() -> None:
    spec = parse("kernel f(a[i], x[i]) -> o[i]:\n    assume a >= 0\n    o = a * x\n")
    made = make_inputs(spec.kernels[0], Case({"i": 64}), torch.float32, CPU)
    assert broken_assumptions(spec.kernels[0], made, spec.text) == ["assume a >= 0"]


def test_omitted_inputs_are_left_out() -> None:
    assert "scale" not in inputs_of(omit=("scale",))


def test_gradients_are_asked_of_floats_and_strides_are_kept() -> None:
    inputs = make_inputs(KERNEL, Case(SIZES, layout="gapped"), torch.float32, CPU)
    leaves, names = with_gradients(inputs, KERNEL, None)
    assert names == ["q", "k", "v", "g", "scale"]
    assert all(leaves[n].is_leaf and leaves[n].requires_grad == (n in names) for n in leaves)
    assert leaves["q"].stride() == inputs.tensors["q"].stride()
    assert with_gradients(inputs, KERNEL, ("k",))[1] == ["k"]


def test_cotangents_are_the_same_numbers_in_every_dtype() -> None:
    half = draw_cotangents(KERNEL, SIZES, 3, torch.float16)["o"]
    assert half.shape == (2, 4, 5)
    assert torch.equal(half, draw_cotangents(KERNEL, SIZES, 3, torch.float32)["o"].half())


def test_dead_slices() -> None:
    gradient = torch.ones(2, 4, 3)
    gradient[:, 1] = 0
    gradient[0, 0, 0] = 0
    dead = dead_slices({"k": gradient, "q": torch.ones(3)})
    assert list(dead) == ["k"]
    assert bool(dead["k"][:, 1].all()) and int(dead["k"].sum()) == 6
    poisoned = with_nan(make_inputs(KERNEL, Case({**SIZES, "j": 4}), torch.float32, CPU), dead).tensors["k"]
    assert torch.equal(~poisoned.isfinite(), dead["k"])


def test_conditioning_is_measured_through_forward_and_backward() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def cancelled() -> torch.Tensor:
        return ((x * 3 - x * 2) - x * 1).sum() * 0 + (x * 1e6 - x * (1e6 - 1)).square().sum()

    (exact,) = torch.autograd.grad(cancelled(), x)
    with Nudged(0, partial_sums=False):
        (nudged,) = torch.autograd.grad(cancelled(), x)
    rms, largest = amplification(exact, nudged)
    assert 1e5 < rms < largest < 1e14
    assert amplification(exact, exact) == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["of one sign", "half cancelled", "of both signs"])
def test_conditioning_of_sums_counts_their_partial_sums(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 100, generator=generator, dtype=torch.float64)
    b = {"of one sign": a, "half cancelled": a, "of both signs": torch.randn(8, 100, generator=generator, dtype=torch.float64)}[kind]
    if kind == "half cancelled":
        a, b = torch.cat([a, a[:, ::2]], dim=1), torch.cat([a, -a[:, ::2]], dim=1)
    partial_sums = (a * b).cumsum(1).square().sum(1).mean().sqrt()

    def moved(partial_sums: bool) -> float:
        with Nudged(0, partial_sums=partial_sums):
            nudged = torch.mm(a, b.T)
        return amplification(torch.mm(a, b.T).diag(), nudged.diag())[0]

    assert moved(False) < 1.5 * float(torch.mm(a, b.T).diag().square().mean().sqrt())
    assert 0.5 < moved(True) / float(partial_sums) < 2
