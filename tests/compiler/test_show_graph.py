"""A graph as text: operators bind as in a spec, shared values have a name, states have their lines."""

import pytest

from weft.compiler.build import build
from weft.compiler.show_graph import LONGEST, show_graph, show_outputs
from weft.dsl.load import load_file, parse
from weft.runtime.library import shipped


def shown(expression: str, axes: str = "i") -> str:
    """The line of one output, of inputs a, b and c."""
    text = f'"""T."""\n\nkernel t(a[i], b[i], c[j]) -> o[{axes}]:\n    o = {expression}\n'
    return show_graph(build(parse(text).kernels[0]))


@pytest.mark.parametrize(
    "expression",
    [
        "a - (b - a)",
        "(a + b) * a",
        "a * b + a",
        "-a ** 2",
        "(-a) ** 2",
        "a / (b / a)",
        "floor(a) // (floor(b) * 2)",
        "(a ** b) ** a",
        "a ** b ** a",
    ],
)
def test_parentheses_are_kept_where_they_matter_and_only_there(expression: str) -> None:
    assert shown(expression) == f"o[i] = {expression}\n"


def test_comparisons_are_not_chained_by_accident() -> None:
    assert "(a < b) == (b < a)" in shown("where((a < b) == (b < a), a, b)")


def test_reductions_scans_and_reads() -> None:
    assert shown("a * sum[j where j <= i](c)") == "o[i] = a * sum[j where j <= i](c)\n"
    assert shown("cumsum[i, reverse, exclusive](a)") == "o[i] = cumsum[i, reverse, exclusive](a)\n"
    assert shown("a[i -> i - 1]") == "o[i] = a[i -> i - 1]\n"
    assert shown("where(topk[j](c, 2), c, 0)", "j") == "o[j] = where(topk[j](c, 2), c, 0)\n"


def test_what_is_used_twice_is_written_once() -> None:
    assert shown("exp(a * b) + tanh(a * b)") == "t1[i] = a * b\no[i] = exp(t1) + tanh(t1)\n"


def test_a_name_of_the_spec_never_names_two_values() -> None:
    graph = build(parse('"""T."""\n\nkernel t(a[i]) -> o[i]:\n    t1 = exp(a)\n    o = sin(a + 1) * cos(a + 1) * t1\n').kernels[0])
    lines = show_graph(graph).splitlines()
    names = [line.split("[")[0] for line in lines]
    assert len(names) == len(set(names)) and "t1[i] = exp(a)" in lines


def test_an_output_that_is_another_one_has_a_line() -> None:
    graph = build(parse('"""T."""\n\nkernel t(a[i]) -> o[i], p[i]:\n    o = exp(a)\n    p = exp(a)\n').kernels[0])
    assert show_graph(graph) == "o[i] = exp(a)\np = o\n"


def test_states_have_their_lines() -> None:
    graph = build(next(k for k in load_file(shipped()["gla"]).kernels))
    lines = show_graph(graph).splitlines()
    assert "state S[b, h, d, e] along t" in lines
    assert "S@1 <- exp(g) * S@0 + k * v" in lines


def test_no_line_grows_without_end() -> None:
    long = " + ".join(f"sin(a * {n})" for n in range(40))
    assert max(len(line) for line in shown(long).splitlines()) < 3 * LONGEST


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_spec_can_be_shown(name: str) -> None:
    for kernel in load_file(shipped()[name]).kernels:
        graph = build(kernel)
        text = show_graph(graph)
        assert all(output.name in text for output in kernel.outputs)
        assert "object at" not in text
        assert show_outputs(graph.outputs, graph.names)
