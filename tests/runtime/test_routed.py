"""Mixtures of experts: only chosen pairs of a token and an expert are computed, forward and backward, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from tests.evidence.library import kernel
from weft.compiler import ir
from weft.compiler.extents import shape
from weft.compiler.route_tables import Tables
from weft.runtime.kernel import Kernel
from weft.runtime.problem import Usual, pose

ROUTED = {
    "moe_swiglu": {}, "moe_mixtral": {}, "moe_qwen": {}, "moe_skywork": {}, "moe_switch": {}, "moe_llama4": {}, "moe_deepseek": {},
    "moe_deepseek_v2": {}, "moe_expert_choice": {"capacity": 3}, "moe_capacity": {"capacity": 3}, "moe_gpt_oss": {"k": 2}, "moe_relu": {},
    "moe_relu2": {}, "moe_rounded": {"tile": 2}, "moe_top_p": {"mass": 0.5}, "ds_moe_sparse": {"threshold": 0.2}, "sigma_moe": {},
    "lora_mixture": {}, "switch_head": {}, "mixture_of_attention_heads": {}, "moe_null": {},
}  # fmt: skip
"""Fused whole in both directions, with params for small sizes."""

ATTENTION = {"switch_head": ("h", "i", "j"), "mixture_of_attention_heads": ("route.pair", "g", "j")}


def drawn(k: Kernel, extents: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(shape(t, extents), generator=g) * (0.4 if len(t.axes) > 2 else 1) for t in k.typed.inputs}


def both(k: Kernel, inputs: dict[str, Tensor], params: dict[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Outputs and gradients, generated in float32 and by the reference in float64."""
    ours = [x.clone().requires_grad_() for x in inputs.values()]
    exact = [x.double().requires_grad_() for x in inputs.values()]
    found, wanted = k(*ours, **params, strict=True), k.reference(*exact, **params)
    found, wanted = (r if isinstance(r, tuple) else (r,) for r in (found, wanted))
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(w.shape, generator=g, dtype=torch.float64) for w in wanted]
    yield from zip(k.output_names, found, wanted, strict=True)
    loss = sum((o * c.to(o.dtype)).sum() for o, c in zip(found, cotangents, strict=True) if o.is_floating_point())
    exact_loss = sum((o * c).sum() for o, c in zip(wanted, cotangents, strict=True) if o.is_floating_point())
    grads = torch.autograd.grad(loss, ours, allow_unused=True)
    exact_grads = torch.autograd.grad(exact_loss, exact, allow_unused=True)
    for name, a, b in zip(inputs, grads, exact_grads, strict=True):
        if b is not None:
            assert a is not None, name
            yield f"d_{name}", a, b


def close(quantity: str, found: Tensor, wanted: Tensor) -> None:
    rms = wanted.double().pow(2).mean().sqrt()
    error = (found.double() - wanted.double()).abs().max()
    assert error <= 1e-4 * rms + 1e-5, f"{quantity}: {error:.2e}, RMS {rms:.2e}"


@pytest.mark.parametrize("name", ROUTED)
def test_fused_on_both_backends(name: str) -> None:
    k = kernel(name)
    for target, dtype in (("c", torch.float32), ("sm_90", torch.float16)):
        problem = pose(k.graph, {}, {}, Usual(length=512))
        lowered = k.lowered(target, dtype=dtype, extents=problem.extents, params=problem.params)
        assert lowered.forward is not None and not lowered.reasons, (target, lowered.reasons)
        assert lowered.routings
        plans = (lowered.forward, lowered.backward(frozenset(lowered.differentiable)))
        for plan in plans:
            assert not any(ATTENTION.get(name, ("?",)) == tuple(b.axes) for b in plan.buffers.values()), "scores are stored"


def test_attention_of_routed_queries_goes_by_tiles_of_pairs() -> None:
    k = kernel("mixture_of_attention_heads")
    problem = pose(k.graph, {}, {}, Usual(length=512))
    forward = k.lowered("c", extents=problem.extents, params=problem.params).forward
    assert forward is not None
    attention = [found for found in forward.kernels if "sweeps j" in found.note]
    assert attention and all(found.rows == "route.pair" for found in attention)


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("name", ROUTED)
def test_agrees_with_float64(name: str, tokens: int) -> None:
    k = kernel(name)
    small = dict.fromkeys(("t", "i", "j"), tokens) | dict.fromkeys(("n", "m"), 5)
    given = {a: n for a, n in small.items() if a in pose(k.graph, {}, {}, Usual()).sizes}
    extents = pose(k.graph, given, ROUTED[name], Usual(feature=20, heads=2)).extents
    for quantity, found, wanted in both(k, drawn(k, extents), ROUTED[name]):
        close(quantity, found, wanted)


def swiglu(t: int, n: int, k: int, d: int = 24, f: int = 40, seed: int = 0) -> tuple[Kernel, dict[str, Tensor], dict[str, Any]]:
    made = kernel("moe_swiglu")
    return made, drawn(made, {"t": t, "n": n, "d": d, "f": f}, seed), {"k": k}


SIZES = {
    "one of everything": (1, 1, 1), "more experts than tokens": (3, 16, 2), "every expert": (300, 2, 2), "a tile and a row": (129, 3, 1),
    "as many as there are": (5, 4, 4), "more than there are": (4, 3, 9),
}  # fmt: skip


@pytest.mark.parametrize(("t", "n", "k"), SIZES.values(), ids=SIZES)
def test_sizes(t: int, n: int, k: int) -> None:
    for quantity, found, wanted in both(*swiglu(t, n, k)):
        close(quantity, found, wanted)


def test_features_above_a_tile() -> None:
    for quantity, found, wanted in both(*swiglu(40, 3, 2, d=300, f=270)):
        close(quantity, found, wanted)


@pytest.mark.parametrize("name", ["moe_swiglu", "moe_skywork", "moe_qwen"])
def test_more_experts_than_a_tile_of_rows_keeps(name: str) -> None:
    k = kernel(name)
    extents = pose(k.graph, {"t": 30, "n": 300}, {"k": 3}, Usual(feature=20, heads=2)).extents
    for quantity, found, wanted in both(k, drawn(k, extents), {"k": 3}):
        close(quantity, found, wanted)


@pytest.mark.parametrize(
    ("name", "loss"), [("moe_swiglu", "load"), ("moe_switch", "balance"), ("moe_switch", "z_loss"), ("ds_moe_dense", "loss")]
)
def test_gradients_of_an_auxiliary_loss_by_itself(name: str, loss: str) -> None:
    """Beside the layer's own they would be too small for their errors to be seen."""
    k = kernel(name)
    inputs = drawn(k, pose(k.graph, {"t": 37, "n": 5}, {}, Usual(feature=20)).extents)
    found = {}
    for call, dtype in ((k, torch.float32), (k.reference, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs.values()]
        value = dict(zip(k.output_names, call(*leaves), strict=True))[loss]
        weights = torch.linspace(1, 2, value.numel(), dtype=dtype).view(value.shape)
        grads = torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True)
        found[dtype] = [value.detach(), *grads]
    for quantity, a, b in zip((loss, *inputs), found[torch.float32], found[torch.float64], strict=True):
        if b is None or not bool(b.any()):
            assert a is None or not bool(a.any()), quantity
        else:
            assert a is not None
            assert float((a.double() - b).abs().max()) < 1e-4 * float(b.pow(2).mean().sqrt()), quantity


def test_no_tokens() -> None:
    made, inputs, params = swiglu(0, 4, 2)
    assert made(**inputs, **params).y.shape == (0, 24)


def test_one_expert_has_all_tokens_and_the_others_none() -> None:
    """Weights that nobody chose get gradients of exactly zero, whatever memory held, and are not read: NaN in them changes nothing."""
    made, inputs, _ = swiglu(200, 6, 1)
    inputs["x"][:, 0] = 3.0
    inputs["router"].zero_()
    inputs["router"][4, 0] = 5.0
    for name in ("w_gate", "w_up", "w_down"):
        inputs[name][[0, 1, 2, 3, 5]] = torch.nan
        inputs[name].requires_grad_()
    for _ in range(3):
        rubbish = torch.full((1 << 20,), torch.nan)
        del rubbish
        y = made(**inputs, k=1, strict=True).y
        assert y.isfinite().all()
        for g in torch.autograd.grad(y.sum(), [inputs[n] for n in ("w_gate", "w_up", "w_down")]):
            assert (g[[0, 1, 2, 3, 5]] == 0).all()
            assert g[4].isfinite().all() and g[4].abs().sum() > 0


def test_two_runs_are_equal_and_neighbours_do_not_matter() -> None:
    made, inputs, params = swiglu(150, 8, 3)
    for x in inputs.values():
        x.requires_grad_()
    runs = []
    for _ in range(2):
        y = made(**inputs, **params).y
        runs.append([y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    some = torch.randperm(150, generator=torch.Generator().manual_seed(2))[:41]
    alone = made(**{**inputs, "x": inputs["x"][some]}, **params).y
    assert torch.equal(alone, runs[0][0][some])


def test_what_is_saved_for_swiglu() -> None:
    """2 d + 4 k n bytes a token in 16 bits: the input, and both pre-activations of every pair. The rest has no axis of features."""
    k = kernel("moe_swiglu")
    lowered = k.lowered("sm_90", dtype=torch.bfloat16, extents={"t": 4096, "d": 512, "f": 256, "n": 32}, params={"k": 4})
    saved = [b for b in lowered.forward.buffers.values() if b.role == "saved"]  # type: ignore[union-attr]
    wide = [b for b in saved if {"d", "f"} & set(b.axes)]
    assert sorted(b.axes for b in wide) == [("route.pair", "f")] * 2
    assert all(b.dtype == "input" for b in wide)


def test_experts_may_be_anything() -> None:
    """Several matrices, a bias inside, a gate on the hidden units, a weight on the input: a spec of nobody's, without a template."""
    text = '''"""Three matrices, a bias, a second gate."""

kernel odd(x[b,t,d], router[n,d], w1[n,d,f], c1[n,f], w2[n,f,g], w3[n,g,d], scale[n]) -> y[b,t,d], used[n]:
    param k: int = 2
    s = sigmoid(sum[d](x * router))
    mask topk[n](s, k)
    used = sum[b, t](s)
    h = tanh(sum[d](s * x * w1) + c1)
    y = sum[n](scale * sum[g](gelu(sum[f](h * w2)) * w3))
'''
    made = weft.loads(text).odd
    extents = {"b": 2, "t": 19, "d": 18, "n": 5, "f": 33, "g": 21}
    for quantity, found, wanted in both(made, drawn(made, extents), {}):
        close(quantity, found, wanted)


def test_what_all_tokens_need_of_all_experts_is_refused() -> None:
    text = '''"""The output of every expert leaves, beside the mixture."""

kernel leaking(x[t,d], router[n,d], w[n,d,f], v[n,f,d]) -> y[t,d], everything[t,n]:
    h = sum[d](x * w)
    everything = sum[f](h)
    mask topk[n](sum[d](x * router), 2)
    y = sum[n](sum[f](h * v))
'''
    lowered = weft.loads(text).leaking.lowered("c", extents={"t": 64, "d": 16, "n": 4, "f": 16})
    assert any("for all tokens and experts" in r for r in lowered.reasons)


@pytest.mark.parametrize("waits", [True, False])
def test_tables(waits: bool) -> None:
    """Every table of a routing against loops, as it is made on CPUs and on devices that are not waited for."""
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(3, 5, 4, generator=g) < 0.4
    chosen[:, :, 2] = False
    route = ir.make(ir.Route, (), "int", ir.const(True), ("b", "t"), ("n",), 4)
    pairs = [(b, t, n) for n in range(4) for b in range(3) for t in range(5) if chosen[b, t, n]]
    extents = {"b": 3, "t": 5, "n": 4, "pair": 60, "tile": 19, "most": 4}
    made = Tables(chosen, route, extents, {"t": 10}, waits)
    count = len(pairs)
    assert made.table("count", ()).item() == count
    for place, name in enumerate(("token:b", "token:t", "expert:n")):
        first = 10 if name == "token:t" else 0
        assert made.table(name, ("pair",))[:count].tolist() == [p[place] + first for p in pairs]
    of = {p: s for s, p in enumerate(pairs)}
    table = made.table("pair", ("n", "b", "t"))
    choices = made.table("choices:b,t", ("b", "most", "t"))
    for b in range(3):
        for t in range(5):
            mine = [of[b, t, n] for n in range(4) if chosen[b, t, n]]
            assert choices[b, :, t].tolist() == mine + [-1] * (4 - len(mine))
            for n in range(4):
                assert table[n, b, t].item() == of.get((b, t, n), -1)
    by_expert = made.table("choices:n,b", ("b", "n", "most"))
    for b in range(3):
        for n in range(4):
            mine = [of[b, t, n] for t in range(5) if chosen[b, t, n]]
            assert by_expert[b, n, : len(mine)].tolist() == mine[:4]
    tiles = []
    for n in range(4):
        mine = [s for s, p in enumerate(pairs) if p[2] == n]
        first, last = (made.table(name, ("n",))[n].item() for name in ("first", "last"))
        assert list(range(first, last)) == mine
        tiles += [(n, mine[k], mine[min(k + 4, len(mine)) - 1] + 1) for k in range(0, len(mine), 4)]
    found = zip(*(made.table(name, ("tile",)).tolist() for name in ("tile:n", "tile_start", "tile_stop")), strict=True)
    listed = list(found)
    assert listed[: len(tiles)] == tiles
    assert all(start == stop for _, start, stop in listed[len(tiles) :])


def test_selections_prefer_the_lower_position() -> None:
    """The fast selection of ordinary scores, against the meaning of ``topk``: ties, -inf, all alike, NaN."""
    from weft.compiler.reference_ops import Setting, Value, select
    from weft.runtime.library_steps import _largest

    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 4, (200, 9), generator=g).float()
    x[:20] = -torch.inf
    x[20:40, 3:] = -torch.inf
    x[40:60] = 1.0
    x[60:90, 2] = torch.nan
    x[90:99, ::2] = torch.nan
    for k in (1, 3, 9):
        setting = Setting({"t": 200, "u": 9}, {}, x.device, torch.float32)
        wanted = select(("u",), Value(x, ("t", "u")), Value(torch.tensor(k), ()), None, setting)
        assert torch.equal(_largest(x, k), wanted.data)


def test_compiled_whole() -> None:
    """torch.compile sees operators, forward and backward."""
    made, inputs, params = swiglu(33, 4, 2)
    for x in inputs.values():
        x.requires_grad_()

    def loss(*given: Tensor) -> Tensor:
        y, load = made(*given, **params)
        return y.square().sum() + load.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs.values()), list(inputs.values()))
    wanted = torch.autograd.grad(loss(*inputs.values()), list(inputs.values()))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_a_named_position_and_an_origin() -> None:
    """Weights read at a position that the spec names: with an origin along that axis the kernel's plan does not hold."""
    made = kernel("moe_gpt_oss")
    extents = {"t": 9, "d": 8, "n": 3, "f": 6, "g": 2}
    inputs = drawn(made, extents)
    usual = made(**inputs, k=2)
    moved = made(**inputs, k=2, origin={"g": 1})
    assert torch.allclose(moved, made.reference(**inputs, k=2, origin={"g": 1}), atol=1e-5)
    assert not torch.allclose(usual, moved, atol=1e-3)
