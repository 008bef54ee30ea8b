"""What `weft bench` compares attention variants with: the same output from eager PyTorch, SDPA and compiled FlexAttention.

A row of ``VARIANTS`` writes one spec's mask and score in FlexAttention's terms. The eager peer evaluates the same on whole
matrices, unless ``eager_attention`` has it by hand; SDPA is entered where a mask is all there is, densely stored except for
the causal one. Some need a little around the call: normalised queries, a rotation, an extra key for a sink. FlexAttention
compiled for CPUs has no backward pass.

FlexAttention has no row for `maxsim`: it gives back no maximum on CPUs, and nowhere the gradient of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from benchmarks.eager_attention import HAND_WRITTEN, Forward, Given, attend, bucket_deberta, bucket_t5, inside
from weft.runtime.bench import Peer

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One spec as FlexAttention sees it. ``qkv`` makes (b, h, position, feature) tensors, ``finish`` the spec's output of theirs.

    ``score_of`` makes the score in every call, where it reads products of these queries and keys. ``causal`` says that ``mask``
    is the plain causal one.
    """

    mask: MaskMod | None = None
    score: ScoreMod | None = None
    score_of: Callable[[Tensor, Tensor], ScoreMod] | None = None
    qkv: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    scale: float | None = None
    causal: bool = False


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


CAUSAL = Variant(causal, causal=True)


def alibi(given: Given) -> Variant:
    heads = given.extents["h"]
    return Variant(causal, lambda s, b, h, i, j: s + (j - i) * torch.exp2(-8.0 * (h + 1) / heads))


def alibi_slopes(given: Given) -> Variant:
    slope = given.learned("slope")
    return Variant(causal, lambda s, b, h, i, j: s - slope[h] * (i - j))


def softcap(given: Given) -> Variant:
    cap = given.params["cap"]
    return Variant(causal, lambda s, b, h, i, j: cap * torch.tanh(s / cap))


def sliding_window(given: Given) -> Variant:
    window = given.params["window"]
    return Variant(lambda b, h, i, j: (i >= j) & (i - j < window))


def dilated_window(given: Given) -> Variant:
    window, dilation = given.params["window"], given.params["dilation"]
    return Variant(lambda b, h, i, j: ((i - j).abs() <= window) & ((i - j).abs() % dilation == 0))


def global_window(given: Given) -> Variant:
    window, everywhere = given.params["window"], given["everywhere"]
    return Variant(lambda b, h, i, j: ((i - j).abs() <= window) | everywhere[i] | everywhere[j])


def prefix_lm(given: Given) -> Variant:
    prefix = given["prefix"]
    return Variant(lambda b, h, i, j: (j <= i) | (j < prefix[b]))


def document_mask(given: Given) -> Variant:
    doc = given["doc"]
    return Variant(lambda b, h, i, j: (i >= j) & (doc[b, i] == doc[b, j]))


def in_context_blocks(given: Given) -> Variant:
    block, test = given["block"], given["test"]
    return Variant(lambda b, h, i, j: (i >= j) & ((block[b, i] == block[b, j]) | (i >= test[b])))


def chunked(given: Given) -> Variant:
    chunk = given.params["chunk"]
    return Variant(lambda b, h, i, j: (i >= j) & (i // chunk == j // chunk))


def block_causal(given: Given) -> Variant:
    block = given.params["block"]
    return Variant(lambda b, h, i, j: j // block <= i // block)


def streaming(given: Given) -> Variant:
    sinks, window = given.params["sinks"], given.params["window"]
    return Variant(lambda b, h, i, j: (i >= j) & ((j < sinks) | (i - j < window)))


def fastgen(given: Given) -> Variant:
    special, keep, local = given["special"], given["keep"], given["local"]
    return Variant(lambda b, h, i, j: (i >= j) & (special[b, j] | keep[b, h, j] | (i - j <= local[h])))


def natten1d(given: Given) -> Variant:
    window, dilation, size = given.params["window"], given.params["dilation"], given.extents["j"]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        group = i % dilation
        length = (size - group + dilation - 1) // dilation
        start = torch.minimum((i // dilation - window // 2).clamp(min=0), length - window)
        return (j % dilation == group) & (j // dilation >= start) & (j // dilation - start < window)

    return Variant(mask)


def natten2d(given: Given) -> Variant:
    window, high, wide = given.params["window"], given.extents["y"], given.extents["x"]

    def near(q: Tensor, k: Tensor, size: int) -> Tensor:
        start = (q - window // 2).clamp(0, size - window)
        return (k >= start) & (k - start < window)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return near(i // wide, j // wide, high) & near(i % wide, j % wide, wide)

    def flat() -> tuple[Tensor, Tensor, Tensor]:
        return given["q"].flatten(2, 3), given["k"].flatten(2, 3), given["v"].flatten(2, 3)

    return Variant(mask, qkv=flat, finish=lambda o: o.unflatten(2, (high, wide)))


def natten3d(given: Given) -> Variant:
    window, depth = given.params["window"], given.params["depth"]
    deep, high, wide = given.extents["z"], given.extents["y"], given.extents["x"]

    def near(q: Tensor, k: Tensor, size: int, kept: int) -> Tensor:
        start = (q - kept // 2).clamp(0, size - kept)
        return (k >= start) & (k - start < kept)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        plane = near(i // (high * wide), j // (high * wide), deep, depth)
        row = near(i // wide % high, j // wide % high, high, window)
        return plane & row & near(i % wide, j % wide, wide, window)

    def flat() -> tuple[Tensor, Tensor, Tensor]:
        return given["q"].flatten(2, 4), given["k"].flatten(2, 4), given["v"].flatten(2, 4)

    return Variant(mask, qkv=flat, finish=lambda o: o.unflatten(2, (deep, high, wide)))


def sta2d(given: Given) -> Variant:
    tile, tiles_x, tiles_y, wx, wy = (given.params[p] for p in ("tile", "tiles_x", "tiles_y", "wx", "wy"))

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ti, tj = i // tile, j // tile
        cx = (ti % tiles_x).clamp(wx // 2, tiles_x - 1 - wx // 2)
        cy = (ti // tiles_x).clamp(wy // 2, tiles_y - 1 - wy // 2)
        return ((cx - tj % tiles_x).abs() <= wx // 2) & ((cy - tj // tiles_x).abs() <= wy // 2)

    return Variant(mask)


def tree(given: Given) -> Variant:
    prefix, ancestor = given.params["prefix"], given["ancestor"]
    nodes = ancestor.shape[1]
    return Variant(lambda b, h, i, j: (j < prefix) | ((j - prefix < nodes) & ancestor[i, (j - prefix).clamp(0, nodes - 1)]))


def t5_bias(given: Given) -> Variant:
    """The bias of every distance, so that a score reads one number."""
    bias, one_sided, keys = given.learned("bias"), given.params["causal"], given.extents["j"]
    distances = torch.arange(1 - keys, given.extents["i"], device=bias.device)
    table = bias[:, bucket_t5(distances, bias.shape[1], given.params["longest"], one_sided)]
    return Variant(causal if one_sided else None, lambda s, b, h, i, j: s + table[h, i - j + keys - 1], scale=1.0)


def graphormer(given: Given) -> Variant:
    bias, dist = given.learned("bias"), given["dist"]
    return Variant(None, lambda s, b, h, i, j: s + bias[h, dist[b, i, j]])


def row_col_bias(given: Given) -> Variant:
    row, col = given.learned("row"), given.learned("col")
    return Variant(causal, lambda s, b, h, i, j: s + row[b, h, i] - col[b, h, j])


def kerple(given: Given) -> Variant:
    a, c = given.learned("a"), given.learned("c")
    return Variant(causal, lambda s, b, h, i, j: s - a[h] * torch.log1p(c[h] * (i - j).clamp(min=0)))


def log_n(given: Given) -> Variant:
    scale = given.learned("scale")
    return Variant(causal, lambda s, b, h, i, j: s * scale[h] * torch.log((i + 1).to(s.dtype)))


def qk_norm(given: Given) -> Variant:
    def normalised() -> tuple[Tensor, Tensor, Tensor]:
        width = (given.extents["d"],)
        q = F.layer_norm(given["q"], width, given["gq"], given["bq"])
        return q, F.layer_norm(given["k"], width, given["gk"], given["bk"]), given["v"]

    return Variant(causal, qkv=normalised, causal=True)


def rope(given: Given) -> Variant:
    def rotated(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * given["freq"]
        cos, sin = torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(),) * 2, -1)
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    return Variant(causal, qkv=lambda: (rotated(given["q"]), rotated(given["k"]), given["v"]), causal=True)


def mla(given: Given) -> Variant:
    def joined() -> tuple[Tensor, Tensor, Tensor]:
        latent = given["c"][:, None]
        return torch.cat((given["ql"], given["qr"]), -1), torch.cat((latent, given["kr"][:, None]), -1), latent

    return Variant(causal, qkv=joined, scale=given.params["scale"], causal=True)


def mla_full(given: Given) -> Variant:
    def joined() -> tuple[Tensor, Tensor, Tensor]:
        kr = given["kr"][:, None].expand(-1, given.extents["h"], -1, -1)
        return torch.cat((given["qc"], given["qr"]), -1), torch.cat((given["kc"], kr), -1), given["v"]

    return Variant(causal, qkv=joined, causal=True)


def gated_attention(given: Given) -> Variant:
    return Variant(causal, causal=True, finish=lambda o: torch.sigmoid(given["gate"]) * o)


def differential(given: Given) -> Variant:
    """Both softmaxes as heads of one call."""

    def stacked() -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.cat((given["q1"], given["q2"]), 1),
            torch.cat((given["k1"], given["k2"]), 1),
            torch.cat((given["v"], given["v"]), 1),
        )

    def difference(o: Tensor) -> Tensor:
        first, second = o.chunk(2, 1)
        return first - given["lam"][:, None, None] * second

    return Variant(causal, qkv=stacked, finish=difference, causal=True)


def kitchen_sink(given: Given) -> Variant:
    """The sink is a key of its own, behind the others, with a zero value."""
    window, cap, keys = given.params["window"], given.params["cap"], given.extents["j"]
    slope, sink, doc = given.learned("slope"), given.learned("sink"), given["doc"]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = j.clamp(max=keys - 1)
        return (j == keys) | ((i >= j) & (i - j < window) & (doc[b, i] == doc[b, inside]))

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j == keys, sink[h], cap * torch.tanh(s / cap) - slope[h] * (i - j))

    return Variant(mask, score, qkv=lambda: with_sink(given))


def attention_sink(given: Given) -> Variant:
    keys, sink = given.extents["j"], given.learned("sink")
    return Variant(
        lambda b, h, i, j: (i >= j) | (j == keys), lambda s, b, h, i, j: torch.where(j == keys, sink[h], s), qkv=lambda: with_sink(given)
    )


def softmax_one(given: Given) -> Variant:
    keys = given.extents["j"]
    return Variant(lambda b, h, i, j: (i >= j) | (j == keys), qkv=lambda: with_sink(given))


def shaped(given: Given) -> Variant:
    def finish(o: Tensor) -> Tensor:
        v, rows = given["v"], given.extents["i"]
        alpha, beta, gamma = (given[name][:, None, None] for name in ("alpha", "beta", "gamma"))
        mean = v.cumsum(2)[:, :, :rows] / torch.arange(1, rows + 1, device=v.device, dtype=v.dtype)[:, None]
        return beta * o + alpha * v[:, :, :rows] - gamma * mean

    return Variant(causal, causal=True, finish=finish)


def hierarchical(given: Given) -> Variant:
    """The extra keys stand behind the others."""
    keys, see = given.extents["j"], given["see"]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j < keys, j <= i, see[b, i, (j - keys).clamp(min=0)])

    def joined() -> tuple[Tensor, Tensor, Tensor]:
        return given["q"], torch.cat((given["k"], given["kx"]), 2), torch.cat((given["v"], given["vx"]), 2)

    return Variant(mask, qkv=joined)


def spacetime(given: Given) -> Variant:
    """Pixels are entries of the batch."""
    bias, video = given.learned("bias"), given["video"]
    high, wide, frames = given.extents["y"], given.extents["x"], given.extents["g"]
    pixels = high * wide
    table = F.pad(bias, (0, 1))
    at = inside(torch.arange(1 - frames, given.extents["f"], device=bias.device) + frames - 1, bias.shape[1])

    def flat() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (given[name].permute(0, 2, 3, 4, 1, 5).flatten(0, 2) for name in ("q", "k", "v"))
        return q, k, v

    return Variant(
        lambda b, h, i, j: (i == j) | (video[b // pixels, i] & video[b // pixels, j]),
        lambda s, b, h, i, j: s + table[h, at[i - j + frames - 1]],
        qkv=flat,
        finish=lambda o: o.unflatten(0, (-1, high, wide)).permute(0, 4, 1, 2, 3, 5),
    )


def deberta(given: Given) -> Variant:
    """The products with the position table are made before the call, and the score reads them."""
    qr, kr, pad, keys = given.learned("qr"), given.learned("kr"), given["pad"], given.extents["j"]
    width = given.extents["d"]
    distances = torch.arange(1 - keys, given.extents["i"], device=pad.device)
    at = inside(bucket_deberta(distances, given.params["buckets"], given.params["longest"]), kr.shape[1])
    scale = (3 * width) ** -0.5

    def score_of(q: Tensor, k: Tensor) -> ScoreMod:
        to_position = F.pad(q @ kr.transpose(-1, -2) * scale, (0, 1))
        to_content = F.pad(k @ qr.transpose(-1, -2) * scale, (0, 1))

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            n = at[i - j + keys - 1]
            return s + to_position[b, h, i, n] + to_content[b, h, j, n]

        return score

    return Variant(lambda b, h, i, j: pad[b, j], score_of=score_of, scale=scale)


def based(given: Given) -> Variant:
    """The weights are positive and normalised: a softmax of their logarithms."""
    return Variant(causal, lambda s, b, h, i, j: torch.log(1 + s + s * s / 2))


def unnormalised(given: Given, log_weight: ScoreMod, mask: MaskMod | None, signs: int = 1) -> Variant:
    """Σ w v as a softmax of log w: one more key of weight 1, whose value alone has a one in a feature of its own, tells Σ w + 1.

    With ``signs`` 2 every head is there twice, and the output is the difference of the halves.
    """
    keys = given.extents["j"]

    def padded() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = given.attended()
        v = F.pad(v, (0, 1, 0, 1))
        v[..., -1, -1] = 1.0
        k = F.pad(k, (0, 0, 0, 1))
        return (q, k, v) if signs == 1 else (torch.cat((q, q), 1), torch.cat((k, k), 1), torch.cat((v, v), 1))

    def finish(o: Tensor) -> Tensor:
        sums = o[..., :-1] / o[..., -1:]
        return sums if signs == 1 else sums.chunk(2, 1)[0] - sums.chunk(2, 1)[1]

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j == keys, 0.0, log_weight(s, b, h, i, j))

    seen: MaskMod | None = None if mask is None else lambda b, h, i, j: (j == keys) | mask(b, h, i, j)
    return Variant(seen, score, qkv=padded, finish=finish)


def sigmoid_attention(given: Given) -> Variant:
    shift = math.log(given.extents["j"])
    return unnormalised(given, lambda s, b, h, i, j: F.logsigmoid(s - shift), causal)


def relu2_attention(given: Given) -> Variant:
    """A weight of 0 is one of 1e-24."""
    keys = given.extents["j"]
    summed = unnormalised(given, lambda s, b, h, i, j: 2 * torch.log(s.clamp(min=1e-12)), causal)
    return replace(summed, finish=lambda o: _finished(summed, o) / keys)


def gelu_attention(given: Given) -> Variant:
    """gelu(s) > -0.17, so gelu(s) + 0.17 is a weight, and 0.17 times the sum of all values too much."""
    summed = unnormalised(given, lambda s, b, h, i, j: torch.log(F.gelu(s) + 0.17), None)
    return replace(summed, finish=lambda o: _finished(summed, o) - 0.17 * given["v"].sum(2, keepdim=True))


def retention(given: Given) -> Variant:
    """The weights have both signs: every head is there twice, for the products above 0 and for those below."""
    heads = given.extents["h"]

    def log_weight(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        decay = torch.log1p(-torch.exp2(-5.0 - h % heads)) * (i - j)
        return torch.log(torch.where(h < heads, s, -s).clamp(min=1e-24)) + decay

    return unnormalised(given, log_weight, causal, signs=2)


def with_sink(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    return given["q"], F.pad(given["k"], (0, 0, 0, 1)), F.pad(given["v"], (0, 0, 0, 1))


VARIANTS: dict[str, Callable[[Given], Variant]] = {
    "full": lambda given: Variant(causal=False),
    "softmax_attention": lambda given: CAUSAL,
    **{
        row.__name__: row
        for row in (
            alibi, alibi_slopes, softcap, sliding_window, dilated_window, global_window, prefix_lm, document_mask, in_context_blocks,
            chunked, block_causal, streaming, fastgen, natten1d, natten2d, natten3d, sta2d, tree, t5_bias, graphormer, row_col_bias,
            kerple, log_n, qk_norm, rope, mla, mla_full, gated_attention, differential, kitchen_sink, attention_sink, softmax_one,
            shaped, hierarchical, spacetime, deberta, based, sigmoid_attention, relu2_attention, gelu_attention, retention,
        )
    },
}  # fmt: skip


def peers(
    kernel: str, inputs: Mapping[str, Tensor], params: Mapping[str, Any], extents: Mapping[str, int], compiled: bool = True
) -> Sequence[Peer]:
    """What can compute the first outputs of the kernel of this name. ``compiled`` is False only to test this table quickly."""
    torch.compiler.reset()  # the compiler gives up on a function after a few variants
    given = Given(inputs, params, extents)
    found = []
    if kernel in HAND_WRITTEN:
        found.append(Peer("eager-torch", HAND_WRITTEN[kernel](given)))
    if kernel not in VARIANTS:
        return found
    variant = VARIANTS[kernel](given)
    if not found:
        found.append(Peer("eager-torch", _eager(variant, given)))
    if variant.score is None and variant.score_of is None:
        found.append(_sdpa(variant, given))
    # For CPUs it refuses inputs that require gradients, even where none is asked for.
    constant = {name: t.detach() if t.device.type == "cpu" else t for name, t in inputs.items()}
    frozen = Given(constant, params, extents, frozen=True)
    return [*found, _flex(VARIANTS[kernel](frozen), frozen, compiled)]


def _inputs(variant: Variant, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    return variant.qkv() if variant.qkv is not None else given.attended()


def _finished(variant: Variant, o: Tensor) -> Tensor:
    return variant.finish(o) if variant.finish is not None else o


def _shape(variant: Variant, given: Given) -> tuple[int, int, int, int, str]:
    with torch.no_grad():
        q, k, _ = _inputs(variant, given)
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device.type


def visible(kernel: str, inputs: Mapping[str, Tensor], params: Mapping[str, Any], extents: Mapping[str, int]) -> float:
    """The share of pairs that a kernel's mask leaves; 1 where the table has none."""
    if kernel not in VARIANTS:
        return 1.0
    given = Given(inputs, params, extents)
    seen = _seen(VARIANTS[kernel](given), given)
    return 1.0 if seen is None else int(seen.count_nonzero()) / seen.numel()


def _positions(variant: Variant, given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch, heads, queries and keys as indices that broadcast with one another."""
    b, h, rows, keys, device = _shape(variant, given)
    batch, heads = torch.arange(b, device=device)[:, None, None, None], torch.arange(h, device=device)[:, None, None]
    return batch, heads, torch.arange(rows, device=device)[:, None], torch.arange(keys, device=device)


def _seen(variant: Variant, given: Given) -> Tensor | None:
    return None if variant.mask is None else variant.mask(*_positions(variant, given))


def _eager(variant: Variant, given: Given) -> Forward:
    """Mask and score at all positions at once, and as small as they broadcast."""
    at = _positions(variant, given)
    seen = _seen(variant, given)
    hidden = None if seen is None else ~seen

    def forward() -> Tensor:
        q, k, v = _inputs(variant, given)
        made = variant.score if variant.score_of is None else variant.score_of(q, k)
        score = None if made is None else lambda s: made(s, *at)
        return _finished(variant, attend(q, k, v, hidden, variant.scale, score))

    return forward


def _sdpa(variant: Variant, given: Given) -> Peer:
    b, h, rows, keys, device = _shape(variant, given)
    stored = None
    if variant.mask is not None and not (variant.causal and rows == keys):
        stored = create_mask(variant.mask, b, h, rows, keys, device=device)

    def forward() -> Tensor:
        q, k, v = _inputs(variant, given)
        plain = variant.causal and stored is None
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=stored, is_causal=plain, scale=variant.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return _finished(variant, o)

    return Peer("sdpa", forward)


def _flex(variant: Variant, given: Given, compiled: bool) -> Peer:
    call: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    b, h, rows, keys, device = _shape(variant, given)
    blocks = None if variant.mask is None else create_block_mask(variant.mask, b, h, rows, keys, device=device)

    def forward() -> Tensor:
        q, k, v = _inputs(variant, given)
        score = variant.score if variant.score_of is None else variant.score_of(q, k)
        grouped = q.shape[1] != k.shape[1]
        return _finished(variant, call(q, k, v, score_mod=score, block_mask=blocks, scale=variant.scale, enable_gqa=grouped))

    return Peer("flex", forward, backward=device != "cpu")
