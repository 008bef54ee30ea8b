"""What the printed Triton looks like, and what no printer for GPUs takes. Nothing here needs Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
import time

import pytest

from tests.codegen import sample_plans as samples
from weft.codegen.print_triton import print_triton
from weft.codegen.source import Module
from weft.codegen.triton_expressions import UnprintablePlan
from weft.compiler import ir
from weft.compiler import plan as p


def printed(direction: str = "forward", dtype: str = "float16", width: int = 40) -> Module:
    plan = samples.attention_forward() if direction == "forward" else samples.attention_backward()
    return print_triton(plan, samples.specialization(plan, dtype, {"d": width, "e": 64}), samples.SPEC_TEXT)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_source_is_python_that_imports_triton_alone(direction: str) -> None:
    tree = ast.parse(printed(direction).text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert imported == {"triton", "triton.language"}
    assert printed(direction).text == printed(direction).text


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_argument_and_no_assigned_name_is_unused(direction: str) -> None:
    for function in (n for n in ast.parse(printed(direction).text).body if isinstance(n, ast.FunctionDef)):
        read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} - {"_"}
        assert stored <= read, function.name
        strides = {a.arg for a in function.args.args if "_stride_" in a.arg}
        assert strides <= read, function.name


def test_the_spec_stands_in_the_header_and_beside_its_code() -> None:
    text = printed().text
    assert "#         mask j <= i" in text
    assert "# spec.weft:4  o = sum[j](softmax[j](s) * v)" in text
    assert "# full tiles: no mask" in text


def test_full_tiles_have_no_mask_but_that_of_padding() -> None:
    text = printed().text
    full, partial = text.split("# full tiles: no mask")[1].split("# the diagonal and the last keys")
    assert "mask=d_inside[None, :]" in full
    assert "j_inside" not in full
    assert "mask=j_inside[:, None] & d_inside[None, :]" in partial


@pytest.mark.parametrize(("dtype", "product"), [("float16", "tl.dot(q, tl.trans(k))"), ("float32", 'tl.trans(k), input_precision="ieee")')])
def test_products_are_taken_in_the_dtype_of_the_tensors(dtype: str, product: str) -> None:
    assert product in printed(dtype=dtype).text
    assert ("p.to(tl.float16)" in printed(dtype=dtype).text) == (dtype == "float16")


def test_a_head_dim_of_a_power_of_two_is_not_padded() -> None:
    assert "PADDED_D" in printed(width=40).text
    assert "PADDED" not in printed(width=64).text
    assert "d_inside" not in printed(width=64).text


def test_a_head_dim_below_16_is_padded_for_matrix_products() -> None:
    assert '"D": 8, "PADDED_D": 16' in printed(width=8).text


def test_entries_say_what_kernels_are_called_with() -> None:
    (entry,) = printed().entries
    assert entry.buffers == ("q", "k", "v", "o", "lse")
    assert entry.extents == ("b", "g", "r", "i", "j")
    assert entry.origins == ("i",)
    assert entry.params == ("scale",)


def test_names_that_python_or_the_file_uses_are_avoided() -> None:
    x = samples.tensor("x", "t")
    node = samples.op("tanh", x)
    body = (p.Load(x, "x", (), ("t",)), p.Compute(node), p.Store("lambda", node, ("t",)))
    kernel = p.Kernel("apply", (), "t", {"t": 32}, (), ("t",), body, "")
    buffers = [p.Buffer("x", ("t",), "float32", "input"), p.Buffer("lambda", ("t",), "float32", "output")]
    plan = samples.make_plan("forward", buffers, [kernel], {x: "tl", node: "tanh"})
    text = print_triton(plan, samples.specialization(plan, "float32", {})).text
    ast.parse(text)
    assert "tl_ = tl.load(" in text
    assert "tanh(tl_)" in text


def test_plans_for_a_cpu_are_refused() -> None:
    owner = samples.attention_backward_owner()
    with pytest.raises(UnprintablePlan, match="a plan for a CPU"):
        print_triton(owner, samples.specialization(owner, "float32", {"d": 16, "e": 16}))


def test_a_value_that_no_statement_obtains_is_refused() -> None:
    x = samples.tensor("x", "t")
    kernel = p.Kernel("apply", (), "t", {"t": 32}, (), ("t",), (p.Store("out", x, ("t",)),), "")
    plan = samples.make_plan("forward", [p.Buffer("out", ("t",), "float32", "output")], [kernel], {x: "x"})
    with pytest.raises(UnprintablePlan, match="before a statement obtains it"):
        print_triton(plan, samples.specialization(plan, "float32", {}))


def test_an_axis_that_nothing_fixes_is_refused() -> None:
    x = samples.tensor("x", "t n")
    kernel = p.Kernel("apply", (), "t", {"t": 32}, (), ("t",), (p.Load(x, "x", (), ("t",)), p.Store("x", x, ("t",))), "")
    plan = samples.make_plan("forward", [p.Buffer("x", ("t", "n"), "float32", "output")], [kernel], {x: "x"})
    with pytest.raises(UnprintablePlan, match="index of n, which neither its grid nor a loop fixes"):
        print_triton(plan, samples.specialization(plan, "float32", {}))


def test_a_loop_that_starts_inside_a_tile_starts_at_its_first_index() -> None:
    x, total = samples.tensor("x", "t"), p.local("total", ())
    inner = (p.Load(x, "x", (), ("t",)), p.Accumulate(total, "sum", x, None, ("t",)))
    starts = {"100": ir.const(100), "64": ir.const(64), "start": p.origin("t")}
    texts = {}
    for name, start in starts.items():
        body = (p.Begin(total, "sum"), p.Loop("t", 32, start, ir.size("t"), inner, ""), p.Store("out", total, ()))
        kernel = p.Kernel("apply", (), None, {"t": 32}, (), ("t",), body, "")
        buffers = [p.Buffer("x", ("t",), "float32", "input"), p.Buffer("out", (), "float32", "output")]
        plan = samples.make_plan("forward", buffers, [kernel], {})
        texts[name] = print_triton(plan, samples.specialization(plan, "float32", {})).text
    assert "range(96, t_size, BLOCK_T)" in texts["100"]
    assert "range(64, t_size, BLOCK_T)" in texts["64"]
    assert "tl.maximum(t_origin, 0) // BLOCK_T * BLOCK_T" in texts["start"]


def test_printing_takes_milliseconds() -> None:
    printed("backward")
    start = time.process_time()
    printed("backward")
    assert time.process_time() - start < 0.15


def test_the_printer_does_not_import_triton() -> None:
    code = "import sys, weft.codegen.print_triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
