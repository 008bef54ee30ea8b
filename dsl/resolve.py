"""Resolution of a kernel: its tensors, axes, parameters, statements and outputs become typed nodes.

All mistakes of a kernel are collected. A definition that fails leaves a broken name behind, so that its uses are not
reported again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

from . import diagnostics as d
from . import kinds, names, tree
from . import typed as t
from .diagnostics import Source, SpecError
from .expand import Expander, Macro
from .expressions import MAX_ERRORS, Abandon, Expressions, Mask, shown_axes
from .extents import check_extents
from .scope import AxisSymbol, BrokenSymbol, InputSymbol, MacroSymbol, ParamSymbol, Scope, StateSymbol, ValueSymbol
from .steps import check_steps

DEFAULTS = {"bool": ("`true` or `false`", "true"), "int": ("a whole number", "0"), "real": ("a number", "0.0")}


def resolve_kernel(
    source: Source, kernel: tree.Kernel, macros: Mapping[str, Macro], missing: Iterable[str], errors: list[SpecError]
) -> t.Kernel | None:
    """The typed kernel; its mistakes are added to ``errors``, and where there are any the result is None.

    ``missing`` are macros that have a mistake of their own.
    """
    before = len(errors)
    resolver = _Resolver(source, kernel, macros, errors)
    for name in missing:
        resolver.scope.define(name, BrokenSymbol(), None)
    resolved = resolver.run()
    return resolved if len(errors) == before else None


class _Resolver:
    def __init__(self, source: Source, kernel: tree.Kernel, macros: Mapping[str, Macro], errors: list[SpecError]) -> None:
        self.source = source
        self.kernel = kernel
        self.errors = errors
        self.scope = Scope()
        self.expressions = Expressions(source, Expander(source, macros), self.scope, errors)
        self.inputs: list[t.Tensor] = []
        self.params: dict[str, t.Param] = {}
        self.declared: dict[str, t.Axis] = {}
        self.assumes: list[t.Expr] = []
        self.samples: dict[str, tuple[t.Span, t.Expr | None]] = {}
        self.body: list[t.Statement] = []
        for name, macro in macros.items():
            self.scope.define(name, MacroSymbol(macro.params), macro.span)

    def error(self, kind: type[SpecError], span: t.Span, /, **fields: object) -> None:
        self.errors.append(kind(self.source, span, **fields))
        if len(self.errors) >= MAX_ERRORS:
            raise d.SpecErrors(self.errors)

    def run(self) -> t.Kernel:
        kernel = self.kernel
        self.declare_inputs()
        self.declare_params()
        self.declare_axes()
        self.collect_later()
        for statement in kernel.body:
            self.statement(statement)
        outputs = self.declare_outputs()
        self.check_states()
        self.errors += check_steps(self.source, self.body)
        axes = [self.declared.get(name) or t.Axis(name, None, self.axis_span(name)) for name in self.scope.axes()]
        samples = tuple((name, expr) for name, (_, expr) in self.samples.items() if expr is not None)
        return t.Kernel(
            kernel.name.name, kernel.doc, tuple(self.inputs), outputs, tuple(self.params.values()), tuple(axes),
            tuple(self.assumes), samples, tuple(self.body), kernel.span,
        )  # fmt: skip

    def axis_span(self, name: str) -> t.Span:
        return self.scope.entries[name].span or self.kernel.span

    # Names -----------------------------------------------------------------------------------------------------------

    def free(self, name: tree.Name, called: str | None = None) -> bool:
        """Whether ``name`` may be defined here; if not, why is reported. ``called``: what a call could confuse it with."""
        if name.name in names.KEYWORDS:
            return self.refuse(name, d.ReservedWord)
        if name.name in names.FUNCTION_NAMES:
            return self.refuse(name, d.ReservedFunction)
        if called is not None and name.name in names.CALL_NAMES:
            return self.refuse(name, d.ReservedCallName, role=called)
        entry = self.scope.entries.get(name.name)
        if entry is not None:
            line = entry.span.line if entry.span else 1
            self.error(d.NameTaken, name.span, name=name.name, role=entry.symbol.role, line=line)
            if isinstance(entry.symbol, MacroSymbol):
                self.scope.define(name.name, BrokenSymbol(), entry.span)
            return False
        return True

    def refuse(self, name: tree.Name, kind: type[SpecError], **fields: object) -> bool:
        """Reports a name that cannot be one, once: its uses are not reported."""
        if name.name not in self.scope.entries:
            self.error(kind, name.span, name=name.name, **fields)
            self.scope.define(name.name, BrokenSymbol(), name.span)
        return False

    def collect_later(self) -> None:
        """The names that statements will define, for the message about a use before the definition."""
        for statement in self.kernel.body:
            if isinstance(statement, tree.Equation | tree.State):
                self.scope.later.setdefault(statement.name.name, statement.name.span)

    # Declarations ----------------------------------------------------------------------------------------------------

    def declare_inputs(self) -> None:
        for tensor in self.kernel.inputs:
            for dim in tensor.dims:
                for axis in dim.names:
                    if not isinstance(self.scope.get(axis.name), AxisSymbol) and self.free(axis):
                        self.scope.define(axis.name, AxisSymbol(), axis.span)
        for tensor in self.kernel.inputs:
            self.declare_input(tensor)

    def declare_input(self, tensor: tree.Tensor) -> None:
        dtype = self.dtype(tensor.dtype)
        kind: t.Kind = "real" if dtype is None else _kind(dtype)
        default = None if tensor.default is None else self.literal(tensor.name.name, tensor.default, kind)
        self.check_twice(tensor.dims)
        if self.free(tensor.name, called="an input"):
            made = t.Tensor(tensor.name.name, _dims(tensor.dims), dtype, default, tensor.span)
            self.scope.define(tensor.name.name, InputSymbol(made, kind), tensor.name.span)
            self.inputs.append(made)

    def check_twice(self, dims: Sequence[tree.Dim]) -> None:
        seen: set[str] = set()
        for dim in dims:
            for axis in dim.names:
                if axis.name in seen:
                    self.error(d.AxisTwice, axis.span, name=axis.name)
                seen.add(axis.name)

    def dtype(self, name: tree.Name | None) -> str | None:
        if name is None or name.name in names.DTYPES:
            return None if name is None else name.name
        hint = names.closest(name.name, names.DTYPES)
        if name.name in ("float", "real"):
            hint = "did you mean `float32`? "
        known = ", ".join(f"`{dtype}`" for dtype in names.DTYPES)
        self.error(d.UnknownDtype, name.span, name=name.name, hint=hint, known=known)
        return None

    def literal(self, name: str, expr: tree.Expr, kind: t.Kind) -> bool | int | float | None:
        """The value of a default: a number with a sign, ``inf``, or a bool. What is none of these is reported."""
        negative = isinstance(expr, tree.Unary) and expr.op == "-"
        inner = expr.x if isinstance(expr, tree.Unary) and expr.op in "+-" else expr
        expected, shown = DEFAULTS[kind]
        if isinstance(inner, tree.Number):
            try:
                value = self.expressions.number(inner).value
            except Abandon:
                return None
            if isinstance(value, bool) == (kind == "bool") and not (kind == "int" and isinstance(value, float)):
                signed = -value if negative else value
                if not (kind == "bool" and inner is not expr):
                    return float(signed) if kind == "real" else signed
        self.error(d.BadDefault, expr.span, name=name, expected=expected, example=shown)
        return None

    def declare_params(self) -> None:
        for param in self.kernel.body:
            if isinstance(param, tree.Param):
                self.declare_param(param)

    def declare_param(self, param: tree.Param) -> None:
        name = param.name.name
        kind = param.dtype.name if param.dtype is not None else None
        if not self.free(param.name, called="a parameter"):
            return
        if param.dtype is None:
            self.error(d.MissingParamType, param.span, name=name)
        elif kind not in ("int", "bool", "float"):
            self.error(d.ParamType, param.dtype.span, name=kind)
        match kind:
            case "int" | "bool" | "float":
                value_kind: t.Kind = "real" if kind == "float" else kind
                default = None if param.default is None else self.literal(name, param.default, value_kind)
                self.scope.define(name, ParamSymbol(value_kind), param.name.span)
                self.params[name] = t.Param(name, kind, default, param.span)
            case _:
                self.scope.define(name, BrokenSymbol(), param.name.span)

    def declare_axes(self) -> None:
        statements = [s for s in self.kernel.body if isinstance(s, tree.Axis)]
        declared: list[tree.Axis] = []
        for axis in statements:
            name = axis.name.name
            if isinstance(self.scope.get(name), AxisSymbol) and all(name != a.name.name for a in declared):
                declared.append(axis)
            elif self.free(axis.name):
                self.scope.define(name, AxisSymbol(), axis.name.span)
                declared.append(axis)
        whole = True
        for axis in declared:
            extent = self.extent(axis)
            whole &= extent is not None
            self.declared[axis.name.name] = t.Axis(axis.name.name, extent, axis.span)
        if whole:
            self.errors += check_extents(self.source, self.inputs, self.declared)

    def extent(self, axis: tree.Axis) -> t.Expr | None:
        try:
            extent = self.expressions.resolve(axis.expr, place="axis")
        except Abandon:
            return None
        name = axis.name.name
        if extent.kind != "int":
            self.error(d.BadExtent, axis.expr.span, name=name, found=kinds.SHOWN[extent.kind])
            return None
        small = isinstance(extent, t.Literal) and extent.value < 1
        if small or (isinstance(extent, t.Pointwise) and extent.op == "neg"):
            self.error(d.BadExtent, axis.expr.span, name=name, found="smaller than 1")
            return None
        return extent

    # Statements ------------------------------------------------------------------------------------------------------

    def statement(self, statement: tree.Statement) -> None:
        match statement:
            case tree.Equation():
                self.equation(statement)
            case tree.Update():
                self.update(statement)
            case tree.Mask():
                self.mask(statement)
            case tree.State():
                self.state(statement)
            case tree.Assume(expr=expr):
                self.assume(expr)
            case tree.Sample():
                self.sample(statement)
            case tree.Axis() | tree.Param():
                pass
            case _:
                assert_never(statement)

    def equation(self, node: tree.Equation) -> None:
        name = node.name.name
        try:
            expr = self.expressions.resolve(node.expr)
        except Abandon:
            expr = None
        symbol = self.scope.get(name)
        if isinstance(symbol, StateSymbol):
            symbol.failed = True
            self.error(d.StateAssigned, node.name.span, name=name)
            return
        if not self.free(node.name):
            return
        if expr is None:
            self.scope.define(name, BrokenSymbol(), node.name.span)
            return
        masks = tuple(m.cond for m in self.expressions.masks if m.cond.axes <= expr.axes)
        self.scope.define(name, ValueSymbol(expr.axes, expr.kind), node.name.span)
        self.body.append(t.Equation(name, expr, masks, node.span))

    def mask(self, node: tree.Mask) -> None:
        try:
            cond = self.expressions.resolve(node.expr)
        except Abandon:
            return
        wrong = kinds.need_bool(self.source, cond, "the condition of a mask (true means kept)")
        self.errors += wrong
        if wrong:
            return
        if not cond.axes:
            self.error(d.MaskWithoutAxes, node.expr.span)
            return
        self.expressions.masks.append(Mask(cond, node.span))

    def state(self, node: tree.State) -> None:
        name = node.name.name
        init = self.init(node)
        axes = [a for dim in node.dims for a in dim.names]
        self.check_twice(node.dims)
        known = [self.known_axis(a) for a in axes]
        along = list(node.along.names) if node.along is not None else []
        if node.along is None:
            self.error(d.MissingAlong, node.span, name=name)
        else:
            self.check_twice([node.along])
        known += [self.known_axis(a) for a in along]
        for axis in along:
            if any(axis.name == own.name for own in axes):
                self.error(d.StateTimeAxis, axis.span, name=name, axis=axis.name)
                known.append(False)
        if not self.free(node.name):
            return
        if not all(known) or node.along is None or (node.init is not None and init is None):
            self.scope.define(name, BrokenSymbol(), node.name.span)
            return
        own_axes, time = tuple(a.name for a in axes), tuple(a.name for a in along)
        if init is not None:
            self.check_state_axes("the start of", name, init, set(own_axes))
        masks = self.step_masks(node, own_axes, time)
        state = t.State(name, own_axes, time, node.reverse, init, masks, node.span)
        self.scope.define(name, StateSymbol(state), node.name.span)
        self.body.append(state)

    def init(self, node: tree.State) -> t.Expr | None:
        if node.init is None:
            return None
        try:
            init = self.expressions.resolve(node.init)
        except Abandon:
            return None
        self.errors += kinds.need_number(self.source, init, f"the start of `{node.name.name}`")
        return init

    def known_axis(self, name: tree.Name) -> bool:
        try:
            self.expressions.axis(name)
        except Abandon:
            return False
        return True

    def step_masks(self, node: tree.State, axes: tuple[str, ...], along: tuple[str, ...]) -> tuple[t.Expr, ...]:
        """The masks on the time axes: where one is false the step is skipped."""
        masks = [m for m in self.expressions.masks if m.cond.axes & set(along)]
        for mask in masks:
            extra = sorted(mask.cond.axes - {*axes, *along})
            if extra:
                time = ", ".join(sorted(mask.cond.axes & set(along)))
                self.error(d.StateMaskAxis, node.span, name=node.name.name, line=mask.span.line, axis=extra[0], time=time)
        return tuple(m.cond for m in masks)

    def check_state_axes(self, place: str, name: str, expr: t.Expr, axes: set[str]) -> None:
        extra = sorted(expr.axes - axes)
        if extra:
            self.error(d.StateAxes, expr.span, place=place, name=name, axis=extra[0])

    def update(self, node: tree.Update) -> None:
        name = node.name.name
        try:
            expr = self.expressions.resolve(node.expr)
        except Abandon:
            expr = None
        symbol = self.scope.get(name)
        if not isinstance(symbol, StateSymbol):
            self.not_a_state(node.name)
            return
        symbol.version += 1
        if expr is None:
            return
        self.errors += kinds.need_number(self.source, expr, f"the next `{name}`")
        self.check_state_axes("the next", name, expr, set(symbol.axes))
        self.check_step_masks(symbol.state)
        self.body.append(t.Update(name, symbol.version, expr, node.span))

    def not_a_state(self, name: tree.Name) -> None:
        symbol = self.scope.get(name.name)
        if isinstance(symbol, BrokenSymbol):
            return
        if symbol is not None:
            role, advice = symbol.role, f"define a value with `=`, or declare `state {name.name}[...] along t` instead"
        elif name.name in self.scope.later:
            role, advice = "declared only below", "write its `state` line above"
        else:
            states = {n: e.symbol for n, e in self.scope.entries.items() if isinstance(e.symbol, StateSymbol)}
            hint = names.closest(name.name, states)
            for state in states.values():
                state.failed |= bool(hint)
            role, advice = "not declared", f"{hint}write `state {name.name}[...] along t` above"
        self.error(d.NotAState, name.span, name=name.name, role=role, advice=advice)

    def check_step_masks(self, state: t.State) -> None:
        for mask in self.expressions.masks:
            shared = sorted(mask.cond.axes & set(state.along))
            if shared and not any(mask.cond is m for m in state.masks):
                error = d.MaskInsideStep(self.source, mask.span, axis=shared[0], name=state.name, line=state.span.line)
                if not any(isinstance(e, d.MaskInsideStep) and e.span == mask.span for e in self.errors):
                    self.errors.append(error)

    def check_states(self) -> None:
        for name, entry in self.scope.entries.items():
            if isinstance(entry.symbol, StateSymbol) and entry.symbol.version == 0 and not entry.symbol.failed:
                self.error(d.StateNeverUpdated, entry.symbol.state.span, name=name)

    def assume(self, node: tree.Expr) -> None:
        try:
            cond = self.expressions.resolve(node, place="assume")
        except Abandon:
            return
        self.errors += kinds.need_bool(self.source, cond, "an assumption")
        self.assumes.append(cond)

    def sample(self, node: tree.Sample) -> None:
        name = node.name.name
        symbol = self.scope.get(name)
        if not isinstance(symbol, InputSymbol):
            hint = names.closest(name, [i.name for i in self.inputs]) if symbol is None else ""
            self.error(d.SampleTarget, node.name.span, name=name, hint=hint)
            return
        axes = frozenset(symbol.tensor.axes)
        try:
            expr = self.expressions.resolve(node.expr, place="sample", drawn=axes)
        except Abandon:
            expr = None
        if name in self.samples:
            self.error(d.SampleTwice, node.name.span, name=name, line=self.samples[name][0].line)
            return
        self.samples[name] = (node.span, expr)
        if expr is None:
            return
        extra = sorted(expr.axes - axes)
        if extra:
            self.error(d.SampleAxes, node.expr.span, name=name, axis=extra[0], axes=shown_axes(symbol.tensor.axes))
        if expr.kind != symbol.kind and not (symbol.kind == "real" and expr.kind == "int"):
            advice = {"int": "draw with `randint(0, 4)`", "bool": "compare the draw: `normal() > 0`", "real": "write `where(cond, 1, 0)`"}
            expected, found = kinds.SHOWN[symbol.kind], kinds.SHOWN[expr.kind]
            self.error(d.SampleKind, node.expr.span, name=name, expected=expected, found=found, advice=advice[symbol.kind])

    # Outputs ---------------------------------------------------------------------------------------------------------

    def declare_outputs(self) -> tuple[t.Tensor, ...]:
        if not self.kernel.outputs:
            self.error(d.MissingOutputs, self.kernel.span, name=self.kernel.name.name)
        seen: dict[str, tree.Tensor] = {}
        made: list[t.Tensor] = []
        for tensor in self.kernel.outputs:
            name = tensor.name.name
            if name in seen:
                self.error(d.NameTaken, tensor.span, name=name, role="an output", line=seen[name].span.line)
                continue
            seen[name] = tensor
            if tensor.default is not None:
                self.error(d.OutputDefault, tensor.default.span, name=name)
            dtype = self.dtype(tensor.dtype)
            self.check_twice(tensor.dims)
            known = [self.known_axis(a) for dim in tensor.dims for a in dim.names]
            if all(known):
                self.check_output(tensor, dtype)
            made.append(t.Tensor(name, _dims(tensor.dims), dtype, None, tensor.span))
        return tuple(made)

    def check_output(self, tensor: tree.Tensor, dtype: str | None) -> None:
        name = tensor.name.name
        declared = [a.name for dim in tensor.dims for a in dim.names]
        symbol = self.scope.get(name)
        match symbol:
            case ValueSymbol(axes=axes, kind=kind):
                self.check_output_axes(tensor, declared, axes)
                self.check_output_kind(tensor, dtype, kind)
            case StateSymbol(state=state):
                if set(declared) != set(state.axes) and set(declared) != symbol.axes:
                    advice = (
                        f"write {_bracket(name, state.axes)} for the final value, or {_bracket(name, (*state.axes, *state.along))}"
                        f" for the value after every step"
                    )
                    found = shown_axes(state.axes)
                    self.error(d.OutputAxes, tensor.span, name=name, declared=shown_axes(declared), found=found, advice=advice)
                self.check_output_kind(tensor, dtype, "real")
            case None:
                defined = [n for n, e in self.scope.entries.items() if isinstance(e.symbol, ValueSymbol | StateSymbol)]
                self.error(d.OutputUndefined, tensor.span, name=name, hint=names.closest(name, defined))
            case BrokenSymbol():
                pass
            case _:
                self.error(d.OutputRole, tensor.span, name=name, role=symbol.role)

    def check_output_axes(self, tensor: tree.Tensor, declared: Sequence[str], axes: frozenset[str]) -> None:
        extra, missing = sorted(axes - set(declared)), [a for a in declared if a not in axes]
        if extra:
            advice = f"reduce along {_list(extra)}, or add {'it' if len(extra) == 1 else 'them'} to the output"
        elif missing:
            advice = f"remove {_list(missing)} from the output: its value does not depend on {'it' if len(missing) == 1 else 'them'}"
        else:
            return
        name = tensor.name.name
        self.error(d.OutputAxes, tensor.span, name=name, declared=shown_axes(declared), found=shown_axes(axes), advice=advice)

    def check_output_kind(self, tensor: tree.Tensor, dtype: str | None, kind: t.Kind) -> None:
        if dtype is None or _kind(dtype) == kind or (_kind(dtype) == "real" and kind == "int"):
            return
        advice = "round it: `floor(x)`" if _kind(dtype) == "int" and kind == "real" else "drop the type, or convert the value"
        self.error(d.OutputKind, tensor.span, name=tensor.name.name, dtype=dtype, kind=kinds.SHOWN[kind], advice=advice)


def _kind(dtype: str) -> t.Kind:
    match names.DTYPES[dtype]:
        case "bool":
            return "bool"
        case "int":
            return "int"
        case _:
            return "real"


def _dims(dims: Sequence[tree.Dim]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(a.name for a in dim.names) for dim in dims)


def _bracket(name: str, axes: Iterable[str]) -> str:
    return f"`{name}[{','.join(axes)}]`"


def _list(axes: Sequence[str]) -> str:
    return ", ".join(f"`{a}`" for a in axes)
