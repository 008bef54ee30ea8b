"""Mixtures of experts, sparse and quantised layers that no installed package has: dense PyTorch with explicit selections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.peers.oracle import agree


def picked(x: Tensor, k: int, dim: int = -1) -> Tensor:
    """1 at the k largest entries, else 0."""
    return torch.zeros_like(x).scatter(dim, x.detach().topk(k, dim).indices, 1.0)


def experts(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None, act: object = F.silu) -> Tensor:
    """Every expert for every token: [t,n,d]."""
    assert callable(act)
    hidden = act(torch.einsum("td,ndf->tnf", x, w1))
    hidden = hidden if w3 is None else hidden * torch.einsum("td,ndf->tnf", x, w3)
    return torch.einsum("tnf,nfd->tnd", hidden, w2)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def mix(weights: Tensor, outputs: Tensor) -> Tensor:
    return (weights[..., None] * outputs).sum(1)


def test_ds_moe_dense() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> dict[str, Tensor]:
        p = (x @ router.T).softmax(-1)
        entropy = torch.distributions.Categorical(p.mean(0)).entropy()
        loss = torch.distributions.Categorical(p).entropy().mean() - entropy
        return {"y": mix(p, experts(x, w1, w2, act=F.gelu)), "loss": loss}

    agree("ds_moe_dense", oracle)


def test_ds_moe_sparse() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        p = (x @ router.T).softmax(-1)
        return mix(p * (p >= 0.2), experts(x, w1, w2, act=F.gelu))

    agree("ds_moe_sparse", oracle)


def test_moe_expert_choice() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        p = F.layer_norm(x @ router.T, router.shape[:1], eps=1e-6).softmax(-1)
        return mix(p * picked(p, 2, 0), experts(x, w1, w2, act=relu2))

    agree("moe_expert_choice", oracle)


def test_moe_rounded() -> None:
    k, tile = 2, 2

    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> dict[str, Tensor]:
        p = (x @ router.T).softmax(-1)
        sel = picked(p, k)
        w = torch.where(sel > 0, p / (sel * p).sum(-1, keepdim=True), p)
        counts = [int(tile * torch.round(n / tile)) for n in sel.sum(0)]
        rank = torch.where(sel > 0, w, p - 1).detach()
        kept = torch.stack([picked(rank[:, n], count, 0) for n, count in enumerate(counts)], 1)
        return {"y": mix(w * kept, experts(x, w1, w2)), "count": torch.tensor(counts)}

    agree("moe_rounded", oracle)


def test_moe_skywork() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        z = x @ router.T
        p = ((z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-6)).softmax(-1)
        w = p * picked(p, 2)
        return mix(w / w.sum(-1, keepdim=True), experts(x, w1, w2, w3))

    agree("moe_skywork", oracle)


def test_moe_relu() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> dict[str, Tensor]:
        s = F.relu(x @ router.T)
        return {"y": mix(s, experts(x, w1, w2, w3)), "l1": s.sum(-1).mean()}

    agree("moe_relu", oracle)


def test_moe_null() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        p = (x @ router.T).softmax(-1)
        w = (p * picked(p, 3))[:, : len(w1)]
        return mix(w / w.sum(-1, keepdim=True), experts(x, w1, w2, w3))

    agree("moe_null", oracle)


def test_moe_relu2() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        z = x @ router.T
        top = z.topk(2)
        w = torch.zeros_like(z).scatter(-1, top.indices, top.values.softmax(-1))
        return mix(w, experts(x, w1, w2, act=relu2))

    agree("moe_relu2", oracle)


def test_moe_top_p() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        p = (x @ router.T).softmax(-1)
        ordered, order = p.sort(-1, descending=True)
        above = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(p).scatter(-1, order, (above < 0.6).double())
        return mix(p * kept, experts(x, w1, w2))

    agree("moe_top_p", oracle)


def test_moe_soft() -> None:
    def oracle(x: Tensor, phi: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        n, s, _ = phi.shape
        z = x @ phi.flatten(0, 1).T
        slots = (z.softmax(1).transpose(1, 2) @ x).unflatten(1, (n, s))
        out = torch.einsum("bnsf,nfd->bnsd", F.gelu(torch.einsum("bnsd,ndf->bnsf", slots, w1)), w2)
        return z.softmax(2) @ out.flatten(1, 2)

    agree("moe_soft", oracle)


def test_moe_capacity() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> dict[str, Tensor]:
        p = (x @ router.T).softmax(-1)
        chosen = picked(p, 2)
        room, kept = [3] * len(router), torch.zeros_like(p)
        for t in range(len(x)):
            for n in chosen[t].nonzero()[:, 0].tolist():
                kept[t, n] = float(room[n] > 0)
                room[n] -= 1
        w = p * chosen / (p * chosen).sum(-1, keepdim=True)
        return {"y": mix(w * kept, experts(x, w1, w2, act=F.relu)), "dropped": 1 - kept.sum() / chosen.sum()}

    agree("moe_capacity", oracle)


def test_sigma_moe() -> None:
    def oracle(x: Tensor, xn: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        s = torch.sigmoid(xn @ router.T)
        return mix(s * picked(s, 2), experts(x, w1, w2, act=F.relu))

    agree("sigma_moe", oracle)


def test_switch_head() -> None:
    def oracle(q: Tensor, k: Tensor, x: Tensor, sv: Tensor, so: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        gv, go = torch.sigmoid(sv), torch.sigmoid(so)
        v = torch.einsum("hjn,jc,hnce->hje", gv * picked(gv, 2), x, wv)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("him,hie,hmef->if", go * picked(go, 2), o, wo)

    agree("switch_head", oracle)


def test_mixture_of_depths() -> None:
    def oracle(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        r = x @ router
        return x + (r * picked(r, 2))[..., None] * (F.gelu(x @ w1) @ w2)

    agree("mixture_of_depths", oracle)


def test_lora_mixture() -> None:
    def oracle(x: Tensor, w: Tensor, router: Tensor, a: Tensor, bb: Tensor) -> Tensor:
        p = (x @ router.T).softmax(-1)
        low = torch.einsum("td,ndr,nrf->tnf", x, a, bb)
        return x @ w + mix(p * picked(p, 1), low)

    agree("lora_mixture", oracle)


def test_multi_lora() -> None:
    def oracle(x: Tensor, w: Tensor, a: Tensor, bb: Tensor, adapter: Tensor) -> Tensor:
        return x @ w + torch.stack([row @ a[n] @ bb[n] for row, n in zip(x, adapter, strict=True)])

    agree("multi_lora", oracle)


def test_cats() -> None:
    def oracle(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        a = F.silu(x @ w_gate)
        return (a * (a.abs() >= 0.3) * (x @ w_up)) @ w_down

    agree("cats", oracle)


def test_ksparse() -> None:
    def oracle(x: Tensor, w: Tensor, bias: Tensor, out_bias: Tensor) -> Tensor:
        z = x @ w + bias
        return (z * picked(z, 2)) @ w.T + out_bias

    agree("ksparse", oracle)


def test_relu2_mlp() -> None:
    agree("relu2_mlp", lambda x, w1, w2: relu2(x @ w1) @ w2)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def act8(x: Tensor) -> Tensor:
    x = F.rms_norm(x, x.shape[-1:], eps=1e-8)
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return straight_through(x, (x * scale).round().clamp(-128, 127) / scale)


def ternary(w: Tensor) -> Tensor:
    unit = w.abs().mean().clamp(min=1e-5)
    return straight_through(w, (w / unit).round().clamp(-1, 1) * unit)


def test_bitlinear_glu() -> None:
    def oracle(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        hidden = F.silu(act8(x) @ ternary(w_gate)) * (act8(x) @ ternary(w_up))
        return act8(hidden) @ ternary(w_down)

    agree("bitlinear_glu", oracle)


def test_fake_quant() -> None:
    def oracle(x: Tensor, w: Tensor, b: Tensor, lo: Tensor, hi: Tensor) -> dict[str, Tensor]:
        inside = torch.minimum(torch.maximum(x, lo), hi)
        step = ((hi - lo) / 15).detach()
        y = straight_through(inside, (inside / step).round() * step) @ w + b
        z = (y - y.mean()) / y.std(unbiased=False)
        return {"y": y, "kurtosis": (z**4).mean()}

    agree("fake_quant", oracle)


def test_pam_adds_bit_patterns() -> None:
    def oracle(a: Tensor, b: Tensor) -> Tensor:
        one = torch.tensor(1.0, dtype=torch.float64).view(torch.int64)
        bits = a.abs()[:, :, None].view(torch.int64) + b.abs()[None].contiguous().view(torch.int64) - one
        product = bits.view(torch.float64) * torch.sign(a)[:, :, None] * torch.sign(b)[None]
        return product.sum(1)

    agree("pam", oracle, gradients=False)
