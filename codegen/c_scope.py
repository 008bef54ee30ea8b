"""What the parts of a C kernel share: names, indices, addresses in tensors, tiles, and the lines written so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..compiler import ir
from ..compiler.plan import Edge, Index, Kernel, Load, Local, Loop, Origin, Plan, Store
from .c_expressions import PRIMARY, PRODUCT, SUM, Expressions, Text, number, wrap
from .c_library import sections
from .c_lowering import Lowering
from .c_storage import Names, Tile, padded
from .source import Specialization


def vector_order(kernel: Kernel) -> tuple[str, ...]:
    """The axes of tiles in C: swept axes first, then the rows, then whole axes.

    With the rows of a program side by side, maxima and sums over a swept axis are sums of vectors, and a product of the
    program's rows with a swept tile needs only the rows transposed, once.
    """
    if kernel.columns is not None or not any(isinstance(s, Loop) for s in kernel.body):
        return kernel.tile_order
    swept = [a for a in kernel.tile_order if a in kernel.tiled and a != kernel.rows]
    rows = [a for a in kernel.tile_order if a == kernel.rows]
    return (*swept, *rows, *(a for a in kernel.tile_order if a not in kernel.tiled))


class Scope:
    """The state of printing one kernel."""

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
        floats = {b for b, dtype in self.dtypes.items() if dtype in ("float32", "float16", "bfloat16")}
        self.lowering = Lowering(kernel, plan.names, floats, {name: b.axes for name, b in plan.buffers.items()})
        self.expressions = Expressions(self.known, self.grows, functions)

        self.lines: list[str] = []
        self.indent = 0
        self.last_comment = 0
        self.values: dict[ir.Node, Text | list[Tile]] = {}
        self.tiles: list[Tile] = []
        self.diagonals: dict[ir.Node, Tile] = {}
        self.layouts: dict[tuple[ir.Node, tuple[str, ...], str], Tile] = {}
        self.ahead: dict[str, str] = {}
        """The memory that follows a tile, by the tile's name, until a product has asked for it."""
        self.axis_names: dict[str, str] = {}
        self.starts: dict[str, str] = {}
        self.start_names: dict[str, str] = {}
        self.count_names: dict[str, str] = {}
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

    def span(self, axis: str, relaxed: bool = False) -> tuple[str, str]:
        """Where a loop over an axis of a tile begins and ends."""
        return "0", self.bound(axis, relaxed)

    def held_in(self, buffer: str) -> str:
        """The float tensor in which a value is summed in place: the tensor itself, or scratch memory for one of half precision."""
        return self.scratch.get(buffer, buffer)

    def place_in_memory(self, node: ir.Node, at: dict[str, Text]) -> str:
        return self.element(self.held_in(self.lowering.in_place[node]), at)
