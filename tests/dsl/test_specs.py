"""Every shipped spec resolves, and what comes out keeps the promises of typed.py."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from weft import dsl
from weft.dsl import kinds
from weft.dsl import typed as t
from weft.dsl.extents import operands, walk

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "specs").glob("*.weft"))


def axes_of(node: t.Expr) -> frozenset[str]:
    """The axes of ``node`` by the language, from those of its operands."""
    parts = frozenset().union(*(o.axes for o in operands(node)))
    match node:
        case t.Reduce(op="softmax" | "topk", over=over):
            return parts | set(over)
        case t.Reduce(over=over, where=where, x=x):
            return x.axes.union(*(w.axes for w in where)) - set(over)
        case t.Scan(axis=axis):
            return parts | {axis}
        case t.Read(x=x, at=at):
            return (x.axes - {a for a, _ in at}).union(*(e.axes for _, e in at))
        case t.Position(axis=axis):
            return frozenset((axis,))
        case t.Literal() | t.Size() | t.ParamRef():
            return frozenset()
        case t.InputRef() | t.ValueRef() | t.StateRef() | t.Draw():
            return node.axes
        case _:
            return parts


class Verifier:
    """Checks a kernel against what later rooms rely on."""

    def __init__(self, kernel: t.Kernel) -> None:
        self.kernel = kernel
        self.axes = {a.name for a in kernel.axes}
        self.inputs = {i.name: i for i in kernel.inputs}
        self.params = {p.name for p in kernel.params}
        self.values: dict[str, t.Expr] = {}
        self.states: dict[str, t.State] = {}
        self.versions: dict[str, int] = {}

    def expr(self, root: t.Expr) -> None:
        for node in walk([root]):
            assert node.axes == axes_of(node), node
            assert node.axes <= self.axes
            assert node.span.line >= 1 and (node.span.line, node.span.column) < (node.span.end_line, node.span.end_column)
            self.node(node)

    def node(self, node: t.Expr) -> None:
        match node:
            case t.InputRef(name=name, axes=axes):
                assert axes == set(self.inputs[name].axes)
            case t.ParamRef(name=name):
                assert name in self.params
            case t.ValueRef(name=name, axes=axes, kind=kind):
                assert (axes, kind) == (self.values[name].axes, self.values[name].kind)
            case t.StateRef(name=name, version=version, axes=axes):
                assert version == self.versions[name]
                assert axes == {*self.states[name].axes, *self.states[name].along}
            case t.Pointwise(op=op, args=args, kind=kind):
                count = t.POINTWISE[op]
                assert len(args) == count
                assert kind == kinds.result_kind(op, [a.kind for a in args])
            case t.Reduce(op=op, over=over, where=where, k=k):
                assert op in t.REDUCTIONS and over and len(set(over)) == len(over)
                assert all(w.kind == "bool" for w in where)
                assert (k is not None) == (op == "topk")
            case t.Scan(op=op, where=where):
                assert op in t.SCANS and all(w.kind == "bool" for w in where)
            case t.Read(x=x, at=at):
                assert all(a in x.axes and e.kind == "int" for a, e in at)

    def run(self) -> None:
        for axis in self.kernel.axes:
            if axis.extent is not None:
                self.expr(axis.extent)
                assert axis.extent.kind == "int" and not axis.extent.axes
        for root in (*self.kernel.assumes, *(e for _, e in self.kernel.samples)):
            self.expr(root)
        for statement in self.kernel.body:
            self.statement(statement)
        for output in self.kernel.outputs:
            self.output(output)

    def statement(self, statement: t.Statement) -> None:
        match statement:
            case t.Equation(name=name, expr=expr, masks=masks):
                self.expr(expr)
                assert all(m.axes <= expr.axes and m.kind == "bool" for m in masks)
                self.values[name] = expr
            case t.State(name=name, axes=axes, along=along, init=init):
                assert not set(axes) & set(along)
                if init is not None:
                    self.expr(init)
                    assert init.axes <= set(axes)
                self.states[name], self.versions[name] = statement, 0
            case t.Update(state=name, version=version, expr=expr):
                self.expr(expr)
                assert expr.axes <= {*self.states[name].axes, *self.states[name].along}
                self.versions[name] += 1
                assert version == self.versions[name]

    def output(self, output: t.Tensor) -> None:
        if output.name in self.values:
            assert set(output.axes) == self.values[output.name].axes
        else:
            state = self.states[output.name]
            assert set(output.axes) in (set(state.axes), {*state.axes, *state.along})


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_spec_resolves(path: Path) -> None:
    spec = dsl.load_file(path)
    assert spec.doc
    assert spec.kernels
    for kernel in spec.kernels:
        Verifier(kernel).run()
    assert dsl.lint(spec) == []
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_all_specs_are_there() -> None:
    assert len(SPECS) >= 88


def test_importing_does_not_load_the_parser() -> None:
    code = "import weft.dsl, sys; assert 'lark' not in sys.modules; weft.dsl.parse('def f(x) = x'); assert 'lark' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
