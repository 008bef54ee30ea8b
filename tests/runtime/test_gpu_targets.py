"""Kernels compiled ahead of time for GPUs that are not here, and what their binaries show."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from tests.codegen import sample_plans as samples
from tests.evidence import library
from weft.codegen.gpu_blocks import Launch, launch_options, register_limit
from weft.codegen.print_triton import print_triton
from weft.codegen.source import Entry, Module, Specialization
from weft.compiler.blocks import Demand, blocks_for
from weft.compiler.fit import REGISTERS
from weft.runtime import spills
from weft.runtime.ahead import build_ahead
from weft.runtime.gpu_targets import TARGETS, KernelReport, TargetName, compile_for
from weft.runtime.problem import Usual, pose
from weft.runtime.spills import Fitted, fit_launches
from weft.runtime.triton_loader import NoDevice, load_triton


@pytest.fixture(autouse=True)
def own_triton_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def attention(direction: str, dtype: str, width: int, target: TargetName, folder: Path) -> list[KernelReport]:
    """Reports of causal attention with the default blocks for its head dim."""
    extents = {"d": width, "e": width}
    demand = Demand(width, width, 3 * width) if direction == "forward" else Demand(width, 2 * width, 4 * width)
    rows, swept = blocks_for(target, demand, 4 if dtype == "float32" else 2)
    make = samples.attention_forward if direction == "forward" else samples.attention_backward
    plan = make(rows, swept)
    spec = samples.specialization(plan, dtype, extents)
    return compile_for(print_triton(plan, spec, samples.SPEC_TEXT), spec, target, folder)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("width", "dtype"), [(64, "bfloat16"), (128, "float16")])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_attention_spills_nothing_and_uses_tensor_cores(target: TargetName, width: int, dtype: str, direction: str, tmp_path: Path) -> None:
    for report in attention(direction, dtype, width, target, tmp_path):
        assert not report.spills, str(report)
        assert report.fits, str(report)
        assert (report.tensor_core_instructions > 0) == (report.dots > 0), str(report)
        assert report.dots == {"forward": 4, "row_delta": 0, "key_gradients": 4, "query_gradients": 6}[report.kernel]


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_attention_compiles_for_other_targets(target: TargetName, tmp_path: Path) -> None:
    (report,) = attention("forward", "float16", 64, target, tmp_path)
    assert report.tensor_core_instructions > 0
    assert report.fits
    assert not report.spills, str(report)


def test_float32_products_are_exact_and_need_no_tensor_cores(tmp_path: Path) -> None:
    (report,) = attention("forward", "float32", 32, "sm_80", tmp_path)
    assert report.dots == 0, "only products of half precision count"
    assert report.tensor_core_instructions == 0


def test_a_kernel_is_compiled_once_wherever_it_stands_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one above it that was fitted to its registers may have more lines now."""
    import triton

    plan = samples.attention_forward(*blocks_for("sm_80", Demand(16, 16, 48), 2))
    spec = samples.specialization(plan, "float16", {"d": 16, "e": 16})
    module = print_triton(plan, spec, samples.SPEC_TEXT)
    moved = replace(module, text="# One line more.\n" + module.text)
    compiled: list[int] = []
    compile_one = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *args, **options: compiled.append(1) or compile_one(*args, **options))
    first = compile_for(module, spec, "sm_80", tmp_path)
    assert compile_for(moved, spec, "sm_80", tmp_path) == first
    assert len(compiled) == 1
    compile_for(moved, spec, "sm_80", tmp_path, {"num_warps": 8})
    assert len(compiled) == 2, "other launch options make another binary"


@pytest.mark.parametrize("width", [40, 72])
def test_padded_head_dims_compile(width: int, tmp_path: Path) -> None:
    (report,) = attention("forward", "bfloat16", width, "sm_80", tmp_path)
    assert report.tensor_core_instructions > 0


SPILLING = """
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, out_ptr, x_stride_i, x_stride_d, out_stride_i, out_stride_d, i_size: tl.int32, N: tl.constexpr):
    rows = tl.arange(0, N)
    x = tl.load(x_ptr + rows[:, None] * x_stride_i + rows[None, :] * x_stride_d)
    squared = tl.dot(x, x)
    for _ in range(i_size):
        squared = tl.dot(tl.exp(squared).to(tl.float16), x, squared)
    tl.store(out_ptr + rows[:, None] * out_stride_i + rows[None, :] * out_stride_d, squared)


kernel_options = {"N": 128, "num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
"""


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_spills_are_reported(target: TargetName, tmp_path: Path) -> None:
    """An accumulator of 128 x 128 floats does not fit into the registers of one warp; one of 32 x 32 does."""
    module = Module("triton", SPILLING, (Entry("kernel", ("x", "out"), ("i",), (), ()),))
    spec = Specialization((("x", "float16"), ("out", "float16")), (), ())
    (spilling,) = compile_for(module, spec, target, tmp_path)
    assert spilling.spills
    assert spilling.spill_bytes > 0
    assert spilling.spill_stores > 0
    assert spilling.spill_loads > 0
    assert "bytes spilled" in str(spilling)
    (small,) = compile_for(module, spec, target, tmp_path, {"N": 32})
    assert not small.spills
    assert "no spills" in str(small)


@pytest.mark.parametrize(("size", "launches"), [(32, {}), (128, {"kernel": Launch(8, 2)})])
def test_a_kernel_that_spills_is_launched_with_more_warps(size: int, launches: dict[str, Launch]) -> None:
    text = SPILLING.replace('"N": 128', f'"N": {size}')
    module = Module("triton", text, (Entry("kernel", ("x", "out"), ("i",), (), ()),))
    spec = Specialization((("x", "float16"), ("out", "float16")), (), ())
    assert fit_launches(module, spec, "sm_90") == Fitted(launches, {})
    assert fit_launches(module, spec, "gfx942") == Fitted({}, {})
    assert fit_launches(module, spec, "sm_90", only=()) == Fitted({}, {})


def test_what_spills_with_every_launch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spills, "AGAINST_SPILLS", ())
    module = Module("triton", SPILLING, (Entry("kernel", ("x", "out"), ("i",), (), ()),))
    fitted = fit_launches(module, Specialization((("x", "float16"), ("out", "float16")), (), ()), "sm_90")
    assert fitted.spilling["kernel"] > 0


def test_a_kernel_that_spills_with_every_launch_gets_finer_tiles() -> None:
    """The gradient of queries and of distances: no launch holds the tiles of the table, and half of one holds everything."""
    kernel = library.kernel("shaw")
    problem = pose(kernel.graph, {}, {}, Usual(feature=64))
    usual = kernel.lowered("sm_80", dtype=torch.float16, extents=problem.extents, params=problem.params)
    tiled = {k.name: k.tiled for k in usual.backward(frozenset(usual.differentiable)).kernels}
    assert tiled["backward_d_q_t3"] == {"i": 64, "j": 32}
    built = build_ahead(kernel, problem, "sm_80", "float16")
    assert not any(report.spills for report in built.reports), str(built)
    text = kernel.source("triton", part="backward", target="sm_80", dtype=torch.float16, extents=problem.extents, params=problem.params)
    assert "backward_d_q_t3: grid b, h; rows of i by 32; j by 32" in text


def test_a_half_that_spills_is_fitted_like_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assembler is feigned: no tiles help the gradients of keys and values together, finer ones help that of keys alone."""
    seen: list[tuple[int, int]] = []

    def feigned(module: Module, *_: object) -> Fitted:
        if any(e.name == "backward_d_k_d_v" for e in module.entries):
            return Fitted({}, {"backward_d_k_d_v": 100})
        (tiles,) = re.findall(r"backward_d_k: grid .*; rows of j by (\d+); i by (\d+)", module.text)
        seen.append((int(tiles[0]), int(tiles[1])))
        return Fitted({}, {"backward_d_k": 50} if seen[-1] == seen[0] else {})

    monkeypatch.setattr(spills, "fit_launches", feigned)
    kernel = library.kernel("softmax_attention")
    problem = pose(kernel.graph, {}, {}, Usual(feature=64))
    lowered = kernel.lowered("sm_90", dtype=torch.float16, extents=problem.extents, params=problem.params)
    plan = lowered.backward(frozenset(lowered.differentiable))
    spec = Specialization(tuple((name, "float16") for name in plan.buffers), tuple(problem.extents.items()), ())
    module = spills.print_fitted(plan, spec, kernel.spec.text, "sm_90")
    assert {"backward_d_k", "backward_d_v"} <= {e.name for e in module.entries}
    assert len(seen) == 2 and seen[1][0] * seen[1][1] < seen[0][0] * seen[0][1]
    assert "backward_d_k: grid b, g; rows of j by {}; i by {};".format(*seen[1]) in module.text


@pytest.mark.parametrize("warps", [4, 8, 16])
def test_all_threads_of_a_program_find_registers(warps: int) -> None:
    assert register_limit(warps) * warps * 32 <= REGISTERS


def test_without_a_gpu_loading_says_what_to_do(tmp_path: Path) -> None:
    import torch
    import triton

    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        pytest.skip("there is something to run on")
    plan = samples.pointwise_kernel("neg", 1)
    with pytest.raises(NoDevice, match="TRITON_INTERPRET=1"):
        load_triton(print_triton(plan, samples.specialization(plan, "float32", {})), tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("width", [1, 16, 64, 96, 128, 192, 256])
def test_blocks_are_fit_for_matrix_products(target: str, element_bytes: int, width: int) -> None:
    for sums in (1, 2, 3):
        rows, swept = blocks_for(target, Demand(width, sums * width, (sums + 2) * width, stepped=1), element_bytes)
        assert rows >= 16
        assert swept >= 16
        assert rows * swept <= 64 * 64
    assert launch_options(width, target) in [Launch(n, 2, limited=target.startswith("sm_")) for n in (4, 8)]
