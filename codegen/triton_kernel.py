"""One kernel of a plan as the lines of a Triton function: a method for every statement of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import assert_never

from ..compiler import ir
from ..compiler import plan as plans
from .gpu_blocks import Launch, launch_options, register_limit
from .source import Specialization
from .triton_expressions import (
    AND,
    ATOM,
    COMPARE,
    HALF,
    PRODUCT,
    SUM,
    Expressions,
    Shown,
    UnprintablePlan,
    cast,
    literal,
    real,
    real_tensor,
    spread,
    wrapped,
)  # fmt: skip
from .triton_inline import is_inlined
from .triton_names import KernelNames
from .triton_padding import PaddingContents, obtained
from .triton_products import MatrixProduct, OperandDtypes, fits_dot, matrix_product, padded_extents

LINE = 120
MAX_INLINE = 72
MAX_BOUND = 40
MAX_PROGRAMS = 2**31 - 1
INT_INFINITY = 2**63 - 1

STARTS: dict[str, bool | int | float] = {
    "sum": 0, "any": False, "prod": 1, "all": True, "max": float("-inf"), "min": float("inf"), "argmax": -1,
}  # fmt: skip
"""What a fold starts from."""


@dataclass(frozen=True, slots=True)
class PrintedKernel:
    """Lines of the function and of its launcher, and what both are called with."""

    name: str
    note: str
    arguments: list[str]
    body: list[str]
    launch: list[str]
    options: dict[str, int | bool | str]
    helpers: set[str]
    buffers: tuple[str, ...]
    extents: tuple[str, ...]
    origins: tuple[str, ...]
    params: tuple[str, ...]


class KernelPrinter:
    """Prints one kernel. What turns out to be read (``i_index``, ``j_size`` ...) is noted on the way, and defined afterwards."""

    def __init__(
        self,
        plan: plans.Plan,
        kernel: plans.Kernel,
        spec: Specialization,
        node_names: Mapping[ir.Node, str],
        spec_lines: Sequence[str],
        target: str,
        launch: Launch | None = None,
    ) -> None:
        """``launch``: options in place of those of the table."""
        if kernel.owner:
            raise UnprintablePlan(f"kernel {kernel.name} owns memory that it adds to in place: a plan for a CPU")
        self._plan = plan
        self._kernel = kernel
        self._statements = plans.inner_statements(kernel.body)
        self._dtypes = dict(spec.dtypes)
        self._compiled_params = dict(spec.params)
        self._extents = {a: e for a, e in spec.extents if a in kernel.whole}
        self._spec_lines = spec_lines
        self._target = target
        self._launch_given = launch
        self._spec_line: int | None = None

        self._sizes = padded_extents(kernel, self._extents)
        self._padding = {a: PaddingContents(kernel, a) for a in kernel.whole if self._sizes[a] != self._extents[a]}
        self._operand_dtypes = OperandDtypes(kernel, plan.buffers, spec)
        self._halved: dict[ir.Node, list[str]] = {}
        """What was made of a float32 operand (``_halves``), and the lines among which that stands."""
        self._obtained = {node for s in self._statements for node in obtained(s)}
        self._kept_half = self._half_operands()
        self._pivot_of = {pivot for s in self._statements if (pivot := _weight_pivot(s)) is not None}

        self._node_names = node_names
        self._names = KernelNames({*node_names.values(), kernel.name})
        self._expressions = Expressions(self._find, kernel.tile_order)
        self._values: dict[ir.Node, Shown] = {}
        self._pivots: dict[ir.Node, Shown] = {}
        self._read: set[tuple[str, str]] = set()
        self._lines: list[str] = []
        self._depth = 0
        self._open_loops: list[str] = []
        """Axes that enclosing loops step through one index at a time."""

    def print(self) -> PrintedKernel:
        self._print_body(self._kernel.body)
        offsets = self._print_offsets()
        body = [*offsets, "", *self._lines] if offsets else self._lines
        while body and not body[-1]:
            body.pop()
        arguments, options = self._arguments()
        extents = tuple(a for a in self._extent_axes() if self._is_argument(a))
        return PrintedKernel(
            name=self._kernel.name,
            note=self._kernel.note or self._kernel.name,
            arguments=arguments,
            body=body,
            launch=self._launch(extents),
            options=options,
            helpers=self._expressions.helpers,
            buffers=self._buffers(),
            extents=extents,
            origins=self._all_read("origin"),
            params=self._all_read("param"),
        )

    # Values ---------------------------------------------------------------------------------------------------

    def _find(self, node: ir.Node) -> Shown | None:
        """What a node is called here, or None for an operation that no statement obtains."""
        if node in self._values:
            return self._values[node]
        match node:
            case ir.Const(value=value):
                return literal(value)
            case ir.Param(name=name):
                return self._show_param(name, node.kind)
            case ir.Size(axis=axis):
                return self._show_size(axis)
            case plans.Index(axis=axis):
                return self._show_index(axis)
            case plans.Origin(axis=axis):
                return Shown(self._reading("origin", axis, self._names.origin(axis)), dtype="int32")
            case ir.Position(axis=axis):
                origin = plans.origin(axis)
                return self._expressions.apply("add", "int", [self._show_index(axis), self._expressions.show(origin)])
            case plans.Edge(axis=axis, side=side):
                return self._show_edge(axis, side)
            case plans.Local():
                return Shown(self._name(node), dims=self._expressions.dims(node), dtype=_local_dtype(node, self._local_op(node)))
            case _:
                return None

    def _name(self, node: ir.Node) -> str:
        if node in self._node_names:
            return self._node_names[node]
        if isinstance(node, plans.Local):
            return self._names.get(node.name, "local", node.name)
        raise UnprintablePlan(f"the plan names no {type(node).__name__} over {node.axes}")

    def _reading(self, role: str, what: str, name: str) -> str:
        self._read.add((role, what))
        return name

    def _show_param(self, name: str, kind: ir.Kind) -> Shown:
        text = self._reading("constant" if name in self._compiled_params else "param", name, self._names.param(name))
        if name in self._compiled_params:
            value = self._compiled_params[name]
            return Shown(text, dtype="bool" if isinstance(value, bool) else "int64", value=value)
        if kind != "real":
            raise UnprintablePlan(f"the {kind} param {name} is not compiled in")
        return Shown(text)

    def _show_size(self, axis: str) -> Shown:
        known = ir.fixed_extent(axis)
        if known is not None and axis not in self._extents:
            return literal(known)
        if axis in self._extents:
            text = self._reading("extent", axis, self._names.extent(axis))
            return Shown(text, dtype="int64", value=self._extents[axis])
        return Shown(self._reading("size", axis, self._names.size(axis)), dtype="int32")

    def _show_index(self, axis: str) -> Shown:
        if axis in self._kernel.tile_order:
            return Shown(self._reading("index", axis, self._names.index(axis)), dims=(axis,), dtype="int32")
        return self._show_scalar(axis)

    def _show_scalar(self, axis: str) -> Shown:
        if axis not in self._kernel.grid and axis not in self._open_loops:
            raise UnprintablePlan(f"kernel {self._kernel.name} reads the index of {axis}, which neither its grid nor a loop fixes")
        return Shown(self._reading("scalar", axis, self._names.scalar(axis)), dtype="int64")

    def _show_offsets(self, axis: str) -> Shown:
        return Shown(self._reading("offsets", axis, self._names.offsets(axis)), dims=(axis,), dtype="int32")

    def _show_inside(self, axis: str) -> Shown:
        return Shown(self._reading("inside", axis, self._names.inside(axis)), dims=(axis,), dtype="bool")

    def _show_edge(self, axis: str, side: str) -> Shown:
        if axis in self._extents:
            return literal(0) if side == "start" else self._show_size(axis)
        if side == "start":
            return Shown(self._names.start(axis), dtype="int32")
        return Shown(self._reading("stop", axis, self._names.stop(axis)), dtype="int32")

    def _span(self, axis: str) -> str:
        """The name of the size of an axis in a tile."""
        if axis not in self._extents:
            return self._reading("block", axis, self._names.block(axis))
        if axis in self._padding:
            return self._reading("padded", axis, self._names.padded(axis))
        return self._reading("extent", axis, self._names.extent(axis))

    def _shape(self, dims: Sequence[str]) -> str:
        return f"[{', '.join(self._span(d) for d in dims)}]"

    def _tile(self, node: ir.Node) -> Shown:
        """A node as a tile over all of its axes, also where its value does not vary along some."""
        shown, dims = self._expressions.show(node), self._expressions.dims(node)
        if shown.dims == dims:
            return shown
        if shown.value is not None:
            return Shown(f"tl.full({self._shape(dims)}, {shown.text}, tl.{_tl(shown.dtype)})", ATOM, dims, shown.dtype)
        return Shown(f"tl.broadcast_to({spread(shown, dims).text}, {self._shape(dims)})", ATOM, dims, shown.dtype)

    # Lines ----------------------------------------------------------------------------------------------------

    def _emit(self, text: str) -> None:
        self._lines.append("    " * self._depth + text)

    def _emit_call(self, head: str, args: Sequence[str], tail: str = ")") -> None:
        """``head(args)tail`` on one line, or with a line for each argument."""
        line = head + ", ".join(args) + tail
        if len(line) + 4 * self._depth <= LINE:
            self._emit(line)
            return
        self._emit(head)
        for arg in args:
            self._emit(f"    {arg},")
        self._emit(tail)

    def _blank(self) -> None:
        if self._lines and self._lines[-1] and not self._lines[-1].endswith(":"):
            self._lines.append("")

    def _comment_line(self, node: ir.Node) -> None:
        """A comment with the line of the spec, where it is another one than before."""
        line = self._plan.lines.get(node)
        if line is None or line == self._spec_line:
            return
        self._spec_line = line
        self._blank()
        text = self._spec_lines[line - 1].strip() if line <= len(self._spec_lines) else ""
        self._emit(f"# spec.weft:{line}  {text}".rstrip())

    def _assign(self, node: ir.Node, shown: Shown) -> None:
        self._emit(f"{self._name(node)} = {shown.text}")
        self._obtain(node, shown.dims, shown.dtype)

    def _obtain(self, node: ir.Node, dims: tuple[str, ...], dtype: str) -> None:
        """Make a node known by its name; where weights are taken relative to it, print the finite value to subtract too."""
        self._values[node] = Shown(self._name(node), dims=dims, dtype=dtype)
        if node in self._pivot_of:
            name = self._names.get(f"{self._name(node)}_pivot", "pivot", self._name(node))
            shown = real(self._values[node])
            self._emit(f'{name} = tl.where({wrapped(shown, ATOM)} == float("-inf"), 0.0, {shown.text})')
            self._pivots[node] = Shown(name, dims=dims)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """What is obtained inside is unknown afterwards."""
        values, pivots = dict(self._values), dict(self._pivots)
        self._depth += 1
        yield
        self._depth -= 1
        self._values, self._pivots = values, pivots

    def _print_body(self, body: Sequence[plans.Statement]) -> None:
        for position, statement in enumerate(body):
            match statement:
                case plans.Load():
                    self._print_load(statement)
                case plans.Compute():
                    self._print_compute(statement, body, position)
                case plans.Contract():
                    self._print_contract(statement)
                case plans.Fold():
                    self._print_fold(statement)
                case plans.Begin():
                    self._print_begin(statement)
                case plans.Advance():
                    self._print_advance(statement)
                case plans.Accumulate():
                    self._print_accumulate(statement, body[position + 1 :])
                case plans.Scatter():
                    self._print_scatter(statement)
                case plans.Assign():
                    self._print_assign(statement)
                case plans.Rename():
                    self._print_rename(statement)
                case plans.Store():
                    self._print_store(statement)
                case plans.Loop():
                    self._print_loop(statement)
                case _:
                    assert_never(statement)

    # Memory ---------------------------------------------------------------------------------------------------

    def _print_load(self, load: plans.Load) -> None:
        self._comment_line(load.node)
        dims = self._expressions.dims(load.node)
        at = {
            axis: index.axis if isinstance(index, plans.Index) and axis not in load.checked else self._located(load.node, axis, index)
            for axis, index in load.at
        }
        dtype = self._dtypes[load.buffer]
        args = [self._address(load.buffer, at, dims)]
        conditions = self._conditions(load.buffer, at, load.checked, dims)
        if load.where is not None:
            conditions.append(self._expressions.show(load.where))
        if conditions:
            args += [f"mask={self._conjunction(conditions, dims)}", "other=0" if dtype in ("int32", "int64", "bool") else "other=0.0"]
        widened = dtype in HALF and load.node not in self._kept_half
        self._emit_call(f"{self._name(load.node)} = tl.load(", args, ").to(tl.float32)" if widened else ")")
        self._obtain(load.node, dims, "float32" if widened else dtype)

    def _print_store(self, store: plans.Store) -> None:
        self._comment_line(store.node)
        buffer = self._plan.buffers[store.buffer]
        at: dict[str, Shown | str] = {axis: self._located(store.node, axis, index) for axis, index in store.at}
        dims = tuple(a for a in self._kernel.tile_order if a in buffer.axes)
        value = spread(self._expressions.show(store.node), dims)
        args = [self._address(store.buffer, at, dims), value.text]
        conditions = self._conditions(store.buffer, at, store.checked, dims)
        if conditions:
            args.append(f"mask={self._conjunction(conditions, dims)}")
        self._emit_call("tl.store(", args)

    def _located(self, node: ir.Node, axis: str, index: ir.Node) -> Shown:
        """The index of an addressed axis; named where it is an expression, since address and mask read it."""
        shown = self._expressions.show(index)
        if shown.value is not None or shown.text.isidentifier():
            return shown
        name = self._names.get(f"{self._name(node)}_{axis}", "at", self._name(node), axis)
        self._emit(f"{name} = {shown.text}")
        return Shown(name, dims=shown.dims, dtype=shown.dtype)

    def _address(self, buffer: str, at: Mapping[str, Shown | str], dims: tuple[str, ...]) -> str:
        """The pointers of a tile: first where the tile starts, then the offsets in it, which stay the same from tile to tile. ``at``: the
        index along an axis that the tile has not, or the axis of the tile that is read in place of it."""
        names = self._names
        start, inner = [names.pointer(buffer)], list[str]()
        fixed = self._fixed_axes(buffer)
        for axis in self._plan.buffers[buffer].axes:
            stride = names.stride(buffer, axis)
            index = at.get(axis)
            if isinstance(index, Shown):
                if index.value != 0:
                    index = cast(index, "int64")
                    (inner if index.dims else start).append(f"{wrapped(spread(index, dims), PRODUCT)} * {stride}")
                continue
            along = axis if index is None else index
            if along not in self._extents and (along != axis or axis not in fixed):
                base = self._show_base(along) if along in self._kernel.tiled else self._show_scalar(along)
                start.append(f"{base.text} * {stride}")
            if along in self._kernel.tile_order:
                inner.append(f"{spread(self._show_offsets(along), dims).text} * {stride}")
        if len(inner) < 2:
            return " + ".join([*start, *inner])
        return f"{' + '.join(start)} + ({' + '.join(inner)})" if len(start) > 1 else " + ".join([*start, *inner])

    def _fixed_axes(self, buffer: str) -> tuple[str, ...]:
        """Axes of the grid and of the rows at whose index every access takes the buffer: the pointer is moved there once."""
        kernel = self._kernel
        accesses = [s for s in self._statements if isinstance(s, plans.Load | plans.Store)]
        addressed = {a for s in accesses if s.buffer == buffer for a, _ in s.at}
        looped = {s.axis for s in self._statements if isinstance(s, plans.Loop)}
        fixed = [*kernel.grid, *([kernel.rows] if kernel.rows and kernel.rows not in looped else [])]
        return tuple(a for a in self._plan.buffers[buffer].axes if a in fixed and a not in addressed)

    def _show_base(self, axis: str) -> Shown:
        """Where the tile starts on an axis, as int64, to be multiplied with strides."""
        return Shown(self._reading("base", axis, self._names.base(axis)), dtype="int64")

    def _conditions(self, buffer: str, at: Mapping[str, Shown | str], checked: Sequence[str], dims: tuple[str, ...]) -> list[Shown]:
        """What an access must fulfil: no padding, and the extents of checked axes."""
        own = [a for a in checked if a in self._kernel.tiled and a not in at]
        conditions = [self._show_inside(a) for a in dims if a in self._padding or a in own]
        for axis in self._plan.buffers[buffer].axes:
            index = at.get(axis)
            if axis in checked and isinstance(index, Shown):
                conditions += self._bounds(index, axis)
        return conditions

    def _bounds(self, index: Shown, axis: str) -> list[Shown]:
        low = self._expressions.apply("ge", "bool", [index, literal(0)])
        high = self._expressions.apply("lt", "bool", [index, self._show_size(axis)])
        return [c for c in (low, high) if c.value is not True]

    def _conjunction(self, conditions: Sequence[Shown], dims: tuple[str, ...]) -> str:
        """All of the conditions, as a flag for a tile over ``dims``. Scalars come last."""
        tiles = [c for c in conditions if c.dims]
        if dims and not tiles:
            tiles = [Shown(f"tl.full({self._shape(dims)}, True, tl.int1)", dims=dims, dtype="bool")]
        scalars = [c for c in conditions if not c.dims]
        parts = [spread(c, dims) for c in tiles]
        both = " & ".join(wrapped(c, AND) for c in parts) if len(parts) > 1 else "".join(c.text for c in parts)
        if not scalars:
            return both
        every = " & ".join(wrapped(c, AND) for c in scalars) if len(scalars) > 1 else scalars[0].text
        return f"tl.where({every}, {both}, False)" if parts else every

    # Tiles ----------------------------------------------------------------------------------------------------

    def _print_compute(self, compute: plans.Compute, body: Sequence[plans.Statement], position: int) -> None:
        node = compute.node
        if not isinstance(node, ir.Pointwise):
            raise UnprintablePlan(f"{type(node).__name__} is not an operation to compute")
        args = [self._expressions.show(a) for a in node.args]
        if node.op == "lt" and self._is_inside(node.args):
            shown = self._show_inside(node.axes[0])
        elif node.op == "expdiff" and node.args[1] in self._pivots:
            pivot = self._pivots[node.args[1]]
            shown = self._expressions.weight(args[0], pivot, self._expressions.dims(node))
        else:
            shown = self._expressions.apply(node.op, node.kind, args, node.args)
        if shown.value is not None or self._is_alias(node, shown) or self._shares_line(node, shown, body, position):
            self._values[node] = shown
        else:
            self._comment_line(node)
            self._assign(node, shown)

    def _is_inside(self, args: Sequence[ir.Node]) -> bool:
        """Whether a comparison asks if the indices of a tile are inside the extent."""
        match args:
            case [plans.Index(axis=axis), ir.Size(axis=extent)]:
                return axis == extent and axis in self._kernel.tile_order
            case _:
                return False

    def _shares_line(self, node: ir.Node, shown: Shown, body: Sequence[plans.Statement], position: int) -> bool:
        if node in self._plan.graph.names or node in self._pivot_of or len(shown.text) > MAX_INLINE:
            return False
        return is_inlined(body, position, self._obtained.__contains__)

    def _is_alias(self, node: ir.Pointwise, shown: Shown) -> bool:
        """stopgrad(x) is x, unless x goes on to change; being inside the extent has a name already."""
        if node.op == "lt" and self._is_inside(node.args):
            return True
        return node.op in ("stopgrad", "clipgrad") and not isinstance(node.args[0], plans.Local) and shown.text.isidentifier()

    def _print_contract(self, contract: plans.Contract) -> None:
        self._comment_line(contract.node)
        dims = self._expressions.dims(contract.node)
        self._assign(contract.node, self._product(contract.lhs, contract.rhs, contract.over, dims))

    def _print_fold(self, fold: plans.Fold) -> None:
        self._comment_line(fold.node)
        self._assign(fold.node, self._fold(fold.op, fold.x, fold.over))

    def _fold(self, op: str, node: ir.Node, over: Sequence[str]) -> Shown:
        """The fold of a tile over those of its axes in ``over``; its padding there is replaced where it is not the start of the fold."""
        shown = self._tile(node)
        folded = [d for d in shown.dims if d in over]
        start = STARTS["max" if op == "argmax" else op]
        if node.kind == "real":
            shown = real(shown)
        elif op not in ("any", "all"):
            shown = cast(shown, "int32" if shown.dtype == "bool" else "int64" if op in ("sum", "prod") else shown.dtype)
        return self._fold_shown(op, self._hidden(shown, node, folded, start), folded)

    def _fold_shown(self, op: str, shown: Shown, folded: Sequence[str]) -> Shown:
        if not folded:
            return self._show_index_zero(op, shown)
        if op == "argmax":
            return self._argmax(shown, folded)
        if op in ("any", "all"):
            counted = self._fold_shown("max" if op == "any" else "min", cast(shown, "int32"), folded)
            return Shown(f"{counted.text} > 0", COMPARE, counted.dims, "bool")
        for axis in reversed([d for d in shown.dims if d in folded]):
            place = shown.dims.index(axis)
            rest = tuple(d for d in shown.dims if d != axis)
            if op == "prod":
                text = f"tl.reduce({shown.text}, {place}, {self._expressions.helper('multiply')})"
            else:
                text = f"tl.{op}({shown.text}, axis={place})"
            shown = Shown(text, ATOM, rest, shown.dtype)
        return shown

    def _show_index_zero(self, op: str, shown: Shown) -> Shown:
        if op == "argmax":
            raise UnprintablePlan("argmax over no axis of its tile")
        return shown

    def _argmax(self, shown: Shown, folded: Sequence[str]) -> Shown:
        if len(folded) != 1:
            raise UnprintablePlan(f"argmax over {folded}: one axis at a time")
        (axis,) = folded
        rest = tuple(d for d in shown.dims if d != axis)
        text = f"tl.argmax({shown.text}, axis={shown.dims.index(axis)}, tie_break_left=True)"
        if axis in self._extents:
            return Shown(text, ATOM, rest, "int32")
        return Shown(f"{self._names.start(axis)} + {text}", SUM, rest, "int32")

    def _hidden(self, shown: Shown, node: ir.Node, folded: Sequence[str], start: bool | int | float) -> Shown:
        """The tile with its padding along folded axes replaced by ``start``, where it is not that already."""
        padded = [a for a in folded if a in self._padding and self._padding[a].of(node) != start]
        if not padded:
            return shown
        inside = self._conjunction([self._show_inside(a) for a in padded], shown.dims)
        replaced = literal(_finite_for(start, shown.dtype))
        return Shown(f"tl.where({inside}, {shown.text}, {replaced.text})", ATOM, shown.dims, shown.dtype)

    # Products -------------------------------------------------------------------------------------------------

    def _product(self, lhs: ir.Node, rhs: ir.Node, over: Sequence[str], dims: tuple[str, ...], onto: str | None = None) -> Shown:
        """``onto`` plus the sum over ``over`` of ``lhs * rhs``, as a tile over ``dims``."""
        left, right = self._tile(lhs), self._tile(rhs)
        shape = matrix_product(left.dims, right.dims, over)
        if shape is not None and fits_dot(shape, self._sizes):
            return self._dot(shape, lhs, rhs, dims, onto)
        left, right = (self._factor(n, other, over, "float32") for n, other in ((lhs, rhs), (rhs, lhs)))
        both = self._expressions.apply("mul", "real", [left, right])
        total = self._fold_shown("sum", both, [d for d in both.dims if d in over])
        return total if onto is None else Shown(f"{onto} + {spread(total, dims).text}", SUM, dims)

    def _dot(self, shape: MatrixProduct, lhs: ir.Node, rhs: ir.Node, dims: tuple[str, ...], onto: str | None) -> Shown:
        dtype = self._operand_dtypes.of(lhs, rhs)
        rows, columns = shape.rows, shape.columns
        if dims[0] in columns:
            lhs, rhs, rows, columns = rhs, lhs, columns, rows
        first, *others = [
            [self._matrix(left, rows, shape.inner), self._matrix(right, shape.inner, columns)]
            for left, right in self._operands(lhs, rhs, shape.inner, dtype)
        ]
        plain = dims == (*rows, *columns) and len(dims) == 2
        ending = [onto] if onto is not None and plain else []
        for other in others:  # what rounding takes away is multiplied first, and added to
            ending = [f"tl.dot({', '.join([*other, *ending])})"]
        precision = [f'input_precision="{"tf32" if self._operand_dtypes.rounds(lhs, rhs) else "ieee"}"'] if dtype == "float32" else []
        text = f"tl.dot({', '.join([*first, *ending, *precision])})"
        if not plain:
            text = self._rearranged(f"tl.reshape({text}, {self._shape((*rows, *columns))})", (*rows, *columns), dims)
            text = text if onto is None else f"{onto} + {text}"
        return Shown(text, ATOM if plain or onto is None else SUM, dims)

    def _operands(self, lhs: ir.Node, rhs: ir.Node, inner: Sequence[str], dtype: str) -> list[tuple[Shown, Shown]]:
        """Pairs of operands whose products add up to that of two values."""
        if dtype in HALF and self._operand_dtypes.feeds_back(lhs, rhs):
            right = self._factor(rhs, lhs, inner, dtype)
            return [(left, right) for left in self._halves(lhs, rhs, inner, dtype)]
        if dtype in HALF and self._operand_dtypes.feeds_back(rhs, lhs):
            left = self._factor(lhs, rhs, inner, dtype)
            return [(left, right) for right in self._halves(rhs, lhs, inner, dtype)]
        return [(self._factor(lhs, rhs, inner, dtype), self._factor(rhs, lhs, inner, dtype))]

    def _halves(self, node: ir.Node, other: ir.Node, inner: Sequence[str], dtype: str) -> tuple[Shown, Shown]:
        """A float32 operand as two of half precision that add up to it: rounded, and what rounding takes away."""
        shown = self._factor(node, other, inner, "float32")
        name = self._names.get(f"{self._name(node)}_{dtype}", "rounded", self._name(node))
        rest = self._names.get(f"{self._name(node)}_rest", "rest", self._name(node))
        if self._halved.get(node) is not self._lines:
            self._emit(f"{name} = {cast(shown, dtype).text}")
            self._emit(f"{rest} = {cast(Shown(f'({shown.text} - {name}.to(tl.float32))', ATOM, shown.dims), dtype).text}")
            self._halved[node] = self._lines
        return Shown(name, ATOM, shown.dims, dtype), Shown(rest, ATOM, shown.dims, dtype)

    def _factor(self, node: ir.Node, other: ir.Node, inner: Sequence[str], dtype: str) -> Shown:
        """An operand in the dtype of the product. Its padding is 0, or finite where that of the other operand is 0."""
        shown = self._tile(node)
        shown = cast(shown, "float32") if shown.dtype not in (dtype, "bool") and inner and self._unclean(node, other, inner) else shown
        for axis in (a for a in inner if a in self._padding and a in shown.dims):
            mine = self._padding[axis].of(node)
            theirs = self._padding[axis].of(other) if axis in other.axes else None
            if mine == 0 or (theirs == 0 and mine is not None and abs(mine) < float("inf")):
                continue
            inside = spread(self._show_inside(axis), shown.dims).text
            zero = "False" if shown.dtype == "bool" else "0.0"
            shown = Shown(f"tl.where({inside}, {shown.text}, {zero})", ATOM, shown.dims, shown.dtype)
        return cast(shown, dtype)

    def _unclean(self, node: ir.Node, other: ir.Node, inner: Sequence[str]) -> bool:
        return any(a in self._padding and a in node.axes and self._padding[a].of(node) != 0 for a in inner)

    def _matrix(self, shown: Shown, first: Sequence[str], second: Sequence[str]) -> str:
        """A tile as a matrix with the axes of ``first`` as its rows."""
        order = (*first, *second)
        if shown.dims == order[::-1] and len(order) == 2:
            return f"tl.trans({shown.text})"
        text = self._rearranged(shown.text, shown.dims, order)
        if len(order) == 2:
            return text
        sides = [" * ".join(self._span(a) for a in group) for group in (first, second)]
        return f"tl.reshape({text}, [{', '.join(sides)}])"

    def _rearranged(self, text: str, dims: Sequence[str], order: Sequence[str]) -> str:
        if tuple(dims) == tuple(order):
            return text
        return f"tl.permute({text}, ({', '.join(str(list(dims).index(a)) for a in order)}))"

    def _half_operands(self) -> set[ir.Node]:
        """Tiles that some product takes in half precision: they are kept as they are loaded."""
        kept: set[ir.Node] = set()
        for statement in self._statements:
            match statement:
                case plans.Contract(lhs=lhs, rhs=rhs) | plans.Accumulate(lhs=lhs, rhs=ir.Node() as rhs):
                    if self._operand_dtypes.of(lhs, rhs) in HALF:
                        kept |= {lhs, rhs}
                case _:
                    pass
        return kept

    # Carried values -------------------------------------------------------------------------------------------

    def _print_assign(self, assign: plans.Assign) -> None:
        self._comment_line(assign.node)
        dims = self._expressions.dims(assign.local)
        shown = real_tensor(self._expressions.show(assign.node))
        value = shown if dims == shown.dims else self._broadcast(shown, dims)
        self._emit(f"{self._name(assign.local)} = {value.text}")
        self._halved.pop(assign.local, None)
        self._obtain(assign.local, dims, "float32")

    def _broadcast(self, shown: Shown, dims: tuple[str, ...]) -> Shown:
        if shown.value is not None:
            return Shown(f"tl.full({self._shape(dims)}, {shown.text}, tl.float32)", ATOM, dims)
        return Shown(f"tl.broadcast_to({spread(shown, dims).text}, {self._shape(dims)})", ATOM, dims)

    def _print_rename(self, rename: plans.Rename) -> None:
        """The same tile with other names of its axes: its elements beyond the extent are 0, as what is read there would be."""
        self._comment_line(rename.node)
        shown = real(self._tile(rename.x))
        new = dict(rename.renamed)
        for axis in (a for a in shown.dims if a in new):
            known = self._padding[axis].of(rename.x) if axis in self._padding else 0
            if known != 0:
                inside = spread(self._show_inside(axis), shown.dims).text
                shown = Shown(f"tl.where({inside}, {shown.text}, 0.0)", ATOM, shown.dims)
        renamed = tuple(new.get(a, a) for a in shown.dims)
        dims = self._expressions.dims(rename.node)
        for axis in (b for _, b in rename.renamed if b in self._padding):  # a longer tile than its extent must not show more
            inside = spread(self._show_inside(axis), renamed).text
            shown = Shown(f"tl.where({inside}, {shown.text}, 0.0)", ATOM, shown.dims)
        self._emit(f"{self._name(rename.node)} = {self._rearranged(shown.text, renamed, dims)}")
        self._obtain(rename.node, dims, "float32")

    def _local_op(self, local: ir.Node) -> str:
        return next((s.op for s in self._statements if isinstance(s, plans.Begin) and s.local is local), "sum")

    def _print_begin(self, begin: plans.Begin) -> None:
        if begin.buffer is not None:
            raise UnprintablePlan(f"{begin.local.name} accumulates in the tensor {begin.buffer}: a plan for a CPU")
        dims = self._expressions.dims(begin.local)
        dtype = _local_dtype(begin.local, begin.op)
        start = _finite_for(STARTS[begin.op], dtype)
        name = self._name(begin.local)
        if dims and start == 0 and dtype != "bool":
            self._emit(f"{name} = tl.zeros({self._shape(dims)}, tl.{dtype})")
        else:
            self._emit(f"{name} = tl.full({self._shape(dims)}, {literal(start).text}, tl.{_tl(dtype)})")

    def _print_advance(self, advance: plans.Advance) -> None:
        self._comment_line(advance.score)
        name, rescale = self._name(advance.local), self._name(advance.rescale)
        following = self._names.get(f"{name}_next", "next", name)
        dims = self._expressions.dims(advance.local)
        reached = spread(self._fold("max", advance.score, advance.over), dims)
        self._emit(f"{following} = tl.maximum({name}, {reached.text})")
        # Equal infinities have no difference: nothing to rescale.
        self._emit(f"{rescale} = tl.where({following} == {name}, 1.0, tl.exp({name} - {following}))")
        self._emit(f"{name} = {following}")
        self._obtain(advance.local, dims, "float32")
        self._obtain(advance.rescale, dims, "float32")

    def _print_accumulate(self, accumulate: plans.Accumulate, following: Sequence[plans.Statement]) -> None:
        self._comment_line(accumulate.lhs)
        local = self._tile(accumulate.local)
        if any(isinstance(s, plans.Accumulate) and s.companion is accumulate.local for s in following):
            self._emit(f"{self._before(local.text)} = {local.text}")
        if accumulate.op == "argmax":
            self._accumulate_argmax(accumulate, local)
        else:
            self._emit(f"{local.text} = {self._accumulated(accumulate, local)}")
        self._obtain(accumulate.local, local.dims, local.dtype)

    def _before(self, name: str) -> str:
        return self._names.get(f"{name}_before", "before", name)

    def _accumulated(self, accumulate: plans.Accumulate, local: Shown) -> str:
        scaled = local
        if accumulate.rescale is not None:
            scaled = self._expressions.apply("mul", "real", [local, self._expressions.show(accumulate.rescale)])
        if accumulate.rhs is not None:
            total = self._product(accumulate.lhs, accumulate.rhs, accumulate.over, local.dims, scaled.text)
            return total.text
        total = spread(self._fold(accumulate.op, accumulate.lhs, accumulate.over), local.dims)
        match accumulate.op:
            case "sum":
                return f"{scaled.text} + {wrapped(real(total) if local.dtype == 'float32' else total, SUM)}"
            case "prod":
                return f"{wrapped(scaled, PRODUCT)} * {wrapped(total, ATOM)}"
            case "max" | "min":
                return f"tl.{accumulate.op}imum({scaled.text}, {total.text})"
            case "any" | "all":
                return f"{local.text} {'|' if accumulate.op == 'any' else '&'} {wrapped(total, SUM)}"
            case op:
                raise UnprintablePlan(f"no way to accumulate with {op}")

    def _accumulate_argmax(self, accumulate: plans.Accumulate, local: Shown) -> None:
        """The index of the tile's maximum, where that is above the maximum of all tiles before."""
        companion = accumulate.companion
        if companion is None:
            raise UnprintablePlan(f"argmax {accumulate.local.name} follows no maximum")
        folded = [d for d in self._expressions.dims(accumulate.lhs) if d in accumulate.over]
        tile = self._hidden(real_tensor(self._tile(accumulate.lhs)), accumulate.lhs, folded, STARTS["max"])
        highest = spread(self._fold_shown("max", tile, folded), local.dims).text
        index = spread(self._argmax(tile, folded), local.dims).text
        name = self._name(companion)
        best = self._before(name) if ("before", name) in self._names else name
        self._emit(f"{local.text} = tl.where({highest} > {best}, {index}, {local.text})")

    def _print_scatter(self, scatter: plans.Scatter) -> None:
        """A loop over the indices that the tile addresses, so that sums are taken in a fixed order."""
        self._comment_line(scatter.x)
        local, axis = self._tile(scatter.local), scatter.axis
        at, x = self._tile(scatter.at), real(self._tile(scatter.x))
        name = self._name(scatter.local)
        target = self._names.get(f"{name}_{axis}", "target", name)
        start, end = self._show_edge(axis, "start").text, f"{self._show_edge(axis, 'start').text} + {self._span(axis)}"
        first, last = (tl_fold if not at.dims else f"tl.{op}({at.text})" for op, tl_fold in (("min", at.text), ("max", at.text)))
        low = self._names.get(f"{name}_first", "first", name)
        high = self._names.get(f"{name}_last", "last", name)
        self._emit(f"{low} = tl.cast(tl.maximum({first}, {start}), tl.int32)")
        self._emit(f"{high} = tl.cast(tl.minimum({last} + 1, {self._span(axis) if start == '0' else end}), tl.int32)")
        self._emit(f"for {target} in range({low}, {high}):")
        kept = tuple(d for d in local.dims if d != axis)
        hit = Shown(f"{wrapped(at, AND)} == {target}", COMPARE, at.dims, "bool")
        part = self._expressions.apply("where", "real", [hit, x, literal(0.0)])
        folded = [d for d in part.dims if d not in kept]
        part = self._fold_shown("sum", self._hidden_sum(part, scatter.x, folded), folded)
        here = Shown(f"{self._show_index(axis).text} == {target}", COMPARE, (axis,), "bool")
        spot = self._expressions.apply("where", "real", [here, part, literal(0.0)])
        self._emit(f"    {local.text} += {spread(spot, local.dims).text}")

    def _hidden_sum(self, part: Shown, node: ir.Node, folded: Sequence[str]) -> Shown:
        return self._hidden(part, node, [a for a in folded if a in node.axes], 0.0)

    # Loops ----------------------------------------------------------------------------------------------------

    def _print_loop(self, loop: plans.Loop) -> None:
        self._blank()
        if loop.note:
            self._emit(f"# {loop.note}")
        self._spec_line = None
        if loop.block is None:
            self._print_steps(loop)
        else:
            self._print_tiles(loop, loop.block)
        self._blank()
        self._spec_line = None

    def _print_steps(self, loop: plans.Loop) -> None:
        """A loop over single indices; one that runs once or not at all is printed as the condition that it is."""
        axis = loop.axis
        condition = _once_if(loop)
        self._open_loops.append(axis)
        with self._inner_lines() as (lines, read), self._scope():
            self._print_body(loop.body)
        self._open_loops.pop()
        is_read = ("scalar", axis) in read
        if condition is not None and not is_read:
            text = self._expressions.show(condition).text
            self._emit(f"if {text if len(text) <= MAX_INLINE else self._short(text, 'applies')}:")
        else:
            if self._hands_over(loop):
                self._emit("tl.debug_barrier()  # other threads of this program store what this one reads")
            bounds = [self._short(b, f"{axis}_{end}") for b, end in ((self._bound(loop.start), "first"), (self._bound(loop.stop), "last"))]
            step = self._names.step(axis) if is_read else "_"
            self._emit(f"for {step} in range({', '.join(bounds[1:] if bounds[0] == '0' else bounds)}):")
        if is_read and loop.reverse:
            backwards = f"({bounds[1]}) - 1 - {self._names.step(axis)}" + (f" + ({bounds[0]})" if bounds[0] != "0" else "")
            self._emit(f"    {self._names.scalar(axis)} = tl.cast({backwards}, tl.int64)")
        elif is_read:
            self._emit(f"    {self._names.scalar(axis)} = tl.cast({self._names.step(axis)}, tl.int64)")
        self._lines += lines
        self._read |= read - {("scalar", axis)}

    def _hands_over(self, loop: plans.Loop) -> bool:
        """Whether a loop reads what another one of this kernel stores, or stores what another one reads."""
        own, every = plans.inner_statements(loop.body), self._statements
        stored, loaded = ({s.buffer for s in own if isinstance(s, kind)} for kind in (plans.Store, plans.Load))
        all_stored, all_loaded = ({s.buffer for s in every if isinstance(s, kind)} for kind in (plans.Store, plans.Load))
        return bool((loaded & all_stored) ^ (stored & all_loaded))

    def _print_tiles(self, loop: plans.Loop, block: int) -> None:
        axis = loop.axis
        if block != self._sizes.get(axis):
            raise UnprintablePlan(f"a loop over {axis} by {block}, of which a tile has {self._sizes.get(axis)}")
        start = self._bound(loop.start) if loop.exact else self._start(loop.start, axis, block)
        stop = self._bound(loop.stop)
        start, stop = self._short(start, f"{axis}_first"), self._short(stop, f"{axis}_last")
        with self._inner_lines() as (lines, read), self._scope():
            self._print_body(loop.body)
        self._emit(f"for {self._names.start(axis)} in range({start}, {stop}, {self._span(axis)}):")
        self._depth += 1
        for line in self._definitions(axis, read, stop if loop.exact else None):
            self._emit(line)
        self._depth -= 1
        self._lines += lines
        self._read |= {r for r in read if r[1] != axis or r[0] not in ("base", "index", "inside", "stop")}

    @contextmanager
    def _inner_lines(self) -> Iterator[tuple[list[str], set[tuple[str, str]]]]:
        """Collect lines, and what they read, apart."""
        lines, read = self._lines, self._read
        inner: tuple[list[str], set[tuple[str, str]]] = ([], set())
        self._lines, self._read = inner
        yield inner
        self._lines, self._read = lines, read

    def _definitions(self, axis: str, read: set[tuple[str, str]], end: str | None = None) -> list[str]:
        """What a tile along an axis needs of its indices, edges and extent, in order; offsets in the tile apart. ``end``: where
        the axis ends, if not at its extent."""
        names = self._names
        lines = []
        if ("base", axis) in read:
            lines.append(f"{names.base(axis)} = tl.cast({names.start(axis)}, tl.int64)")
        if ("index", axis) in read or ("inside", axis) in read:
            first = "" if axis in self._extents else f"{names.start(axis)} + "
            lines.append(f"{names.index(axis)} = {first}tl.arange(0, {self._span(axis)})")
        if ("inside", axis) in read:
            lines.append(f"{names.inside(axis)} = {names.index(axis)} < {end or self._show_size(axis).text}")
        if ("stop", axis) in read:
            size = end or self._show_size(axis).text
            lines.append(f"{names.stop(axis)} = tl.minimum({names.start(axis)} + {self._span(axis)}, {size})")
        return lines

    def _bound(self, node: ir.Node) -> str:
        shown = self._expressions.show(node)
        return shown.text if shown.value is not None or shown.dtype == "int32" else cast(shown, "int32").text

    def _short(self, bound: str, name: str) -> str:
        """A long bound gets a line and a name."""
        if len(bound) <= MAX_BOUND:
            return bound
        name = self._names.get(name, "bound", name)
        self._emit(f"{name} = {bound}")
        return name

    def _start(self, node: ir.Node, axis: str, block: int) -> str:
        """The start of a loop, rounded down to a whole tile."""
        if is_multiple(node, block, self._sizes):
            return self._bound(node)
        shown = self._expressions.show(node)
        if shown.value is not None:
            return repr(int(shown.value) // block * block)
        text = self._bound(node) if self._expressions.never_negative(node) else f"tl.maximum({self._bound(node)}, 0)"
        text = text if text.isidentifier() or text.startswith("tl.maximum(") else f"({text})"
        return f"{text} // {self._span(axis)} * {self._span(axis)}"

    # The function's beginning and its launch ------------------------------------------------------------------

    def _print_offsets(self) -> list[str]:
        """Which point of the grid and which tile of rows this program has, and where its tensors start there."""
        kernel, names = self._kernel, self._names
        pointers = []
        for buffer in self._buffers():
            fixed = self._fixed_axes(buffer)
            if fixed:
                starts = [(self._show_base(a) if a == kernel.rows else self._show_scalar(a), a) for a in fixed]
                terms = [f"{start.text} * {names.stride(buffer, a)}" for start, a in starts]
                pointers.append(f"{names.pointer(buffer)} += {' + '.join(terms)}")
        tiles = [line for axis in self._framed_axes() for line in self._definitions(axis, self._read)]
        for axis in self._all_read("offsets"):
            tiles.append(f"{names.offsets(axis)} = tl.arange(0, {self._span(axis)}).to({names.offset_type()})")
        rest = names.get("program", "program")
        decoded = []
        if kernel.rows is not None:
            count = names.get(f"{kernel.rows}_tiles", "tiles", kernel.rows)
            decoded.append(f"{count} = tl.cdiv({self._show_size(kernel.rows).text}, {self._span(kernel.rows)})")
            decoded.append(f"{names.start(kernel.rows)} = {rest} % {count} * {self._span(kernel.rows)}")
            decoded.append(f"{rest} = {rest} // {count}")
        scalars = [a for a in kernel.grid if ("scalar", a) in self._read]
        for axis in reversed(kernel.grid):
            if not scalars or not set(kernel.grid[: kernel.grid.index(axis) + 1]) & set(scalars):
                break
            if axis == kernel.grid[0]:
                decoded.append(f"{names.scalar(axis)} = {rest}.to(tl.int64)")
                continue
            if axis in scalars:
                decoded.append(f"{names.scalar(axis)} = ({rest} % {self._show_size(axis).text}).to(tl.int64)")
            decoded.append(f"{rest} = {rest} // {self._show_size(axis).text}")
        while decoded and decoded[-1].startswith(f"{rest} = "):
            decoded.pop()
        first = [f"{rest} = tl.program_id(0)"] if decoded else []
        phases = [[*first, *decoded], tiles, pointers]
        return [line for phase in phases if phase for line in ("", *phase)][1:]

    def _framed_axes(self) -> list[str]:
        """Axes whose tile is the same all through the kernel: the rows and the whole ones."""
        return [a for a in self._kernel.tile_order if a == self._kernel.rows or a in self._extents]

    def _buffers(self) -> tuple[str, ...]:
        used = {s.buffer for s in self._statements if isinstance(s, plans.Load | plans.Store)}
        return tuple(b for b in self._plan.buffers if b in used)

    def _all_read(self, role: str) -> tuple[str, ...]:
        return tuple(sorted(what for r, what in self._read if r == role))

    def _extent_axes(self) -> list[str]:
        """Axes whose extents the function or its launcher needs: those of the grid first."""
        frame = [*self._kernel.grid, *([self._kernel.rows] if self._kernel.rows else [])]
        return frame + [a for a in self._all_read("size") if a not in frame]

    def _is_argument(self, axis: str) -> bool:
        return axis not in self._extents and ir.fixed_extent(axis) is None

    def _known_extent(self, axis: str) -> int:
        known = self._extents.get(axis, ir.fixed_extent(axis))
        assert known is not None
        return known

    def _arguments(self) -> tuple[list[str], dict[str, int | bool | str]]:
        """Lines of the function's arguments, and the values of those that are compiled in, with the launch options.

        A value that is a string is source text.
        """
        names, kernel = self._names, self._kernel
        lines = [", ".join(names.pointer(b) for b in self._buffers())]
        for buffer in self._buffers():
            strides = [names.stride(buffer, a) for a in self._plan.buffers[buffer].axes]
            if strides:
                lines.append(", ".join(strides))
        groups = (
            [f"{names.size(a)}: tl.int32" for a in self._extent_axes() if self._is_argument(a)],
            [f"{names.origin(a)}: tl.int32" for a in self._all_read("origin")],
            [f"{names.param(p)}: tl.float32" for p in self._all_read("param")],
        )
        lines += [", ".join(group) for group in groups if group]
        constants: dict[str, int | bool | str] = {names.block(a): self._sizes[a] for a in self._all_read("block")}
        for axis in kernel.whole:
            if ("extent", axis) in self._read:
                constants[names.extent(axis)] = self._extents[axis]
            if ("padded", axis) in self._read:
                constants[names.padded(axis)] = self._sizes[axis]
        constants |= {names.param(p): self._compiled_params[p] for p in self._all_read("constant")}
        if self._all_read("offsets"):
            constants[names.offset_type()] = "tl.int32"
        if constants:
            lines.append(", ".join(f"{name}: tl.constexpr" for name in constants))
        return lines, constants | self._launch_options()

    def _launch_options(self) -> dict[str, int | bool]:
        launch = self._launch_given or launch_options(self._width(), self._target)
        options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
        return options | ({"maxnreg": register_limit(launch.warps)} if launch.limited else {})

    def _width(self) -> int:
        """Elements of the widest row that a tile has."""
        widest = 1
        for s in self._statements:
            if isinstance(s, plans.Load | plans.Begin):
                axes = (s.node if isinstance(s, plans.Load) else s.local).axes
                if any(a in self._kernel.tiled for a in axes):
                    widest = max(widest, math.prod(self._sizes[a] for a in axes if a in self._kernel.whole))
        return widest

    def _launch(self, extents: tuple[str, ...]) -> list[str]:
        kernel, names = self._kernel, self._names
        sizes = {a: names.size(a) if self._is_argument(a) else repr(self._known_extent(a)) for a in (*kernel.grid, kernel.rows) if a}
        counts = [sizes[a] for a in kernel.grid]
        if kernel.rows:
            counts.append(f'triton.cdiv({sizes[kernel.rows]}, {kernel.name}_options["{names.block(kernel.rows)}"])')
        frame = {*kernel.grid, kernel.rows}
        lines = []
        if extents and frame & set(extents):
            unpacked = [names.size(a) if a in frame else "_" for a in extents]
            lines.append(f"{', '.join(unpacked)}{',' if len(unpacked) == 1 else ''} = extents")
        lines.append(f"programs = {' * '.join(counts) or '1'}")
        lines.append(f"if programs > {MAX_PROGRAMS}:")
        lines.append(f'    raise ValueError(f"{kernel.name}: {{programs}} programs, more than a grid holds")')
        options = f"{kernel.name}_options"
        reaches = self._reaches()
        if reaches:
            lines.append("# The farthest element of a tile decides whether 32 bits are enough for offsets in it.")
            if len(reaches) == 1:
                lines.append(f"reach = {reaches[0]}")
            else:
                lines += ["reach = max(", *(f"    {r}," for r in reaches), ")"]
            lines.append(f'options = {options} if reach < 2147483648 else {{**{options}, "{names.offset_type()}": tl.int64}}')
            options = "options"
        lines.append("if programs:")
        given = "*tensors, *strides, *extents, *origins, *params"
        lines.append(f"    {kernel.name}[(programs,)]({given}, **{options})")
        return lines

    def _reaches(self) -> list[str]:
        """For every tensor, how far its tile reaches: the sum over the axes of the tile of stride times size."""
        reaches, position = [], 0
        for buffer in self._buffers():
            axes = self._plan.buffers[buffer].axes
            loads = [s for s in self._statements if isinstance(s, plans.Load) and s.buffer == buffer]
            among = {a: {a} | {i.axis for s in loads for b, i in s.at if a == b and isinstance(i, plans.Index)} for a in axes}
            sizes = {a: max((self._sizes[o] for o in others if o in self._kernel.tile_order), default=0) for a, others in among.items()}
            terms = [f"strides[{position + n}] * {sizes[a]}" for n, a in enumerate(axes) if sizes[a]]
            if terms:
                reaches.append(" + ".join(terms))
            position += len(axes)
        return reaches if self._all_read("offsets") else []


def _once_if(loop: plans.Loop) -> ir.Node | None:
    """The condition of a loop from 0 to ``where(condition, 1, 0)``."""
    match loop.start, loop.stop:
        case ir.Const(value=0), ir.Pointwise(op="where", args=(condition, ir.Const(value=1), ir.Const(value=0))):
            return condition
        case _:
            return None


def _weight_pivot(statement: plans.Statement) -> ir.Node | None:
    """What is subtracted in the exponent of a weight."""
    match statement:
        case plans.Compute(node=ir.Pointwise(op="expdiff", args=(_, pivot))):
            return pivot
        case _:
            return None


def _local_dtype(local: ir.Node, op: str) -> str:
    """Carried ints are int64, so that counts and sums cannot overflow."""
    return {"real": "float32", "int": "int32" if op == "argmax" else "int64", "bool": "bool"}[local.kind]


def _tl(dtype: str) -> str:
    return "int1" if dtype == "bool" else dtype


def _finite_for(start: bool | int | float, dtype: str) -> bool | int | float:
    """The start of a fold in a dtype; the infinities of ints are the ends of their range."""
    if dtype == "bool":
        return bool(start)
    if dtype == "float32" or dtype in HALF:
        return float(start)
    if start == float("inf"):
        return INT_INFINITY
    return -INT_INFINITY if start == float("-inf") else int(start)


def is_multiple(node: ir.Node, block: int, sizes: Mapping[str, int]) -> bool:
    """Whether an int expression is surely a multiple of ``block``: what a loop over tiles may start from as it is."""
    match node:
        case ir.Const(value=value):
            return value % block == 0
        case plans.Edge(axis=axis, side="start"):
            return sizes.get(axis, 1) % block == 0
        case ir.Pointwise(op="mul", args=args):
            return any(is_multiple(a, block, sizes) for a in args)
        case ir.Pointwise(op="add" | "sub" | "min" | "max", args=args):
            return all(is_multiple(a, block, sizes) for a in args)
        case _:
            return False
