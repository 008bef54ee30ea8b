"""Against PyTorch's own layers: scaled_dot_product_attention, LSTM, GRU, RNN, MultiheadAttention, conv1d."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.peers.oracle import agree, draw

sdpa = F.scaled_dot_product_attention


def below(i: int, j: int) -> Tensor:
    """True where the key is not after the query."""
    return torch.arange(j) <= torch.arange(i)[:, None]


def weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights of SDPA, read off by giving it the identity as values."""
    eye = torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:-2], -1, -1)
    return sdpa(q, k, eye, attn_mask=mask)


def test_softmax_attention() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        o = sdpa(q, k, v, is_causal=True, enable_gqa=True)
        s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
        return {"o": o, "l": torch.logsumexp(s.masked_fill(~below(q.shape[2], k.shape[2]), -math.inf), -1)}

    agree("softmax_attention", oracle)


def test_softmax_attention_decodes() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(k.shape[2]) <= 6 + torch.arange(q.shape[2])[:, None]
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    agree("softmax_attention", oracle, sizes={"i": 3, "j": 9}, origin={"i": 6})


def test_full() -> None:
    agree("full", lambda **x: sdpa(x["q"], x["k"], x["v"]), sizes={"i": 4, "j": 7})


def test_full_is_multihead_attention() -> None:
    heads, dim = 2, 3
    width = heads * dim
    layer = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    eye = torch.eye(width, dtype=torch.float64)
    identity = {"in_proj_weight": torch.cat([eye, eye, eye]), "out_proj.weight": eye}

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        merged = tuple(x.transpose(1, 2).flatten(2) for x in (q, k, v))
        o = functional_call(layer, identity, merged, {"need_weights": False})[0]
        return o.unflatten(-1, (heads, dim)).transpose(1, 2)

    agree("full", oracle, sizes={"h": heads, "d": dim, "e": dim})


def test_differential() -> None:
    def oracle(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return sdpa(q1, k1, v, is_causal=True) - lam[:, None, None] * sdpa(q2, k2, v, is_causal=True)

    agree("differential", oracle)


def test_fastgen() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, special: Tensor, keep: Tensor, local: Tensor) -> dict[str, Tensor]:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = special[:, None, None, :] | keep[:, :, None, :] | (i - j <= local[:, None, None])
        mask = seen & below(q.shape[2], k.shape[2])
        return {"o": sdpa(q, k, v, attn_mask=mask), "mass": weights(q, k, mask).sum(-2)}

    x = draw("fastgen", sizes={"i": 7, "j": 7})
    x["local"] = torch.arange(x["local"].numel()) % 3
    agree("fastgen", oracle, inputs=x)


def test_hierarchical() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, kx: Tensor, vx: Tensor, see: Tensor) -> Tensor:
        kept = torch.cat([below(q.shape[2], k.shape[2]).expand(*see.shape[:-1], -1), see], -1)
        return sdpa(q, torch.cat([k, kx], 2), torch.cat([v, vx], 2), attn_mask=kept[:, None])

    agree("hierarchical", oracle)


def test_learned_queries() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, x: Tensor, score: Tensor) -> Tensor:
        a = torch.sigmoid(score)[..., None] * sdpa(q, k, v, is_causal=True)
        hit = torch.zeros_like(score).scatter(-1, score.topk(2).indices, 1.0)
        return x + hit[..., None] * a

    agree("learned_queries", oracle)


def test_mla() -> None:
    def oracle(ql: Tensor, qr: Tensor, c: Tensor, kr: Tensor) -> Tensor:
        keys = torch.cat([c, kr], -1)[:, None].expand(-1, ql.shape[1], -1, -1)
        return sdpa(torch.cat([ql, qr], -1), keys, c[:, None].expand(-1, ql.shape[1], -1, -1), is_causal=True, scale=0.07)

    agree("mla", oracle)


def test_mla_full() -> None:
    def oracle(qc: Tensor, qr: Tensor, kc: Tensor, kr: Tensor, v: Tensor) -> Tensor:
        keys = torch.cat([kc, kr[:, None].expand(-1, kc.shape[1], -1, -1)], -1)
        return sdpa(torch.cat([qc, qr], -1), keys, v, is_causal=True)

    agree("mla_full", oracle)


def test_qk_norm() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, gq: Tensor, bq: Tensor, gk: Tensor, bk: Tensor) -> Tensor:
        return sdpa(F.layer_norm(q, gq.shape, gq, bq), F.layer_norm(k, gk.shape, gk, bk), v, is_causal=True)

    agree("qk_norm", oracle)


def test_shaped() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        alpha, beta, gamma = (x[:, None, None] for x in (alpha, beta, gamma))
        mean = sdpa(torch.zeros_like(q), k, v, is_causal=True)
        return beta * sdpa(q, k, v, is_causal=True) + alpha * v - gamma * mean

    agree("shaped", oracle)


def test_spacetime() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, video: Tensor) -> Tensor:
        f = torch.arange(q.shape[1])
        kept = (f[:, None] == f) | (video[:, :, None] & video[:, None, :])
        near = bias[:, f[:, None] - f + len(f) - 1]
        mask = torch.where(kept[:, None], near, -math.inf)[:, None, None]
        rows = (x.permute(0, 2, 3, 4, 1, 5) for x in (q, k, v))
        return sdpa(*rows, attn_mask=mask).permute(0, 4, 1, 2, 3, 5)

    agree("spacetime", oracle)


def test_gated_attention() -> None:
    agree("gated_attention", lambda q, k, v, gate: torch.sigmoid(gate) * sdpa(q, k, v, is_causal=True))


def test_cosine() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        sharpness = scale.clamp(max=math.log(100)).exp()[:, None, None]
        return sdpa(sharpness * F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, attn_mask=bias.expand(len(q), -1, -1, -1), scale=1.0)

    x = draw("cosine")
    x["scale"][0] = 6.0
    agree("cosine", oracle, inputs=x)


def test_l2_attention_is_a_biased_dot_product() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (-(torch.cdist(q, k) ** 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v

    agree("l2_attention", oracle)


@pytest.mark.parametrize("spec", ["in_context_blocks", "block_causal", "streaming"])
def test_boolean_masks(spec: str) -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, block: Tensor | None = None, test: Tensor | None = None) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        if spec == "block_causal":
            return sdpa(q, k, v, attn_mask=j // 3 <= i // 3)
        if spec == "streaming":
            return sdpa(q, k, v, attn_mask=(j <= i) & ((j < 1) | (i - j < 3)))
        assert block is not None and test is not None
        own = block[:, :, None] == block[:, None, :]
        return sdpa(q, k, v, attn_mask=((own | (i >= test[:, None, None])) & (j <= i))[:, None])

    agree(spec, oracle)


def test_natten3d() -> None:
    def near(n: int, window: int) -> Tensor:
        at = torch.arange(n)
        start = (at - window // 2).clamp(0, n - window)[:, None]
        return ((start <= at) & (at < start + window)).int()

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z, y, x = q.shape[2:5]
        mask = torch.kron(near(z, 2), torch.kron(near(y, 3), near(x, 3))).bool()
        return sdpa(*(t.flatten(2, 4) for t in (q, k, v)), attn_mask=mask).unflatten(2, (z, y, x))

    agree("natten3d", oracle)


def test_tensor_product() -> None:
    def oracle(q: Tensor, ak: Tensor, bk: Tensor, av: Tensor, bv: Tensor) -> Tensor:
        k, v = torch.einsum("brhj,brjd->bhjd", ak, bk), torch.einsum("brhj,brjd->bhjd", av, bv)
        return sdpa(q, k, v, is_causal=True)

    agree("tensor_product", oracle)


def test_attention_entropy() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        s = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~below(q.shape[2], k.shape[2]), -1e9)
        return {"o": sdpa(q, k, v, is_causal=True), "entropy": torch.distributions.Categorical(logits=s).entropy()}

    agree("attention_entropy", oracle)


def test_attention_variance() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        p = weights(q, k, below(q.shape[2], k.shape[2]))
        o = p @ v
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        spread = (p[..., None] * (v[:, :, None] - o[:, :, :, None]) ** 2).sum(-2)
        return {"o": o, "spread": spread, "noise": (p * (s - (p * s).sum(-1, keepdim=True)) ** 2).sum(-1)}

    agree("attention_variance", oracle)


def test_talking_heads() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, pl: Tensor, pw: Tensor) -> Tensor:
        s = torch.einsum("bhid,bhjd,hm->bmij", q, k, pl) / math.sqrt(q.shape[-1])
        p = s.masked_fill(~below(q.shape[2], k.shape[2]), -math.inf).softmax(-1)
        return torch.einsum("bmij,mn,bnje->bnie", p, pw, v)

    agree("talking_heads", oracle)


def test_cross_softmax_topk() -> None:
    def oracle(x: Tensor) -> dict[str, Tensor]:
        p = x.softmax(-1)
        return {"p": p, "mass": p.topk(2).values.sum(-1)}

    agree("cross_softmax_topk", oracle)


def test_topk_softmax() -> None:
    def oracle(x: Tensor) -> dict[str, Tensor]:
        top = x.topk(2)
        return {"p": torch.zeros_like(x).scatter(-1, top.indices, top.values.softmax(-1)), "l": top.values.logsumexp(-1)}

    agree("topk_softmax", oracle)


# Recurrent layers: their input weights are the identity, so that they take the projected inputs of the specs -------


def stacked(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gates side by side, and the input weights that keep them apart."""
    joined = torch.cat(x, -1)
    return joined, torch.eye(joined.shape[-1], dtype=joined.dtype)


@pytest.mark.parametrize("spec", ["lstm_np", "lstm"])
def test_lstm(spec: str) -> None:
    n = 3
    layer = nn.LSTM(4 * n, n, batch_first=True, bias=False)

    def oracle(
        zx: Tensor, ix: Tensor, fx: Tensor, ox: Tensor, rz: Tensor, ri: Tensor, rf: Tensor, ro: Tensor, **_: Tensor
    ) -> dict[str, Tensor]:
        x, eye = stacked([ix, fx, zx, ox])
        tensors = {"weight_ih_l0": eye, "weight_hh_l0": torch.cat([ri, rf, rz, ro], 1).T}
        y, (_, c) = functional_call(layer, tensors, (x,))
        return {"y": y, "c": c[0]} if spec == "lstm" else {"y": y}

    inputs = draw(spec)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("pi", "pf", "po") if name in inputs}
    agree(spec, oracle, inputs=inputs, constants=("pi", "pf", "po"))


def test_gru() -> None:
    n = 3
    layer = nn.GRU(3 * n, n, batch_first=True)

    def oracle(xr: Tensor, xz: Tensor, xn: Tensor, wr: Tensor, wz: Tensor, wn: Tensor, bn: Tensor) -> Tensor:
        x, eye = stacked([xr, xz, xn])
        zero = bn.new_zeros(2 * n)
        tensors = {"weight_ih_l0": eye, "weight_hh_l0": torch.cat([wr, wz, wn], 1).T, "bias_ih_l0": bn.new_zeros(3 * n),
                   "bias_hh_l0": torch.cat([zero, bn])}  # fmt: skip
        return functional_call(layer, tensors, (x,))[0]

    agree("gru_torch", oracle)


def test_rnn() -> None:
    layer = nn.RNN(3, 3, batch_first=True, bias=False)
    agree("rnn", lambda x, w: functional_call(layer, {"weight_ih_l0": torch.eye(3).double(), "weight_hh_l0": w.T}, (x,))[0])


# Convolutions --------------------------------------------------------------------------------------------------------


def convolved(x: Tensor, filt: Tensor) -> Tensor:
    """A depthwise causal convolution of [b,t,d] by [w,d]; conv1d wants the filter from the oldest entry on."""
    rows = F.pad(x.transpose(1, 2), (len(filt) - 1, 0))
    return F.conv1d(rows, filt.flip(0).T[:, None], groups=x.shape[-1]).transpose(1, 2)


def test_baseconv() -> None:
    agree("baseconv", lambda u1, u2, filt: F.silu(convolved(u1, filt)) * u2)


def test_short_conv() -> None:
    agree("short_conv", lambda x, filt, bias: F.silu(convolved(x, filt) + bias))


def test_hyena() -> None:
    def oracle(x1: Tensor, x2: Tensor, v: Tensor, filt: Tensor, bias: Tensor) -> Tensor:
        u, n = v * x1, 2 * len(filt)
        spectrum = torch.fft.rfft(u, n=n, dim=1) * torch.fft.rfft(filt, n=n, dim=0)
        return x2 * (torch.fft.irfft(spectrum, n=n, dim=1)[:, : u.shape[1]] + bias * u)

    agree("hyena", oracle)


def test_h3() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, shift: Tensor, dk: Tensor, a: Tensor, bb: Tensor, c: Tensor, dd: Tensor) -> Tensor:
        u = (convolved(k, shift.T) + dk * k) * v
        steps = torch.arange(u.shape[1], dtype=u.dtype)[:, None, None]
        return q * (convolved(u, (c * bb * a**steps).sum(-1)) + dd * u)

    agree("h3", oracle)
