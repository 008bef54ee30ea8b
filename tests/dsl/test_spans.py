"""Spans point at the text that a node came from."""

from weft import dsl
from weft.dsl import typed as t
from weft.dsl.extents import walk

TEXT = """def twice(x) = x + x

kernel f(q[b,i,d], k[b,j,d]) -> o[b,i]:
    param scale: float = 2.0
    axis n = size(i)
    mask j < 9
    s = scale * sum[d](q * k[b -> b])
    p = softmax[j](s) - (twice(s) / 3)
    state S[b] = 0 along i
    S <- S + max[j](
        p
    )
    o = S + sum[j](p)
"""


def at(span: t.Span) -> str:
    lines = TEXT.split("\n")[span.line - 1 : span.end_line]
    lines[-1] = lines[-1][: span.end_column - 1]
    lines[0] = lines[0][span.column - 1 :]
    return "\n".join(lines)


def kernel() -> t.Kernel:
    return dsl.parse(TEXT).kernels[0]


def test_spans_of_statements() -> None:
    made = kernel()
    assert [at(s.span) for s in made.body] == [
        "s = scale * sum[d](q * k[b -> b])",
        "p = softmax[j](s) - (twice(s) / 3)",
        "state S[b] = 0 along i",
        "S <- S + max[j](\n        p\n    )",
        "o = S + sum[j](p)",
    ]
    assert at(made.span) == "kernel f(q[b,i,d], k[b,j,d]) -> o[b,i]:"
    assert [at(i.span) for i in made.inputs] == ["q[b,i,d]", "k[b,j,d]"]
    assert at(made.params[0].span) == "param scale: float = 2.0"
    assert [at(a.span) for a in made.axes] == ["b", "i", "d", "j", "axis n = size(i)"]


def test_spans_of_expressions() -> None:
    found = {at(node.span) for statement in kernel().body if isinstance(statement, t.Equation) for node in walk([statement.expr])}
    assert found == {
        "scale * sum[d](q * k[b -> b])", "scale", "sum[d](q * k[b -> b])", "q * k[b -> b]", "q", "k[b -> b]", "k", "b",
        "softmax[j](s) - (twice(s) / 3)", "softmax[j](s)", "s", "(twice(s) / 3)", "twice(s)", "3", "S + sum[j](p)", "S", "sum[j](p)", "p",
        "j < 9", "j", "9",
    }  # fmt: skip


def test_spans_do_not_matter_for_equality() -> None:
    moved = dsl.parse("\n\n" + TEXT.replace("scale * sum", "scale  *  sum"))
    assert moved.kernels[0] == kernel()
