"""Derivatives: every rule against torch.autograd, and the derived gradients of every spec against autograd through the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import weft.dsl
from tests.compiler.unrolled import Unroller
from tests.specs_sizes import tiny
from weft.compiler import ir, reference, sampling
from weft.compiler.algebra import substitute
from weft.compiler.autodiff import RULES, NoDerivative, differentiate
from weft.compiler.build import build
from weft.compiler.pipeline import Hints, Lowered, Target, lower
from weft.compiler.plan import Origin, with_derived
from weft.dsl.typed import POINTWISE

SPECS = sorted(Path(__file__).parents[2].joinpath("specs").glob("*.weft"))
FUSED_BY_NAME = {"softmax_attention", "kitchen_sink", "differential", "deberta", "hierarchical", "natten3d", "maxsim", "additive"}

REAL_OPS = sorted(set(RULES) - {"where", "stopgrad", "expdiff", "sign"})


def _spec(expression: str, arguments: str) -> ir.Graph:
    text = f'"""One operation."""\n\nkernel one({arguments}) -> y[n]:\n    y = {expression}\n'
    return build(weft.dsl.parse(text).kernels[0])


def _expression(op: str) -> str:
    infix = {"add": "a + b", "sub": "a - b", "mul": "a * b", "div": "a / b", "pow": "a ** b", "neg": "-a"}
    count = POINTWISE[op]
    names = ("a", "b", "c")[: count if isinstance(count, int) else count[0]]
    return infix.get(op, f"{op}({', '.join(names)})")


@pytest.mark.parametrize("op", REAL_OPS)
def test_rule_agrees_with_autograd(op: str) -> None:
    names = [n for n in "abc" if n in _expression(op).replace(op, "")]
    graph = _spec(
        _expression(op) if op != "clipgrad" else "clipgrad(a, 0.3)", ", ".join(f"{n}[n]" for n in (names if op != "clipgrad" else ["a"]))
    )
    names = ["a"] if op == "clipgrad" else names
    torch.manual_seed(0)
    inputs = {n: (torch.rand(64, dtype=torch.float64) + 0.1).requires_grad_() for n in names}
    if op == "clamp":
        inputs["b"], inputs["c"] = (torch.full((64,), v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.8))
    y = reference.evaluate(graph, inputs, {}, {"n": 64})["y"]
    cotangent = torch.randn(64, dtype=torch.float64)
    wanted = torch.autograd.grad(y, list(inputs.values()), cotangent, allow_unused=True)
    nodes = [ir.make(ir.Input, ("n",), "real", n) for n in names]
    made = differentiate(graph.outputs, {"y": ir.make(ir.Input, ("n",), "real", "d_y")}, nodes)
    found = reference.evaluate(
        ir.Graph(graph.kernel, made), {**{n: x.detach() for n, x in inputs.items()}, "d_y": cotangent}, {}, {"n": 64}
    )
    for name, want in zip(names, wanted, strict=True):
        torch.testing.assert_close(found[name], torch.zeros(64, dtype=torch.float64) if want is None else want, rtol=1e-12, atol=1e-12)


def test_every_real_operation_has_a_rule() -> None:
    integer = {"floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "floor", "ceil", "round"}
    assert set(POINTWISE) - integer <= set(RULES)


def test_a_missing_rule_is_an_error() -> None:
    graph = build(weft.dsl.parse('"""Scan."""\n\nkernel k(x[t]) -> y[t]:\n    y = cumsum[t](x)\n').kernels[0])
    with pytest.raises(NoDerivative):
        differentiate(graph.outputs, {"y": ir.make(ir.Input, ("t",), "real", "d_y")}, [ir.make(ir.Input, ("t",), "real", "x")])


def _lowered(path: Path) -> tuple[Lowered, dict[str, int], dict[str, bool | int | float]]:
    kernel = weft.dsl.parse(path.read_text(), str(path)).kernels[0]
    sizes, params = tiny(kernel, path.stem)
    constants = tuple((n, v) for n, v in params.items() if not isinstance(v, float))
    return lower(build(kernel), Target("c"), Hints(constants, tuple(sizes.items()))), sizes, params


UNROLLED = [p for p in SPECS if p.stem != "mesa_net"]
"""Specs whose gradients can be written out step by step. MesaNet's steps within steps, at every position, fill the memory so; its
gradients are checked as numbers (``test_recurrences.py``, ``test_check_c.py``)."""


@pytest.mark.parametrize("path", UNROLLED, ids=lambda p: p.stem)
def test_derived_gradients_agree_with_autograd(path: Path) -> None:
    lowered, sizes, params = _lowered(path)
    if lowered.fused is None:
        assert path.stem not in FUSED_BY_NAME
        pytest.skip(f"not fused: {lowered.reasons[-1]}")
    if lowered.outside:
        pytest.skip(f"partly outside: {', '.join(lowered.outside)}")
    kernel = lowered.graph.kernel
    inputs = sampling.sample(kernel, sizes, params=params, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = list(lowered.differentiable)
    for name in wanted:
        inputs[name].requires_grad_()
    outputs = reference.evaluate(lowered.graph, inputs, params, sizes)
    cotangents = {n: torch.randn_like(outputs[n]) for n in lowered.cotangents}
    loss = sum((outputs[n] * c).sum() for n, c in cotangents.items())
    assert isinstance(loss, torch.Tensor)
    grads = torch.autograd.grad(loss, [inputs[n] for n in wanted], allow_unused=True)
    roots = {
        n: substitute(g, {o: ir.const(0) for o in ir.topological([g]) if isinstance(o, Origin)}) for n, g in lowered._gradient_nodes.items()
    }
    given = {n: x.detach() for n, x in inputs.items()}
    for name, buffer in lowered.cotangents.items():
        axes = next(t.axes for t in kernel.outputs if t.name == name)
        given[buffer] = _sorted(cotangents[name], axes, sizes)
    brought = {axis: extent for routing in lowered.routings for axis, extent in routing.derived().items()}
    found = reference.evaluate(Unroller().graph(kernel, roots), given, params, with_derived(sizes, brought))
    for name, grad in zip(wanted, grads, strict=True):
        axes = next(t.axes for t in kernel.inputs if t.name == name)
        want = _sorted(torch.zeros_like(inputs[name]) if grad is None else grad, axes, sizes)
        got = found[name].reshape([sizes[a] if a in roots[name].axes else 1 for a in sorted(axes)]).expand_as(want)
        error = ((got - want).abs().max() / (1 + want.abs().max())).item()
        assert error < 1e-9, f"{path.stem}: gradient of {name} is off by {error:.2e}"


def _sorted(x: torch.Tensor, axes: tuple[str, ...], sizes: dict[str, int]) -> torch.Tensor:
    return x.reshape([sizes[a] for a in axes]).permute([axes.index(a) for a in sorted(axes)])


def test_extents_of_tiny_are_complete() -> None:
    for path in SPECS[:3]:
        kernel = weft.dsl.parse(path.read_text()).kernels[0]
        sizes, _ = tiny(kernel, path.stem)
        assert set(sizes) >= {a for t in kernel.inputs for a in t.axes}
