"""Against the naive reference functions of fla-core, their internal float32 raised to float64."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.peers.oracle import agree, draw, in_float64, swap

PACKAGE = importlib.util.find_spec("fla")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="fla-core is not installed")


HELPERS = ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling", "fla.ops.titans", "fla.ops.titans.log_impl")
"""What the files import for packed sequences and chunks, which are not tested here: importing it takes long."""


def fla(path: str) -> Callable[..., Any]:
    """A function of fla.ops by its path, in float64. Its file alone is loaded: the packages around it want a GPU, or more packages."""
    module, name = path.rsplit(".", 1)
    return in_float64(getattr(_load(module), name))


@functools.cache
def _load(module: str) -> ModuleType:
    assert PACKAGE is not None and PACKAGE.submodule_search_locations is not None
    file = Path(PACKAGE.submodule_search_locations[0], "ops", *module.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"naive_{module.replace('.', '_')}", file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(), mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in HELPERS}):
        warnings.simplefilter("ignore")
        spec.loader.exec_module(loaded)
    return loaded


def per_head(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> Tensor:
    """Calls a function of [b,t,h,...] tensors with [b,h,t,...] ones and takes its first result."""
    result = function(*(swap(x) for x in tensors), **options)
    return swap(result[0] if isinstance(result, tuple) else result)


def first(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> Tensor:
    result = function(*tensors, **options)
    return result[0] if isinstance(result, tuple) else result


HEADS_FIRST = {
    "delta_rule": ("delta_rule.naive.delta_rule_recurrence", "q k v beta"),
    "abc": ("abc.naive.naive_recurrent_abc", "q k v s"),
    "retention": ("retention.naive.naive_retention", "q k v"),
    "rwkv6": ("rwkv6.recurrent_naive.naive_recurrent_rwkv6", "q k v w u"),
    "rwkv7": ("generalized_delta_rule.dplr.naive.dplr_recurrence", "q k v alpha beta g"),
    "iplr": ("generalized_delta_rule.iplr.naive.iplr_recurrence", "q k v alpha beta"),
    "rebased": ("rebased.naive.naive_parallel_rebased", "q k v"),
    "hgrn": ("hgrn.naive.naive_recurrent_hgrn", "x g"),
    "gdn2": ("gdn2.naive.naive_recurrent_gdn2", "q k v g erase write"),
    "kda": ("kda.naive.naive_recurrent_kda", "q k v log_a beta"),
    "gsa": ("gsa.naive.naive_recurrent_gsa", "q k v s g"),
    "comba": ("comba.naive.naive_recurrent_comba", "q k v p beta g"),
    "momentum_delta": ("momentum_delta_rule.naive.recurrent_momentum_delta_rule_ref", "q k v log_alpha log_mu p beta eta"),
    "log_linear": ("log_linear_attn.naive.naive_log_linear_attn", "q k v g level"),
}
"""Specs whose tensors lie as the oracle's do, with the order of its arguments."""


@pytest.mark.parametrize("spec", sorted(HEADS_FIRST))
def test_same_layout(spec: str) -> None:
    path, order = HEADS_FIRST[spec]
    function = fla(path)
    agree(spec, lambda **x: first(function, *(x[name] for name in order.split())))


SWAPPED = {
    "gla": ("gla.naive.naive_recurrent_gla", "q k v g"),
    "simple_gla": ("simple_gla.naive.naive_recurrent_simple_gla", "q k v g"),
    "gated_delta": ("gated_delta_rule.naive.naive_recurrent_gated_delta_rule", "q k v beta g"),
    "forgetting": ("forgetting_attn.naive.naive_forgetting_attn", "q k v log_f"),
    "linear_plain": ("linear_attn.naive.naive_recurrent_linear_attn", "q k v"),
}
"""Specs in [b,h,t,...] whose oracle takes [b,t,h,...]."""


@pytest.mark.parametrize("spec", sorted(SWAPPED))
def test_swapped_layout(spec: str) -> None:
    path, order = SWAPPED[spec]
    function = fla(path)
    agree(spec, lambda **x: per_head(function, *(x[name] for name in order.split())))


@pytest.mark.parametrize("spec", ["delta_rule", "kda"])
def test_final_states(spec: str) -> None:
    path, order = HEADS_FIRST[spec]
    function = fla(path)

    def oracle(**x: Tensor) -> dict[str, Tensor]:
        o, state = function(*(x[name] for name in order.split()), output_final_state=True)
        return {"o": o, "S": state}

    agree(spec, oracle)


def test_abc_cumulative_sums() -> None:
    function = fla("abc.naive.naive_cumsum_abc")
    agree("abc", lambda q, k, v, s: first(function, q, k, v, s))


def test_based() -> None:
    function = fla("based.naive.naive_parallel_based")

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = function(q, k, torch.ones_like(v[..., :1]), use_norm=False)
        return function(q, k, v, use_norm=False) / weights

    agree("based", oracle)


def test_based_with_its_epsilon() -> None:
    agree("based", fla("based.naive.naive_parallel_based"), tol=1e-5)


def test_deltaformer() -> None:
    agree("deltaformer", fla("deltaformer.naive.naive_deltaformer_attn"), sizes={"d": 3, "e": 3})


def test_dsa() -> None:
    function = fla("dsa.naive.naive_dsa")
    agree("dsa", lambda q, k, v, q_idx, k_idx, w_idx: function(q, k, v, q_idx, k_idx, w_idx, topk=3))


def test_gated_delta_product() -> None:
    function = fla("gated_delta_product.naive.naive_recurrent_gated_delta_product")

    def oracle(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return per_head(lambda *x: function(*x, scale=q.shape[-1] ** -0.5, num_householder=2), q, k, v, g, beta)

    agree("gated_delta_product", oracle)


def test_hedgehog_is_linear_attention_of_its_features() -> None:
    function = fla("simple_gla.naive.naive_parallel_simple_gla")

    def features(x: Tensor, w: Tensor) -> Tensor:
        y = torch.einsum("bhtd,hdf->bhtf", x, w)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    def oracle(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        fq, fk = features(q, wq), features(k, wk)
        g = torch.zeros(q.shape[:3], dtype=q.dtype)
        sums = per_head(function, fq, fk, torch.cat([v, torch.ones_like(v[..., :1])], -1), g, scale=1.0)
        return sums[..., :-1] / (sums[..., -1:] + 1e-12)

    agree("hedgehog", oracle)


def test_hedgehog_concat_is_linear_attention_of_its_features() -> None:
    function = fla("linear_attn.naive.naive_recurrent_linear_attn")

    def features(x: Tensor, w: Tensor) -> Tensor:
        y = 2 * torch.einsum("bhtd,hdf->bhtf", x, w)
        return torch.cat([y, -y], -1).softmax(-1)

    def oracle(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        return per_head(function, features(q, wq), features(k, wk), v, normalize=True, scale=1.0)

    agree("hedgehog_concat", oracle)


def test_hgrn2_ties_the_key_to_the_gate() -> None:
    function = fla("gla.naive.naive_recurrent_gla")
    agree("hgrn2", lambda q, v, g: per_head(function, q * q.shape[-1] ** 0.5, 1 - g.exp(), v, g))


def test_gla_bidirectional_is_two_passes() -> None:
    function = fla("gla.naive.naive_recurrent_gla")

    def oracle(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        back = per_head(function, *(x.flip(2) for x in (q, k, v, g))).flip(2)
        return per_head(function, q, k, v, g) + back

    agree("gla_bidirectional", oracle)


def test_lightning() -> None:
    function = fla("simple_gla.naive.naive_recurrent_simple_gla")

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        g = -(8 / heads * (1 - 3 / 24)) * torch.arange(heads, dtype=q.dtype)
        return per_head(function, q, k, v, g[None, :, None].expand(q.shape[:3]))

    agree("lightning", oracle)


def test_lightning_alibi() -> None:
    function = fla("simple_gla.naive.naive_recurrent_simple_gla")

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=q.dtype)
        g = -slopes * (1 - 3 / 23 + 1e-5)
        return per_head(function, q, k, v, g[None, :, None].expand(q.shape[:3]))

    agree("lightning_alibi", oracle)


def test_linear_attn() -> None:
    function = fla("linear_attn.naive.naive_recurrent_linear_attn")
    agree("linear_attn", lambda q, k, v: per_head(function, q, k, v, normalize=True, scale=1.0))


def test_log_linear_long() -> None:
    function = fla("log_linear_attn.naive.naive_log_linear_attn")
    agree("log_linear", lambda level, **x: function(level_scales=level, **x), sizes={"i": 16, "j": 16, "t": 16, "l": 5})


def test_mesa_net_token_by_token() -> None:
    function = fla("mesa_net.naive.naive_mesa_net_decoding_one_step")

    def oracle(q: Tensor, k: Tensor, v: Tensor, g: Tensor, lam: Tensor, beta: Tensor) -> Tensor:
        shape = (q.shape[0], q.shape[2], q.shape[3])
        hk, hv = q.new_zeros(*shape, q.shape[3]), q.new_zeros(*shape, v.shape[3])
        steps = []
        for t in range(q.shape[1]):
            o, hk, hv = function(q[:, t], k[:, t], v[:, t], g[:, t], lam, beta[:, t], hk, hv, max_CG_iteration=4)
            steps.append(o)
        return torch.stack(steps, 1)

    agree("mesa_net", oracle)


def test_mesa_net_converges_to_the_exact_solve() -> None:
    function = fla("mesa_net.naive.naive_mesa_net_exact")
    sizes = {"d": 3, "e": 3, "t": 4}
    agree("mesa_net", lambda **x: first(function, **{"lamb" if n == "lam" else n: y for n, y in x.items()}),
          sizes=sizes, params={"steps": 12}, tol=1e-2)  # fmt: skip


def test_mlgru_is_hgrn_between_gates() -> None:
    function = fla("hgrn.naive.naive_recurrent_hgrn")

    def oracle(f: Tensor, c: Tensor, g: Tensor) -> Tensor:
        return first(function, torch.sigmoid(-f) * F.silu(c), F.logsigmoid(f)) * torch.sigmoid(g)

    agree("mlgru", oracle)


def test_min_gru_is_hgrn() -> None:
    function = fla("hgrn.naive.naive_recurrent_hgrn")
    agree("min_gru", lambda z, x: first(function, torch.sigmoid(z) * x, F.logsigmoid(-z)))


def test_min_lstm_is_hgrn() -> None:
    function = fla("hgrn.naive.naive_recurrent_hgrn")

    def oracle(f: Tensor, i: Tensor, x: Tensor) -> Tensor:
        keep = torch.sigmoid(f) / (torch.sigmoid(f) + torch.sigmoid(i))
        return first(function, (1 - keep) * x, keep.log())

    agree("min_lstm", oracle)


def test_nsa_gathers_the_blocks_it_names() -> None:
    module = "nsa.naive."
    compressed, chosen = fla(module + "naive_nsa_compression"), fla(module + "naive_nsa_topk")
    block, blocks = 2, 4

    def oracle(q: Tensor, k: Tensor, v: Tensor, gate_cmp: Tensor, gate_sel: Tensor) -> Tensor:
        t, group, scale = q.shape[1], q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
        k_cmp, v_cmp = (torch.stack([x[:, s : s + block].mean(1) for s in range(0, t, block)], 1) for x in (k, v))
        o_cmp = first(compressed, q, k_cmp, v_cmp, block, scale)
        picked = chosen(q.detach(), k_cmp.detach(), blocks, block, scale)
        hit = (picked[..., None] == torch.arange(k_cmp.shape[1])).any(-2).repeat_interleave(block, -1)[..., :t]
        seen = (hit & (torch.arange(t)[:, None, None] >= torch.arange(t))).transpose(1, 2).repeat_interleave(group, 1)
        kk, vv = (x.repeat_interleave(group, 2) for x in (k, v))
        o_sel = swap(F.scaled_dot_product_attention(swap(q), swap(kk), swap(vv), attn_mask=seen))
        return gate_cmp[..., None] * o_cmp + gate_sel[..., None] * o_sel

    agree("nsa", oracle)


def test_parallax() -> None:
    function = fla("parallax.naive.naive_parallax")
    agree("parallax", lambda q, r, k, v: per_head(function, q, r, k, v), sizes={"e": 5, "d": 5})


def test_attention_residual() -> None:
    function = fla("attnres.naive.naive_attnres")
    agree("attention_residual", lambda query, x, w: function(query, list(x), w))


@pytest.mark.parametrize("spec", ["path", "path_fox"])
def test_path(spec: str) -> None:
    function = fla("path_attn.naive.naive_path_attn")

    def oracle(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_f: Tensor | None = None) -> Tensor:
        g = torch.zeros_like(beta) if log_f is None else log_f
        return per_head(function, q, k, v, w, beta, g, scale=q.shape[-1] ** -0.5, chunk_size=4)

    agree(spec, oracle, sizes={"i": 7, "j": 7, "t": 7} if spec == "path_fox" else {"i": 7, "j": 7})


def test_mlstm_sigmoid_is_gated_linear_attention_with_a_normaliser() -> None:
    function = fla("simple_gla.naive.naive_recurrent_simple_gla")

    def oracle(q: Tensor, k: Tensor, v: Tensor, ig: Tensor, fg: Tensor) -> Tensor:
        values = torch.cat([v, torch.ones_like(v[..., :1])], -1) * torch.sigmoid(ig)[..., None]
        sums = per_head(function, q, k, values, F.logsigmoid(fg))
        return sums[..., :-1] / sums[..., -1:].abs().clamp(min=1)

    agree("mlstm_sigmoid", oracle)


def test_rwkv5_is_rwkv6_with_a_constant_decay() -> None:
    function = fla("rwkv6.recurrent_naive.naive_recurrent_rwkv6")

    def oracle(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return first(function, r, k, v, -w.exp()[None, :, None].expand(r.shape), u, scale=1.0)

    agree("rwkv5", oracle)


@pytest.mark.parametrize("name", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_ssd(name: str) -> None:
    function = fla(f"simple_gla.naive.{name}")

    def oracle(x: Tensor, dt: Tensor, a: Tensor, bb: Tensor, c: Tensor, skip: Tensor) -> dict[str, Tensor]:
        heads = x.shape[2]
        q, k = (y[:, :, None].expand(-1, -1, heads, -1) for y in (c, bb))
        o, state = function(q, k, dt[..., None] * x, dt * a, scale=1.0, output_final_state=True)
        return {"y": o + skip[:, None] * x, "S": state.transpose(2, 3)}

    agree("ssd", oracle)


def test_ssd_dual() -> None:
    function = fla("simple_gla.naive.naive_recurrent_simple_gla")

    def oracle(x: Tensor, dt: Tensor, a: Tensor, bb: Tensor, c: Tensor, skip: Tensor) -> Tensor:
        q, k = (y[:, :, None].expand(-1, -1, x.shape[2], -1) for y in (c, bb))
        return first(function, q, k, dt[..., None] * x, dt * a, scale=1.0) + skip[:, None] * x

    agree("ssd_dual", oracle)


def test_stickbreaking() -> None:
    function = fla("stickbreaking_attn.naive.naive_stickbreaking_attn")

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        o, rem = function(swap(q), swap(k), swap(v))
        return {"o": swap(o), "rem": swap(rem)}

    agree("stickbreaking", oracle)


@pytest.mark.parametrize("spec", ["softmax_attention", "sliding_window", "attention_sink"])
def test_softmax(spec: str) -> None:
    function = fla("attn.naive.naive_parallel_attn")

    def oracle(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
        window = 3 if spec == "sliding_window" else None
        return per_head(lambda *x: function(*x, window_size=window, sink_bias=sink), q, k, v)

    agree(spec, oracle)


def test_titans() -> None:
    function = fla("titans.naive.chunk_titans_linear_ref")

    def oracle(theta: Tensor, alpha: Tensor, eta: Tensor, **x: Tensor) -> Tensor:
        gates = (theta[..., None], alpha[..., None], eta[..., None])
        return first(function, x["q"], x["k"], x["v"], x["w"], x["bias"], *gates, chunk_size=3, use_chunk=False)

    agree("titans", oracle)


def test_ttt_linear() -> None:
    function = fla("ttt.naive.chunk_ttt_linear_ref")

    def oracle(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor, eta: Tensor) -> Tensor:
        return first(function, q, k, v, w, bias, eta[..., None], mini_batch_size=3)

    agree("ttt_linear", oracle)


def test_gated_delta_with_states() -> None:
    """The oracle's initial and final state, against two halves of our own."""
    function = fla("gated_delta_rule.naive.naive_recurrent_gated_delta_rule")
    x = draw("gated_delta", sizes={"t": 6})
    halves = [{n: y[:, :, s] for n, y in x.items()} for s in (slice(0, 3), slice(3, 6))]
    order = ("q", "k", "v", "beta", "g")
    _, state = function(*(swap(halves[0][n]) for n in order), output_final_state=True)
    second = function(*(swap(halves[1][n]) for n in order), initial_state=state)[0]
    whole = function(*(swap(x[n]) for n in order))[0]
    assert torch.allclose(second, whole[:, 3:], atol=1e-12)
    agree("gated_delta", lambda **y: per_head(function, *(y[n] for n in order)), inputs=x)
    assert math.isfinite(state.sum())
