"""Tiny extents and params at which a spec says something: what the tests of all rooms draw their inputs for.

Axes that a row does not give get small extents that differ from each other; params that it does not give keep their
defaults.
"""

from __future__ import annotations

from typing import Any

from weft.compiler import extents
from weft.dsl import typed

USUAL = {"i": 5, "j": 5, "t": 5}
"""Queries, keys and steps, which many specs need in equal number."""

SIZES: dict[str, dict[str, Any]] = {
    "block_causal": {"sizes": {"i": 7, "j": 7}, "params": {"block": 3}},
    "block_diffusion": {"sizes": {"i": 12, "j": 12}, "params": {"block": 2, "length": 6}},
    "cats": {"params": {"threshold": 0.3}},
    "chunked": {"sizes": {"i": 7, "j": 7}, "params": {"chunk": 3}},
    "cope": {"sizes": {"n": 4}},
    "cosformer": {"params": {"longest": 8}},
    "cross_softmax_topk": {"params": {"k": 2}},
    "deberta": {"sizes": {"i": 7, "j": 7, "n": 7}, "params": {"buckets": 4, "longest": 9}},
    "dilated_window": {"sizes": {"i": 7, "j": 7}, "params": {"window": 4}},
    "ds_moe_sparse": {"sizes": {"n": 4}, "params": {"threshold": 0.2}},
    "dsa": {"params": {"top": 3}},
    "fake_quant": {"sizes": {"d": 4, "f": 3}},
    "flamingo": {"sizes": {"i": 6, "j": 6, "n": 3}, "params": {"tokens": 2}},
    "global_window": {"sizes": {"i": 8, "j": 8, "t": 8}, "params": {"window": 1}},
    "gru": {"sizes": {"m": 3, "n": 3}},
    "gru_torch": {"sizes": {"m": 3, "n": 3}},
    "hyena": {"sizes": {"n": 5}},
    "ids4": {"sizes": {"k": 3, "n": 3}},
    "in_context_blocks": {"sizes": {"i": 8, "j": 8, "t": 8}},
    "jetspec_training": {"sizes": {"i": 6, "j": 9}, "params": {"prefix": 3, "block": 2}},
    "kitchen_sink": {"sizes": {"i": 7, "j": 7, "t": 7}, "params": {"window": 3, "cap": 5.0}},
    "ksparse": {"params": {"k": 2}},
    "learned_queries": {"params": {"top": 2}},
    "lightning": {"params": {"layer": 3}},
    "lightning_alibi": {"params": {"layer": 3}},
    "log_linear": {"sizes": {"i": 7, "j": 7, "t": 7, "l": 4}},
    "lstm": {"sizes": {"m": 3, "n": 3}},
    "lstm_cifg": {"sizes": {"m": 3, "n": 3}},
    "lstm_coupled": {"sizes": {"m": 3, "n": 3}},
    "lstm_fgr": {"sizes": {"m": 3, "n": 3}},
    "lstm_nfg": {"sizes": {"m": 3, "n": 3}},
    "lstm_niaf": {"sizes": {"m": 3, "n": 3}},
    "lstm_nig": {"sizes": {"m": 3, "n": 3}},
    "lstm_noaf": {"sizes": {"m": 3, "n": 3}},
    "lstm_nog": {"sizes": {"m": 3, "n": 3}},
    "lstm_np": {"sizes": {"m": 3, "n": 3}},
    "m2rnn": {"sizes": {"c": 3, "e": 3}},
    "mesa_net": {"params": {"steps": 4}},
    "mixture_of_depths": {"params": {"capacity": 2}},
    "moba": {"sizes": {"i": 7, "j": 7}, "params": {"block": 2, "top": 2}},
    "moe_capacity": {"sizes": {"t": 7, "n": 3}, "params": {"capacity": 3}},
    "moe_deepseek": {"sizes": {"n": 3}, "params": {"groups": 3, "k": 3, "k_groups": 2}},
    "moe_deepseek_v2": {"sizes": {"n": 2}, "params": {"groups": 3, "k": 3, "k_groups": 2}},
    "moe_expert_choice": {"params": {"capacity": 2}},
    "moe_gpt_oss": {"params": {"k": 2, "limit": 1.0}},
    "moe_mixtral": {"sizes": {"n": 4}},
    "moe_null": {"sizes": {"a": 6, "n": 4}, "params": {"k": 3}},
    "moe_qwen": {"sizes": {"n": 4}, "params": {"k": 2}},
    "moe_relu2": {"sizes": {"n": 4}},
    "moe_rounded": {"sizes": {"t": 7, "n": 3}, "params": {"tile": 2}},
    "moe_skywork": {"sizes": {"n": 4}},
    "moe_top_p": {"sizes": {"n": 4}, "params": {"mass": 0.6}},
    "multi_token": {"sizes": {"a": 2, "c": 3}},
    "natten1d": {"sizes": {"i": 9, "j": 9}, "params": {"window": 3}},
    "natten2d": {"sizes": {"y": 4, "yk": 4, "x": 5, "xk": 5}, "params": {"window": 3}},
    "natten3d": {"sizes": {"b": 1, "h": 2, "z": 3, "zk": 3, "y": 4, "yk": 4, "x": 4, "xk": 4}, "params": {"window": 3, "depth": 2}},
    "nsa": {"sizes": {"i": 9, "j": 9}, "params": {"block": 2, "blocks": 4}},
    "pyramid_infer": {"sizes": {"i": 9, "j": 9}, "params": {"recent": 3, "sinks": 1, "top": 4}},
    "rnn": {"sizes": {"m": 3, "n": 3}},
    "shaw": {"sizes": {"i": 7, "j": 7, "n": 3}},
    "sliding_window": {"params": {"window": 3}},
    "slstm": {"sizes": {"m": 3, "n": 3}},
    "softcap": {"params": {"cap": 2.0}},
    "spacetime": {"sizes": {"f": 3, "g": 3, "n": 5}},
    "sta2d": {"sizes": {"i": 18, "j": 18, "b": 1, "h": 2}, "params": {"tile": 2, "tiles_x": 3, "tiles_y": 3, "wy": 1}},
    "sta3d": {
        "sizes": {"i": 36, "j": 36, "b": 1, "h": 2},
        "params": {"tile": 2, "tiles_t": 2, "tiles_y": 3, "tiles_x": 3, "wt": 1, "wx": 1},
    },
    "streaming": {"sizes": {"i": 7, "j": 7}, "params": {"sinks": 1, "window": 3}},
    "svg_spatial": {"sizes": {"i": 8, "j": 8}, "params": {"prompt": 1, "sink": 2, "width": 2}},
    "svg_temporal": {"sizes": {"i": 8, "j": 8}, "params": {"prompt": 2, "frame": 3, "width": 1}},
    "swin": {"sizes": {"y": 4, "yk": 4, "x": 6, "xk": 6, "r": 3, "c": 3}, "params": {"window": 2, "shift": 1}},
    "switch_head": {"sizes": {"m": 5, "n": 4}},
    "t5_bias": {"sizes": {"i": 7, "j": 7, "n": 8}, "params": {"longest": 6}},
    "titans": {"sizes": {"t": 6, "d": 3, "e": 3}, "params": {"chunk": 3}},
    "topk_softmax": {"params": {"k": 2}},
    "transformer_xl": {"sizes": {"n": 5}},
    "tree": {"sizes": {"i": 4, "j": 6, "n": 4}, "params": {"prefix": 2}},
    "ttt_linear": {"sizes": {"n": 3, "d": 3, "e": 3}, "params": {"batch": 3}},
    "vsa": {"sizes": {"i": 7, "j": 7}, "params": {"tile": 2, "top": 2}},
}


def tiny(kernel: typed.Kernel, spec: str) -> tuple[dict[str, int], dict[str, bool | int | float]]:
    """The extents of all axes of a spec's kernel at a tiny size, and its complete params."""
    row = SIZES.get(spec, {})
    params = extents.bind_params(kernel, row.get("params", {}))
    sizes = {axis: 2 + n % 4 for n, axis in enumerate(extents.free_axes(kernel))}
    sizes |= {axis: n for axis, n in USUAL.items() if axis in sizes} | row.get("sizes", {})
    return extents.complete(kernel, params, sizes), params
