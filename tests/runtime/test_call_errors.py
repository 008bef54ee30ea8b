"""Every kind of bad call: the class, and the whole message, which says what is wrong, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import weft
from weft.runtime import errors

TEXT = """
kernel attend(q[b,(g r),i,d], k[b,g,j,d], v[b,g,j,e], keep[b,j]: bool, doc[i]: int = 0, bias[j] = 0) -> o[b,(g r),i,e]:
    param scale: float = 1.0
    param window: int = 4
    param causal: bool = true
    mask 0 <= i - j + window or not causal
    mask keep
    mask doc >= 0
    o = sum[j](softmax[j](scale * sum[d](q * k) + bias) * v)

kernel decay(x[b,t,c], g[b,t]) -> y[b,t,c]:
    state S[b,c] along t
    S <- exp(g) * S + x
    y = S

kernel blocks(x[(m n)]) -> y[m]:
    param inner: int
    axis n = inner
    y = sum[n](x)

kernel half(x[n]: float16) -> y[n]:
    y = 2 * x

kernel running(x[b,t]) -> y[b,t]:
    y = cumsum[t, exclusive](x)
"""

KERNELS = weft.loads(TEXT, name="bad_calls.weft")
attend, decay, blocks, half, running = KERNELS


def q() -> torch.Tensor:
    return torch.randn(2, 4, 5, 8)


def k() -> torch.Tensor:
    return torch.randn(2, 2, 6, 8)


def v() -> torch.Tensor:
    return torch.randn(2, 2, 6, 3)


def keep() -> torch.Tensor:
    return torch.ones(2, 6, dtype=torch.bool)


Case = tuple[Callable[[], Any], type[Exception], str]

CASES: dict[str, Case] = {
    "missing input": (
        lambda: attend(q(), k(), v()),
        errors.MissingInput,
        "attend: input 'keep' is missing and has no default. Pass a tensor for 'keep'.",
    ),
    "too many inputs": (
        lambda: half(q(), 3),
        errors.TooManyInputs,
        "half: 2 tensors were passed but the inputs are x (1). Pass params by keyword.",
    ),
    "input given twice": (
        lambda: attend(q(), k(), v(), keep(), k=k()),
        errors.InputGivenTwice,
        "attend: input 'k' is passed twice, as tensor number 2 and by name. Pass it once.",
    ),
    "unknown keyword": (
        lambda: attend(q(), k(), v(), keep(), windw=3),
        errors.UnknownKeyword,
        "attend: there is no input or param 'windw'. did you mean `window`? It has the inputs q, k, v, keep, doc, bias and the params "
        "scale, window, causal.",
    ),
    "not a tensor": (
        lambda: attend(q(), k(), [1.0], keep()),
        errors.NotATensor,
        "attend: 'v' must be a tensor, not list. Pass torch.as_tensor(...).",
    ),
    "rank": (
        lambda: attend(q()[0], k(), v(), keep()),
        errors.RankMismatch,
        "attend: 'q' has shape [4, 5, 8] but is declared q[b,(g r),i,d]: 4 dimensions. "
        "Pass a tensor with 4 dimensions, or change the declaration.",
    ),
    "extent": (
        lambda: attend(q(), k(), v()[:, :, 1:], keep()),
        errors.ExtentMismatch,
        "attend: axis 'j' is 6 in 'k' but 5 in 'v'. The same name means the same extent: make them equal, or give one of the axes "
        "another name in the spec.",
    ),
    "split": (
        lambda: attend(q()[:, :3], k(), v(), keep()),
        errors.SplitNotDivisible,
        "attend: dimension (g r) of 'q' has extent 3, which is not divisible by g=2 = 2. Pass a multiple of 2, or another extent for g=2.",
    ),
    "split by a param": (
        lambda: blocks(torch.ones(7), inner=2),
        errors.SplitNotDivisible,
        "blocks: dimension (m n) of 'x' has extent 7, which is not divisible by n=2 = 2. Pass a multiple of 2, or another extent for n=2.",
    ),
    "negative axis": (
        lambda: blocks(torch.ones(6), inner=-2),
        errors.NegativeExtent,
        "blocks: 'axis n' has the extent -2, which is negative. Change what it is computed from (inner).",
    ),
    "unknown size": (
        lambda: blocks(torch.ones(6), inner=2, sizes={"z": 2}),
        errors.UnknownAxis,
        "blocks: there is no axis 'z'. The axes are m, n.",
    ),
    "bad size": (
        lambda: blocks(torch.ones(6), inner=2, sizes={"n": 1.5}),
        errors.BadExtent,
        "blocks: the extent of axis 'n' must be an int of at least 0, not 1.5. Pass another size.",
    ),
    "contradicting size": (
        lambda: blocks(torch.ones(6), inner=2, sizes={"m": 2}),
        errors.SplitMismatch,
        "blocks: dimension (m n) of 'x' has extent 6 but m=2 * n=2 = 4. Pass a tensor whose extent there is 4.",
    ),
    "sizes is no dict": (
        lambda: blocks(torch.ones(6), inner=2, sizes=3),
        errors.BadOption,
        "blocks: sizes= takes a dict of axis names and ints, not int. Write sizes={'m': 4}.",
    ),
    "int where float is wanted": (
        lambda: attend(q().long(), k(), v(), keep()),
        errors.WrongDtype,
        "attend: 'q' has dtype int64 but a floating dtype is wanted. Convert it with q.float(), or declare q[b,(g r),i,d]: int.",
    ),
    "bool where float is wanted": (
        lambda: attend(q(), k(), v(), keep(), bias=torch.ones(6, dtype=torch.bool)),
        errors.WrongDtype,
        "attend: 'bias' has dtype bool but a floating dtype is wanted. Convert it with bias.float(), or declare bias[j]: bool.",
    ),
    "complex": (
        lambda: attend(q().to(torch.complex64), k(), v(), keep()),
        errors.WrongDtype,
        "attend: 'q' has dtype complex64 but a floating dtype is wanted. Pass real and imaginary part as torch.view_as_real(q), "
        "with an axis for the two.",
    ),
    "float8": (
        lambda: attend(q(), k().to(torch.float8_e4m3fn), v(), keep()),
        errors.WrongDtype,
        "attend: 'k' has dtype float8_e4m3fn but a floating dtype is wanted. Convert it with k.float().",
    ),
    "float where bool is wanted": (
        lambda: attend(q(), k(), v(), keep().float()),
        errors.WrongDtype,
        "attend: 'keep' has dtype float32 but bool is wanted. Write the condition, as in keep != 0.",
    ),
    "float where int is wanted": (
        lambda: attend(q(), k(), v(), keep(), torch.ones(5)),
        errors.WrongDtype,
        "attend: 'doc' has dtype float32 but an integer dtype is wanted. Convert it with doc.long().",
    ),
    "another declared dtype": (
        lambda: half(torch.ones(3)),
        errors.WrongDtype,
        "half: 'x' has dtype float32 but float16 is wanted. Convert it with x.to(torch.float16).",
    ),
    "sparse": (
        lambda: half(torch.ones(3, dtype=torch.float16).to_sparse()),
        errors.UnsupportedLayout,
        "half: 'x' is a sparse tensor, and kernels read strided memory. Pass x.to_dense().",
    ),
    "nested": (
        lambda: half(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
        errors.UnsupportedLayout,
        "half: 'x' is a nested tensor, and kernels read strided memory. Pass x.to_padded_tensor(0.0).",
    ),
    "meta": (
        lambda: attend(q().to("meta"), k(), v(), keep()),
        errors.MetaInput,
        "attend: 'q' is on the meta device and holds no numbers. Pass a tensor with data, or work out shapes under "
        "torch._subclasses.FakeTensorMode.",
    ),
    "missing param": (
        lambda: blocks(torch.ones(6)),
        errors.MissingParam,
        "blocks: param 'inner' is missing and has no default. Pass inner=..., one int.",
    ),
    "wrong param": (
        lambda: attend(q(), k(), v(), keep(), window=2.5),
        errors.WrongParamType,
        "attend: param 'window' is an int, not 2.5 (float). Pass an int.",
    ),
    "tensor as param": (
        lambda: half(torch.ones(3, dtype=torch.float16), y=torch.ones(3)),
        errors.UnknownKeyword,
        "half: there is no input or param 'y'. It has the inputs x.",
    ),
    "bad origin": (
        lambda: attend(q(), k(), v(), keep(), origin={"i": 0.5}),
        errors.BadOrigin,
        "attend: the origin of axis 'i' must be an int, not 0.5. Pass the position of its first element, as in origin={'i': 100}.",
    ),
    "unknown origin": (
        lambda: attend(q(), k(), v(), keep(), origin={"t": 5}),
        errors.UnknownAxis,
        "attend: there is no axis 't'. The axes are b, d, e, g, i, j, r.",
    ),
    "origin is no dict": (
        lambda: attend(q(), k(), v(), keep(), origin=5),
        errors.BadOption,
        "attend: origin= takes a dict of axis names and ints, not int. Write origin={'i': 100}.",
    ),
    "unknown backend": (
        lambda: attend(q(), k(), v(), keep(), backend="cuda"),
        errors.UnknownBackend,
        "attend: there is no backend 'cuda'. Choose 'c', 'triton' or 'reference', or leave it out.",
    ),
    "packed": (
        lambda: attend(q(), k(), v(), keep(), cu_seqlens={"i": torch.tensor([0, 5])}),
        errors.NotSupported,
        "attend: packed sequences along i, where no state goes, are not supported yet. Call the kernel on each sequence by itself.",
    ),
    "packed with one state": (
        lambda: decay(torch.ones(2, 3, 4), torch.ones(2, 3), initial={"h": torch.ones(2, 4)}, cu_seqlens={"t": torch.tensor([0, 2, 2, 3])}),
        errors.BadInitial,
        "decay: initial['h'] of packed sequences has them as its first dimension, here 3, not shape (2, 4). Stack a value for every "
        "sequence with torch.stack.",
    ),
    "bounds of floats": (
        lambda: decay(torch.ones(2, 3, 4), torch.ones(2, 3), cu_seqlens={"t": torch.tensor([0.0, 3.0])}),
        errors.BadSequences,
        "decay: cu_seqlens['t'] is no tensor of ints with one dimension. Write cu_seqlens={'t': torch.tensor([0, 5, 12])} for a sequence "
        "of 5 steps and one of 7.",
    ),
    "bounds that end early": (
        lambda: decay(torch.ones(2, 3, 4), torch.ones(2, 3), cu_seqlens={"t": torch.tensor([0, 2])}),
        errors.BadSequences,
        "decay: cu_seqlens['t'] does not rise from 0 to 3, the extent of t. Write cu_seqlens={'t': torch.tensor([0, 5, 12])} for a "
        "sequence of 5 steps and one of 7.",
    ),
    "history": (
        lambda: attend(q(), k(), v(), keep(), history={"k": k()}),
        errors.NotSupported,
        "attend: a history for shifted reads (history=) is not supported yet. It is planned; until then, pass the earlier elements in "
        "front of the input and drop their outputs.",
    ),
    "not deterministic": (
        lambda: attend(q(), k(), v(), keep(), deterministic=False),
        errors.NotSupported,
        "attend: deterministic=False is not supported yet. Every kernel is deterministic, and none is faster without that. Leave it out.",
    ),
    "final value of no state": (
        lambda: attend(q(), k(), v(), keep(), return_final=True),
        errors.NoStates,
        "attend: return_final=True was passed but the kernel carries no state. Leave return_final=True out.",
    ),
    "initial value of no state": (
        lambda: attend(q(), k(), v(), keep(), initial={"S": q()}),
        errors.NoStates,
        "attend: initial= was passed but the kernel carries no state. Leave initial= out.",
    ),
    "unknown state": (
        lambda: decay(torch.ones(1, 3, 2), torch.ones(1, 3), initial={"T": torch.ones(1, 2)}),
        errors.UnknownState,
        "decay: there is no state 'T'. The states are S.",
    ),
    "initial value of another shape": (
        lambda: decay(torch.ones(1, 3, 2), torch.ones(1, 3), initial={"S": torch.ones(1, 5)}),
        errors.WrongShape,
        "decay: the initial value of state 'S' has shape [1, 5] but b, c is [1, 2]. Pass a tensor of that shape.",
    ),
    "initial value of ints": (
        lambda: decay(torch.ones(1, 3, 2), torch.ones(1, 3), initial={"S": torch.ones(1, 2, dtype=torch.int32)}),
        errors.WrongDtype,
        "decay: 'initial['S']' has dtype int32 but a floating dtype is wanted. Convert it with .float().",
    ),
    "strict scan": (
        lambda: running(torch.ones(2, 3), strict=True),
        errors.NotFused,
        "running: not all of it runs in generated kernels:\n  - y_ runs as PyTorch before the fused part: a scan (cumsum)\n"
        "  - the kernel runs as the reference: an output rests on a value that no fused class covers\n"
        "Without strict=True that runs as PyTorch.",
    ),
    "strict float64": (
        lambda: attend(q().double(), k(), v(), keep(), strict=True),
        errors.NotFused,
        "attend: not all of it runs in generated kernels:\n  - the inputs are float64, and generated kernels compute in float32\n"
        "Without strict=True that runs as PyTorch.",
    ),
    "strict reference": (
        lambda: attend(q(), k(), v(), keep(), strict=True, backend="reference"),
        errors.NotFused,
        "attend: not all of it runs in generated kernels:\n  - backend='reference' was asked for\n"
        "Without strict=True that runs as PyTorch.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == message
    assert isinstance(caught.value, errors.CallError)
    assert isinstance(caught.value, ValueError)


def test_a_good_call_passes() -> None:
    assert attend(q(), k(), v(), keep()).shape == (2, 4, 5, 3)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(errors.BackendUnavailable) as caught:
        attend(q(), k(), v(), keep(), backend="triton")
    assert str(caught.value) == (
        "attend: backend 'triton' cannot run: the tensors are on cpu. Move them to a GPU, or set TRITON_INTERPRET=1 before Python starts."
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_mixed_devices() -> None:
    with pytest.raises(errors.MixedDevices) as caught:
        attend(q(), k().cuda(), v(), keep())
    assert str(caught.value) == "attend: 'q' is on cpu but 'k' is on cuda:0. Move them to one device, as with k.to('cpu')."


def test_mixed_devices_under_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(2, 2, 6, 8, device="cuda")
        with pytest.raises(errors.MixedDevices) as caught:
            attend(torch.empty(2, 4, 5, 8), there, torch.empty(2, 2, 6, 3), torch.ones(2, 6, dtype=torch.bool))
    assert str(caught.value) == "attend: 'q' is on cpu but 'k' is on cuda:0. Move them to one device, as with k.to('cpu')."


def test_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.runtime import backends

    monkeypatch.setattr(backends, "c_compiler_works", lambda: False)
    backends._warn_once.cache_clear()
    kernel = weft.loads("kernel twice(x[n]) -> y[n]:\n    y = 2 * x\n").twice
    with pytest.warns(errors.CompilerMissing) as warned:
        y = kernel(torch.ones(3))
        kernel(torch.ones(3))
    assert y.tolist() == [2.0, 2.0, 2.0]
    assert [str(w.message) for w in warned] == [
        "no C compiler was found: kernels on the CPU run as the reference, many times slower. "
        "Install gcc or clang, or name one in the environment variable CC."
    ]
    for options in ({"backend": "c"}, {"strict": True}):
        with pytest.raises(errors.BackendUnavailable) as caught:
            kernel(torch.ones(3), **options)
        assert str(caught.value) == (
            "twice: backend 'c' cannot run: no C compiler was found. Install gcc or clang, or name one in the environment variable CC."
        )
