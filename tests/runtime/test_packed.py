"""Sequences packed along the time axis of a recurrence: what the kernel gives for each of them by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import weft
from tests.evidence.library import kernel
from weft.compiler import errors as compiler_errors
from weft.runtime import errors
from weft.runtime.problem import Usual, pose

NAMES = tuple(
    "linear_attn simple_gla gla hgrn hgrn2 selective_scan rwkv4 rwkv6 rwkv7 gated_delta gdn2 iplr comba "
    "momentum_delta mlstm lstm_np gru min_gru min_lstm rg_lru rnn gsa titans".split()
)
BOUNDS = [0, 1, 34, 34, 66, 70]
"""One step, more than a segment of checkpoints, none, 32 and 4."""


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_each_by_itself(name: str, backend: str) -> None:
    made = kernel(name)
    posed = pose(made.graph, {}, {}, Usual(70, 8, 2, 1))
    leaves = {n: x.clone().requires_grad_() for n, x in posed.inputs(seed=5).items()}
    axes = {t.name: t.axes for t in (*made.typed.inputs, *made.typed.outputs)}
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    got = made(**leaves, cu_seqlens={"t": bounds}, backend=backend, strict=backend == "c")
    parts = []
    for start, stop in pairwise(BOUNDS):
        if start < stop:
            one = {n: x.narrow(axes[n].index("t"), start, stop - start) if "t" in axes[n] else x for n, x in leaves.items()}
            parts.append(made.reference(**one))
    several = isinstance(got, tuple)
    for number, output in enumerate(made.output_names):
        found = got[number] if several else got
        want = torch.cat([p[number] if several else p for p in parts], axes[output].index("t"))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.detach().abs().max())))
        if number == 0:
            cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
            grads = [torch.autograd.grad(o, [*leaves.values()], cotangent, retain_graph=True, allow_unused=True) for o in (found, want)]
            for n, a, b in zip(leaves, *grads, strict=True):
                if b is not None:
                    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4 * float(b.abs().max()) + 1e-7, msg=lambda m, n=n: f"{n}: {m}")


def test_masked_first_steps_and_initial_values() -> None:
    text = "kernel spec(x[t], m[t]: bool) -> o[t]:\n    mask m\n    state s[] = 3 along t\n    s <- s / 2 + x\n    o = s\n"
    made = weft.loads(text).spec
    x, m = torch.randn(9), torch.tensor([True, False, True, False, False, True, True, False, True])
    bounds = [0, 3, 7, 9]
    want = torch.cat([made.reference(x[a:b], m[a:b]) for a, b in pairwise(bounds)])
    for backend in ("c", "reference"):
        torch.testing.assert_close(made(x, m, cu_seqlens={"t": torch.tensor(bounds)}, backend=backend), want)


ONE_BY_ONE = tuple("delta_rule ssd kda abc gated_delta_product".split())
"""They look at other steps, know how many there are, have outputs without a time axis, or states along two axes."""


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("name", [*ONE_BY_ONE, "gla", "mlstm", "lstm_np", "rg_lru"])
def test_states_go_in_and_out_of_every_sequence(name: str, backend: str) -> None:
    made = kernel(name)
    posed = pose(made.graph, {}, {}, Usual(BOUNDS[-1], 8, 2, 1))
    count = len(BOUNDS) - 1
    torch.manual_seed(7)
    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in posed.inputs(seed=5).items()}
    starts = {
        s.name: torch.rand([count, *(posed.extents[a] for a in s.axes)]).requires_grad_()
        for s in made.graph.states.values()
        if s.name in made.states
    }
    got, final = made(**leaves, cu_seqlens={"t": torch.tensor(BOUNDS)}, initial=starts, return_final=True, backend=backend)
    dims = {t.name: t.dims for t in (*made.typed.inputs, *made.typed.outputs)}
    place = {n: next((k for k, d in enumerate(own) if "t" in d), None) for n, own in dims.items()}
    parts, ends = [], []
    for number, (start, stop) in enumerate(pairwise(BOUNDS)):
        one = dict(leaves)
        for n, k in place.items():
            if n in leaves and k is not None:
                step = leaves[n].shape[k] // BOUNDS[-1]
                one[n] = leaves[n].narrow(k, start * step, (stop - start) * step)
        out, end = made.reference(**one, initial={n: x[number] for n, x in starts.items()}, return_final=True)
        parts.append(out if isinstance(out, tuple) else (out,))
        ends.append(end)
    found = [*(got if isinstance(got, tuple) else (got,)), *final.values()]
    want = [
        torch.stack(xs) if place[n] is None else torch.cat(xs, place[n])
        for n, xs in zip(made.output_names, map(list, zip(*parts, strict=True)), strict=True)
    ]
    want += [torch.stack([end[n] for end in ends]) for n in made.states]
    assert [tuple(x.shape) for x in found] == [tuple(x.shape) for x in want]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.detach().abs().max())))
    wanted = [x for x in (*leaves.values(), *starts.values()) if x.requires_grad]
    cotangents = [torch.randn(x.shape) for x in want]
    for a, b in zip(*(torch.autograd.grad(xs, wanted, cotangents, allow_unused=True) for xs in (found, want)), strict=True):
        if b is not None:
            assert a is not None
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4 * float(b.abs().max()) + 1e-7)


def test_only_states_make_a_sequence() -> None:
    for name, axis, why in (
        ("full", "i", "no state goes"),
        ("short_conv", "t", "no state goes"),
        ("log_linear", "t", "steps are read by the position along i,"),
    ):
        made = kernel(name)
        inputs = pose(made.graph, {}, {}, Usual(16, 8, 2, 1)).inputs()
        with pytest.raises(errors.NotSupported, match=f"where {why}"):
            made(**inputs, cu_seqlens={axis: torch.tensor([0, 16])})


def test_what_does_not_fit_is_not_cut() -> None:
    x = torch.randn(1, 7, 4)
    with pytest.raises(compiler_errors.ExtentMismatch):
        kernel("hgrn")(x, torch.zeros(1, 8, 4), cu_seqlens={"t": torch.tensor([0, 3, 7])}, return_final=True)
    text = "kernel spec(x[(u t)]) -> o[(u t)]:\n    axis u = 2\n    state s[u] along t\n    s <- s / 2 + x\n    o = s\n"
    with pytest.raises(errors.NotSupported, match="it is not the first axis of a dimension"):
        weft.loads(text).spec(torch.ones(8), cu_seqlens={"t": torch.tensor([0, 1, 4])}, return_final=True)


def test_states_that_grow_do_not_come_out() -> None:
    made = kernel("deltaformer")
    inputs = pose(made.graph, {}, {}, Usual(7, 8, 2, 1)).inputs()
    with pytest.raises(errors.NotSupported, match="where a state has a value for every step"):
        made(**inputs, cu_seqlens={"t": torch.tensor([0, 3, 7])}, return_final=True)


def test_no_sequence_at_all() -> None:
    x = torch.randn(1, 0, 4)
    h, final = kernel("hgrn")(x, x, cu_seqlens={"t": torch.tensor([0])}, return_final=True)
    assert h.shape == (1, 0, 4) and final["h"].shape == (0, 1, 4)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 7], [0, 5, 4, 7], []])
def test_bounds_that_are_none(bounds: list[int]) -> None:
    x = torch.randn(1, 7, 4)
    with pytest.raises(errors.BadSequences, match=r"hgrn: cu_seqlens\['t'\] .*Write cu_seqlens="):
        kernel("hgrn")(x, -x.abs(), cu_seqlens={"t": torch.tensor(bounds, dtype=torch.int64)})
    with pytest.raises(compiler_errors.UnknownAxis):
        kernel("hgrn")(x, -x.abs(), cu_seqlens={"z": torch.tensor([0, 7])})


@pytest.mark.parametrize("value", [torch.zeros(3, 1, 4), torch.tensor(0.0), None])
def test_initial_values_are_one_for_each_sequence(value: object) -> None:
    x = torch.randn(1, 7, 4)
    with pytest.raises(errors.BadInitial, match=r"initial\['h'\] of packed sequences has them as its first dimension, here 2, not"):
        kernel("hgrn")(x, -x.abs(), cu_seqlens={"t": torch.tensor([0, 3, 7])}, initial={"h": value})
