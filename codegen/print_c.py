"""Plan -> one C file: C11 with OpenMP and vector extensions, an entry for each kernel.

A program (a grid point and a tile of rows) keeps its tiles in arrays of its own, so nothing is shared between threads and
results do not depend on their number. Matrix products go through one register-blocked function; everything pointwise
between two products is fused into loops that the compiler vectorises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, assert_never

from ..compiler import ir
from ..compiler.plan import Begin, Buffer, Edge, Index, Kernel, Load, Local, Loop, Origin, Plan, Statement, Store, inner_statements
from .c_expressions import ORDER, PRIMARY, PRODUCT, SUM, UNARY, Expressions, Text, number, wrap
from .c_library import library, sections
from .c_lowering import Clear, Lowering, Product, Run, Step, Sweep, TileLoad
from .c_pieces import Define, Fill, Folded, Gather, Move, Nest, Piece, Scale, Spread, Write, all_reads, arrange, inside, writes
from .c_storage import PAD, Names, Tile, padded
from .source import Entry, Module, Specialization

if TYPE_CHECKING:
    import jinja2

Definition = Define | Gather | Folded | TileLoad | Product
"""What gives a value that is not carried."""

STACK_BYTES = 1 << 20
"""Tiles of a program that need more than this go to the heap."""

_CTYPES = {
    "float32": "float", "float16": "_Float16", "bfloat16": "uint16_t", "int32": "int32_t", "int64": "int64_t", "bool": "uint8_t",
}  # fmt: skip
_STARTS = {"sum": "0", "any": "0", "prod": "1", "all": "1", "max": "-INFINITY", "highest": "-INFINITY", "min": "INFINITY", "argmax": "-1"}
_FUNCTIONS = {"max": "maximum", "min": "minimum", "highest": "highest"}
_SYMBOLS = {"sum": "+", "prod": "*", "any": "|", "all": "&"}


def print_c(plan: Plan, spec: Specialization, spec_text: str = "", filename: str = "spec.weft", version: str = "") -> Module:
    """The C source of a plan. ``spec_text`` goes into the header and beside the statements that it explains."""
    functions: set[str] = set()
    printed = [_KernelPrinter(kernel, plan, spec, spec_text, filename, functions) for kernel in plan.kernels]
    kernels = [p.render() for p in printed]
    header = [f"{plan.direction} pass, written by weft {version}".rstrip() + "."]
    if spec_text:
        header += ["", *spec_text.rstrip().splitlines()]
    text = _template("module.c.jinja").render(header=[h.rstrip() for h in header], functions=library(functions), kernels=kernels)
    clean = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    return Module("c", clean, tuple(p.entry for p in printed))


@cache
def _template(name: str) -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False, autoescape=False
    )
    return environment.from_string(resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8"))


def vector_order(kernel: Kernel) -> tuple[str, ...]:
    """The axes of tiles in C: swept axes first, then the rows, then whole axes.

    With the rows of a program side by side, maxima and sums over a swept axis are sums of vectors, and a product of the
    program's rows with a swept tile needs only the rows transposed, once.
    """
    swept = [a for a in kernel.tile_order if a in kernel.tiled and a != kernel.rows]
    rows = [a for a in kernel.tile_order if a == kernel.rows]
    return (*swept, *rows, *(a for a in kernel.tile_order if a not in kernel.tiled))


class _KernelPrinter:
    """Prints one kernel: ``render`` gives its text, after which ``entry`` says how to call it."""

    def __init__(self, kernel: Kernel, plan: Plan, spec: Specialization, spec_text: str, filename: str, functions: set[str]) -> None:
        kernel = self.kernel = replace(kernel, tile_order=vector_order(kernel))
        self.plan = plan
        self.plan_buffers = dict(plan.buffers)
        self.dtypes = dict(spec.dtypes)
        self.scratch: dict[str, str] = {}
        self.extents = dict(spec.extents)
        self.params = dict(spec.params)
        self.spec_lines = spec_text.splitlines()
        self.filename = filename
        self.functions = functions
        self.names = Names(set(sections()) | {k.name for k in plan.kernels})
        self.lowering = Lowering(kernel, plan.names, {b for b, dtype in self.dtypes.items() if dtype in ("float32", "float16", "bfloat16")})
        self.expressions = Expressions(self.known, self.grows, functions)

        self.lines: list[str] = []
        self.indent = 0
        self.last_comment = 0
        self.values: dict[ir.Node, Text | list[Tile]] = {}
        self.tiles: list[Tile] = []
        self.layouts: dict[tuple[ir.Node, tuple[str, ...], str], Tile] = {}
        self.definitions: dict[ir.Node, Definition] = {}
        self.users: dict[Definition, list[Piece | Step]] = {}
        self.axis_names: dict[str, str] = {}
        self.starts: dict[str, str] = {}
        self.counts: dict[str, str] = {}
        self.buffer_names: dict[str, str] = {}
        self.strides: dict[tuple[str, str], str] = {}
        self.size_names: dict[str, str] = {}
        self.origin_names: dict[str, str] = {}
        self.param_names: dict[str, str] = {}

        for axis in (*kernel.grid, *kernel.tile_order, *(s.axis for s in self.lowering.statements if isinstance(s, Loop))):
            if axis not in self.axis_names:
                self.axis_names[axis] = self.names.new(axis)
        used = {s.buffer for s in self.lowering.statements if isinstance(s, Load | Store)} | set(self.lowering.in_place.values())
        self.buffers = [b for b in plan.buffers if b in used]

    # Names and leaves -----------------------------------------------------------------------------------------------

    def name_of(self, node: ir.Node) -> str:
        return node.name if isinstance(node, Local) else self.plan.names[node]

    def size(self, axis: str) -> str:
        """The extent of an axis: a number where it is compiled in."""
        if axis in self.extents:
            return str(self.extents[axis])
        if axis not in self.size_names:
            self.size_names[axis] = self.names.new(f"size_{axis}")
        return self.size_names[axis]

    def origin(self, axis: str) -> str:
        if axis not in self.origin_names:
            self.origin_names[axis] = self.names.new(f"origin_{axis}")
        return self.origin_names[axis]

    def buffer(self, buffer: str) -> str:
        if buffer not in self.buffer_names:
            self.buffer_names[buffer] = self.names.new(f"{buffer}_data")
        return self.buffer_names[buffer]

    def stride(self, buffer: str, axis: str) -> str:
        """The stride of a tensor along an axis; what weft allocates is contiguous."""
        about = self.plan_buffers[buffer]
        if axis == about.axes[-1] and about.role in ("temporary", "output", "gradient"):
            return "1"
        if (buffer, axis) not in self.strides:
            self.strides[buffer, axis] = self.names.new(f"{buffer}_{axis}")
        return self.strides[buffer, axis]

    def index(self, axis: str) -> Text:
        """The index along an axis at this point of the loops."""
        variable = self.axis_names[axis]
        if axis in self.kernel.tiled and axis in self.starts:
            return Text(f"{self.starts[axis]} + {variable}", SUM)
        return Text(variable, PRIMARY)

    def grows(self, node: ir.Node) -> bool:
        return True

    def known(self, node: ir.Node) -> Text | None:
        value = self.values.get(node)
        if isinstance(value, Text):
            return value
        if value is not None:
            return self.pick(value).element(self.axis_names)
        match node:
            case Local() if node in self.lowering.in_place:
                return Text(self.place_in_memory(node, {}), PRIMARY)
            case Index(axis=axis):
                return self.index(axis)
            case ir.Position(axis=axis):
                return Text(f"{self.index(axis).text} + {self.origin(axis)}", SUM)
            case Origin(axis=axis):
                return Text(self.origin(axis), PRIMARY)
            case ir.Size(axis=axis):
                return Text(self.size(axis), PRIMARY)
            case Edge(axis=axis, side="start"):
                return Text(self.starts[axis], PRIMARY)
            case Edge(axis=axis):
                return Text(f"{self.starts[axis]} + {self.counts[axis]}", SUM)
            case ir.Param(name=name) if name in self.params:
                return number(self.params[name])
            case ir.Param(name=name):
                if name not in self.param_names:
                    self.param_names[name] = self.names.new(name)
                return Text(self.param_names[name], PRIMARY)
            case _:
                return None

    def pick(self, tiles: list[Tile]) -> Tile:
        """The tile in natural order where there is one."""
        return next((t for t in tiles if t.axes == tuple(a for a in self.kernel.tile_order if a in t.axes)), tiles[0])

    def show(self, node: ir.Node) -> str:
        return self.expressions.show(node).text

    # Lines ----------------------------------------------------------------------------------------------------------

    def put(self, *lines: str) -> None:
        self.lines.extend("    " * self.indent + line if line and not line.startswith("#") else line for line in lines)

    def pragma(self, line: str) -> None:
        self.lines.append("#pragma " + line)

    def open(self, line: str) -> None:
        self.put(line + " {")
        self.indent += 1

    def close(self) -> None:
        self.indent -= 1
        self.put("}")

    def phase(self, nodes: Iterable[ir.Node]) -> None:
        """A blank line, and the line of the spec that what follows comes from, where that is another one than before."""
        if self.lines and self.lines[-1] and not self.lines[-1].endswith("{"):
            self.lines.append("")
        for line in sorted({self.plan.lines[n] for n in nodes if n in self.plan.lines}):
            if line != self.last_comment and 0 < line <= len(self.spec_lines):
                self.put(f"// {self.filename}:{line} {self.spec_lines[line - 1].strip()}")
                self.last_comment = line

    # Memory ---------------------------------------------------------------------------------------------------------

    def address(self, buffer: str, at: dict[str, Text], without: tuple[str, ...] = ()) -> Text:
        """Offset of an element in its tensor; ``without`` leaves the index inside a tile out of axes."""
        terms = []
        for axis in self.plan_buffers[buffer].axes:
            if axis in at:
                index = at[axis]
            elif axis in without:
                index = Text(self.starts.get(axis, "0"), PRIMARY)
            else:
                index = self.index(axis)
            if index.text != "0":
                stride = self.stride(buffer, axis)
                terms.append(index.text if stride == "1" else f"{wrap(index, PRODUCT)} * {stride}")
        return Text(" + ".join(terms) or "0", SUM)

    def element(self, buffer: str, at: dict[str, Text]) -> str:
        return f"{self.buffer(buffer)}[{self.address(buffer, at).text}]"

    def read(self, buffer: str, at: dict[str, Text]) -> Text:
        dtype = self.dtypes[buffer]
        text = Text(self.element(buffer, at), PRIMARY)
        return self.expressions.use(f"from_{dtype}", text) if dtype in ("float16", "bfloat16") else text

    def new_tile(self, wish: str, axes: tuple[str, ...], ctype: str, instead: Tile | None = None) -> Tile:
        extents = [self.tile_extent(a) for a in axes]
        if extents:
            extents[-1] = padded(extents[-1])
        tile = Tile(self.names.new(wish), axes, tuple(extents), ctype, instead.name if instead else "")
        self.tiles.append(tile)
        return tile

    def kept_tile(self, node: ir.Node, axes: tuple[str, ...], suffix: str, instead: Tile | None = None) -> Tile:
        """The tile that holds a node in a layout, one for all loops that come by; it may take the place of another tile."""
        key = (node, axes, instead.name if instead else "")
        if key not in self.layouts:
            self.layouts[key] = self.new_tile(self.name_of(node) + suffix, axes, self.expressions.ctype(node), instead)
        return self.layouts[key]

    def tile_extent(self, axis: str) -> int:
        return self.kernel.tiled[axis] if axis in self.kernel.tiled else self.extents[axis]

    def carried(self, node: ir.Node) -> Tile:
        """The tile of a carried value, made at first sight."""
        value = self.values.get(node)
        if value is None:
            value = self.values[node] = [self.new_tile(self.name_of(node), self.lowering.space(node), self.expressions.ctype(node))]
        assert isinstance(value, list)
        return value[0]

    def target(self, node: ir.Node) -> str:
        """The element that holds a carried or kept value."""
        if node in self.lowering.in_place:
            return self.place_in_memory(node, {})
        return self.carried(node).element(self.axis_names).text

    def bound(self, axis: str, relaxed: bool) -> str:
        """Where a loop over an axis of a tile ends. A relaxed loop may run over elements that do not exist."""
        if axis in self.kernel.tiled and not relaxed:
            return self.counts[axis]
        return str(self.tile_extent(axis))

    # Steps ----------------------------------------------------------------------------------------------------------

    def steps(self, steps: list[Step]) -> None:
        for step in steps:
            match step:
                case Run(pieces=pieces):
                    self.run(pieces)
                case TileLoad():
                    self.tile_load(step)
                case Product():
                    self.product(step)
                case Clear(begin=begin):
                    self.clear(begin)
                case Sweep(loop=loop, steps=inner):
                    self.sweep(loop, inner)
                case _:
                    assert_never(step)

    def note_users(self, steps: list[Step], around: dict[ir.Node, Definition]) -> None:
        """Notes who reads each definition of a value; ``around`` has those in force where the steps begin."""
        current = dict(around)

        def reads(nodes: Iterable[ir.Node], user: Piece | Step) -> None:
            for node in nodes:
                if node in current:
                    self.users[current[node]].append(user)

        def defines(node: ir.Node, definition: Definition) -> None:
            self.users[definition] = []
            current[node] = definition

        for step in steps:
            match step:
                case Run(pieces=pieces):
                    for piece in pieces:
                        reads(all_reads(piece), piece)
                        if isinstance(piece, Define | Gather | Folded) and writes(piece)[0] in self.lowering.defined:
                            defines(writes(piece)[0], piece)
                case TileLoad(load=load):
                    reads(self.lowering.values_in(*(n for _, n in load.at)), step)
                    defines(load.node, step)
                case Product(target=target, left=left, right=right):
                    reads((left, right), step)
                    if target in self.lowering.defined:
                        defines(target, step)
                case Clear():
                    pass
                case Sweep(loop=loop, steps=inner):
                    outside = (loop.start, loop.stop) if loop.skip is None else (loop.start, loop.stop, loop.skip)
                    reads(self.lowering.values_in(*outside), step)
                    self.note_users(inner, current)
                case _:
                    assert_never(step)

    def is_exact(self, axis: str, body: tuple[Statement, ...]) -> bool:
        """Whether every tile of an axis is known to lie inside its extent: something reads or writes along it unchecked."""
        unchecked = False
        for statement in inner_statements(body):
            match statement:
                case Load(node=node, at=at, checked=checked) if axis in node.axes and axis not in dict(at):
                    if axis in checked:
                        return False
                    unchecked = unchecked or axis in self.plan.buffers[statement.buffer].axes
                case Store(node=node, checked=checked) if axis in node.axes:
                    if axis in checked:
                        return False
                    unchecked = True
                case _:
                    pass
        return unchecked

    def enter_tile(self, axis: str, body: tuple[Statement, ...]) -> None:
        """Names for the tile of an axis, inside the loop over its tiles."""
        block = self.kernel.tiled[axis]
        start = self.starts[axis]
        if self.is_exact(axis, body):
            self.counts[axis] = str(block)
            return
        self.counts[axis] = self.names.new(f"{self.axis_names[axis]}_count") if axis not in self.counts else self.counts[axis]
        if self.counts[axis].isdigit():
            self.counts[axis] = self.names.new(f"{self.axis_names[axis]}_count")
        left = f"{self.size(axis)} - {start}"
        self.put(f"const int {self.counts[axis]} = {left} < {block} ? {left} : {block};")

    def start_name(self, axis: str) -> str:
        if axis not in self.starts:
            self.starts[axis] = self.names.new(f"{self.axis_names[axis]}_start")
        return self.starts[axis]

    def sweep(self, loop: Loop, steps: list[Step]) -> None:
        self.phase(())
        if loop.note:
            self.put(f"// {loop.note}")
        start, stop = self.expressions.show(loop.start), self.limit(loop)
        if loop.block is None:
            variable = self.axis_names[loop.axis]
            self.open(f"for (int {variable} = {start.text}; {variable} < {wrap(stop, ORDER + 1)}; {variable}++)")
        else:
            first = "0" if start.text == "0" else f"{wrap(start, PRODUCT)} / {loop.block} * {loop.block}"
            variable = self.start_name(loop.axis)
            self.open(f"for (int {variable} = {first}; {variable} < {wrap(stop, ORDER + 1)}; {variable} += {loop.block})")
            self.enter_tile(loop.axis, loop.body)
        if loop.skip is not None:
            self.put(f"if ({self.show(loop.skip)})", "    continue;")
        comment = self.last_comment
        self.steps(steps)
        self.last_comment = comment
        self.close()

    def limit(self, loop: Loop) -> Text:
        """Where a loop stops: worked out before it begins."""
        stop = self.expressions.show(loop.stop)
        if stop.binds == PRIMARY and "(" not in stop.text:
            return stop
        name = self.names.new(f"{self.axis_names[loop.axis]}_stop")
        self.put(f"const int {name} = {stop.text};")
        return Text(name, PRIMARY)

    def held_in(self, buffer: str) -> str:
        """The float tensor in which a value is summed in place: the tensor itself, or scratch memory for one of half precision."""
        return self.scratch.get(buffer, buffer)

    def place_in_memory(self, node: ir.Node, at: dict[str, Text]) -> str:
        return self.element(self.held_in(self.lowering.in_place[node]), at)

    def clear(self, begin: Begin) -> None:
        """Zero the part of a tensor that this program owns."""
        assert begin.buffer is not None
        buffer = self.plan.buffers[begin.buffer]
        self.phase(())
        if self.dtypes[buffer.name] != "float32":
            self.make_scratch(buffer)
        held = self.held_in(buffer.name)
        self.over_owned(buffer, lambda: f"{self.element(held, {})} = 0.0f;")

    def make_scratch(self, buffer: Buffer) -> None:
        """Float memory for the part of a half-precision tensor that this program owns."""
        axes = tuple(a for a in buffer.axes if a not in self.kernel.grid)
        name = self.names.new(f"{buffer.name}_sum")
        self.plan_buffers[name] = Buffer(name, axes, "float32", "temporary")
        self.dtypes[name] = "float32"
        self.buffer_names[name] = name
        self.scratch[buffer.name] = name
        self.functions.add("allocate")
        extent = "1"
        for axis in reversed(axes):
            if axis != axes[-1]:
                self.strides[name, axis] = self.names.new(f"{name}_{axis}")
                self.put(f"const int64_t {self.strides[name, axis]} = {extent};")
                extent = f"{self.strides[name, axis]} * {self.size(axis)}"
            else:
                extent = f"(int64_t){self.size(axis)}"
        self.put(f"float *const {name} = allocate({extent} * (int64_t)sizeof(float));")

    def release_scratch(self) -> None:
        """Convert what was summed in scratch memory to the dtype of its tensor."""
        for buffer, held in self.scratch.items():
            self.phase(())
            store = f"to_{self.dtypes[buffer]}"
            self.functions.add(store)
            self.over_owned(self.plan.buffers[buffer], lambda b=buffer, h=held, f=store: f"{self.element(b, {})} = {f}({self.element(h, {})});")  # type: ignore[misc]
            self.put(f"free({held});")

    def over_owned(self, buffer: Buffer, statement: Callable[[], str]) -> None:
        """A statement for every element of the part of a tensor that a program owns."""
        axes = [a for a in buffer.axes if a not in self.kernel.grid]
        hidden = dict(self.starts)
        for axis in axes:
            variable = self.axis_names.setdefault(axis, axis)
            if axis == axes[-1]:
                self.pragma("omp simd")
            if axis == self.kernel.rows and not self.kernel.owner:
                self.open(f"for (int {variable} = 0; {variable} < {self.counts[axis]}; {variable}++)")
            else:
                self.starts.pop(axis, None)
                self.open(f"for (int {variable} = 0; {variable} < {self.size(axis)}; {variable}++)")
        self.put(statement())
        self.starts = hidden
        for _ in axes:
            self.close()

    # Tile loads and products ----------------------------------------------------------------------------------------

    def tile_orders(self, step: TileLoad) -> list[tuple[str, ...]]:
        """The layouts in which a loaded tile is wanted: as the right factor of a product its columns lie side by side."""
        node, users = step.load.node, self.users[step]
        asked = [(p.depth, p.columns) for p in users if isinstance(p, Product) and p.right is node]
        plain = not asked or any(not isinstance(user, Product) for user in users)
        return list(dict.fromkeys([*asked, *([self.lowering.space(node)] if plain else [])]))

    def tile_load(self, step: TileLoad) -> None:
        load = step.load
        self.phase((load.node,))
        at = {axis: self.expressions.show(node) for axis, node in load.at}
        tiles = []
        for order in self.tile_orders(step):
            suffix = "" if order == self.lowering.space(load.node) else "_t"
            tiles.append(self.kept_tile(load.node, order, suffix))
            self.copy_tile(load.buffer, tiles[-1], at, self.limits(load, at))
        self.values[load.node] = tiles

    def limits(self, load: Load, at: dict[str, Text]) -> list[str]:
        """Tests that an address lies inside the tensor."""
        checked = [(index, self.size(axis)) for axis, index in at.items() if axis in load.checked]
        return [f"{wrap(index, ORDER)} >= 0 && {wrap(index, ORDER)} < {size}" for index, size in checked]

    def copy_tile(self, buffer: str, tile: Tile, at: dict[str, Text], limits: list[str]) -> None:
        function = f"load_{self.dtypes[buffer]}"
        self.functions.add(function)
        base = self.address(buffer, at, tile.axes).text
        source = self.buffer(buffer) + ("" if base == "0" else f" + {base}")
        target = tile.first
        outer = tile.axes[:-2]
        for axis in outer:
            variable = self.axis_names[axis]
            self.open(f"for (int {variable} = 0; {variable} < {self.bound(axis, False)}; {variable}++)")
            source += f" + {variable} * {self.stride(buffer, axis)}"
            target += f" + {variable} * {tile.stride(axis)}"
        column = tile.axes[-1]
        row = tile.axes[-2] if len(tile.axes) > 1 else None
        rows = "1" if row is None else self.bound(row, False)
        if limits:
            rows = f"{' && '.join(limits)} ? {rows} : 0"
        row_stride = "0" if row is None else self.stride(buffer, row)
        tile_rows = 1 if row is None else tile.dims[-2]
        self.put(
            f"{function}({target}, {tile_rows}, {tile.dims[-1]}, {tile.dims[-1]}, {source}, "
            f"{row_stride}, {self.stride(buffer, column)}, {rows}, {self.bound(column, False)});"
        )
        for _ in outer:
            self.close()

    def product(self, product: Product) -> None:
        self.phase((product.target,))
        self.functions.add("product")
        right = self.operand(product.right, (product.depth, product.columns))
        left = self.pick(self.tiles_of(product.left))
        rows = "1" if product.rows is None else self.bound(product.rows, False)
        left_row = 0 if product.rows is None else left.stride(product.rows)
        keep = "NULL, 0"
        if product.rescale is not None:
            scale = self.carried(product.rescale)
            keep = f"{scale.first}, {1 if scale.axes else 0}"
        elif product.accumulate:
            keep = "&unchanged, 0"
            self.functions.add("unchanged")
        if product in self.users:
            self.definitions[product.target] = product
            self.values[product.target] = [self.kept_tile(product.target, self.lowering.space(product.target), "")]
        memory = self.in_memory(product)
        staged = memory is None and product.target in self.lowering.in_place
        if memory is None:
            out = self.staging(product) if staged else self.carried(product.target)
            memory = f"{out.first}, {out.stride(product.rows) if product.rows else 0}"
        if staged:
            self.copy_in_place(product, out, back=False)
        self.put(
            f"product({memory}, {keep}, {left.first}, {left_row}, "
            f"{left.stride(product.depth)}, {right.first}, {right.stride(product.depth)}, {rows}, {self.bound(product.columns, False)}, "
            f"{self.bound(product.depth, False)});"
        )
        if staged:
            self.copy_in_place(product, out, back=True)

    def in_memory(self, product: Product) -> str | None:
        """Address and row stride of a value kept in a tensor whose rows are whole vectors: the product adds to it there."""
        buffer = self.lowering.in_place.get(product.target)
        if buffer is None or product.rows is None or product.columns in self.kernel.tiled:
            return None
        held = self.held_in(buffer)
        if self.tile_extent(product.columns) % PAD != 0 or self.stride(held, product.columns) != "1":
            return None
        base = self.address(held, {}, self.lowering.space(product.target))
        return f"{self.buffer(held)} + {base.text}, {self.stride(held, product.rows)}"

    def staging(self, product: Product) -> Tile:
        """A tile for the rows of an in-place value that a product adds to."""
        return self.kept_tile(product.target, self.lowering.space(product.target), "_rows")

    def copy_in_place(self, product: Product, tile: Tile, back: bool) -> None:
        for axis in tile.axes:
            variable = self.axis_names[axis]
            self.open(f"for (int {variable} = 0; {variable} < {self.bound(axis, False)}; {variable}++)")
        memory = self.place_in_memory(product.target, {})
        local = tile.element(self.axis_names).text
        self.put(f"{memory} = {local};" if back else f"{local} = {memory};")
        for _ in tile.axes:
            self.close()

    def tiles_of(self, node: ir.Node) -> list[Tile]:
        if isinstance(node, Local):
            self.carried(node)
        value = self.values[node]
        assert isinstance(value, list), f"{self.name_of(node)} is not kept in a tile"
        return value

    def operand(self, node: ir.Node, order: tuple[str, ...]) -> Tile:
        """The tile of a right factor with its columns side by side: transposed here where it was computed the other way."""
        tiles = self.tiles_of(node)
        for tile in tiles:
            if tile.axes == order:
                return tile
        source = tiles[0]
        turned = self.kept_tile(node, order, "_t")
        self.functions.add("transpose")
        self.put(f"transpose({turned.first}, {turned.dims[1]}, {source.first}, {source.dims[1]}, {source.dims[0]}, {self.tile_extent(order[0])});")
        return turned

    # Runs of pieces -------------------------------------------------------------------------------------------------

    def run(self, pieces: list[Piece]) -> None:
        items = arrange(pieces)
        for piece in pieces:
            if piece in self.users:
                self.definitions[writes(piece)[0]] = piece  # type: ignore[assignment]
        self.place(items)
        self.phase(n for p in pieces for n in writes(p))
        self.emit(items, ())

    def place(self, items: list[Piece | Nest]) -> None:
        """Decides which values of a run are variables of a loop and which need a tile."""
        paths: dict[Piece, tuple[Nest, ...]] = {}

        def walk(items: list[Piece | Nest], path: tuple[Nest, ...]) -> None:
            for item in items:
                if isinstance(item, Nest):
                    walk(item.items, (*path, item))
                else:
                    paths[item] = path

        walk(items, ())
        order = list(paths)
        for piece, path in paths.items():
            match piece:
                case Define(node=node) | Gather(load=Load(node=node)):
                    home = path
                case Folded(target=node, mode="set", folded=folded):
                    home = tuple(n for n in path if n.axis not in folded)
                case _:
                    continue
            if piece not in self.users:
                self.carried(node)
            elif not self.lowering.space(node) or all(u in paths and paths[u][: len(home)] == home for u in self.users[piece]):  # type: ignore[index]
                self.values[node] = Text(self.names.new(self.name_of(node)), PRIMARY)
            else:
                before = {p for p in order[: order.index(piece) + 1] if paths[p] == path}
                self.values[node] = [self.kept_tile(node, self.lowering.space(node), "", self.replaced(piece, before))]

    def replaced(self, piece: Define | Gather | Folded, before: set[Piece]) -> Tile | None:
        """The tile of an operand that nobody needs after this piece, for the result to take its place."""
        if not isinstance(piece, Define) or piece.node.kind != "real":
            return None
        for node in self.tiles_read(piece.node):
            value = self.values.get(node)
            definition = self.definitions.get(node)
            if isinstance(value, list) and definition is not None and self.lowering.space(node) == piece.space and node.kind == "real":
                if len(value) == 1 and value[0].axes == piece.space and all(u in before for u in self.users[definition]):
                    del self.definitions[node]
                    return value[0]
        return None

    def tiles_read(self, node: ir.Node) -> Iterable[ir.Node]:
        """The values in tiles that an expression is made of, through variables of its loop."""
        for argument in ir.children(node):
            if isinstance(self.values.get(argument), list):
                yield argument
            else:
                yield from self.tiles_read(argument)

    def emit(self, items: list[Piece | Nest], fixed: tuple[str, ...]) -> None:
        for item in items:
            if isinstance(item, Nest):
                self.nest(item, fixed)
            else:
                self.piece(item)

    def nest(self, nest: Nest, fixed: tuple[str, ...]) -> None:
        members = inside(nest.items)
        ending = [p for p in members if isinstance(p, Folded) and p.folded and set(p.space) - set(fixed) <= set(p.folded)]
        ending = [p for p in ending if p not in self.totals]
        for fold in ending:
            self.start_total(fold)
        if nest.innermost:
            self.simd(members, ending)
        relaxed = nest.innermost and all(
            isinstance(p, Define | Fill | Scale | Move) or isinstance(p, Folded) and nest.axis not in p.folded for p in members
        )
        relaxed = relaxed and not any(n in self.lowering.in_place for p in members for n in writes(p) + all_reads(p))
        variable = self.axis_names[nest.axis]
        self.open(f"for (int {variable} = 0; {variable} < {self.bound(nest.axis, relaxed)}; {variable}++)")
        self.emit(nest.items, (*fixed, nest.axis))
        self.close()
        for fold in ending:
            self.finish_total(fold)

    def simd(self, members: list[Piece], ending: list[Folded]) -> None:
        """The pragma that lets the innermost loop be vectorised, unless its order matters."""
        if any(isinstance(p, Spread) or isinstance(p, Folded) and p.op == "argmax" for p in members):
            return
        clauses = ""
        for fold in ending:
            symbol = _SYMBOLS.get(fold.op, "min" if fold.op == "min" else "max")
            clauses += f" reduction({symbol}: {self.totals[fold]})"
        self.pragma(f"omp simd{clauses}")

    def piece(self, piece: Piece) -> None:
        match piece:
            case Define(node=node):
                assert isinstance(node, ir.Pointwise)
                self.assign(node, self.expressions.pointwise(node, node.op, node.args).text)
            case Gather(load=load):
                self.assign(load.node, self.gathered(load).text)
            case Folded():
                self.join(piece)
            case Fill(local=local, op=op):
                self.put(f"{self.target(local)} = {self.start_of(local, op)};")
            case Scale(local=local, factor=factor):
                self.put(f"{self.target(local)} *= {self.show(factor)};")
            case Move(local=local, candidate=candidate, rescale=rescale):
                self.functions |= {"highest", "rescaling"}
                old, new = self.target(local), self.names.new(f"new_{local.name}")
                self.put(f"const float {new} = highest({old}, {self.show(candidate)});")
                self.put(f"{self.target(rescale)} = rescaling({old}, {new});")
                self.put(f"{old} = {new};")
            case Write(buffer=buffer, node=node):
                self.write(buffer, node)
            case Spread():
                self.spread(piece)
            case _:
                assert_never(piece)

    def assign(self, node: ir.Node, text: str) -> None:
        value = self.values[node]
        if isinstance(value, Text):
            self.put(f"const {self.expressions.ctype(node)} {value.text} = {text};")
        else:
            self.put(f"{self.target(node)} = {text};")

    def gathered(self, load: Load) -> Text:
        at = {axis: self.expressions.show(node) for axis, node in load.at}
        limits = self.limits(load, at)
        element = self.read(load.buffer, at)
        return Text(f"{' && '.join(limits)} ? {element.text} : 0", 3) if limits else element

    def write(self, buffer: str, node: ir.Node) -> None:
        dtype = self.dtypes[buffer]
        value = self.expressions.show(node)
        if dtype in ("float16", "bfloat16"):
            value = self.expressions.use(f"to_{dtype}", value)
        self.put(f"{self.element(buffer, {})} = {value.text};")

    def spread(self, piece: Spread) -> None:
        at = self.names.new("at")
        self.put(f"const int64_t {at} = {self.show(piece.at)};")
        self.put(f"if ({at} >= 0 && {at} < {self.size(piece.axis)})")
        if piece.local in self.lowering.in_place:
            target = self.place_in_memory(piece.local, {piece.axis: Text(at, PRIMARY)})
        else:
            target = self.carried(piece.local).element({**self.axis_names, piece.axis: at}).text
        self.put(f"    {target} += {self.show(piece.x)};")

    # Folds ----------------------------------------------------------------------------------------------------------

    def start_of(self, node: ir.Node, op: str) -> str:
        """What a fold starts from."""
        start = _STARTS[op]
        if node.kind == "real":
            return start if "INF" in start else start + ".0f"
        return {"-INFINITY": "INT64_MIN", "INFINITY": "INT64_MAX"}.get(start, start)

    def start_total(self, fold: Folded) -> None:
        name = self.names.new(f"{self.name_of(fold.target)}_{_TOTAL.get(fold.op, fold.op)}")
        self.totals[fold] = name
        if fold.op == "argmax":
            assert fold.best is not None
            self.put(f"float {name}_value = -INFINITY;")
            self.put(f"int64_t {name} = -1;")
        else:
            self.put(f"{self.expressions.ctype(fold.target)} {name} = {self.start_of(fold.target, fold.op)};")

    def operand_text(self, fold: Folded) -> Text:
        shown = [self.expressions.show(f) for f in fold.factors]
        if len(shown) == 1:
            return shown[0]
        return Text(f"{wrap(shown[0], PRODUCT)} * {wrap(shown[1], UNARY)}", PRODUCT)

    def join(self, fold: Folded) -> None:
        """One element joins a fold."""
        x = self.operand_text(fold)
        total = self.totals.get(fold)
        if fold.op == "argmax":
            assert fold.index is not None and fold.best is not None
            best, place = (f"{total}_value", total) if total else (self.target(fold.best), self.target(fold.target))
            self.keep_larger(x.text, self.index(fold.index).text, best, place)
        elif total is not None:
            self.combine(total, fold.op, fold.target, x)
        elif fold.mode == "set":
            self.assign(fold.target, x.text)
        else:
            self.combine(self.target(fold.target), fold.op, fold.target, x, fold.rescale)

    def keep_larger(self, x: str, index: str, best: str, place: str) -> None:
        self.open(f"if ({x} > {best})")
        self.put(f"{best} = {x};", f"{place} = {index};")
        self.close()

    def combine(self, target: str, op: str, node: ir.Node, x: Text, rescale: ir.Node | None = None) -> None:
        if rescale is not None:
            assert op == "sum"
            self.put(f"{target} = {target} * {self.show(rescale)} + {wrap(x, SUM + 1)};")
        elif op in _SYMBOLS:
            self.put(f"{target} {_SYMBOLS[op]}= {x.text};")
        else:
            function = _FUNCTIONS[op] + ("" if node.kind == "real" else "_int")
            self.functions.add(function)
            self.put(f"{target} = {function}({target}, {x.text});")

    def finish_total(self, fold: Folded) -> None:
        total = self.totals.pop(fold)
        if fold.op == "argmax" and fold.mode == "join":
            assert fold.best is not None
            self.keep_larger(f"{total}_value", total or "", self.target(fold.best), self.target(fold.target))
        elif fold.mode == "set":
            self.assign(fold.target, total)
        else:
            self.combine(self.target(fold.target), fold.op, fold.target, Text(total, PRIMARY), fold.rescale)

    # The whole kernel -----------------------------------------------------------------------------------------------

    totals: dict[Folded, str]
    products: list[Product]
    entry: Entry

    def render(self) -> str:
        self.totals = {}
        steps = self.lowering.steps(self.kernel.body)
        self.products = list(_products(steps))
        self.note_users(steps, {})
        body = self.program(steps)
        self.entry = self.make_entry()
        return _template("kernel.c.jinja").render(
            notes=[line for line in [self.kernel.note, *self.shape_of_work()] if line],
            name=self.kernel.name,
            arguments=self.arguments(),
            packing=[],
            program=body,
            release=[],
        )

    def shape_of_work(self) -> list[str]:
        kernel = self.kernel
        where = f"A program for each point of ({', '.join(kernel.grid)})" if kernel.grid else "One program"
        if kernel.rows is None:
            return [where + "."]
        tiles = f"tile of {kernel.tiled[kernel.rows]} along {kernel.rows}"
        return [f"{where}, which goes through every {tiles}." if kernel.owner else f"{where} and {tiles}."]

    def program(self, steps: list[Step]) -> list[str]:
        """The loops over programs and what one program does."""
        kernel = self.kernel
        loops = []
        for axis in kernel.grid:
            variable = self.axis_names[axis]
            loops.append(f"for (int {variable} = 0; {variable} < {self.size(axis)}; {variable}++)")
        row_loop = None
        if kernel.rows is not None:
            block = kernel.tiled[kernel.rows]
            start = self.start_name(kernel.rows)
            row_loop = f"for (int {start} = 0; {start} < {self.size(kernel.rows)}; {start} += {block})"
            if not kernel.owner:
                loops.append(row_loop)
        self.indent = len(loops) + 1
        first = [s for s in steps if isinstance(s, Clear)] if kernel.owner else []
        self.steps(list(first))
        if row_loop is not None and kernel.owner:
            self.phase(())
            self.open(row_loop)
        if kernel.rows is not None:
            self.enter_tile(kernel.rows, kernel.body)
        self.steps([s for s in steps if s not in first])
        if row_loop is not None and kernel.owner:
            self.close()
        self.release_scratch()
        return self.around(loops)

    def around(self, loops: list[str]) -> list[str]:
        """The parallel loops, the tiles of a program, and its body."""
        heap = sum(t.bytes for t in self.tiles if not t.place_of) > STACK_BYTES
        pad = "    "
        tiles = [pad * (len(loops) + 1) + line for line in (self.heap_tiles() if heap else self.stack_tiles())]
        head = []
        if loops:
            busy = any(isinstance(s, Loop) for s in self.kernel.body) or self.kernel.owner
            schedule = "dynamic" if busy else "static"
            collapse = f" collapse({len(loops)})" if len(loops) > 1 else ""
            head.append(f"#pragma omp parallel for{collapse} schedule({schedule}) num_threads(thread_count)")
            head += [pad * (n + 1) + line for n, line in enumerate(loops)]
            head[-1] += " {"
        else:
            head.append(pad + "{")
            tiles = [pad * 2 + line.strip() for line in tiles]
        body = self.lines if loops else [pad + line if line and not line.startswith("#") else line for line in self.lines]
        gap = [""] if tiles and body and body[0] else []
        free = [pad * (max(len(loops), 1) + 1) + "free(scratch);"] if heap else []
        return [*head, *tiles, *gap, *body, *free, pad * max(len(loops), 1) + "}"]

    def stack_tiles(self) -> list[str]:
        own = [f"{t.declaration}{' __attribute__((aligned(64)))' if t.axes else ''};" for t in self.tiles if not t.place_of]
        return [*own, *self.shared_tiles()]

    def shared_tiles(self) -> list[str]:
        return [f"{t.pointer} = {t.place_of};" for t in self.tiles if t.place_of]

    def heap_tiles(self) -> list[str]:
        self.functions.add("allocate")
        total = 0
        lines = []
        for tile in self.tiles:
            if tile.place_of:
                continue
            if not tile.axes:
                lines.append(tile.declaration + ";")
                continue
            lines.append(f"{tile.pointer} = {tile.cast}(scratch + {total});")
            total += (tile.bytes + 63) // 64 * 64
        return [f"char *const scratch = allocate({total});", *lines, *self.shared_tiles()]

    def arguments(self) -> list[str]:
        lines = []
        written = {s.buffer for s in self.lowering.statements if isinstance(s, Store)} | set(self.lowering.in_place.values())
        first_stride = 0
        for n, name in enumerate(self.buffers):
            buffer: Buffer = self.plan.buffers[name]
            ctype = _CTYPES[self.dtypes[name]]
            const = "" if name in written else "const "
            lines.append(f"{const}{ctype} *const {self.buffer(name)} = tensors[{n}];  // {name}[{', '.join(buffer.axes)}]")
            for k, axis in enumerate(buffer.axes):
                if (name, axis) in self.strides:
                    lines.append(f"const int64_t {self.strides[name, axis]} = strides[{first_stride + k}];")
            first_stride += len(buffer.axes)
        lines += [f"const int {text} = (int)extents[{n}];" for n, text in enumerate(self.size_names.values())]
        lines += [f"const int {text} = (int)origins[{n}];" for n, text in enumerate(self.origin_names.values())]
        lines += [f"const float {text} = (float)params[{n}];" for n, text in enumerate(self.param_names.values())]
        return lines

    def make_entry(self) -> Entry:
        return Entry(self.kernel.name, tuple(self.buffers), tuple(self.size_names), tuple(self.origin_names), tuple(self.param_names))


_TOTAL = {"sum": "total", "highest": "top", "max": "top", "min": "bottom", "argmax": "place"}


def _products(steps: list[Step]) -> Iterable[Product]:
    for step in steps:
        match step:
            case Product():
                yield step
            case Sweep(steps=inner):
                yield from _products(inner)
            case _:
                pass
