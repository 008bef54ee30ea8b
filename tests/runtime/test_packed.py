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


def refused(name: str, axis: str, why: str) -> None:
    made = kernel(name)
    inputs = pose(made.graph, {}, {}, Usual(16, 8, 2, 1)).inputs()
    with pytest.raises(errors.NotSupported, match=why):
        made(**inputs, cu_seqlens={axis: torch.tensor([0, 16])})


def test_what_no_step_knows_is_refused() -> None:
    refused("full", "i", "where no state goes")
    refused("short_conv", "t", "where")
    refused("abc", "t", "where other steps are read")
    refused("ssd", "t", "where an output lacks that axis")


@pytest.mark.parametrize("bounds", [[0, 3], [1, 7], [0, 5, 4, 7], []])
def test_bounds_that_are_none(bounds: list[int]) -> None:
    x = torch.randn(1, 7, 4)
    with pytest.raises(errors.BadSequences, match=r"hgrn: cu_seqlens\['t'\] .*Write cu_seqlens="):
        kernel("hgrn")(x, -x.abs(), cu_seqlens={"t": torch.tensor(bounds, dtype=torch.int64)})
    with pytest.raises(compiler_errors.UnknownAxis):
        kernel("hgrn")(x, -x.abs(), cu_seqlens={"z": torch.tensor([0, 7])})


def test_states_do_not_go_in_or_out_yet() -> None:
    x = torch.randn(1, 7, 4)
    with pytest.raises(errors.NotSupported, match="states that go into or come out of packed sequences"):
        kernel("hgrn")(x, -x.abs(), cu_seqlens={"t": torch.tensor([0, 7])}, return_final=True)
