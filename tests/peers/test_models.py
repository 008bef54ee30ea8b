"""Small language models of transformers with weft's layer in the place of their experts: the same first 20 losses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft.specs

pytest.importorskip("transformers", reason="transformers is not installed")

Forward = Callable[[Any, Tensor], Any]
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", "MixtralSparseMoeBlock", {"num_local_experts": 6}),
    "qwen2_moe": ("Qwen2Moe", "Qwen2MoeSparseMoeBlock",
                  {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3MoE",
                    {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2,
                     "num_experts_per_tok": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16,
                     "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}),
    "gpt_oss": ("GptOss", "GptOssMLP", {"num_local_experts": 6, "head_dim": 8, "pad_token_id": 0}),
    "jetmoe": ("JetMoe", "JetMoeMoE", {"num_local_experts": 6, "kv_channels": 8, "num_hidden_layers": 2}),
}  # fmt: skip
"""Architecture -> the prefix of its classes, the module that is replaced, and what its configuration has besides."""


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def halves(joined: Tensor) -> tuple[Tensor, Tensor]:
    """[n,2f,d], as transformers stores gate and up, as two of [n,d,f]."""
    gate, up = joined.chunk(2, 1)
    return gate.mT, up.mT


def mixtral(self: Any, x: Tensor) -> Tensor:
    w1, w3 = halves(self.experts.gate_up_proj)
    y = weft.specs.moe_mixtral(rows(x), self.gate.weight, w1, w3, self.experts.down_proj.mT, k=self.gate.top_k, strict=True)
    return y.view_as(x)


def qwen2_moe(self: Any, x: Tensor) -> Tensor:
    w1, w3 = halves(self.experts.gate_up_proj)
    s, gate = self.shared_expert, self.shared_expert_gate.weight[0]
    shared = (s.gate_proj.weight.T, s.up_proj.weight.T, s.down_proj.weight.T)
    w2 = self.experts.down_proj.mT
    return weft.specs.moe_qwen(rows(x), self.gate.weight, w1, w3, w2, *shared, gate, k=self.gate.top_k, strict=True).view_as(x)


def deepseek_v3(self: Any, x: Tensor) -> Tensor:
    g, s = self.gate, self.shared_experts
    shared = (s.gate_proj.weight.T, s.up_proj.weight.T, s.down_proj.weight.T)
    chosen = {"groups": g.num_group, "k": g.top_k, "k_groups": g.topk_group, "scaling": g.routed_scaling_factor}
    experts = (*halves(self.experts.gate_up_proj), self.experts.down_proj.mT)
    y = weft.specs.moe_deepseek(rows(x), g.weight, g.e_score_correction_bias, *experts, *shared, **chosen, strict=True)
    return y.view_as(x)


def gpt_oss(self: Any, x: Tensor) -> tuple[Tensor, None]:
    e, r = self.experts, self.router
    weights = (r.weight, r.bias, e.gate_up_proj, e.gate_up_proj_bias, e.down_proj, e.down_proj_bias)
    return weft.specs.moe_gpt_oss(rows(x), *weights, k=r.top_k, limit=e.limit, strict=True).view_as(x), None


def jetmoe(self: Any, x: Tensor) -> Tensor:
    w1, w3 = halves(self.input_linear.weight)
    y = weft.specs.moe_mixtral(rows(x), self.router.layer.weight, w1, w3, self.output_linear.weight.mT, k=self.router.top_k, strict=True)
    return y.view_as(x) + self.bias


FORWARDS: dict[str, Forward] = {
    "mixtral": mixtral, "qwen2_moe": qwen2_moe, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss, "jetmoe": jetmoe,
}  # fmt: skip


def losses(architecture: str, *, ours: bool) -> list[float]:
    """20 steps of AdamW on random text, the experts' layers replaced by ours or not."""
    prefix, replaced, values = MODELS[architecture]
    package = importlib.import_module(f"transformers.models.{architecture}")
    modelling = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    torch.manual_seed(0)
    made: nn.Module = getattr(modelling, f"{prefix}ForCausalLM")(getattr(package, f"{prefix}Config")(**SMALL | values))
    layers = [m for m in made.modules() if isinstance(m, getattr(modelling, replaced))]
    assert layers
    called = []

    def forward(self: Any, x: Tensor) -> Any:
        called.append(self)
        return FORWARDS[architecture](self, x)

    for layer in layers if ours else ():
        layer.forward = forward.__get__(layer)  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    text = torch.randint(61, (20, 3, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for tokens in text:
        loss = made(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert len(called) == (20 * len(layers) if ours else 0)
    return found


@pytest.mark.parametrize("architecture", MODELS)
def test_a_layer_in_a_model_trains_alike(architecture: str) -> None:
    ours, theirs = losses(architecture, ours=True), losses(architecture, ours=False)
    assert theirs[-1] != theirs[0]
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) < 1e-4
