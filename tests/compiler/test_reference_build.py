"""What the words of the language become in the equation graph."""

from __future__ import annotations

from dataclasses import replace

import weft.dsl
from weft.compiler import ir
from weft.compiler.build import Builder, build
from weft.dsl import typed


def graph(text: str) -> ir.Graph:
    return build(weft.dsl.parse(text).kernels[0])


def test_equal_mathematics_is_one_node() -> None:
    g = graph("kernel f(x[t]) -> y[t], z[t]:\n    y = exp(x) + 1\n    a = exp(x)\n    z = a + 1\n")
    assert g.outputs["y"] is g.outputs["z"]


def test_mean() -> None:
    g = graph("kernel f(x[j,d], keep[j]: bool) -> y[d], z[d]:\n    y = mean[j](x)\n    z = mean[j where keep](x)\n")
    x, keep = ir.make(ir.Input, ("j", "d"), "real", "x"), ir.make(ir.Input, ("j",), "bool", "keep")
    one = ir.const(1)
    assert g.outputs["y"] is ir.pointwise("div", ir.reduce("sum", ("j",), x), ir.pointwise("max", ir.size("j"), one))
    count = ir.reduce("sum", ("j",), one, keep)
    assert g.outputs["z"] is ir.pointwise("div", ir.reduce("sum", ("j",), x, keep), ir.pointwise("max", count, one))


def test_softmax_and_lse_share_the_normaliser() -> None:
    text = "kernel f(s[i,j]) -> w[i,j], l[i]:\n    mask j <= i\n    w = softmax[j](s)\n    l = lse[j](s)\n"
    g = graph(text)
    s = ir.make(ir.Input, ("i", "j"), "real", "s")
    kept = ir.pointwise("le", ir.position("j"), ir.position("i"))
    lse = ir.reduce("lse", ("j",), s, kept)
    assert g.outputs["l"] is lse
    weights = ir.pointwise("where", kept, ir.pointwise("expdiff", s, lse), ir.const(0.0))
    assert g.outputs["w"] is ir.pointwise("where", kept, weights, ir.const(0.0))
    assert g.names[weights] == "w"
    assert g.spans[lse].line == 3


def test_topk_is_a_selection() -> None:
    g = graph("kernel f(x[n]) -> y[n]:\n    param k: int = 2\n    y = topk[n where n > 0](x, k)\n")
    node = g.outputs["y"]
    assert isinstance(node, ir.Select)
    assert (node.over, node.k, node.axes) == (("n",), ir.make(ir.Param, (), "int", "k"), ("n",))


def test_masked_value_is_0_where_read_and_plain_elsewhere() -> None:
    text = "kernel f(x[t]) -> z[t]:\n    a = exp(x)\n    z = a[t -> t - 1] + 0 * a\n"
    masked = text.replace("    a", "    mask x > 0\n    a", 1)
    plain, kept = graph(text), graph(masked)
    reads = [n for n in ir.topological([kept.outputs["z"]]) if isinstance(n, ir.Read)]
    assert [n.x.op for n in reads] == ["where"]
    assert not any(isinstance(n, ir.Pointwise) and n.op == "where" for n in ir.topological([plain.outputs["z"]]))
    products = [n for n in ir.topological([kept.outputs["z"]]) if isinstance(n, ir.Pointwise) and n.op == "mul"]
    assert [n.args[1].op for n in products] == ["exp"]


def test_states_hold_their_updates_and_masks() -> None:
    text = "kernel f(x[t], keep[t]: bool) -> S[], y[t]:\n    mask keep\n    state S[] = 1 along t reverse\n"
    text += "    S <- S + x\n    S <- 2 * S\n    y = S + 0\n"
    g = graph(text)
    state = g.states["S"]
    assert (state.along, state.reverse, state.init) == (("t",), True, ir.const(1))
    assert state.where is ir.make(ir.Input, ("t",), "bool", "keep")
    versions = [[n.version for n in ir.topological([u]) if isinstance(n, ir.StateValue)] for u in state.updates]
    assert versions == [[0], [1]]
    assert isinstance(g.outputs["S"], ir.StateValue)
    assert (g.outputs["S"].version, g.outputs["S"].axes) == (2, ("t",))


def test_exact_folds() -> None:
    g = graph("kernel f(x[t]) -> y[t]:\n    y = where(true and x > 2 * 3 - 1, x, -inf)\n")
    x = ir.make(ir.Input, ("t",), "real", "x")
    condition = ir.pointwise("gt", x, ir.const(5))
    assert g.outputs["y"] is ir.pointwise("where", condition, x, ir.const(float("-inf")))


def test_deep_expressions_do_not_exhaust_the_stack() -> None:
    kernel = weft.dsl.parse("kernel f(x[t]) -> y[t]:\n    y = x\n").kernels[0]
    equation = kernel.body[0]
    assert isinstance(equation, typed.Equation)
    expr = equation.expr
    for _ in range(20_000):
        expr = typed.Pointwise(expr.axes, "real", expr.span, "exp", (expr,))
    builder = Builder(kernel)
    builder.add(replace(equation, expr=expr))
    assert sum(1 for _ in ir.topological([builder.output("y")])) == 20_001
