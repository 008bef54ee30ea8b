"""Causal attention printed as C, forward and backward, against torch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.codegen.c_harness import DTYPES, CPlan
from tests.codegen.sample_plans import SPEC_TEXT, attention_backward, attention_backward_owner, attention_forward

BOUNDS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}


@dataclass
class Case:
    extents: dict[str, int]
    dtype: str
    origin: int
    tensors: dict[str, torch.Tensor]
    o: torch.Tensor
    lse: torch.Tensor
    gradients: dict[str, torch.Tensor]
    scale: float = 0.3


def make_case(dtype: str = "float32", origin: int = 0, seed: int = 0, **extents: int) -> Case:
    """Random inputs with what torch makes of them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn([extents[a] for a in axes], generator=generator).to(DTYPES[dtype])
        for name, axes in {"q": "bgrid", "k": "bgjd", "v": "bgje", "d_o": "bgrie"}.items()
    }
    q, k, v = (tensors[n].double().requires_grad_() for n in "qkv")
    case = Case(extents, dtype, origin, tensors, q, q, {})
    scores = torch.einsum("bgrid,bgjd->bgrij", q, k) * case.scale
    future = torch.arange(extents["j"])[None] > torch.arange(extents["i"])[:, None] + origin
    scores = scores.masked_fill(future, float("-inf"))
    lse = scores.logsumexp(-1)
    case.lse = lse.detach()
    weights = torch.where(case.lse[..., None] == float("-inf"), 0.0, (scores - lse[..., None].clamp(min=-1e30)).exp())
    o = torch.einsum("bgrij,bgje->bgrie", weights, v)
    case.o = o.detach()
    case.gradients = dict(zip(("d_q", "d_k", "d_v"), torch.autograd.grad(o, (q, k, v), tensors["d_o"].double()), strict=True))
    return case


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert not actual.isnan().any()
    error = (actual.double() - expected).abs().max().item()
    assert error <= bound * max(1.0, expected.abs().max().item()), error


def run_forward(case: Case, block_i: int = 32, block_j: int = 32, threads: int = 1) -> dict[str, torch.Tensor]:
    compiled = CPlan(attention_forward(block_i, block_j), case.dtype, case.extents, text=SPEC_TEXT)
    return compiled({n: case.tensors[n] for n in "qkv"}, {"i": case.origin}, {"scale": case.scale}, threads)


SHAPES = [
    {"b": 1, "g": 2, "r": 2, "i": 70, "j": 70, "d": 16, "e": 16},
    {"b": 2, "g": 1, "r": 1, "i": 33, "j": 65, "d": 5, "e": 19},
    {"b": 1, "g": 1, "r": 3, "i": 1, "j": 40, "d": 64, "e": 64},
    {"b": 1, "g": 1, "r": 1, "i": 96, "j": 32, "d": 1, "e": 1},
]


@pytest.mark.parametrize(("shape", "dtype"), [*((shape, "float32") for shape in SHAPES), (SHAPES[0], "float16"), (SHAPES[1], "bfloat16")])
def test_forward(shape: dict[str, int], dtype: str) -> None:
    case = make_case(dtype, max(0, shape["j"] - shape["i"]), **shape)
    result = run_forward(case)
    close(result["o"], case.o, BOUNDS[dtype])
    close(result["lse"], case.lse, 2e-6)


@pytest.mark.parametrize("blocks", [(16, 64), (8, 8), (64, 128)])
def test_any_blocks(blocks: tuple[int, int]) -> None:
    case = make_case(origin=7, b=1, g=2, r=1, i=90, j=97, d=24, e=8)
    close(run_forward(case, *blocks)["o"], case.o, 2e-6)


def test_rows_without_keys_are_zero() -> None:
    case = make_case(origin=-10, b=1, g=1, r=1, i=40, j=40, d=8, e=8)
    result = run_forward(case)
    assert torch.equal(result["o"][..., :10, :], torch.zeros(1, 1, 1, 10, 8))
    assert torch.equal(result["lse"][..., :10], torch.full((1, 1, 1, 10), float("-inf")))
    close(result["o"], case.o, 2e-6)


def test_strided_and_expanded_inputs() -> None:
    case = make_case(b=2, g=2, r=2, i=50, j=50, d=12, e=12)
    plain = run_forward(case)["o"]
    case.tensors["q"] = case.tensors["q"].permute(4, 3, 0, 2, 1).contiguous().permute(2, 4, 3, 1, 0)
    case.tensors["k"] = torch.stack([case.tensors["k"]] * 3, -1)[..., 1]
    assert torch.equal(run_forward(case)["o"], plain)
    case.tensors["v"] = case.tensors["v"][:1, :1].expand(2, 2, 50, 12)
    expanded = run_forward(case)["o"]
    case.tensors["v"] = case.tensors["v"].contiguous()
    assert torch.equal(run_forward(case)["o"], expanded)


def test_same_bits_on_any_number_of_threads() -> None:
    case = make_case(b=2, g=2, r=2, i=130, j=130, d=16, e=16)
    assert torch.equal(run_forward(case, threads=1)["o"], run_forward(case, threads=3)["o"])


@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[0], "float32"), (SHAPES[1], "float32"), (SHAPES[0], "bfloat16")])
def test_backward(shape: dict[str, int], dtype: str) -> None:
    case = make_case(dtype, max(0, shape["j"] - shape["i"]), **shape)
    check_backward(case, CPlan(attention_backward(), dtype, shape))


@pytest.mark.parametrize(("shape", "blocks"), [*((shape, (32, 32)) for shape in SHAPES), (SHAPES[0], (16, 48))])
def test_backward_of_an_owner(shape: dict[str, int], blocks: tuple[int, int]) -> None:
    case = make_case("float32", max(0, shape["j"] - shape["i"]), **shape)
    check_backward(case, CPlan(attention_backward_owner(*blocks), "float32", shape))


def check_backward(case: Case, compiled: CPlan) -> None:
    saved = {"o": case.o.to(DTYPES[case.dtype]), "lse": case.lse.float()}
    result = compiled({**case.tensors, **saved}, {"i": case.origin}, {"scale": case.scale}, threads=2)
    for name, expected in case.gradients.items():
        close(result[name], expected, 4 * BOUNDS[case.dtype])
