"""Recurrences that no installed package has: step by step, from the papers' definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.peers.oracle import agree

LSTMS = ["lstm", "lstm_nig", "lstm_nfg", "lstm_nog", "lstm_niaf", "lstm_noaf", "lstm_np", "lstm_coupled", "lstm_fgr"]


@pytest.mark.parametrize("spec", LSTMS)
def test_lstm(spec: str) -> None:
    """The LSTM with every part that a variant may lack; gates that it lacks are 1."""

    def oracle(**w: Tensor) -> Tensor:
        batch, steps, width = w["zx"].shape
        c = y = i = f = o = w["zx"].new_zeros(batch, width)
        outputs = []
        for t in range(steps):
            before = {"i": i, "f": f, "o": o}

            def gate(name: str, cell: Tensor, past: Tensor = y, t: int = t, before: dict[str, Tensor] = before) -> Tensor:
                if f"{name}x" not in w:
                    return torch.ones_like(cell)
                pre = w[f"{name}x"][:, t] + past @ w[f"r{name}"]
                pre = pre + w[f"p{name}"] * cell if f"p{name}" in w else pre
                for source, value in before.items():
                    pre = pre + value @ w[f"r{source}{name}"] if f"r{source}{name}" in w else pre
                return torch.sigmoid(pre)

            z = w["zx"][:, t] + y @ w["rz"]
            z = z if spec == "lstm_niaf" else torch.tanh(z)
            i, f = gate("i", c), gate("f", c)
            i = 1 - f if spec == "lstm_coupled" else i
            c = i * z + f * c
            o = gate("o", c)
            y = o * (c if spec == "lstm_noaf" else torch.tanh(c))
            outputs.append(y)
        return torch.stack(outputs, 1)

    agree(spec, oracle)


def test_lstm_cifg() -> None:
    def oracle(zx: Tensor, fx: Tensor, ox: Tensor, rz: Tensor, rf: Tensor, ro: Tensor, rff: Tensor) -> Tensor:
        c = y = f = zx.new_zeros(zx.shape[0], zx.shape[2])
        outputs = []
        for t in range(zx.shape[1]):
            f = torch.sigmoid(fx[:, t] + y @ rf + f @ rff)
            c = (1 - f) * torch.tanh(zx[:, t] + y @ rz) + f * c
            y = torch.sigmoid(ox[:, t] + y @ ro) * c
            outputs.append(y)
        return torch.stack(outputs, 1)

    agree("lstm_cifg", oracle)


def test_gru() -> None:
    def oracle(x: Tensor, xf: Tensor, xr: Tensor, w: Tensor, wf: Tensor, wr: Tensor) -> Tensor:
        def turn(y: Tensor, m: Tensor) -> Tensor:
            return torch.einsum("bhm,hmn->bhn", y, m)

        y = torch.zeros_like(x[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            f, r = torch.sigmoid(xf[:, t] + turn(y, wf)), torch.sigmoid(xr[:, t] + turn(y, wr))
            y = f * y + (1 - f) * torch.tanh(x[:, t] + turn(r * y, w))
            outputs.append(y)
        return torch.stack(outputs, 1)

    agree("gru", oracle)


def test_slstm() -> None:
    """Without the running maximum, which cancels: plain exponentials in float64."""

    def oracle(ix: Tensor, fx: Tensor, zx: Tensor, ox: Tensor, ri: Tensor, rf: Tensor, rz: Tensor, ro: Tensor) -> Tensor:
        def pre(x: Tensor, r: Tensor, t: int, y: Tensor) -> Tensor:
            return x[:, t] + torch.einsum("bhm,hmn->bhn", y, r)

        y = c = norm = torch.zeros_like(ix[:, 0])
        outputs = []
        for t in range(ix.shape[1]):
            i, f = torch.exp(pre(ix, ri, t, y)), torch.sigmoid(pre(fx, rf, t, y))
            z, o = torch.tanh(pre(zx, rz, t, y)), torch.sigmoid(pre(ox, ro, t, y))
            c, norm = f * c + i * z, f * norm + i
            y = o * c / norm
            outputs.append(y)
        return torch.stack(outputs, 1)

    agree("slstm", oracle)


def test_m2rnn() -> None:
    def oracle(q: Tensor, k: Tensor, v: Tensor, f: Tensor, w: Tensor) -> dict[str, Tensor]:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        outputs = []
        for t in range(q.shape[2]):
            z = torch.tanh(state @ w + k[:, :, t, :, None] * v[:, :, t, None])
            state = f[:, :, t, None, None] * state + (1 - f[:, :, t, None, None]) * z
            outputs.append((q[:, :, t, None] @ state)[:, :, 0])
        return {"o": torch.stack(outputs, 2), "S": state}

    agree("m2rnn", oracle)


def test_ids4() -> None:
    def oracle(x: Tensor, a: Tensor, proj: Tensor) -> Tensor:
        p = torch.eye(a.shape[1], dtype=a.dtype).expand(len(x), -1, -1)
        outputs = []
        for t in range(x.shape[1]):
            p = p @ torch.einsum("bm,mnk->bnk", x[:, t], a)
            outputs.append(torch.einsum("bnk,nkc->bc", p, proj))
        return torch.stack(outputs, 1)

    agree("ids4", oracle)


def test_rnn_s4() -> None:
    def oracle(x: Tensor, a: Tensor, bb: Tensor, c: Tensor, dd: Tensor) -> Tensor:
        h = x.new_zeros(len(x), len(a))
        outputs = []
        for t in range(x.shape[1]):
            h = torch.sign(h @ a.T + x[:, t] @ bb.T)
            outputs.append(h @ c.T + dd * x[:, t])
        return torch.stack(outputs, 1)

    agree("rnn_s4", oracle)


def test_mlgru_released() -> None:
    def oracle(f: Tensor, c: Tensor, g: Tensor, w: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(f[:, 0]), []
        for t in range(f.shape[1]):
            keep = torch.sigmoid(f[:, t])
            h = keep * h + (1 - keep) * F.silu(c[:, t])
            outputs.append(F.rms_norm(g[:, t], w.shape, w, 1e-5) * F.silu(h))
        return torch.stack(outputs, 1)

    agree("mlgru_released", oracle)


CLOSED: dict[str, Callable[..., Tensor]] = {
    "min_gru": lambda z, x: _weighted(torch.sigmoid(-z), torch.sigmoid(z) * x),
    "hgrn": lambda x, g: _weighted(g.exp(), x),
}


def _weighted(keep: Tensor, write: Tensor) -> Tensor:
    """h_t = Σ_u (Π_{u<l≤t} keep_l) write_u, summed as it stands."""
    steps = range(keep.shape[1])
    return torch.stack([sum((keep[:, u + 1 : t + 1].prod(1) * write[:, u] for u in steps[: t + 1]), torch.zeros(())) for t in steps], 1)


@pytest.mark.parametrize("spec", sorted(CLOSED))
def test_closed_forms(spec: str) -> None:
    agree(spec, CLOSED[spec])
