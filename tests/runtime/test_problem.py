"""Sizes that nobody gave: usual ones, by what an axis is for."""

import pytest

import weft
from weft.compiler.build import build
from weft.compiler.errors import UnknownAxis, UnknownParam
from weft.compiler.ir import Graph
from weft.dsl.load import load_file
from weft.runtime.errors import SpecNotFound
from weft.runtime.library import find, shipped, title
from weft.runtime.problem import Usual, pose

USUAL = Usual(length=2048, feature=64, heads=8, batch=1)


def graph(name: str) -> Graph:
    return build(next(k for k in load_file(shipped()[name]).kernels if k.name == name))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("softmax_attention", {"b": 1, "g": 8, "r": 1, "i": 2048, "j": 2048, "d": 64, "e": 64}),
        ("alibi", {"b": 1, "h": 8, "i": 2048, "j": 2048, "d": 64, "e": 64}),
        ("natten2d", {"b": 1, "h": 8, "y": 45, "x": 45, "yk": 45, "xk": 45, "d": 64, "e": 64}),
        ("document_mask", {"b": 1, "h": 8, "i": 2048, "j": 2048, "d": 64, "e": 64, "t": 2048}),
        ("gla", {"b": 1, "h": 8, "t": 2048, "d": 64, "e": 64}),
    ],
)
def test_usual_sizes(name: str, sizes: dict[str, int]) -> None:
    assert pose(graph(name), {}, {}, USUAL).sizes == sizes


def test_what_is_read_at_queries_and_keys_is_a_sequence() -> None:
    """One tensor for both: its axis is not that of a table, however few numbers of positions meet otherwise."""
    kernel = weft.loads(
        "kernel f(x[b,h,t,d]) -> o[b,h,i,d]:\n    axis i = size(t)\n    axis j = size(t)\n    mask j <= i\n"
        "    s = sum[d](x[t -> i] * x[t -> j])\n    o = sum[j](softmax[j](s) * x[t -> j])\n"
    )["f"]
    assert pose(kernel.graph, {}, {}, USUAL).extents["t"] == USUAL.length


def test_what_weights_project_to_are_features_and_latents_are_few() -> None:
    """No sample has these axes, which lie in front of others in every weight."""
    kernel = weft.loads(
        "kernel f(latent[n,c], x[b,j,c], wq[h,d,c], wk[h,d,c], wv[h,e,c]) -> o[b,h,n,e]:\n"
        "    q = sum[c](latent * wq)\n    k = sum[c](x * wk)\n    v = sum[c](x * wv)\n"
        "    o = sum[j](softmax[j](sum[d](q * k)) * v)\n"
    )["f"]
    assert pose(kernel.graph, {}, {}, USUAL).sizes == {"b": 1, "n": 64, "j": 2048, "h": 8, "c": 64, "d": 64, "e": 64}


def test_what_weights_project_to_are_features_without_samples_too() -> None:
    kernel = weft.loads(
        "kernel f(x[i,c], y[j,m], wq[h,d,c], wk[h,d,m], wv[h,e,m]) -> o[h,i,e]:\n"
        "    q = sum[c](x * wq)\n    k = sum[m](y * wk)\n    v = sum[m](y * wv)\n    o = sum[j](softmax[j](sum[d](q * k)) * v)\n"
    )["f"]
    assert pose(kernel.graph, {}, {}, USUAL).sizes == {"i": 2048, "c": 64, "j": 2048, "m": 64, "h": 8, "d": 64, "e": 64}


def test_given_sizes_and_params_win_and_declared_axes_follow() -> None:
    problem = pose(graph("moba"), {"j": 100, "i": 7}, {"block": 32}, USUAL)
    assert problem.extents["i"] == 7 and problem.extents["m"] == 4 and problem.params["block"] == 32


def test_names_that_do_not_exist_are_errors() -> None:
    with pytest.raises(UnknownAxis):
        pose(graph("alibi"), {"z": 3}, {}, USUAL)
    with pytest.raises(UnknownParam):
        pose(graph("alibi"), {}, {"window": 3}, USUAL)


def test_inputs_are_the_same_for_the_same_seed() -> None:
    problem = pose(graph("kitchen_sink"), {}, {}, Usual(32, 8, 2))
    first, again, other = problem.inputs(seed=1), problem.inputs(seed=1), problem.inputs(seed=2)
    assert all(first[n].equal(again[n]) for n in first) and not first["q"].equal(other["q"])
    assert [tuple(t.shape) for t in first.values()] == [problem.shape(t.name) for t in problem.kernel.inputs]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_kernel_can_be_posed(name: str) -> None:
    for kernel in load_file(shipped()[name]).kernels:
        assert all(n > 0 for n in pose(build(kernel), {}, {}, USUAL).extents.values())


def test_find_takes_names_and_paths() -> None:
    assert find("alibi") == shipped()["alibi"] == find(str(shipped()["alibi"]))
    with pytest.raises(SpecNotFound, match="alibi"):
        find("alibbi")


def test_titles_are_read_without_parsing() -> None:
    assert title(shipped()["gla"]) == "Gated linear attention (Yang et al., 2023)."
