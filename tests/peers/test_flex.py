"""Against FlexAttention in eager mode with the masks and score modifications of attention-gym.

FlexAttention has no backward on the CPU: its forward is compared directly, and gradients go through the same
modifications evaluated densely.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, flex_attention

from tests.peers.oracle import agree, draw

masks = pytest.importorskip("attn_gym.masks", reason="attn-gym is not installed")
mods = pytest.importorskip("attn_gym.mods", reason="attn-gym is not installed")

Mod = Callable[..., Tensor]


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mod | None = None, score: Mod | None = None) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, dense; asserts that FlexAttention gives the same numbers. Grouped heads are repeated."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    b, h, i, _ = q.shape
    j = k.shape[2]
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if score is not None:
        s = over_pairs(score, s)
    if mask is not None:
        s = s.masked_fill(~create_mask(mask, b, h, i, j, device="cpu"), -math.inf)
    lse = torch.logsumexp(s, -1)
    weights = torch.where(lse[..., None] > -math.inf, torch.exp(s - torch.where(lse > -math.inf, lse, 0.0)[..., None]), 0.0)
    o = weights @ v
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = None if mask is None else create_block_mask(mask, b, h, i, j, device="cpu", BLOCK_SIZE=max(i, j))
        direct = flex_attention(q.detach(), k.detach(), v.detach(), score_mod=score, block_mask=block)
    assert torch.allclose(direct, o, atol=1e-12)
    return o, lse


def over_pairs(score: Mod, s: Tensor) -> Tensor:
    """A score modification applied to every element of [b,h,i,j]."""
    mapped = score
    for dims in ((0, None, None, None, 0), (0, None, None, 0, None), (0, None, 0, None, None), (0, 0, None, None, None)):
        mapped = torch.vmap(mapped, in_dims=dims)
    return mapped(s, *(torch.arange(n) for n in s.shape))


MASKS: dict[str, Callable[[], Mod]] = {
    "dilated_window": lambda: masks.generate_dilated_sliding_window(4, 2),
    "sliding_window": lambda: masks.generate_sliding_window(2),  # counts the keys before the query's own
    "sta2d": lambda: masks.generate_sta_mask_mod_2d((3, 6), (1, 6), (1, 2)),
    "block_diffusion": lambda: masks.generate_block_diffusion_mask(6, 2),
    "chunked": lambda: masks.batchify_mask_mod(masks.causal_mask, 3),
    "jetspec_training": lambda: masks.generate_jetspec_training_mask_mod(3, 2),
    "svg_spatial": lambda: masks.generate_spatial_head_mask_mod(1, 4, 1, 2, attn_sink=True, round_width=1),
    "svg_temporal": lambda: masks.generate_temporal_head_mask_mod(2, 2, 3, 1),
    "softmax_attention": lambda: masks.causal_mask,
    "full": lambda: lambda b, h, i, j: i >= 0,
}
"""Masks of attention-gym with the params of the specs' tiny sizes."""


@pytest.mark.parametrize("spec", sorted(MASKS))
def test_mask(spec: str) -> None:
    agree(spec, lambda q, k, v: flex(q, k, v, MASKS[spec]())[0])


def test_log_sum_exp() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        o, lse = flex(q, k, v, masks.causal_mask)
        return {"o": o, "l": lse}

    agree("softmax_attention", oracle)


def test_sta2d_with_a_wide_window() -> None:
    mask = masks.generate_sta_mask_mod_2d((6, 8), (6, 6), (2, 2))
    params = {"tile": 4, "tiles_x": 4, "tiles_y": 3, "wx": 3, "wy": 3}
    agree("sta2d", lambda q, k, v: flex(q, k, v, mask)[0], sizes={"i": 48, "j": 48}, params=params)


def test_sta3d() -> None:
    mask = masks.generate_sta_mask_mod_3d((2, 6, 3), (1, 6, 1), (1, 2, 1))
    agree("sta3d", lambda q, k, v: flex(q, k, v, mask)[0])


def test_natten2d() -> None:
    # attention-gym clamps rows with the width and columns with the height: only square canvases are right there.
    mask = masks.generate_natten(5, 5, 3, 3)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), mask)[0].unflatten(2, (5, 5))

    agree("natten2d", oracle, sizes={"y": 5, "yk": 5, "x": 5, "xk": 5})


def test_prefix_lm() -> None:
    x = draw("prefix_lm") | {"prefix": torch.tensor([3, 3])}
    mask = masks.generate_prefix_lm_mask(3)
    agree("prefix_lm", lambda q, k, v, prefix: flex(q, k, v, mask)[0], inputs={n: y[:2] for n, y in x.items()})


def test_global_window() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, everywhere: Tensor) -> Tensor:
        return flex(q, k, v, masks.generate_global_sliding_window(1, everywhere))[0]

    x = draw("global_window", sizes={"i": 8, "j": 8, "t": 8})
    agree("global_window", oracle, inputs=x | {"everywhere": torch.arange(8) % 5 == 1})


def test_tree() -> None:
    ancestors = masks.build_tree_ancestor_matrix([-1, 0, 0, 1], device="cpu")

    def oracle(q: Tensor, k: Tensor, v: Tensor, ancestor: Tensor) -> Tensor:
        return flex(q, k, v, masks.generate_jetspec_tree_causal_mask_mod(2, ancestor))[0]

    agree("tree", oracle, inputs=draw("tree") | {"ancestor": ancestors})


OFFSETS = torch.tensor([0, 3, 4, 8])


@pytest.mark.parametrize("packed", [False, True])
def test_document_mask(packed: bool) -> None:
    x = draw("document_mask", sizes={"i": 8, "j": 8, "t": 8})
    doc = torch.repeat_interleave(torch.arange(3), OFFSETS.diff()).expand(x["q"].shape[0], -1)
    mask = masks.generate_packed_causal_doc_mask_mod(OFFSETS) if packed else masks.generate_doc_mask_mod(masks.causal_mask, OFFSETS)
    agree("document_mask", lambda q, k, v, doc: flex(q, k, v, mask)[0], inputs=x | {"doc": doc})


def test_shared_prefix() -> None:
    x = draw("shared_prefix", sizes={"i": 8, "j": 8, "t": 8})
    doc = torch.repeat_interleave(torch.arange(3), OFFSETS.diff()).expand(x["q"].shape[0], -1)
    mask = masks.generate_shared_prefix_mask_mod(OFFSETS, torch.tensor([0, 0, 0]))
    agree("shared_prefix", lambda q, k, v, doc, prompt: flex(q, k, v, mask)[0], inputs=x | {"doc": doc, "prompt": torch.zeros_like(doc)})


def test_flamingo() -> None:
    x = draw("flamingo")
    intervals = torch.tensor([[1, 3], [3, 5], [5, 6]])
    start, stop = (intervals[:, n].expand(x["q"].shape[0], -1) for n in (0, 1))
    mask = masks.generate_vision_cross_attention_mask_mod(intervals, 2)
    agree("flamingo", lambda q, k, v, start, stop: flex(q, k, v, mask)[0], inputs=x | {"start": start, "stop": stop})


def test_vsa_tile_mask() -> None:
    tile, top = 2, 2

    def oracle(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        tiles = q.shape[2] // tile
        qc, kc, vc = (x.unflatten(2, (tiles, tile)).mean(3) for x in (q, k, v))
        scores = qc @ kc.transpose(-1, -2) / math.sqrt(q.shape[-1])
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(top).indices, True)
        fine = flex(q, k, v, lambda b, h, i, j: chosen[b, h, i // tile, j // tile])[0]
        coarse = (scores.softmax(-1) @ vc).repeat_interleave(tile, 2)
        return fine + gate[..., None] * coarse

    agree("vsa", oracle, sizes={"i": 8, "j": 8})


def test_moba_mask() -> None:
    block, top = 2, 2

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = k.shape[2]
        means = torch.stack([k[:, :, s : s + block].mean(2) for s in range(0, n, block)], 2)
        own, blocks = torch.arange(q.shape[2])[:, None] // block, torch.arange(means.shape[2])
        scores = (q @ means.transpose(-1, -2)).masked_fill(blocks >= own, -math.inf)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(top - 1).indices, True) & (blocks < own)
        chosen = chosen | (blocks == own)
        return flex(q, k, v, and_masks(masks.causal_mask, lambda b, h, i, j: chosen[b, h, i, j // block]))[0]

    agree("moba", oracle)


def test_alibi() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex(q, k, v, masks.causal_mask, mods.generate_alibi_bias(q.shape[1]))[0]

    # attention-gym computes the slopes in float32.
    agree("alibi", oracle, sizes={"h": 4})
    agree("alibi", oracle, sizes={"h": 3}, tol=1e-6)


def test_alibi_slopes() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return flex(q, k, v, masks.causal_mask, lambda s, b, h, i, j: s - slope[h] * (i - j))[0]

    agree("alibi_slopes", oracle)


def test_softcap() -> None:
    agree("softcap", lambda q, k, v: flex(q, k, v, masks.causal_mask, mods.generate_tanh_softcap(2.0))[0])


def test_graphormer() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dist: Tensor) -> Tensor:
        return flex(q, k, v, None, mods.generate_graphormer_spatial_bias(bias, dist))[0]

    agree("graphormer", oracle)


def activation(q: Tensor, k: Tensor, v: Tensor, function: Callable[[Tensor], Tensor], causal: bool) -> Tensor:
    """A plain activation in place of softmax, by attention-gym's way of undoing the softmax."""
    o, lse = flex(q, k, v, masks.causal_mask if causal else None, mods.generate_activation_score_mod(function))
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return mods.undo_softmax(o, lse, v.cumsum(-2) if causal else v.sum(-2, keepdim=True))


def test_gelu_attention() -> None:
    agree("gelu_attention", lambda q, k, v: activation(q, k, v, F.gelu, causal=False))


def test_relu2_attention() -> None:
    agree("relu2_attention", lambda q, k, v: activation(q, k, v, lambda s: F.relu(s) ** 2, causal=True) / k.shape[2])


def test_sigmoid_attention() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = math.log(k.shape[2])
        return activation(q, k, v, lambda s: torch.sigmoid(s - n), causal=True)

    agree("sigmoid_attention", oracle)


def test_kitchen_sink() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, sink: Tensor, doc: Tensor) -> Tensor:
        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i - j < 3) & (j <= i) & (doc[b, i] == doc[b, j])

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return 5.0 * torch.tanh(s / 5.0) - slope[h] * (i - j)

        o, lse = flex(q, k, v, mask, score)
        return o * torch.sigmoid(lse - sink[:, None])[..., None]

    agree("kitchen_sink", oracle)


SCORES: dict[str, Callable[[dict[str, Tensor]], Mod]] = {
    "row_col_bias": lambda x: lambda s, b, h, i, j: s + x["row"][b, h, i] - x["col"][b, h, j],
    "kerple": lambda x: lambda s, b, h, i, j: s - x["a"][h] * torch.log1p(x["c"][h] * (i - j).clamp(min=0)),
    "log_n": lambda x: lambda s, b, h, i, j: s * x["scale"][h] * torch.log(i + 1.0).double(),
}
"""Causal score modifications written here for FlexAttention to run."""


@pytest.mark.parametrize("spec", sorted(SCORES))
def test_score(spec: str) -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> Tensor:
        return flex(q, k, v, masks.causal_mask, SCORES[spec](rest))[0]

    agree(spec, oracle, tol=1e-6 if spec == "log_n" else 1e-9)


def test_pair_bias() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
        return flex(q, k, v, lambda b, h, i, j: pad[b, j], lambda s, b, h, i, j: s + bias[b, h, i, j])[0]

    agree("pair_bias", oracle)


def test_sandwich() -> None:
    heads, count = 4, 3
    score = mods.generate_sandwich_bias(heads, 5, d_bar=2 * count)
    x = draw("sandwich", sizes={"h": heads, "f": count})
    x["freq"] = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    x["slope"] = count * heads / (8 * torch.arange(1, heads + 1, dtype=torch.float64))
    agree("sandwich", lambda q, k, v, freq, slope: flex(q, k, v, masks.causal_mask, score)[0], inputs=x,
          constants=("freq", "slope"), tol=1e-6)  # fmt: skip
