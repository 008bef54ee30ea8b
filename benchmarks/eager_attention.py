"""Attention variants in plain PyTorch: batched matmuls, a dense mask, softmax, another matmul.

A row of ``HAND_WRITTEN`` is a spec as it is written in a model's code; what depends on neither the inputs with gradients nor
their values is made once, outside the call that is timed. ``peers_attention`` derives the others from their score and mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[], Any]
"""A call that computes a tensor, or a tuple of them."""


@dataclass(frozen=True)
class Given:
    """A kernel's inputs, params and extents. With ``frozen``, what a score reads has no gradient."""

    tensors: Mapping[str, Tensor]
    params: Mapping[str, Any]
    extents: Mapping[str, int]
    frozen: bool = False

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def learned(self, name: str) -> Tensor:
        """A parameter of the score: without gradient for FlexAttention, which has none for every way of reading one."""
        return self.tensors[name].detach() if self.frozen else self.tensors[name]

    def attended(self) -> tuple[Tensor, Tensor, Tensor]:
        return self["q"], self["k"], self["v"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None = None,
    scale: float | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Softmax attention of (..., position, feature) tensors. ``hidden`` is true where a query does not see a key."""
    k, v = repeated(q, k), repeated(q, v)
    s = scores(q, k, scale)
    if score is not None:
        s = score(s)
    return weights(s, hidden) @ v


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Scaled products, by 1/√d unless told."""
    s = q @ k.transpose(-1, -2)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return s if factor == 1.0 else s * factor


def weights(s: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over the keys that are seen."""
    return torch.softmax(s if hidden is None else s.masked_fill(hidden, -math.inf), -1)


def repeated(q: Tensor, k: Tensor) -> Tensor:
    """Keys or values of groups of heads, for every head; a single head is broadcast by the matmul."""
    return k if k.shape[1] in (1, q.shape[1]) else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Query positions as a column, key positions as a row."""
    return torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=q.device)


def future(q: Tensor, k: Tensor) -> Tensor:
    """What a causal mask hides."""
    i, j = positions(q, k)
    return j > i


def inside(at: Tensor, size: int) -> Tensor:
    """Indices into a table of ``size`` rows and a row of zeros behind them, which is what is read outside."""
    return torch.where((at >= 0) & (at < size), at, size)


def bucket_t5(distance: Tensor, buckets: int, longest: int, one_sided: bool) -> Tensor:
    """T5's bucket of every distance i - j."""
    sides = 1 if one_sided else 2
    span = buckets // sides
    exact = span // 2
    r = distance.clamp(min=0) if one_sided else distance.abs()
    far = exact + (torch.log(r.clamp(min=1).double() / exact) / math.log(longest / exact) * (span - exact)).floor().to(torch.int64)
    return torch.where(r < exact, r, far.clamp(max=span - 1)) + torch.where(distance < 0, span * (sides - 1), 0)


def bucket_deberta(distance: Tensor, buckets: int, longest: int) -> Tensor:
    """LTG-BERT's bucket of every distance i - j, from 0."""
    mid = buckets // 2
    steps = torch.log(distance.abs().clamp(min=1).double() / mid) / math.log((longest - 1) / mid) * (mid - 1)
    far = distance.sign() * (mid + steps.ceil().to(torch.int64))
    return torch.where(distance.abs() < mid, distance, far) + buckets - 1


# Softmax with a score of its own ------------------------------------------------------------------------------------


def alibi(given: Given) -> Forward:
    """The bias of a key without that of its query, which leaves a softmax as it is: a row for every head."""
    q, k, v = given.attended()
    hidden, (_, j) = future(q, k), positions(q, k)
    heads = torch.arange(1, q.shape[1] + 1, device=q.device)[:, None, None]
    bias = (torch.exp2(-8.0 * heads / q.shape[1]) * (j - j[-1])).to(q.dtype)
    return lambda: attend(q, k, v, hidden, score=lambda s: s + bias)


def t5_bias(given: Given) -> Forward:
    q, k, v = given.attended()
    bias, one_sided = given["bias"], given.params["causal"]
    i, j = positions(q, k)
    at = bucket_t5(i - j, bias.shape[1], given.params["longest"], one_sided)
    hidden = future(q, k) if one_sided else None
    return lambda: attend(q, k, v, hidden, 1.0, lambda s: s + F.embedding(at, bias.T).permute(2, 0, 1))


def graphormer(given: Given) -> Forward:
    (q, k, v), bias, dist = given.attended(), given["bias"], given["dist"]
    return lambda: attend(q, k, v, score=lambda s: s + F.embedding(dist, bias.T).permute(0, 3, 1, 2))


def deberta(given: Given) -> Forward:
    q, k, v = given.attended()
    i, j = positions(q, k)
    at = inside(bucket_deberta(i - j, given.params["buckets"], given.params["longest"]), given["kr"].shape[1])
    to_position = at.expand(*q.shape[:2], -1, -1)
    to_content = at.T.expand(*q.shape[:2], -1, -1)
    hidden = ~given["pad"][:, None, None, :]

    def forward() -> Tensor:
        qr, kr = (F.pad(given[name], (0, 0, 0, 1)) for name in ("qr", "kr"))
        s = q @ k.transpose(-1, -2)
        s = s + (q @ kr.transpose(-1, -2)).gather(-1, to_position)
        s = s + (k @ qr.transpose(-1, -2)).gather(-1, to_content).transpose(-1, -2)
        return weights(s * (3 * q.shape[-1]) ** -0.5, hidden) @ v

    return forward


def kitchen_sink(given: Given) -> Forward:
    """The sink is a column that the softmax sees and that is cut off before the values."""
    (q, k, v), slope, sink = given.attended(), given["slope"], given["sink"]
    window, cap, doc = given.params["window"], given.params["cap"], given["doc"]
    i, j = positions(q, k)
    far = (i - j).to(q.dtype)
    seen = (i >= j) & (i - j < window) & (doc[:, i] == doc[:, None, j])
    hidden = ~seen[:, None]

    def forward() -> Tensor:
        s = cap * torch.tanh(scores(q, repeated(q, k)) / cap) - slope[:, None, None] * far
        s = s.masked_fill(hidden, -math.inf)
        column = sink[:, None, None].expand(s.shape[0], -1, s.shape[2], 1)
        return torch.softmax(torch.cat((s, column), -1), -1)[..., :-1] @ repeated(q, v)

    return forward


def differential(given: Given) -> Forward:
    hidden = future(given["q1"], given["k1"])

    def forward() -> Tensor:
        first, second = (weights(scores(given[q], given[k]), hidden) for q, k in (("q1", "k1"), ("q2", "k2")))
        return (first - given["lam"][:, None, None] * second) @ given["v"]

    return forward


def fastgen(given: Given) -> Forward:
    """With the attention that every key gets."""
    q, k, v = given.attended()
    i, j = positions(q, k)
    kept = given["special"][:, None, None, :] | given["keep"][:, :, None, :] | (i - j <= given["local"][:, None, None])
    hidden = ~((i >= j) & kept)

    def forward() -> tuple[Tensor, Tensor]:
        w = weights(scores(q, k), hidden)
        return w @ v, w.sum(-2)

    return forward


def spacetime(given: Given) -> Forward:
    """Frames in place of positions: pixels and heads are batch axes."""
    q, k, v, bias, video = (given[name] for name in ("q", "k", "v", "bias", "video"))
    f = torch.arange(q.shape[1], device=q.device)[:, None]
    g = torch.arange(k.shape[1], device=q.device)
    at = inside(f - g + k.shape[1] - 1, bias.shape[1])
    hidden = ~((f == g) | (video[:, f] & video[:, None, g]))[:, None, None, None]

    def forward() -> Tensor:
        table = F.pad(bias, (0, 1))[:, at]
        rows, keys, values = (x.permute(0, 2, 3, 4, 1, 5) for x in (q, k, v))
        return (weights(scores(rows, keys) + table, hidden) @ values).permute(0, 4, 1, 2, 3, 5)

    return forward


# Other weights than a softmax's -------------------------------------------------------------------------------------


def sigmoid_attention(given: Given) -> Forward:
    q, k, v = given.attended()
    hidden, shift = future(q, k), math.log(k.shape[-2])
    return lambda: torch.sigmoid((scores(q, repeated(q, k)) - shift).masked_fill(hidden, -math.inf)) @ repeated(q, v)


def gelu_attention(given: Given) -> Forward:
    q, k, v = given.attended()
    return lambda: F.gelu(scores(q, k)) @ v


def relu2_attention(given: Given) -> Forward:
    q, k, v = given.attended()
    hidden = future(q, k)
    return lambda: F.relu(scores(q, repeated(q, k)).masked_fill(hidden, 0.0)).square() @ repeated(q, v) / k.shape[-2]


def based(given: Given) -> Forward:
    q, k, v = given.attended()
    hidden = future(q, k)

    def forward() -> Tensor:
        s = scores(q, k)
        w = (1 + s + s.square() / 2).masked_fill(hidden, 0.0)
        return w @ v / w.sum(-1, keepdim=True)

    return forward


def retention(given: Given) -> Forward:
    """The decay is a dense matrix for every head, with zeros in place of a mask."""
    q, k, v = given.attended()
    i, j = positions(q, k)
    gamma = 1 - torch.exp2(-5.0 - torch.arange(q.shape[1], device=q.device, dtype=q.dtype))[:, None, None]
    decay = torch.where(i >= j, gamma ** (i - j).clamp(min=0), 0.0)
    return lambda: (scores(q, k) * decay) @ v


def maxsim(given: Given) -> Forward:
    """Every query against every document."""
    q, doc = given["q"], given["doc"]
    hidden = ~given["pad"][:, None, :]
    return lambda: torch.einsum("aid,cjd->acij", q, doc).masked_fill(hidden, -math.inf).max(-1).values.sum(-1)


HAND_WRITTEN: dict[str, Callable[[Given], Forward]] = {
    row.__name__: row
    for row in (
        alibi, t5_bias, graphormer, deberta, kitchen_sink, differential, fastgen, spacetime, sigmoid_attention, gelu_attention,
        relu2_attention, based, retention, maxsim,
    )
}  # fmt: skip
