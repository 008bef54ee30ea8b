"""The shipped kernels, which of them must be fused, and which tests of them ``make test`` leaves to ``make test-all``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import weft
from weft.runtime.kernel import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterable

SPECS = Path(__file__).parents[2] / "specs"

REQUIRED = tuple(
    "softmax_attention full alibi softcap sliding_window dilated_window global_window prefix_lm kitchen_sink sigmoid_attention "
    "gelu_attention relu2_attention qk_norm rope mla mla_full differential shaped fastgen natten1d natten2d natten3d sta2d hierarchical "
    "spacetime deberta graphormer t5_bias tree in_context_blocks maxsim based retention".split()
)
"""Fused whole, in both directions."""

RECURRENT = tuple(
    "linear_attn linear_plain lightning lightning_alibi simple_gla gla gla_bidirectional hgrn hgrn2 mlgru mlgru_released selective_scan "
    "ssd rwkv4 rwkv5 rwkv6 rwkv7 delta_rule gated_delta gated_delta_product kda gdn2 iplr comba momentum_delta mlstm mlstm_sigmoid slstm "
    "lstm lstm_np lstm_nig lstm_nfg lstm_nog lstm_niaf lstm_noaf lstm_cifg lstm_fgr lstm_coupled gru gru_torch min_gru min_lstm rg_lru rnn "
    "rnn_s4 ids4 m2rnn gsa abc h3 short_conv titans ttt_linear mesa_net deltaformer path path_fox".split()
)
"""Recurrences and short convolutions, fused whole in both directions."""

EXPERTS = tuple(
    "moe_swiglu moe_mixtral moe_qwen moe_skywork moe_switch moe_llama4 moe_deepseek moe_deepseek_v2 moe_expert_choice moe_capacity "
    "moe_gpt_oss moe_relu moe_relu2 moe_rounded moe_top_p moe_null ds_moe_sparse ds_moe_dense sigma_moe lora_mixture switch_head "
    "mixture_of_attention_heads multi_lora swiglu geglu reglu relu2_mlp cats ksparse bitlinear bitlinear_glu fake_quant".split()
)
"""Mixtures of experts and feed-forward layers, fused whole in both directions."""

OTHERS = tuple(p.stem for p in sorted(SPECS.glob("*.weft")) if p.stem not in REQUIRED)


@cache
def kernel(name: str) -> Kernel:
    """The main kernel of a shipped spec."""
    found = getattr(weft.load(SPECS / f"{name}.weft"), name)
    assert isinstance(found, Kernel)
    return found


def every(step: int, cases: Iterable[str], first: int = 0) -> list[Any]:
    """What ``pytest.mark.parametrize`` takes: every so many cases, beginning with the one at ``first``; the others are marked as slow."""
    return [case if n % step == first else pytest.param(case, marks=pytest.mark.slow) for n, case in enumerate(cases)]
