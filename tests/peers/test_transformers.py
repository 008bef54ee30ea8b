"""Against modules and functions of transformers, with our tensors as their weights and their float32 raised to float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.peers.oracle import agree, in_float64, swap

pytest.importorskip("transformers", reason="transformers is not installed")


def model(name: str) -> Any:
    """The modelling file of one architecture."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def config(**values: Any) -> Any:
    """A stand-in for a configuration object: an attribute for every value."""
    return SimpleNamespace(**{"_experts_implementation": "eager"} | values)


def call(module: nn.Module, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """A module with other weights, in float64."""
    missing = {name for name, _ in module.named_parameters()} - weights.keys()
    assert not missing, f"no weights for {sorted(missing)}"
    return in_float64(functional_call)(module, dict(weights), args, kwargs)


def gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """[n,d,f] projections joined as transformers stores them: [n,2f,d]."""
    return torch.cat([gate, up], -1).transpose(-1, -2)


# Mixtures of experts -----------------------------------------------------------------------------------------------


def mixtral(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, k: int) -> Tensor:
    cfg = config(num_experts_per_tok=k, num_local_experts=len(router), hidden_size=x.shape[-1], intermediate_size=w1.shape[-1],
                 hidden_act="silu", router_jitter_noise=0.0)  # fmt: skip
    module = model("mixtral").MixtralSparseMoeBlock(cfg)
    weights = {"gate.weight": router, "experts.gate_up_proj": gate_up(w1, w3), "experts.down_proj": w2.transpose(-1, -2)}
    return call(module, weights, x[None])[0]


def test_moe_mixtral() -> None:
    agree("moe_mixtral", lambda x, router, w1, w3, w2: mixtral(x, router, w1, w3, w2, 2))


def test_moe_mixtral_in_jetmoe() -> None:
    """JetMoe chooses by logits and normalises after: the same layer, written and computed otherwise."""

    def oracle(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        cfg = config(num_experts_per_tok=2, num_local_experts=len(router), hidden_size=x.shape[-1], intermediate_size=w1.shape[-1],
                     activation_function="silu")  # fmt: skip
        weights = {
            "router.layer.weight": router, "input_linear.weight": gate_up(w1, w3), "output_linear.weight": w2.transpose(-1, -2),
            "bias": x.new_zeros(x.shape[-1]),
        }  # fmt: skip
        return call(model("jetmoe").JetMoeMoE(cfg), weights, x[None])[0]

    agree("moe_mixtral", oracle)


def test_moe_swiglu() -> None:
    def oracle(x: Tensor, router: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> dict[str, Tensor]:
        p = (x @ router.T).softmax(-1)
        hit = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0)
        load = len(router) * p.mean(0) * hit.mean(0)
        total = in_float64(model("mixtral").load_balancing_loss_func)((x @ router.T,), len(router), 2)
        assert torch.allclose(load.sum(), total)
        return {"y": mixtral(x, router, w_gate, w_up, w_down, 2), "load": load}

    agree("moe_swiglu", oracle)


def test_moe_qwen() -> None:
    def oracle(**w: Tensor) -> Tensor:
        x, width, shared = w["x"], w["w1"].shape[-1], w["s1"].shape[-1]
        cfg = config(num_experts_per_tok=2, num_experts=len(w["router"]), hidden_size=x.shape[-1], moe_intermediate_size=width,
                     shared_expert_intermediate_size=shared, hidden_act="silu", norm_topk_prob=False)  # fmt: skip
        weights = {
            "gate.weight": w["router"], "experts.gate_up_proj": gate_up(w["w1"], w["w3"]),
            "experts.down_proj": w["w2"].transpose(-1, -2), "shared_expert.gate_proj.weight": w["s1"].T,
            "shared_expert.up_proj.weight": w["s3"].T, "shared_expert.down_proj.weight": w["s2"].T,
            "shared_expert_gate.weight": w["gate"][None],
        }  # fmt: skip
        return call(model("qwen2_moe").Qwen2MoeSparseMoeBlock(cfg), weights, x[None])[0]

    agree("moe_qwen", oracle)


def deepseek(router: nn.Module, experts: nn.Module, w: Mapping[str, Tensor]) -> Tensor:
    """The router and the experts of one of the DeepSeek models, and the shared expert."""
    x = w["x"]
    buffers = {"e_score_correction_bias": w["bias"]} if "bias" in w else {}
    _, weights, picked = call(router, {"weight": w["router"], **buffers}, x)
    routed = call(experts, {"gate_up_proj": gate_up(w["w1"], w["w3"]), "down_proj": w["w2"].transpose(-1, -2)}, x, picked, weights)
    return routed + (F.silu(x @ w["s1"]) * (x @ w["s3"])) @ w["s2"]


def test_moe_deepseek() -> None:
    module = model("deepseek_v3")

    def oracle(**w: Tensor) -> Tensor:
        cfg = config(num_experts_per_tok=3, num_local_experts=len(w["router"]), hidden_size=w["x"].shape[-1], hidden_act="silu",
                     moe_intermediate_size=w["w1"].shape[-1], routed_scaling_factor=2.5, n_group=3, topk_group=2,
                     norm_topk_prob=True)  # fmt: skip
        return deepseek(module.DeepseekV3TopkRouter(cfg), module.DeepseekV3Experts(cfg), w)

    agree("moe_deepseek", oracle)


def test_moe_deepseek_v2() -> None:
    module = model("deepseek_v2")

    def oracle(**w: Tensor) -> Tensor:
        cfg = config(num_experts_per_tok=3, num_experts=len(w["router"]), num_local_experts=len(w["router"]), hidden_size=w["x"].shape[-1],
                     hidden_act="silu", moe_intermediate_size=w["w1"].shape[-1], routed_scaling_factor=16.0,
                     topk_method="group_limited_greedy", n_group=3, topk_group=2)  # fmt: skip
        return deepseek(module.DeepseekV2TopkRouter(cfg), module.DeepseekV2Experts(cfg), w)

    agree("moe_deepseek_v2", oracle)


def test_moe_gpt_oss() -> None:
    module = model("gpt_oss")

    def oracle(**w: Tensor) -> Tensor:
        x = w["x"]
        cfg = config(num_experts_per_tok=2, num_local_experts=len(w["router"]), hidden_size=x.shape[-1], swiglu_limit=1.0,
                     swiglu_alpha=1.702, intermediate_size=w["w2"].shape[1])  # fmt: skip
        _, weights, picked = call(module.GptOssTopKRouter(cfg), {"weight": w["router"], "bias": w["rb"]}, x)
        experts = {"gate_up_proj": w["w1"], "gate_up_proj_bias": w["b1"], "down_proj": w["w2"], "down_proj_bias": w["b2"]}
        return call(module.GptOssExperts(cfg), experts, x, picked, weights)

    agree("moe_gpt_oss", oracle)


def test_moe_llama4() -> None:
    def oracle(**w: Tensor) -> Tensor:
        x = w["x"]
        cfg = config(num_experts_per_tok=1, num_local_experts=len(w["router"]), hidden_size=x.shape[-1], hidden_act="silu",
                     intermediate_size=w["w1"].shape[-1])  # fmt: skip
        module = model("llama4").Llama4TextMoe(cfg)
        weights = {
            "router.weight": w["router"], "experts.gate_up_proj": torch.cat([w["w1"], w["w3"]], -1), "experts.down_proj": w["w2"],
            "shared_expert.gate_proj.weight": w["s1"].T, "shared_expert.up_proj.weight": w["s3"].T,
            "shared_expert.down_proj.weight": w["s2"].T,
        }  # fmt: skip
        return call(module, weights, x)[0]

    agree("moe_llama4", oracle)


def test_moe_switch() -> None:
    module = model("switch_transformers")

    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> dict[str, Tensor]:
        cfg = config(num_experts=len(router), expert_capacity=len(x), hidden_size=x.shape[-1], router_bias=False, router_jitter_noise=0.0,
                     router_ignore_padding_tokens=False, router_dtype="float64", d_model=x.shape[-1], d_ff=w1.shape[-1],
                     dropout_rate=0.0, dense_act_fn="relu")  # fmt: skip
        weights = {"router.classifier.weight": router}
        for n in range(len(router)):
            weights |= {f"experts.expert_{n}.wi.weight": w1[n].T, f"experts.expert_{n}.wo.weight": w2[n].T}
        y = call(module.SwitchTransformersSparseMLP(cfg).double(), weights, x[None])[0]
        logits = (x @ router.T)[None]
        probabilities = logits.softmax(-1)
        balance = in_float64(module.load_balancing_loss_func)(probabilities, probabilities.argmax(-1))
        return {"y": y, "balance": balance, "z_loss": module.router_z_loss_func(logits)}

    agree("moe_switch", oracle)


def test_mixture_of_attention_heads() -> None:
    module = model("jetmoe")

    def oracle(x: Tensor, router: Tensor, wq: Tensor, k: Tensor, v: Tensor, wo: Tensor) -> Tensor:
        experts, groups, width, dim = wq.shape
        cfg = config(num_local_experts=experts, hidden_size=width, kv_channels=dim, num_key_value_heads=groups, num_experts_per_tok=2)
        moa = module.JetMoeMoA(cfg)
        moa.bias = nn.Parameter(torch.zeros(width))
        moa.requires_grad_(False)

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.moa = moa

            def forward(self, x: Tensor) -> Tensor:
                q, _, topology = self.moa.map(x[None])
                q = q[0].unflatten(-1, (groups, dim)).permute(1, 2, 0, 3)
                o = F.scaled_dot_product_attention(q, k[None].expand(2, -1, -1, -1), v[None].expand(2, -1, -1, -1), is_causal=True)
                return self.moa.reduce(o.permute(2, 0, 1, 3).flatten(2)[None], topology)[0]

        weights = {
            "moa.router.layer.weight": router, "moa.bias": x.new_zeros(width),
            "moa.input_linear.weight": wq.permute(0, 1, 3, 2).flatten(1, 2), "moa.output_linear.weight": wo.flatten(1, 2).transpose(1, 2),
        }  # fmt: skip
        return call(Both(), weights, x)

    agree("mixture_of_attention_heads", oracle, sizes={"c": 4, "f": 4, "d": 3, "e": 3, "n": 4})


# Attention ---------------------------------------------------------------------------------------------------------


def causal(i: int, j: int) -> Tensor:
    return torch.zeros(i, j, dtype=torch.float64).masked_fill(torch.arange(j) > torch.arange(i)[:, None], -math.inf)


def eager(name: str, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """An architecture's eager attention; [b,h,i,e] as the specs have it."""
    module.num_key_value_groups, module.training = q.shape[1] // k.shape[1], False
    return swap(in_float64(model(name).eager_attention_forward)(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5, **options)[0])


def test_softmax_attention() -> None:
    agree("softmax_attention", lambda q, k, v: eager("llama", config(), q, k, v, causal(q.shape[2], k.shape[2])))


def test_softcap() -> None:
    agree("softcap", lambda q, k, v: eager("gemma2", config(), q, k, v, causal(q.shape[2], k.shape[2]), softcap=2.0))


def test_attention_sink() -> None:
    agree("attention_sink", lambda q, k, v, sink: eager("gpt_oss", config(sinks=sink), q, k, v, causal(q.shape[2], k.shape[2])))


def test_kitchen_sink() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, sink: Tensor, doc: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        mask = causal(len(i), len(j)).masked_fill(i - j >= 3, -math.inf).expand(len(doc), 1, -1, -1)
        mask = mask.masked_fill(doc[:, None, :, None] != doc[:, None, None, :], -math.inf) - slope[:, None, None] * (i - j)
        return eager("gpt_oss", config(sinks=sink), q, k, v, mask)

    agree("kitchen_sink", oracle, params={"cap": 1e9}, tol=1e-7)


@pytest.mark.parametrize("function", ["chunked_causal_mask_function", "sliding_window_causal_mask_function"])
def test_mask_functions(function: str) -> None:
    masking = importlib.import_module("transformers.masking_utils")
    spec = "chunked" if function.startswith("chunked") else "sliding_window"
    made = getattr(masking, function)(3, torch.zeros(9, dtype=torch.long)) if spec == "chunked" else getattr(masking, function)(3)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        kept = made(torch.tensor(0), torch.tensor(0), i, j)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept)

    agree(spec, oracle)


@pytest.mark.parametrize(("spec", "architecture"), [("rope", "llama"), ("rope_interleaved", "cohere")])
def test_rope(spec: str, architecture: str) -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> Tensor:
        angles = torch.arange(q.shape[2], dtype=q.dtype)[:, None] * freq
        angles = torch.cat([angles, angles], -1) if spec == "rope" else angles.repeat_interleave(2, -1)
        qr, kr = in_float64(model(architecture).apply_rotary_pos_emb)(q, k, angles.cos()[None], angles.sin()[None])
        return F.scaled_dot_product_attention(qr, kr, v, is_causal=True)

    agree(spec, oracle)


@pytest.mark.parametrize("one_way", [False, True])
def test_t5_bias(one_way: bool) -> None:
    module = model("t5").T5Attention

    def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        at = in_float64(module._relative_position_bucket)(j - i, not one_way, bias.shape[1], 6)
        mask = bias[:, at] + (causal(len(i), len(j)) if one_way else 0.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(len(q), -1, -1, -1), scale=1.0)

    agree("t5_bias", oracle, sizes={"i": 12, "j": 12}, params={"causal": one_way})


def test_deberta() -> None:
    buckets, longest = 4, 9
    module = model("deberta_v2")

    def oracle(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor, pad: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        at = in_float64(module.make_log_bucket_position)(i - j, buckets, longest).long() + buckets - 1
        there = at.expand(*q.shape[:2], -1, -1)
        c2p = torch.gather(q @ kr.transpose(-1, -2), -1, there)
        p2c = torch.gather(k @ qr.transpose(-1, -2), -1, there.transpose(-1, -2)).transpose(-1, -2)
        s = ((q @ k.transpose(-1, -2)) + c2p + p2c) / math.sqrt(3 * q.shape[-1])
        s = s.masked_fill(~pad[:, None, None, :], -math.inf)
        return s.softmax(-1).nan_to_num() @ v

    agree("deberta", oracle)


def test_swin() -> None:
    module = model("swin")
    window, shift = 2, 1

    def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        b, heads, height, width, _ = q.shape
        cfg = config(window_size=window, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, qkv_bias=True,
                     mlp_ratio=1, hidden_act="gelu", _attn_implementation="eager")  # fmt: skip
        layer = module.SwinLayer(cfg, heads, (height, width), heads, shift_size=shift).eval()
        near = call(layer.attention.relative_position_bias, {"relative_position_bias_table": bias.flatten(1).T})

        def windows(x: Tensor) -> Tensor:
            rows = layer.cyclic_shift(x.permute(0, 2, 3, 1, 4).flatten(3))
            return swap(module.window_partition(rows, window).flatten(1, 2).unflatten(-1, (heads, -1)))

        mask = in_float64(layer.get_attn_mask)(height, width, torch.float64, "cpu")[:, None].repeat(b, 1, 1, 1) + near
        o, _ = in_float64(module.eager_attention_forward)(layer, windows(q), windows(k), windows(v), mask)
        rows = module.window_reverse(o.flatten(2).unflatten(1, (window, window)), window, height, width)
        return layer.cyclic_shift(rows, reverse=True).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)

    agree("swin", oracle)


def test_alibi_slopes() -> None:
    function = in_float64(model("mpt").build_mpt_alibi_tensor)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = function(q.shape[1], k.shape[2])[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + causal(q.shape[2], k.shape[2]))

    agree("alibi", oracle, sizes={"h": 4})


# Recurrences -------------------------------------------------------------------------------------------------------


def test_rwkv4() -> None:
    function = in_float64(model("rwkv").rwkv_linear_attention_cpu)
    agree("rwkv4", lambda k, v, decay, u: function(decay, u, k, v)[0])


def test_selective_scan() -> None:
    function = in_float64(_inner(model("mamba").mamba_selective_scan))

    def oracle(x: Tensor, dt: Tensor, a: Tensor, bb: Tensor, cc: Tensor, skip: Tensor) -> Tensor:
        return swap(function(swap(x), swap(dt), a, swap(bb), swap(cc), skip))

    agree("selective_scan", oracle)


@pytest.mark.parametrize("chunk", [2, 4])
def test_ssd(chunk: int) -> None:
    function = in_float64(_inner(model("mamba2").mamba2_chunk_scan))

    def oracle(x: Tensor, dt: Tensor, a: Tensor, bb: Tensor, c: Tensor, skip: Tensor) -> dict[str, Tensor]:
        y, state = function(x, dt, a, bb[:, :, None], c[:, :, None], chunk, D=skip, return_final_states=True)
        return {"y": y, "S": state}

    agree("ssd", oracle)


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without the decorator that would fetch a compiled kernel for it."""
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_gated_delta(name: str) -> None:
    function = in_float64(_inner(getattr(model("qwen3_next"), name)))

    def oracle(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return swap(function(*(swap(x) for x in (q, k, v, g, beta)))[0])

    agree("gated_delta", oracle)


def test_mlstm() -> None:
    function = getattr(model("xlstm"), "mlstm_recurrent_sequence_native", None)
    if function is None:
        pytest.skip("transformers uses the xlstm package where it is installed")
    agree("mlstm", lambda q, k, v, ig, fg: in_float64(function)(q, k, v, ig, fg, eps=0.0))


def test_rg_lru() -> None:
    scan = in_float64(model("recurrent_gemma").RecurrentGemmaRglru._rnn_scan)

    def oracle(x: Tensor, r: Tensor, i: Tensor, lam: Tensor) -> Tensor:
        log_a = -8 * torch.sigmoid(r) * F.softplus(lam)
        reset = (torch.arange(x.shape[1]) == 0)[None, :, None]
        entry = torch.where(reset, 1.0, torch.sqrt(1 - torch.exp(2 * log_a)))
        return scan(None, x * torch.sigmoid(i) * entry, log_a.exp(), reset, None, acc_dtype=torch.float64)[0]

    agree("rg_lru", oracle)


def test_lightning_alibi_slopes() -> None:
    minimax = model("minimax").MiniMaxLightningAttention

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stand_in = config(num_attention_heads=q.shape[1], layer_idx=3, num_hidden_layers=24)
        slopes = in_float64(minimax.get_slope_rate)(stand_in)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        decay = torch.where(i >= j, torch.exp(-slopes * (i - j)), 0.0)
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) * decay) @ v

    agree("lightning_alibi", oracle, tol=1e-6)  # it adds 1e-5 to the number of layers, too


# Quantised linear layers -------------------------------------------------------------------------------------------


def test_bitlinear() -> None:
    bitnet = importlib.import_module("transformers.integrations.bitnet")

    def oracle(x: Tensor, w: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            xq = in_float64(bitnet.ActQuant.apply)(F.rms_norm(x, x.shape[-1:], eps=1e-8))
            wq = in_float64(bitnet.WeightQuant.apply)(w)
        return xq @ wq

    agree("bitlinear", oracle)


@pytest.mark.parametrize(("spec", "act"), [("swiglu", "silu"), ("geglu", "gelu_pytorch_tanh"), ("reglu", "relu")])
def test_gated_mlp(spec: str, act: str) -> None:
    def oracle(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        cfg = config(hidden_size=x.shape[-1], intermediate_size=w_gate.shape[-1], hidden_act=act, mlp_bias=False)
        weights = {"gate_proj.weight": w_gate.T, "up_proj.weight": w_up.T, "down_proj.weight": w_down.T}
        return call(model("llama").LlamaMLP(cfg), weights, x)

    agree(spec, oracle)
