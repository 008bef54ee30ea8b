"""Each statement of a plan printed as C, in small kernels, against torch."""

from __future__ import annotations

import pytest
import torch

from tests.codegen.c_harness import CPlan
from tests.codegen.sample_plans import make_plan, op, product, tensor
from weft.compiler import ir
from weft.compiler import plan as p


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def buffer(name: str, axes: str, dtype: p.Dtype = "float32", out: bool = False) -> p.Buffer:
    return p.Buffer(name, tuple(axes.split()), dtype, "output" if out else "input")


def kernel(
    body: tuple[p.Statement, ...], tiles: str, rows: str | None = None, tiled: dict[str, int] | None = None, grid: str = ""
) -> p.Kernel:
    order = tuple(tiles.split())
    blocks = tiled or {}
    return p.Kernel("work", tuple(grid.split()), rows, blocks, tuple(a for a in order if a not in blocks), order, body, "")


X = tensor("x", "i n")


@pytest.mark.parametrize("rows", [3, 16, 40])
@pytest.mark.parametrize("operation", ["sum", "prod", "max", "min", "argmax"])
def test_fold_over_a_whole_axis(operation: str, rows: int) -> None:
    kind: ir.Kind = "int" if operation == "argmax" else "real"
    out = ir.make(ir.Input, ("i",), kind, "out*")
    body = (p.Load(X, "x", (), ("i",)), p.Fold(out, operation, X, ("n",)), p.Store("out", out, ("i",)))
    buffers = [buffer("x", "i n"), buffer("out", "i", "int64" if operation == "argmax" else "float32", out=True)]
    plan = make_plan("forward", buffers, [kernel(body, "i n", "i", {"i": 16})], {})
    x = randn(rows, 21)
    x[0, 3] = x[0, 9] = 8.0
    expected = {"sum": x.sum(1), "prod": x.prod(1), "max": x.amax(1), "min": x.amin(1), "argmax": x.argmax(1)}[operation]
    result = CPlan(plan, "float32", {"i": rows, "n": 21})({"x": x})["out"]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    if operation == "argmax":
        assert result[0] == 3


@pytest.mark.parametrize("operation", ["sum", "max", "min", "prod", "any", "all", "argmax"])
@pytest.mark.parametrize("order", ["i j", "j i"])
def test_accumulate_over_a_swept_axis(operation: str, order: str) -> None:
    """x[j, i] folded over j, whose extent is no multiple of the block."""
    kind: ir.Kind = "bool" if operation in ("any", "all") else "real"
    x = ir.make(ir.Input, ("i", "j"), kind, "x")
    carried = p.local("carried", ("i",), "int" if operation == "argmax" else kind)
    start = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "argmax": float("-inf"), "min": float("inf"), "any": False, "all": True}[
        operation
    ]
    masked = op("where", op("lt", p.index("j"), ir.size("j")), x, ir.const(start))
    top = p.local("top", ("i",))
    inner = (
        p.Load(x, "x", (), ("i", "j")),
        p.Compute(masked),
        p.Accumulate(carried, operation, masked, None, ("j",), companion=top if operation == "argmax" else None),
    )
    body = (p.Begin(carried, operation), p.Loop("j", 16, ir.const(0), ir.size("j"), inner, ""), p.Store("out", carried, ("i",)))
    dtypes: dict[str, p.Dtype] = {"argmax": "int64", "any": "bool", "all": "bool"}
    dtype: p.Dtype = "bool" if kind == "bool" else "float32"
    buffers = [buffer("x", "j i", dtype), buffer("out", "i", dtypes.get(operation, "float32"), out=True)]
    plan = make_plan("forward", buffers, [kernel(body, order, "i", {"i": 8, "j": 16})], {})
    values = randn(37, 19)
    given = values > 1.2 if operation == "any" else values > -1.2 if operation == "all" else values
    functions = {"sum": torch.sum, "prod": torch.prod, "max": torch.amax, "min": torch.amin, "argmax": torch.argmax, "any": torch.any}
    expected = functions.get(operation, torch.all)(given, 0)
    torch.testing.assert_close(CPlan(plan, "float32", {"i": 19, "j": 37})({"x": given})["out"], expected, rtol=1e-5, atol=1e-6)


PRODUCTS = {
    "matrix": ("i n", "n m", "i m"),
    "turned": ("n i", "m n", "i m"),
    "vector left": ("n", "n m", "m"),
    "vector right": ("i n", "n", "i"),
    "row dots": ("i n", "i n", "i"),
    "batched": ("i n", "i n m", "i m"),
    "outer": ("i", "m", "i m"),
}


@pytest.mark.parametrize("form", sorted(PRODUCTS))
def test_contract(form: str) -> None:
    left_axes, right_axes, out_axes = PRODUCTS[form]
    extents = {"i": 13, "n": 7, "m": 35}
    left, right, out = tensor("left", left_axes), tensor("right", right_axes), product("out", out_axes)
    over = ("n",) if "n" in left_axes.split() else ()
    rows = "i" if "i" in out_axes else None
    checked = ("i",) if rows else ()
    body = (
        p.Load(left, "left", (), tuple(a for a in checked if a in left_axes)),
        p.Load(right, "right", (), tuple(a for a in checked if a in right_axes)),
        p.Contract(out, left, right, over),
        p.Store("out", out, checked),
    )
    tiles = " ".join(a for a in ("i", "n", "m") if a in f"{left_axes} {right_axes}".split())
    plan = make_plan(
        "forward",
        [buffer("left", left_axes), buffer("right", right_axes), buffer("out", out_axes, out=True)],
        [kernel(body, tiles, rows, {"i": 8} if rows else None)],
        {},
    )
    a, b = randn(*(extents[x] for x in left_axes.split())), randn(*(extents[x] for x in right_axes.split()), seed=1)
    expected = torch.einsum(f"{left_axes},{right_axes}->{out_axes}".replace(" ", ""), a.double(), b.double()).float()
    torch.testing.assert_close(CPlan(plan, "float32", extents)({"left": a, "right": b})["out"], expected)


def test_contract_of_positions() -> None:
    """A factor that is an int is multiplied as a number, not taken for a tile of reals."""
    place, out = op("add", p.index("i"), p.origin("i")), product("out", "n")
    body = (p.Load(X, "x", (), ()), p.Compute(place), p.Contract(out, place, X, ("i",)), p.Store("out", out, ()))
    plan = make_plan("forward", [buffer("x", "i n"), buffer("out", "n", out=True)], [kernel(body, "i n")], {})
    x = randn(19, 6)
    result = CPlan(plan, "float32", {"i": 19, "n": 6})({"x": x}, origins={"i": 3})["out"]
    torch.testing.assert_close(result, (torch.arange(3, 22).double() @ x.double()).float(), rtol=1e-5, atol=1e-4)


def test_gather_by_a_computed_index_reads_zero_outside() -> None:
    table, place = tensor("table", "i"), tensor("place", "i", "int")
    shifted = op("sub", place, ir.const(1))
    found = ir.read(table, [("i", shifted)])
    body = (
        p.Load(place, "place", (), ("i",)),
        p.Compute(shifted),
        p.Load(found, "table", (("i", shifted),), ("i",)),
        p.Store("out", found, ("i",)),
    )
    buffers = [buffer("table", "i"), buffer("place", "i", "int32"), buffer("out", "i", out=True)]
    plan = make_plan("forward", buffers, [kernel(body, "i", "i", {"i": 16})], {})
    at = torch.tensor([5, 0, 1, 9, -3, 20, 10, 2, 2, 11], dtype=torch.int32)
    values = randn(10)
    expected = torch.tensor([values[n - 1] if 0 <= n - 1 < 10 else 0.0 for n in at.tolist()])
    assert torch.equal(CPlan(plan, "float32", {"i": 10})({"table": values, "place": at})["out"], expected)


def test_shifted_tile_load() -> None:
    """A scalar index: the row before each row of the grid, 0 before the first."""
    before = ir.read(tensor("x", "t n"), [("t", op("sub", p.index("t"), ir.const(1)))])
    body = (p.Load(before, "x", (("t", op("sub", p.index("t"), ir.const(1))),), ("t",)), p.Store("out", before, ()))
    plan = make_plan("forward", [buffer("x", "t n"), buffer("out", "t n", out=True)], [kernel(body, "n", grid="t")], {})
    x = randn(6, 5)
    expected = torch.cat([torch.zeros(1, 5), x[:-1]])
    assert torch.equal(CPlan(plan, "float32", {"t": 6, "n": 5})({"x": x})["out"], expected)


def test_scatter_adds_in_order_and_drops_what_is_outside() -> None:
    x, at, carried = tensor("x", "i"), tensor("at", "i", "int"), p.local("carried", ("n",))
    inner = (p.Load(x, "x", (), ("i",)), p.Load(at, "at", (), ("i",)), p.Scatter(carried, "n", at, x))
    body = (p.Begin(carried, "sum"), p.Loop("i", 16, ir.const(0), ir.size("i"), inner, ""), p.Store("out", carried, ()))
    buffers = [buffer("x", "i"), buffer("at", "i", "int64"), buffer("out", "n", out=True)]
    plan = make_plan("forward", buffers, [kernel(body, "i n", None, {"i": 16})], {})
    values, places = randn(50), torch.randint(-2, 9, (50,), generator=torch.Generator().manual_seed(2))
    kept = (places >= 0) & (places < 7)
    expected = torch.zeros(7).index_add(0, places[kept], values[kept])
    torch.testing.assert_close(CPlan(plan, "float32", {"i": 50, "n": 7})({"x": values, "at": places})["out"], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [16, 5])
def test_sum_in_place(dtype: str, width: int) -> None:
    """An owner adds x[i, :] . w[j] of every tile j to rows that stay in memory."""
    a, x, rows = tensor("a", "i j"), tensor("x", "j n"), p.local("rows", ("i", "n"))
    inner = (p.Load(a, "a", (), ("i", "j")), p.Accumulate(rows, "sum", a, x, ("j",)))
    body = (
        p.Begin(rows, "sum", "out"),
        p.Load(x, "x", (), ("j",)),
        p.Loop("i", 16, ir.const(0), ir.size("i"), inner, ""),
    )
    owner = p.Kernel("work", ("b",), "j", {"i": 16, "j": 8}, ("n",), ("i", "j", "n"), body, "", owner=True)
    buffers = [p.Buffer("a", ("b", "i", "j"), "input", "input"), p.Buffer("x", ("b", "j", "n"), "input", "input")]
    buffers.append(p.Buffer("out", ("b", "i", "n"), "input", "gradient"))
    plan = make_plan("backward", buffers, [owner], {})
    kind = getattr(torch, dtype)
    given = {"a": randn(2, 37, 21).to(kind), "x": randn(2, 21, width, seed=1).to(kind)}
    expected = (given["a"].double() @ given["x"].double()).to(kind)
    result = CPlan(plan, dtype, {"b": 2, "i": 37, "j": 21, "n": width})(given, threads=2)["out"]
    torch.testing.assert_close(result, expected, rtol=1e-5 if dtype == "float32" else None, atol=1e-5 if dtype == "float32" else None)


def test_a_scalar_loop_within_tiles() -> None:
    """sum over t of x[t, n], leaving out the tile that starts at 8."""
    x, carried = tensor("x", "t n"), p.local("carried", ("n",))
    inner = (p.Load(x, "x", (), ()), p.Accumulate(carried, "sum", x, None, ("t",)))
    scalar = p.Loop("t", None, p.edge("u", "start"), p.edge("u", "stop"), inner, "every row")
    once = op("where", op("ne", p.edge("u", "start"), ir.const(8)), ir.const(1), ir.const(0))
    condition = p.Loop("once", None, ir.const(0), once, (scalar,), "")
    tiles = p.Loop("u", 4, ir.const(0), ir.size("u"), (condition,), "")
    body = (p.Begin(carried, "sum"), tiles, p.Store("out", carried, ()))
    plan = make_plan("forward", [buffer("x", "t n"), buffer("out", "n", out=True)], [kernel(body, "n u", None, {"u": 4})], {})
    x_value = randn(14, 6)
    expected = x_value[:8].sum(0) + x_value[12:].sum(0)
    torch.testing.assert_close(CPlan(plan, "float32", {"t": 14, "u": 14, "n": 6})({"x": x_value})["out"], expected)


def test_tiles_too_large_for_the_stack_go_to_the_heap() -> None:
    x = tensor("x", "i n")
    turned = op("mul", x, p.local("largest", ("i",)))
    largest = p.local("largest", ("i",))
    body = (
        p.Begin(largest, "max"),
        p.Load(x, "x", (), ("i",)),
        p.Accumulate(largest, "max", x, None, ("n",)),
        p.Compute(turned),
        p.Store("out", turned, ("i",)),
    )
    plan = make_plan("forward", [buffer("x", "i n"), buffer("out", "i n", out=True)], [kernel(body, "i n", "i", {"i": 64})], {})
    compiled = CPlan(plan, "float32", {"i": 70, "n": 5000})
    assert "allocate(" in compiled.module.text
    given = randn(70, 5000)
    assert torch.equal(compiled({"x": given}, threads=2)["out"], given * given.amax(1, keepdim=True))


def test_names_that_c_reserves() -> None:
    """A spec may call its tensors and axes what it likes."""
    switch = tensor("switch", "for int")
    body = (p.Load(switch, "switch", (), ()), p.Store("double", switch, ()))
    buffers = [buffer("switch", "for int"), buffer("double", "for int", out=True)]
    plan = make_plan("forward", buffers, [kernel(body, "for int")], {switch: "product"})
    given = randn(3, 4)
    assert torch.equal(CPlan(plan, "float32", {"for": 3, "int": 4})({"switch": given})["double"], given)


def test_text_is_stable_and_short() -> None:
    out = product("out", "i")
    body = (p.Load(X, "x", (), ("i",)), p.Fold(out, "sum", X, ("n",)), p.Store("out", out, ("i",)))
    plan = make_plan("forward", [buffer("x", "i n"), buffer("out", "i", out=True)], [kernel(body, "i n", "i", {"i": 16})], {})
    first, second = (CPlan(plan, "float32", {"i": 4, "n": 8}).module.text for _ in range(2))
    assert first == second
    assert "product(" not in first and "exponential" not in first
