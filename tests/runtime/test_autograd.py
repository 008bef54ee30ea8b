"""Gradients through generated kernels: against the reference, for any strides, and a clear error for what there is not."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import weft
from weft.runtime import errors
from weft.specs import gla, softmax_attention

PARTLY = weft.loads("""
kernel partly(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], log_f[b,h,t]) -> o[b,h,i,e]:
    decay = cumsum[t, exclusive](log_f)
    mask j <= i
    s = sum[d](q * k) / sqrt(size(d)) + decay[t -> i] - decay[t -> j]
    o = sum[j](softmax[j](s) * v)
""").partly
"""Its scan runs as PyTorch before the fused part."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}

MANY = """
kernel many(q[b,i,d], k[b,j,d], v[b,j,e], slope[b], doc[b,j]: int, keep[b,j]: bool, bias[j] = 0) -> o[b,i,e], l[b,i]: float32, n[b,i]:
    param scale: float = 0.5
    param window: int = 5
    mask 0 <= i - j < window
    mask keep
    mask doc >= 1
    s = scale * sum[d](q * k) - slope * (i - j) + bias
    o = sum[j](softmax[j](s) * v)
    l = lse[j](s)
    n = argmax[j](s)
"""
many = weft.loads(MANY, name="many.weft").many


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values for softmax_attention; two query heads a key head."""
    make = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3))
    q, k, v = (torch.randn(shape, generator=make).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def gradients(outputs: Any, sources: Any) -> list[torch.Tensor | None]:
    """Of a loss that weighs every element of every real output differently."""
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).reshape(o.shape)).nan_to_num(neginf=0).sum() for o in outputs)
    return list(torch.autograd.grad(loss, sources, allow_unused=True))


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_reference(dtype: torch.dtype) -> None:
    found = tensors(dtype)
    wanted = tuple(t.detach().double().requires_grad_() for t in found)
    outputs, reference = softmax_attention(*found, strict=True), softmax_attention.reference(*wanted)
    assert outputs.o.dtype == outputs.l.dtype == dtype
    assert_same(outputs, reference, TOLERANCE[dtype])
    computed = gradients(outputs, found)
    assert [g.dtype for g in computed if g is not None] == [dtype] * 3
    assert_same(computed, gradients(reference, wanted), TOLERANCE[dtype])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_only_the_gradients_that_are_wanted(wanted: str) -> None:
    q, k, v = (t.detach().requires_grad_(name in wanted) for name, t in zip("qkv", tensors(), strict=True))
    sources = [t for t in (q, k, v) if t.requires_grad]
    assert_same(gradients(softmax_attention(q, k, v), sources), gradients(softmax_attention.reference(q, k, v), sources), 1e-5)


def many_inputs() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(2)
    return {
        "q": torch.randn(2, 9, 4, generator=make, requires_grad=True),
        "k": torch.randn(2, 9, 4, generator=make, requires_grad=True),
        "v": torch.randn(2, 9, 5, generator=make, requires_grad=True),
        "slope": torch.rand(2, generator=make, requires_grad=True),
        "doc": torch.randint(0, 4, (2, 9), generator=make),
        "keep": torch.rand(2, 9, generator=make) < 0.8,
    }


@pytest.mark.parametrize("ints", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_every_dtype_of_ints(ints: torch.dtype) -> None:
    inputs = many_inputs()
    inputs["doc"] = inputs["doc"].to(ints)
    found, wanted = many(**inputs, strict=True), many.reference(**inputs)
    assert [o.dtype for o in found] == [o.dtype for o in wanted]
    assert_same(found, wanted, 1e-5)


def test_inputs_by_name_params_and_origins() -> None:
    inputs = many_inputs()
    sources = [t for t in inputs.values() if t.requires_grad]
    options: dict[str, Any] = {"scale": 0.9, "window": 4, "origin": {"i": 2}, "sizes": {"d": 4}}
    found, wanted = many(**inputs, **options, strict=True), many.reference(**inputs, **options)
    assert_same(found, wanted, 1e-5)
    assert_same(gradients(found, sources), gradients(wanted, sources), 1e-5)


def test_an_input_with_a_default_may_be_left_out() -> None:
    inputs = many_inputs()
    bias = torch.zeros(9, requires_grad=True)
    assert_same(many(**inputs, strict=True), many(*inputs.values(), bias, strict=True), 1e-6)
    (found,), (wanted,) = (gradients(f(**inputs, bias=bias), [bias]) for f in (many, many.reference))
    assert_same([found], [wanted], 1e-5)


def test_promoted_and_declared_dtypes() -> None:
    inputs = {name: t.half() if t.dtype == torch.float32 else t for name, t in many_inputs().items()}
    assert [o.dtype for o in many(**inputs, strict=True)] == [o.dtype for o in many.reference(**inputs)]
    assert many(**inputs).o.dtype == torch.float16 and many(**inputs).l.dtype == torch.float32
    inputs["slope"] = inputs["slope"].detach().float().requires_grad_()
    found, wanted = many(**inputs, strict=True), many.reference(**inputs)
    assert found.o.dtype == wanted.o.dtype == torch.float32
    sources = [inputs["q"], inputs["slope"]]
    computed = gradients(found, sources)
    assert [g.dtype for g in computed if g is not None] == [torch.float16, torch.float32]
    assert_same(computed, gradients(wanted, sources), 1e-2)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "gapped", "offset"])
def test_any_strides(layout: str) -> None:
    q, k, v = (t.detach() for t in tensors())
    match layout:
        case "transposed":
            sources = [t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
            views = [t.transpose(1, 2) for t in sources]
        case "expanded":
            sources = [t[:1, :1].clone().requires_grad_() for t in (q, k, v)]
            views = [s.expand(t.shape) for s, t in zip(sources, (q, k, v), strict=True)]
        case "sliced":
            sources = [torch.cat([t, t], -1).requires_grad_() for t in (q, k, v)]
            views = [s[..., t.shape[-1] :] for s, t in zip(sources, (q, k, v), strict=True)]
        case "gapped":
            sources = [t.repeat_interleave(2, -1).requires_grad_() for t in (q, k, v)]
            views = [t[..., ::2] for t in sources]
        case _:
            sources = [torch.cat([t.new_zeros(1), t.flatten()]).requires_grad_() for t in (q, k, v)]
            views = [s[1:].view(t.shape) for s, t in zip(sources, (q, k, v), strict=True)]
    found, wanted = softmax_attention(*views, strict=True), softmax_attention.reference(*views)
    assert_same(found, wanted, 1e-5)
    assert_same(gradients(found, sources), gradients(wanted, sources), 1e-5)


def test_cotangents_of_any_strides() -> None:
    q, k, v = tensors()
    outputs, reference = softmax_attention(q, k, v), softmax_attention.reference(q, k, v)
    o = torch.randn(3, 5, 4, 2).permute(3, 2, 1, 0)
    for cotangents in ((o, torch.ones(()).expand(2, 4, 5)), (torch.ones(()).expand(2, 4, 5, 3), torch.randn(5, 4, 2).permute(2, 1, 0))):
        found = torch.autograd.grad(tuple(outputs), (q, k, v), cotangents, retain_graph=True)
        wanted = torch.autograd.grad(tuple(reference), (q, k, v), cotangents, retain_graph=True)
        assert_same(found, wanted, 1e-5)


@pytest.mark.parametrize("name", ["o", "l"])
def test_a_loss_on_one_output(name: str) -> None:
    q, k, v = tensors()
    found = torch.autograd.grad(getattr(softmax_attention(q, k, v), name).sum(), (q, k, v), allow_unused=True)
    wanted = torch.autograd.grad(getattr(softmax_attention.reference(q, k, v), name).sum(), (q, k, v), allow_unused=True)
    assert_same(found[:2], wanted[:2], 1e-5)


@pytest.mark.parametrize("empty", [{"b": 0}, {"i": 0}, {"j": 0}, {"e": 0}])
def test_nothing_to_compute(empty: dict[str, int]) -> None:
    n = {"b": 2, "i": 3, "j": 4, "d": 5, "e": 6} | empty
    q = torch.randn(n["b"], 2, n["i"], n["d"], requires_grad=True)
    k = torch.randn(n["b"], 1, n["j"], n["d"], requires_grad=True)
    v = torch.randn(n["b"], 1, n["j"], n["e"], requires_grad=True)
    o, l = softmax_attention(q, k, v, strict=True)  # noqa: E741
    assert o.shape == (n["b"], 2, n["i"], n["e"]) and l.shape == (n["b"], 2, n["i"])
    assert not o.any() or not empty.keys() <= {"j"}
    for g, t in zip(torch.autograd.grad(o.sum(), (q, k, v), allow_unused=True, materialize_grads=True), (q, k, v), strict=True):
        assert g.shape == t.shape and not g.isnan().any()


def test_what_runs_outside_has_gradients() -> None:
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 6, 4, generator=make, requires_grad=True) for _ in range(3))
    gate = torch.nn.functional.logsigmoid(torch.randn(1, 2, 6, generator=make)).requires_grad_()
    sources = [q, k, v, gate]
    found, wanted = PARTLY(*sources), PARTLY.reference(*sources)
    assert_same([found], [wanted], 1e-5)
    assert_same(gradients(found, sources), gradients(wanted, sources), 1e-5)
    with pytest.raises(errors.NotFused, match="decay runs as PyTorch before the fused part"):
        PARTLY(*sources, strict=True)


def test_states_go_on_where_they_ended() -> None:
    make = torch.Generator().manual_seed(4)
    inputs = [torch.randn(1, 2, 6, 3, generator=make, requires_grad=True) for _ in range(3)] + [-torch.rand(1, 2, 6, 3, generator=make)]
    whole, final = gla(*inputs, return_final=True)
    first, between = gla(*[t[:, :, :4] for t in inputs], return_final=True)
    second, end = gla(*[t[:, :, 4:] for t in inputs], initial=between, return_final=True)
    joined = torch.cat([first, second], 2)
    assert_same([joined, end["S"]], [whole, final["S"]], 1e-6)
    assert_same(gradients(joined, inputs[:3]), gradients(whole, inputs[:3]), 1e-5)


def test_no_mode_of_grad_no_graph() -> None:
    q, k, v = tensors()
    with torch.no_grad():
        assert not softmax_attention(q, k, v).o.requires_grad
    with torch.inference_mode():
        assert softmax_attention(q, k, v).o.is_inference()
    assert not softmax_attention(q.detach(), k.detach(), v.detach()).o.requires_grad


def test_changing_what_is_saved_is_noticed() -> None:
    q, k, v = tensors()
    outputs = softmax_attention(q, k, v)
    with torch.no_grad():
        outputs.o.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.l.sum().backward()


def test_float64_runs_as_the_reference() -> None:
    q, k, v = (t.detach().double().requires_grad_() for t in tensors())
    assert_same(softmax_attention(q, k, v), softmax_attention.reference(q, k, v), 0.0)
    assert torch.autograd.gradcheck(lambda *t: softmax_attention(*t).o, (q[:1, :2, :3], k[:1, :1, :3], v[:1, :1, :3]))


def test_autocast_casts_operands_of_contractions_alone() -> None:
    inputs = many_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, reference = many(**inputs), many.reference(**inputs)
    cast = {name: t.bfloat16() if name in "qkv" else t for name, t in inputs.items()}
    assert many.contraction_inputs == {"q", "k", "v"}
    assert found.o.dtype == torch.float32  # slope is left alone
    assert_same(found, many(**cast), 0.0)
    assert_same(reference, many.reference(**cast), 0.0)
    sources = [inputs["q"], inputs["slope"]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = many(**inputs)
    assert [g.dtype for g in gradients(outputs, sources) if g is not None] == [torch.float32, torch.float32]


def _twice(f: Any, x: torch.Tensor) -> Any:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(f(x).sin().sum(), x)
    torch.testing.assert_close(first, plain)
    return torch.autograd.grad(first.sum(), x)


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
    "second": _twice,
}


MESSAGES = {
    "jvp": "softmax_attention: torch.func.jvp over a kernel is not supported yet. "
    "Use reverse mode outside of torch.func: torch.autograd.grad, or .backward().",
    "vmap": "softmax_attention: torch.func.vmap over a kernel is not supported yet. "
    "Add the axis to the spec instead: an axis that every tensor has costs nothing.",
    "grad": "softmax_attention: torch.func.grad over a kernel is not supported yet. "
    "Use reverse mode outside of torch.func: torch.autograd.grad, or .backward().",
    "second": "softmax_attention: second derivatives of a kernel are not supported yet. "
    "Drop create_graph=True, or write the first derivative as a spec of its own.",
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_that_would_be_wrong_raise(name: str, backend: Any) -> None:
    q, k, v = (t.detach() for t in tensors())
    with pytest.raises(errors.NotSupported) as caught:
        TRANSFORMS[name](lambda t: softmax_attention(t, k, v, backend=backend).o, q)
    assert str(caught.value) == MESSAGES[name]


def test_forward_mode_tangents_raise() -> None:
    q, k, v = (t.detach() for t in tensors())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(errors.NotSupported, match="forward-mode derivatives of a kernel are not supported yet"):
            softmax_attention(dual, k, v)
        assert softmax_attention(q, k, v).o.shape == (2, 4, 5, 3)


def test_threads_share_a_kernel() -> None:
    kernel = weft.loads(MANY.replace("0.5", "0.25"), name="threads.weft").many
    inputs, results = many_inputs(), []

    def run() -> None:
        results.append(gradients(kernel(**inputs), [inputs["q"], inputs["v"]]))

    running = [threading.Thread(target=run) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(results) == 4
    for other in results[1:]:
        assert_same(other, results[0], 0.0)


def test_a_forked_process_computes_too() -> None:
    import torch.multiprocessing as processes

    q, k, v = (t.detach() for t in tensors())
    wanted = softmax_attention(q, k, v).o
    context = processes.get_context("fork")
    receive, send = context.Pipe()

    def child() -> None:
        send.send(softmax_attention(q, k, v).o.tolist())

    process = context.Process(target=child)
    process.start()
    assert receive.poll(60), "the child hangs"
    assert receive.recv() == wanted.tolist()
    process.join()
