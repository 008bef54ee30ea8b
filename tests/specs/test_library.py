"""The library as a whole: every spec parses, evaluates, differentiates, decodes by origin and can be continued from its states."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.peers.oracle import SPECS, draw, graph_of, kernel_of
from tests.specs_sizes import SIZES
from weft.compiler import extents, reference, sampling
from weft.dsl import lint, load_file, typed

NAMES = sorted(path.stem for path in SPECS.glob("*.weft"))

NO_GRADIENT = {
    "dsa": {"q_idx", "k_idx", "w_idx"},  # they only select
    "moe_deepseek": {"bias"},  # it only selects
    "qk_norm": {"bk"},  # it moves all scores of a row by the same amount
    "rnn_s4": {"a", "bb"},  # they end in a sign
    "row_col_bias": {"row"},  # it moves all scores of a row by the same amount
    "pyramid_infer": {"q", "k", "weight"},  # the output is a selection
}
"""Inputs whose gradient is zero by the mathematics."""


def arguments(name: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, bool | int | float], dict[str, int]]:
    """The complete params of a spec at its tiny size, and the extents of these inputs."""
    params = extents.bind_params(kernel_of(name), SIZES.get(name, {}).get("params", {}))
    return params, extents.bind(kernel_of(name), {n: x.shape for n, x in inputs.items()}, params, {})


def test_there_are_at_least_ninety() -> None:
    assert len(NAMES) >= 90


def test_every_row_of_sizes_names_a_spec() -> None:
    assert SIZES.keys() <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_text(name: str) -> None:
    spec = load_file(SPECS / f"{name}.weft")
    assert [kernel.name for kernel in spec.kernels] == [name]
    assert not lint(spec), lint(spec)[0]
    assert re.search(r"arXiv:\d{4}\.\d{4,5}\b|\bNo paper\b", spec.doc), f"{name} names no paper"
    assert re.match(r"\S[^\n]*\.\n\n {4}\S", spec.doc), f"{name}: a title line, an empty line and the equation are expected"
    assert max(len(line) for line in spec.text.splitlines()) <= 140


@pytest.mark.parametrize("name", NAMES)
def test_evaluates_and_differentiates(name: str) -> None:
    inputs = draw(name)
    params, bound = arguments(name, inputs)
    assert not sampling.violated(kernel_of(name), inputs, params, bound)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x.is_floating_point()}
    outputs = reference.evaluate(graph_of(name), inputs, params, bound)
    real = {n: y for n, y in outputs.items() if y.is_floating_point()}
    assert all(y.dtype == torch.float64 and y.isfinite().all() for y in real.values())
    zero = NO_GRADIENT.get(name, set())
    if not any(y.requires_grad for y in real.values()):
        assert zero == leaves.keys()
        return
    generator = torch.Generator().manual_seed(1)
    total = torch.stack([(y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in real.values()]).sum()
    for n, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True):
        if n in zero:
            assert gradient is None or gradient.abs().max() < 1e-12, f"{n} has a gradient"
            continue
        assert gradient is not None and gradient.isfinite().all(), f"{n} has no finite gradient"
        assert gradient.abs().max() > 1e-9, f"the gradient of {n} is zero"


# Decoding ------------------------------------------------------------------------------------------------------------

NEEDS_EARLIER_QUERIES = {
    "learned_queries": "it chooses among all queries",
    "multi_token": "it reads the scores of earlier queries",
    "path": "its keys are carried along the queries: see the test of states",
    "path_fox": "its keys are carried along the queries: see the test of states",
    "pyramid_infer": "it chooses the keys by the last queries of all",
    "selective": "it sums over earlier queries",
    "spacetime": "its video flags have the query axis, and are read for keys",
    "vsa": "it pools the queries in tiles",
}


@functools.cache
def query_axis(name: str) -> str | None:
    """The axis of the queries: the one that outputs and inputs share, and that masks compare with the key axis."""
    kernel = kernel_of(name)
    keys = {"i": "j", "y": "yk", "z": "zk", "f": "g"}
    axes = {axis.name for axis in kernel.axes}
    outputs = {axis for output in kernel.outputs for axis in output.axes}
    return next((q for q, k in keys.items() if {q, k} <= axes and q in outputs and k not in outputs), None)


PAIRWISE = [name for name in NAMES if query_axis(name) is not None]


def test_pairwise_specs_are_found() -> None:
    assert {"softmax_attention", "mla", "natten2d", "natten3d", "swin", "dsa", "aft", "ssd_dual"} <= set(PAIRWISE)
    assert len(PAIRWISE) >= 70
    assert NEEDS_EARLIER_QUERIES.keys() <= {*PAIRWISE, "pyramid_infer"}


@pytest.mark.parametrize("name", PAIRWISE)
def test_decoding_by_origin(name: str) -> None:
    if name in NEEDS_EARLIER_QUERIES:
        pytest.skip(NEEDS_EARLIER_QUERIES[name])
    axis = query_axis(name)
    assert axis is not None
    inputs = draw(name)
    params, bound = arguments(name, inputs)
    count = max(1, bound[axis] // 3)
    start = bound[axis] - count
    last = {t.name: part(t, inputs[t.name], axis, start, bound[axis], bound) for t in kernel_of(name).inputs}
    whole = reference.evaluate(graph_of(name), inputs, params, bound)
    rows = reference.evaluate(graph_of(name), last, params, arguments(name, last)[1], origin={axis: start})
    compared = [t for t in kernel_of(name).outputs if axis in t.axes]
    assert compared
    for tensor in compared:
        assert torch.allclose(rows[tensor.name], part(tensor, whole[tensor.name], axis, start, bound[axis], bound), atol=1e-12), tensor.name


def part(tensor: typed.Tensor, x: Tensor, axis: str, start: int, stop: int, bound: Mapping[str, int]) -> Tensor:
    """Positions ``start`` to ``stop`` along an axis, which may be the first of a composite dimension; all where it has none."""
    for at, dim in enumerate(tensor.dims):
        if axis in dim:
            assert dim[0] == axis
            inner = math.prod(bound[a] for a in dim[1:])
            return x.narrow(at, start * inner, (stop - start) * inner)
    return x


# States --------------------------------------------------------------------------------------------------------------

NOT_CONTINUED = {
    "abc": "it needs the running log-sum-exp before its first step",
    "deltaformer": "every step attends to all values before it",
    "dmc": "every query attends to all pooled keys",
    "gla_bidirectional": "it also runs backwards",
    "h3": "its shift needs the keys before its first step",
}


def states_of(name: str) -> list[typed.State]:
    return [statement for statement in kernel_of(name).body if isinstance(statement, typed.State)]


RECURRENT = [name for name in NAMES if states_of(name)]


def test_recurrences_are_found() -> None:
    assert {"gla", "lstm", "titans", "ttt_linear", "gated_delta_product", "path"} <= set(RECURRENT)
    assert len(RECURRENT) >= 45
    assert NOT_CONTINUED.keys() <= set(RECURRENT)


@pytest.mark.parametrize("name", RECURRENT)
def test_two_calls_with_states_passed_on_equal_one(name: str) -> None:
    if name in NOT_CONTINUED:
        pytest.skip(NOT_CONTINUED[name])
    axis = states_of(name)[0].along[0]
    carried = {state.name for state in states_of(name) if axis in state.along}
    leaves = {n: x.requires_grad_(x.is_floating_point()) for n, x in draw(name).items()}
    params, bound = arguments(name, leaves)
    cut = bound[axis] // 2

    def half(start: int, stop: int, initial: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs = {t.name: part(t, leaves[t.name], axis, start, stop, bound) for t in kernel_of(name).inputs}
        origin = {axis: start}
        return reference.evaluate(
            graph_of(name), inputs, params, arguments(name, inputs)[1], origin=origin, initial=initial, return_final=True
        )

    whole, finals = reference.evaluate(graph_of(name), leaves, params, bound, return_final=True)
    first, middle = half(0, cut, {})
    second, ends = half(cut, bound[axis], {n: x for n, x in middle.items() if n in carried})
    joined = {}
    for tensor in kernel_of(name).outputs:
        n = tensor.name
        at = next((k for k, dim in enumerate(tensor.dims) if axis in dim), None)
        joined[n] = second[n] if at is None else torch.cat([first[n], second[n]], at)
        assert torch.allclose(joined[n], whole[n], atol=1e-10), n
    for n in carried:
        assert torch.allclose(ends[n], finals[n], atol=1e-10), f"final {n}"
    generator = torch.Generator().manual_seed(1)
    cotangents = {n: torch.randn(y.shape, generator=generator, dtype=y.dtype) for n, y in whole.items()}
    wanted, got = (_gradients({n: outputs[n] for n in whole}, leaves, cotangents) for outputs in (whole, joined))
    for n, gradient in wanted.items():
        assert torch.allclose(got[n], gradient, atol=1e-9 * (1 + gradient.abs().max().item())), f"gradient of {n}"


def _gradients(outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inputs = {n: x for n, x in leaves.items() if x.requires_grad}
    total = torch.stack([(y * cotangents[n]).sum() for n, y in outputs.items()]).sum()
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found, strict=True)}
