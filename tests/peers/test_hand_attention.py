"""Attention that no installed package has: written from the papers' definitions, in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.peers.oracle import agree


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def causal(s: Tensor) -> Tensor:
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    return s.masked_fill(j > i, -math.inf)


def test_additive() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, w: Tensor, pad: Tensor) -> Tensor:
        s = torch.tanh(q[:, :, None] + k[:, None]) @ w
        return s.masked_fill(~pad[:, None], -math.inf).softmax(-1).nan_to_num() @ v

    agree("additive", oracle)


def test_agent() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, a: Tensor, bias_in: Tensor, bias_out: Tensor) -> Tensor:
        read = (scores(a, k) + bias_in).softmax(-1) @ v
        return (scores(q, a) + bias_out).softmax(-1) @ read

    agree("agent", oracle)


def test_linformer() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, proj_k: Tensor, proj_v: Tensor) -> Tensor:
        return scores(q, proj_k @ k).softmax(-1) @ (proj_v @ v)

    agree("linformer", oracle)


def test_aft() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        e = torch.exp(causal(w)[None, :, :, None] + k[:, None])
        return torch.sigmoid(q) * (e * v[:, None]).sum(2) / e.sum(2)

    agree("aft", oracle)


def test_centred_relu() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = causal(scores(q, k)).softmax(-1)
        mean = 1 / torch.arange(1, q.shape[2] + 1, dtype=q.dtype)[:, None]
        return torch.relu(p - mean).tril() @ v

    agree("centred_relu", oracle)


def test_cope() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        s = scores(q, k)
        gates = torch.sigmoid(s).tril()
        p = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=table.shape[1] - 1)
        u = q @ table.transpose(-1, -2)
        lo, hi = (torch.gather(u, -1, at.long()) for at in (p.floor(), p.ceil()))
        w = p - p.floor()
        return causal(s + (1 - w) * lo + w * hi).softmax(-1) @ v

    agree("cope", oracle)


def test_cosformer_is_two_linear_attentions() -> None:
    longest = 8

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = math.pi / 2 * torch.arange(q.shape[2], dtype=q.dtype)[:, None] / longest
        w = torch.zeros(())
        for turn in (torch.cos, torch.sin):
            w = w + (torch.relu(q) * turn(angle)) @ (torch.relu(k) * turn(angle)).transpose(-1, -2)
        w = w.tril()
        return w @ v / w.sum(-1, keepdim=True).clamp(min=1e-6)

    agree("cosformer", oracle)


def test_dmc() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, omega: Tensor) -> Tensor:
        t = k.shape[2]
        keep = torch.sigmoid(alpha)
        i, j = torch.arange(t)[:, None], torch.arange(t)
        # The weight of token u in the pool of t: ω_u times the product of the keep between them.
        between = torch.stack([torch.stack([keep[..., u + 1 : n + 1].prod(-1) for u in range(t)], -1) for n in range(t)], -2)
        pool = (between * omega[:, :, None]).tril()
        pool = pool / pool.sum(-1, keepdim=True)
        fade = torch.cat([torch.log1p(-keep[..., 1:]), torch.zeros_like(keep[..., :1])], -1)[:, :, None]
        s = scores(q, pool @ k) + torch.where(i == j, 0.0, fade)
        return causal(s).softmax(-1) @ (pool @ v)

    agree("dmc", oracle)


def features(x: Tensor, w: Tensor) -> Tensor:
    y = torch.einsum("bhtd,hdf->bhtf", x, w)
    return torch.cat([y.exp(), (-y).exp()], -1)


def test_hedgehog_exp() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        w = (features(q, wq) @ features(k, wk).transpose(-1, -2)).tril()
        return w @ v / w.sum(-1, keepdim=True)

    agree("hedgehog_exp", oracle)


def test_performer() -> None:
    def phi(x: Tensor, w: Tensor) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        return torch.exp(x @ w.T - (x * x).sum(-1, keepdim=True) / 2)

    def oracle(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        a = (phi(q, w) @ phi(k, w).transpose(-1, -2)).tril()
        return a @ v / a.sum(-1, keepdim=True)

    agree("performer", oracle)


def test_maxsim() -> None:
    def oracle(q: Tensor, doc: Tensor, pad: Tensor) -> Tensor:
        s = torch.einsum("aid,cjd->acij", q, doc).masked_fill(~pad[None, :, None], -math.inf)
        return s.amax(-1).sum(-1)

    agree("maxsim", oracle)


@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (3, 2), (2, 2), (2, 4), (4, 2)])
def test_natten1d(window: int, dilation: int) -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = k.shape[2]
        seen = torch.zeros(t, t, dtype=torch.bool)
        for group in range(dilation):
            members = torch.arange(group, t, dilation)
            for n, i in enumerate(members):
                start = min(max(n - window // 2, 0), len(members) - window)
                seen[i, members[start : start + window]] = True
        return scores(q, k).masked_fill(~seen, -math.inf).softmax(-1) @ v

    agree("natten1d", oracle, params={"window": window, "dilation": dilation})


def test_multi_token() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        heads, a, c = w.shape
        s = scores(q, k).tril()
        padded = torch.nn.functional.pad(s, (c - 1 - c // 2, c // 2, a - 1, 0))
        z = torch.nn.functional.conv2d(padded, w.flip(1, 2)[:, None], groups=heads)
        return causal(z).softmax(-1) @ v

    agree("multi_token", oracle)


def test_selective() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, q0: Tensor, k0: Tensor) -> Tensor:
        i, j = positions(q, k)
        unneeded = torch.where((j > 0) & (j < i), torch.relu(scores(q0, k0)), 0.0)
        f = unneeded.cumsum(-2) - unneeded
        return causal(scores(q, k) - f[:, None]).softmax(-1) @ v

    agree("selective", oracle)


def test_shaw() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, rel: Tensor) -> Tensor:
        i, j = positions(q, k)
        far = rel[(i - j).clamp(0, len(rel) - 1)]
        s = (q @ k.transpose(-1, -2) + torch.einsum("bhid,ijd->bhij", q, far)) / math.sqrt(q.shape[-1])
        return causal(s).softmax(-1) @ v

    agree("shaw", oracle)


def test_transformer_xl() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, u: Tensor, w: Tensor, rel: Tensor) -> Tensor:
        i, j = positions(q, k)
        far = rel[:, (i - j).clamp(min=0)]
        content = (q + u[:, None]) @ k.transpose(-1, -2)
        s = (content + torch.einsum("bhid,hijd->bhij", q + w[:, None], far)) / math.sqrt(q.shape[-1])
        return causal(s).softmax(-1) @ v

    agree("transformer_xl", oracle)


def test_softmax_one() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = torch.exp(causal(scores(q, k)))
        return e @ v / (1 + e.sum(-1, keepdim=True))

    agree("softmax_one", oracle)


def test_pyramid_infer() -> None:
    recent, sinks, top = 3, 1, 4

    def oracle(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        a = causal(scores(q, k)).softmax(-1).mean(1)
        score = (a[:, -recent:] * weight[-recent:, None]).mean(1)
        score[:, :sinks] = 1e9
        keep = torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(top).indices, True)
        keep[:, -recent:] = True
        return keep

    agree("pyramid_infer", oracle, gradients=False)
