"""``torch.compile(fullgraph=True)``, fake tensors and export: kernels are operators that PyTorch can reason about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import weft
from weft.runtime import errors, registry
from weft.specs import gla, softmax_attention

PARTLY = weft.loads("""
kernel partly(q[b,h,i,d], k[b,h,j,d], v[b,h,j,e], log_f[b,h,t]) -> o[b,h,i,e]:
    decay = cumsum[t, exclusive](log_f)
    mask j <= i
    s = sum[d](q * k) / sqrt(size(d)) + decay[t -> i] - decay[t -> j]
    o = sum[j](softmax[j](s) * v)
""").partly
"""Its scan runs as PyTorch before the fused part."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs() -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=make, requires_grad=True) for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3))]


def compiled(f: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(f, fullgraph=True, backend=backend, **options)
    return made


def check(f: Callable[..., Any], sources: list[torch.Tensor], backend: str = "aot_eager") -> None:
    """Values and gradients of the compiled function are those of the plain one."""
    found, wanted = compiled(f, backend)(*sources), f(*sources)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), sources), torch.autograd.grad(wanted.sin().sum(), sources))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_fused_kernel_among_other_operations(backend: str) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, l = softmax_attention(q * 2, k=k.tanh(), v=v)  # noqa: E741
        return o * 3 + l[..., None].exp()

    check(f, inputs(), backend)


def test_a_recurrence_with_its_final_state() -> None:
    make = torch.Generator().manual_seed(2)
    sources = [torch.randn(1, 2, 6, 3, generator=make, requires_grad=True) for _ in range(3)]
    gate, start = -torch.rand(1, 2, 6, 3, generator=make), torch.randn(1, 2, 3, 3, generator=make, requires_grad=True)

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        o, final = gla(q, k, v, gate, initial={"S": start}, return_final=True)
        total: torch.Tensor = o.sum() + final["S"].square().sum()
        return total

    check(f, [*sources, start])


def test_what_runs_outside() -> None:
    make = torch.Generator().manual_seed(3)
    sources = [torch.randn(1, 2, 6, 4, generator=make, requires_grad=True) for _ in range(3)]
    check(PARTLY, [*sources, torch.randn(1, 2, 6, generator=make, requires_grad=True)])


def test_origins_params_and_backends() -> None:
    text = "kernel near(q[i,d], k[j,d]) -> l[i]:\n    param window: int = 2\n    param scale: float = 1.0\n"
    text += "    mask 0 <= i - j < window\n    l = lse[j](scale * sum[d](q * k))\n"
    near = weft.loads(text).near
    make = torch.Generator().manual_seed(4)
    sources = [torch.randn(5, 4, generator=make, requires_grad=True), torch.randn(9, 4, generator=make, requires_grad=True)]
    for backend in ("c", "reference"):
        check(lambda q, k, b=backend: near(q, k, origin={"i": 3}, window=3, scale=0.5, sizes={"d": 4}, backend=b), sources)


def test_autocast() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o: torch.Tensor = softmax_attention(q, k, v).o
        return o

    sources = inputs()
    assert compiled(f)(*sources).dtype == torch.bfloat16
    torch.testing.assert_close(compiled(f)(*sources), f(*sources))


def test_shapes_that_change() -> None:
    q, k, v = inputs()
    f = compiled(lambda q, k, v: softmax_attention(q, k, v).o, dynamic=True)
    for length in (2, 3, 5):
        torch.testing.assert_close(f(q[:, :, :length], k, v), softmax_attention(q[:, :, :length], k, v).o)


def test_a_bad_call_raises_its_own_error() -> None:
    q, k, v = inputs()
    with pytest.raises(Exception, match="axis 'j' is 7 in 'k' but 6 in 'v'"):
        compiled(lambda q, k, v: softmax_attention(q, k, v).o)(q, k, v[:, :, :6])


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_fake_tensors_have_the_shapes_and_dtypes(backend: Any) -> None:
    q, k, v = (t.detach().bfloat16() for t in inputs())
    real = softmax_attention(q, k, v, backend=backend)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        fake = softmax_attention(*fakes, backend=backend)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_fake_states_have_the_shapes_and_dtypes() -> None:
    make = torch.Generator().manual_seed(5)
    sources = [torch.randn(1, 2, 6, 3, generator=make).half() for _ in range(4)]
    f = compiled(lambda *t: gla(*t, return_final=True))
    (found, finals), (wanted, kept) = f(*sources), gla(*sources, return_final=True)
    assert (found.dtype, finals["S"].dtype) == (wanted.dtype, kept["S"].dtype) == (torch.float16, torch.float32)


def test_export_records_one_operator() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            o: torch.Tensor = softmax_attention(q, k, v).o
            return o

    sources = tuple(t.detach() for t in inputs())
    program = torch.export.export(Layer(), sources)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "weft.forward.default" in names
    torch.testing.assert_close(program.module()(*sources), softmax_attention(*sources).o)


def test_operators_keep_their_promises() -> None:
    q, k, v = inputs()
    softmax_attention(q, k, v)
    extents = softmax_attention.prepare({"q": q, "k": k, "v": v}, {}).bound.extents
    key, variant = next((n, v) for n, v in registry.VARIANTS.items() if v.kernel is softmax_attention and v.fits(extents))
    full = [extents[a] for a in variant.axes]
    torch.library.opcheck(
        torch.ops.weft.forward.default,
        (key, [q, k, v], [], full, [0] * len(full)),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_transforms_inside_a_graph_raise() -> None:
    q, k, v = (t.detach() for t in inputs())
    with pytest.raises(Exception, match="not supported yet"):
        compiled(torch.func.vmap(lambda t: softmax_attention(t, k, v).o))(q[None])
    assert issubclass(errors.NotSupported, NotImplementedError)
