"""Losses of scores that no tensor holds, and masks that ask whether anything holds."""

from __future__ import annotations

import torch

import weft

CROSS_ENTROPY = """
kernel cross_entropy(x[t,d], w[v,d], target[t]: int) -> loss[t]:
    s = sum[d](x * w)
    loss = where(target >= 0, lse[v](s) - s[v -> target], 0)
"""

CONTRASTIVE = """
kernel contrastive(x[n,d], y[m,d], scale[]) -> loss[]:
    s = scale * sum[d](x * y)
    loss = (mean[n](lse[m](s) - s[m -> n]) + mean[m](lse[n](s) - s[n -> m])) / 2
"""

DRAWN = """
kernel drawn(q[h,i,d], k[h,j,d], v[h,j,e], rand[h,m,r]: int) -> o[h,i,e]:
    param block: int = 8
    mask any[r](rand[m -> i // block] == j // block)
    mask all[r](rand[m -> i // block] != j % block)
    o = sum[j](softmax[j](sum[d](q * k)) * v)
"""


def test_cross_entropy_of_a_projection() -> None:
    """The scores of a vocabulary are not stored, and a target that is none reads 0."""
    torch.manual_seed(0)
    kernel = weft.loads(CROSS_ENTROPY)["cross_entropy"]
    x, w = torch.randn(70, 16, requires_grad=True), torch.randn(600, 16, requires_grad=True)
    target = torch.randint(0, 600, (70,))
    target[::7] = -100
    loss = kernel(x, w, target, strict=True)
    wanted = torch.nn.functional.cross_entropy(x @ w.T, target, reduction="none")
    torch.testing.assert_close(loss, wanted)
    d_loss = torch.randn(70)
    ours, theirs = (torch.autograd.grad(y, (x, w), d_loss) for y in (loss, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_contrastive_loss_goes_through_both_sides() -> None:
    torch.manual_seed(0)
    kernel = weft.loads(CONTRASTIVE)["contrastive"]
    x, y = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    scale = torch.tensor(0.3, requires_grad=True)
    loss = kernel(x, y, scale, strict=True)
    scores, own = scale * x @ y.T, torch.arange(300)
    wanted = (torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(z, (x, y, scale)) for z in (loss, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_masks_by_any_and_all_of_a_few() -> None:
    """Blocks drawn at random, as in BigBird (Zaheer et al., 2020, section 2)."""
    torch.manual_seed(0)
    kernel = weft.loads(DRAWN)["drawn"]
    q, k, v = (torch.randn(2, n, 16, requires_grad=True) for n in (40, 48, 48))
    rand = torch.randint(0, 6, (2, 5, 3))
    block, place = torch.arange(48) // 8, torch.arange(48) % 8
    own = rand[:, torch.arange(40) // 8]
    kept = (own[..., None] == block).any(2) & (own[..., None] != place).all(2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, kept, scale=1.0)
    o = kernel(q, k, v, rand, strict=True)
    torch.testing.assert_close(o, wanted, rtol=1e-5, atol=1e-5)
    d_o = torch.randn_like(o)
    ours, theirs = (torch.autograd.grad(z, (q, k, v), d_o) for z in (o, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_read_of_a_sum_over_the_axis_of_its_position() -> None:
    """The position is that of the row outside of the sum, not of the terms within."""
    torch.manual_seed(0)
    text = "kernel f(x[t,d], w[v,d], u[t,v], at[t]: int) -> y[t]:\n    s = sum[d](x * w) + sum[t](u)\n    y = s[v -> at]\n"
    kernel = weft.loads(text)["f"]
    x, w, u = torch.randn(9, 4), torch.randn(7, 4), torch.randn(9, 7)
    at = torch.randint(0, 7, (9,))
    wanted = (x @ w.T + u.sum(0)).gather(1, at[:, None])[:, 0]
    torch.testing.assert_close(kernel(x, w, u, at), wanted)
