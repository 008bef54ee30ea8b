"""Specs that are one another's special cases, or two forms of one function: a mistake in either shows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.peers.oracle import agree, draw, graph_of, kernel_of
from weft.compiler import extents, reference


def evaluate(spec: str, inputs: dict[str, Tensor], **params: float) -> Tensor:
    """The first output of a spec."""
    kernel = kernel_of(spec)
    complete = extents.bind_params(kernel, params)
    bound = extents.bind(kernel, {n: x.shape for n, x in inputs.items()}, complete, {})
    return reference.evaluate(graph_of(spec), inputs, complete, bound)[kernel.outputs[0].name]


def heads(q: Tensor, fill: float) -> Tensor:
    return torch.full(q.shape[1:2], fill, dtype=q.dtype)


CASES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "alibi": lambda x: evaluate("alibi_slopes", x | {"slope": 2.0 ** (-8 * torch.arange(1, x["q"].shape[1] + 1) / x["q"].shape[1])}),
    "softmax_one": lambda x: evaluate("attention_sink", x | {"sink": heads(x["q"], 0.0)}),
    "gated_attention": lambda x: torch.sigmoid(x.pop("gate")) * evaluate("softmax_attention", x),
    "chunked": lambda x: evaluate("document_mask", x | {"doc": torch.arange(x["q"].shape[2]).expand(len(x["q"]), -1) // 3}),
    "sliding_window": lambda x: evaluate("streaming", x, sinks=0, window=3),
    "softmax_attention": lambda x: evaluate("kitchen_sink", x | {
        "slope": heads(x["q"], 0.0), "sink": heads(x["q"], -math.inf), "doc": torch.zeros(len(x["q"]), x["q"].shape[2], dtype=torch.long),
    }, window=99, cap=1e9),
    "ssd": lambda x: evaluate("ssd_dual", x),
    "moe_swiglu": lambda x: evaluate("moe_mixtral", {
        "x": x["x"], "router": x["router"], "w1": x["w_gate"], "w3": x["w_up"], "w2": x["w_down"],
    }),
    "delta_rule": lambda x: evaluate("gated_delta", x | {"g": torch.zeros_like(x["beta"])}),
    "gated_delta": lambda x: evaluate("gated_delta_product", x, steps=1),
    "simple_gla": lambda x: evaluate("gla", x | {"g": x["g"][..., None].expand(x["k"].shape)}),
    "linear_plain": lambda x: evaluate("simple_gla", x | {"g": torch.zeros(x["q"].shape[:3], dtype=x["q"].dtype)}),
    "iplr": lambda x: evaluate("rwkv7", x | {"g": torch.zeros_like(x["k"])}),
    "path": lambda x: evaluate("path_fox", x | {"log_f": torch.zeros_like(x["beta"])}),
    "lstm_np": lambda x: evaluate("lstm", x | {p: torch.zeros_like(x["rz"][0]) for p in ("pi", "pf", "po")}),
}  # fmt: skip
"""A spec, and another one that gives the same from the same inputs."""


@pytest.mark.parametrize("spec", sorted(CASES))
def test_same_function(spec: str) -> None:
    # Slopes and positions are float32 or large in two of them.
    agree(spec, lambda **x: CASES[spec](x), tol=1e-6 if spec in ("alibi", "softmax_attention") else 1e-9)


def test_absorption_turns_one_form_of_latent_attention_into_the_other() -> None:
    """q·(W c) = (Wᵀ q)·c and Σ a (U c) = U Σ a c."""
    x = draw("mla", sizes={"h": 2, "l": 5, "r": 2})
    generator = torch.Generator().manual_seed(1)
    up, out = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    short = torch.randn(*x["ql"].shape[:3], 3, generator=generator, dtype=torch.float64)
    absorbed = x | {"ql": torch.einsum("hdl,bhid->bhil", up, short)}
    latent = evaluate("mla", absorbed, scale=1 / math.sqrt(3 + 2))
    keys, values = (torch.einsum("hdl,bjl->bhjd", w, x["c"]) for w in (up, out))
    full = evaluate("mla_full", {"qc": short, "qr": x["qr"], "kc": keys, "kr": x["kr"], "v": values})
    assert torch.allclose(torch.einsum("hdl,bhil->bhid", out, latent), full, atol=1e-12)
