"""One kernel of a plan as a C function: the loops over programs, the sweeps, tile loads and matrix products of one program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

from ..compiler import ir
from ..compiler.plan import ONCE, ROUTE, Begin, Buffer, Load, Local, Loop, Statement, Store, inner_statements
from .c_expressions import ORDER, PRIMARY, PRODUCT, SUM, Text, wrap
from .c_library import template
from .c_lowering import Alias, Clear, Diagonal, Product, Run, Step, Sweep, TileLoad
from .c_pieces import Define, Folded, Gather, Piece, all_reads, writes
from .c_runs import Definition, Runs
from .c_storage import PAD, Tile, padded
from .source import Entry

STACK_BYTES = 1 << 20
"""Tiles of a program that need more than this go to the heap."""

_CTYPES = {
    "float32": "float", "float16": "_Float16", "bfloat16": "uint16_t", "int32": "int32_t", "int64": "int64_t", "bool": "uint8_t",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shared:
    """``text`` of the function ``name``, in which several threads go through a program together (``c_shared.py``): ``members`` at most.
    ``programs``: how many programs there are, in C. ``functions``: what it uses."""

    text: str
    name: str
    members: int
    programs: str
    functions: set[str]


class KernelPrinter(Runs):
    """Prints one kernel: ``render`` gives its text, after which ``entry`` says how to call it."""

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
                case Diagonal():
                    self.diagonal(step)
                case Alias():
                    self.alias(step)
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
                    reads(self.lowering.values_in(*load.reads), step)
                    defines(load.node, step)
                case Product(target=target, left=left, right=right):
                    reads((left, right), step)
                    if target in self.lowering.defined:
                        defines(target, step)
                case Diagonal(node=node, reads=read):
                    reads(read, step)
                    defines(node, step)
                case Alias(rename=rename):
                    reads(self.lowering.values_in(rename.x), step)
                    defines(rename.node, step)
                case Clear():
                    pass
                case Sweep(loop=loop, steps=inner):
                    reads(self.lowering.values_in(loop.start, loop.stop), step)
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

    def enter_tile(self, axis: str, body: tuple[Statement, ...], stop: Text | None = None) -> None:
        """Names for the tile of an axis, inside the loop over its tiles. ``stop``: where the axis ends, if not at its extent."""
        block = self.kernel.tiled[axis]
        start = self.starts[axis]
        if stop is None and self.is_exact(axis, body):
            self.counts[axis] = str(block)
            return
        if axis not in self.count_names:
            self.count_names[axis] = self.names.new(f"{self.axis_names[axis]}_count")
        self.counts[axis] = self.count_names[axis]
        left = f"{self.size(axis) if stop is None else wrap(stop, SUM + 1)} - {start}"
        self.put(f"const int {self.counts[axis]} = {left} < {block} ? {left} : {block};")

    def start_name(self, axis: str) -> str:
        """The variable that holds the first index of the tile of an axis, from here to the end of the loop over its tiles."""
        if axis not in self.start_names:
            self.start_names[axis] = self.names.new(f"{self.axis_names[axis]}_start")
        self.starts[axis] = self.start_names[axis]
        return self.starts[axis]

    def sweep(self, loop: Loop, steps: list[Step]) -> None:
        self.phase(())
        if loop.note:
            self.put(f"// {loop.note}")
        match loop:
            case Loop(axis=axis, stop=ir.Pointwise(args=(condition, *_))) if axis == ONCE:
                self.open(f"if ({self.show(condition)})")
                self.inner_steps(steps)
                return
        start, stop = self.expressions.show(loop.start), self.limit(loop)
        if loop.block is None:
            variable = self.axis_names[loop.axis]
            if loop.reverse:
                self.open(f"for (int {variable} = {stop.text} - 1; {variable} >= {wrap(start, ORDER + 1)}; {variable}--)")
            else:
                self.open(f"for (int {variable} = {start.text}; {variable} < {wrap(stop, ORDER + 1)}; {variable}++)")
        else:
            first = start.text if loop.exact or start.text == "0" else f"{wrap(start, PRODUCT)} / {loop.block} * {loop.block}"
            variable = self.start_name(loop.axis)
            self.open(f"for (int {variable} = {first}; {variable} < {wrap(stop, ORDER + 1)}; {variable} += {loop.block})")
            self.enter_tile(loop.axis, loop.body, stop if loop.exact else None)
        self.inner_steps(steps)
        if loop.block is not None:
            del self.starts[loop.axis], self.counts[loop.axis]

    def inner_steps(self, steps: list[Step]) -> None:
        """The steps of a loop. A tile that was made before it is needed again in the next round: none takes its place."""
        comment, outside = self.last_comment, self.definitions
        self.definitions = {}
        self.steps(steps)
        self.last_comment, self.definitions = comment, outside
        self.close()

    def limit(self, loop: Loop) -> Text:
        """Where a loop stops: worked out before it begins."""
        stop = self.expressions.show(loop.stop)
        if stop.binds == PRIMARY and "(" not in stop.text:
            return stop
        name = self.names.new(f"{self.axis_names[loop.axis]}_stop")
        self.put(f"const int {name} = {stop.text};")
        return Text(name, PRIMARY)

    def clear(self, begin: Begin) -> None:
        """Zero the part of a tensor that this program owns."""
        assert begin.buffer is not None
        buffer = self.plan.buffers[begin.buffer]
        self.phase(())
        if self.dtypes[buffer.name] != "float32":
            self.make_scratch(buffer)
        held = self.held_in(buffer.name)
        self.over_owned(buffer, "{} = 0.0f;", (held,))

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
            self.over_owned(self.plan.buffers[buffer], f"{{}} = {store}({{}});", (buffer, held))
            self.put(f"free({held});")

    def over_owned(self, buffer: Buffer, statement: str, tensors: tuple[str, ...]) -> None:
        """A statement about an element of each of ``tensors``, for all that a program owns of a tensor."""
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
        self.put(statement.format(*(self.element(tensor, {}) for tensor in tensors)))
        self.starts = hidden
        for _ in axes:
            self.close()

    # Tile loads and products ----------------------------------------------------------------------------------------

    def tile_orders(self, step: TileLoad) -> list[tuple[str, ...]]:
        """The layouts in which a loaded tile is wanted: as the right factor of a product its columns lie side by side."""
        node, users = step.load.node, self.users[step]
        asked = [self.right_order(p) for p in users if isinstance(p, Product) and p.right is node]
        plain = not asked or any(not isinstance(user, Product) for user in users)
        return list(dict.fromkeys([*asked, *([self.lowering.space(node)] if plain else [])]))

    def tile_load(self, step: TileLoad) -> None:
        load = step.load
        self.phase((load.node,))
        at = {axis: self.expressions.show(node) for axis, node in load.at}
        lies = self.tile_in_memory(step, at)
        if lies is not None:
            self.values[load.node] = [lies]
            return
        tiles = []
        for order in self.tile_orders(step):
            suffix = "" if order == self.lowering.space(load.node) else "_t"
            tiles.append(self.kept_tile(load.node, order, suffix))
            self.copy_tile(load.buffer, tiles[-1], at, self.limits(load, at), load.where)
        self.values[load.node] = tiles

    def tile_in_memory(self, step: TileLoad, at: dict[str, Text]) -> Tile | None:
        """A tile that lies in float memory of ours as it would lie in a copy: rows of whole vectors, one after the other."""
        load = step.load
        buffer, space = self.plan.buffers[load.buffer], self.lowering.space(load.node)
        if buffer.role != "temporary" or self.dtypes[load.buffer] != "float32" or len(space) < 2 or self.limits(load, at):
            return None
        whole = all(a in self.kernel.whole and self.extents[a] % PAD == 0 for a in space)
        if not whole or buffer.axes[len(buffer.axes) - len(space) :] != space or self.tile_orders(step) != [space]:
            return None
        tile = Tile(self.names.new(self.name_of(load.node)), space, tuple(self.extents[a] for a in space), "float", load.buffer)
        base = self.address(load.buffer, at, space).text
        self.put(f"{tile.pointer} = {tile.cast}({self.buffer(load.buffer)} + {base});")
        return tile

    def copy_tile(self, buffer: str, tile: Tile, at: dict[str, Text], limits: list[str], where: ir.Node | None = None) -> None:
        function = f"load_{self.dtypes[buffer]}"
        self.functions.add(function)
        base = self.address(buffer, at, tile.axes).text
        source = self.buffer(buffer) + ("" if base == "0" else f" + {base}")
        target = tile.first
        outer = tile.axes[:-2]
        strides = [self.stride(buffer, a) for a in tile.axes]
        if where is not None and len(tile.axes) == 2 and tile.axes[0] in where.axes:
            self.copy_rows(function, tile, source, strides, where)
            return
        across = where if len(tile.axes) == 2 and strides[1] != "1" else None
        if across is not None:
            self.open(f"if ({strides[1]} != 1)")
            self.copy_columns(buffer, tile, source, strides, across)
            self.close()
            self.open("else")
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
        first, end = self.span(column)
        columns, kept = end, str(tile.dims[-1])
        place, pitch = self.part_of(tile, tile.dims[-1])
        if first != "0":
            target, source = f"{target} + {place}", f"{source} + {first} * {self.stride(buffer, column)}"
            columns = kept = f"{end} - {first}"
        self.put(
            f"{function}({target}, {tile_rows}, {kept}, {pitch}, {source}, {row_stride}, {self.stride(buffer, column)}, {rows}, {columns});"
        )
        if self.kernel.columns is not None and row is not None and not outer and not row.startswith(ROUTE) and not limits:
            shape = f"{rows}, {self.bound(column, False)}"
            self.ahead[tile.name] = f"next_tile({source}, sizeof *({source}), {row_stride}, {self.stride(buffer, column)}, {shape})"
        for _ in outer:
            self.close()
        if across is not None:
            self.close()

    def part_of(self, tile: Tile, pitch: int) -> tuple[str, str]:
        """Where this thread's columns of a tile begin, and how far it is from row to row."""
        return self.span(tile.axes[-1])[0], str(pitch)

    def copy_columns(self, buffer: str, tile: Tile, source: str, strides: list[str], where: ir.Node) -> None:
        """The columns of a tile that are wanted, one by one, where each lies together; the others are 0."""
        row, column = tile.axes
        function = f"load_column_{self.dtypes[buffer]}"
        self.functions.add(function)
        variable = self.axis_names[column]
        self.put(f"memset({tile.name}, 0, sizeof {tile.name});")
        self.open(f"for (int {variable} = 0; {variable} < {self.bound(column, False)}; {variable}++)")
        self.open(f"if ({self.expressions.show(where).text})")
        start = f"{source} + {variable} * {strides[1]}"
        self.put(f"{function}({tile.name}[0] + {variable}, {tile.dims[1]}, {start}, {strides[0]}, {self.bound(row, False)});")
        self.close()
        self.close()

    def copy_rows(self, function: str, tile: Tile, source: str, strides: list[str], where: ir.Node) -> None:
        """The rows of a tile that are wanted, one by one; the others are 0."""
        row, column = tile.axes
        variable, count = self.axis_names[row], self.bound(row, False)
        self.open(f"for (int {variable} = 0; {variable} < {tile.dims[0]}; {variable}++)")
        wanted = wrap(self.expressions.show(where), ORDER)
        self.put(
            f"{function}({tile.name}[{variable}], 1, {tile.dims[1]}, {tile.dims[1]}, {source} + {variable} * {strides[0]}, "
            f"0, {strides[1]}, {variable} < {count} && {wanted} ? 1 : 0, {self.bound(column, False)});"
        )
        self.close()

    def diagonal(self, step: Diagonal) -> None:
        """A value for every distance: the column stands at the end of its tile, and the row goes on beyond the end of its own."""
        self.phase((step.node,))
        column, row = self.lowering.space(step.node)
        last, count = self.tile_extent(column) - 1, self.tile_extent(column) + self.tile_extent(row) - 1
        if step.node not in self.diagonals:
            tile = Tile(self.names.new(self.name_of(step.node)), ("",), (padded(count),), self.expressions.ctype(step.node))
            self.diagonals[step.node] = tile
            self.tiles.append(tile)
        name, usual, values = self.diagonals[step.node].name, dict(self.axis_names), dict(self.values)
        for node in step.closure:
            self.values.pop(node, None)
        along = self.names.new("along")
        self.axis_names |= {row: along, column: str(last)}
        self.values |= {n: Text(f"{tile.name}[{along}]", PRIMARY) for n, tile in self.diagonals.items() if n is not step.node}
        self.pragma("omp simd")
        self.open(f"for (int {along} = 0; {along} < {count}; {along}++)")
        for node in step.closure:
            made = self.lowering.diagonals.made[node]
            if isinstance(made, Load):
                text = self.gathered(replace(made, checked=tuple(axis for axis, _ in made.at))).text
            else:
                text = self.show(node)
            if node is step.node:
                self.put(f"{name}[{along}] = {text};")
            elif isinstance(made, Load) or not self.lowering.is_index_only(node):
                self.values[node] = Text(self.names.new(self.name_of(node)), PRIMARY)
                self.put(f"const {self.expressions.ctype(node)} {self.show(node)} = {text};")
        self.close()
        self.axis_names, self.values = usual, values
        self.values[step.node] = Text(f"{name}[{usual[row]} - {usual[column]} + {last}]", PRIMARY)

    def alias(self, step: Alias) -> None:
        """The elements of a tile, by other names of its axes."""
        rename = step.rename
        self.phase((rename.node,))
        source = self.pick(self.tiles_of(rename.x))
        target = self.kept_tile(rename.node, self.lowering.space(rename.node), "")
        self.values[rename.node] = [target]
        new = dict(rename.renamed)
        variables = {a: self.axis_names[new.get(a, a)] for a in source.axes}
        for axis in target.axes:
            variable = self.axis_names[axis]
            first, end = "0", self.bound(axis, False)
            if axis == target.axes[-1]:
                self.pragma("omp simd")
                first, end = self.span(axis)
            self.open(f"for (int {variable} = {first}; {variable} < {end}; {variable}++)")
        shorter = [(a, b) for a, b in rename.renamed if self.tile_extent(a) < self.tile_extent(b)]
        inside = " && ".join(f"{self.axis_names[b]} < {self.tile_extent(a)}" for a, b in shorter)
        element = source.element(variables).text
        self.put(f"{target.element(self.axis_names).text} = {f'{inside} ? {element} : 0.0f' if inside else element};")
        for _ in target.axes:
            self.close()

    def right_order(self, product: Product) -> tuple[str, ...]:
        """The layout of a right factor: its columns side by side, as they are anyway or as they are to be put."""
        natural = self.lowering.space(product.right)
        if natural[-1] == product.columns:
            return natural
        outer = (product.outer,) if product.outer is not None and product.outer in product.right.axes else ()
        return (*outer, product.depth, product.columns)

    def target_order(self, product: Product) -> tuple[str, ...]:
        """The layout of a result: its columns side by side."""
        natural = self.lowering.space(product.target)
        outer = product.outer
        return natural if outer is None or natural[-1] != outer else (outer, *(a for a in natural if a != outer))

    def product(self, product: Product) -> None:
        self.phase((product.target,))
        self.functions.add("product")
        right = self.operand(product.right, self.right_order(product))
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
            self.values[product.target] = [self.kept_tile(product.target, self.target_order(product), "")]
        memory = self.in_memory(product)
        staged = memory is None and product.target in self.lowering.in_place
        if memory is None:
            out = self.staging(product) if staged else self.carried(product.target)
            memory = f"{self.slice_of(out, product)}, {out.stride(product.rows) if product.rows else 0}"
        if staged:
            self.copy_in_place(product, out, back=False)
        if product.outer is not None:
            variable = self.axis_names[product.outer]
            self.open(f"for (int {variable} = 0; {variable} < {self.bound(product.outer, False)}; {variable}++)")
            factor, step = keep.split(", ")
            if product.summed and factor != "&unchanged":
                self.functions.add("unchanged")
                keep = f"{variable} > 0 ? &unchanged : {factor}, {step if step == '0' else f'{variable} > 0 ? 0 : {step}'}"
        ahead = self.ahead.pop(right.name, None)
        if ahead is not None:
            self.functions.update(("product_ahead", "next_tile"))
        call = "product(" if ahead is None else f"product_ahead({ahead}, "
        factor, columns = self.slice_of(right, product), self.bound(product.columns, False)
        first, end = self.span(product.columns)
        place, pitch = self.part_of(right, right.stride(product.depth))
        if first != "0":
            into, out_row = memory.rsplit(", ", 1)
            memory, factor, columns = f"{into} + {first}, {out_row}", f"{factor} + {place}", f"{end} - {first}"
        self.put(
            f"{call}{memory}, {keep}, {self.slice_of(left, product)}, {left_row}, {left.stride(product.depth)}, "
            f"{factor}, {pitch}, {rows}, {columns}, {self.bound(product.depth, False)});"
        )
        if product.outer is not None:
            self.close()
        if staged:
            self.copy_in_place(product, out, back=True)

    def slice_of(self, tile: Tile, product: Product) -> str:
        """The address of what a product takes of a tile, or puts there."""
        if product.outer is None or product.outer not in tile.axes:
            return tile.first
        return f"{tile.first} + {self.axis_names[product.outer]} * {tile.stride(product.outer)}"

    def in_memory(self, product: Product) -> str | None:
        """Address and row stride of a value kept in a tensor whose rows are whole vectors: the product adds to it there."""
        buffer = self.lowering.in_place.get(product.target)
        if buffer is None or product.rows is None or product.columns in self.kernel.tiled:
            return None
        held = self.held_in(buffer)
        if self.tile_extent(product.columns) % PAD != 0 or self.stride(held, product.columns) != "1":
            return None
        base = self.address(held, {}, self.lowering.space(product.target))
        outer = product.outer if product.outer in product.target.axes else None
        chosen = f" + {self.axis_names[outer]} * {self.stride(held, outer)}" if outer is not None else ""
        return f"{self.buffer(held)} + {base.text}{chosen}, {self.stride(held, product.rows)}"

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
        depth, columns = order[-2:]
        into, start = turned.first, source.first
        for axis in order[:-2]:
            variable = self.axis_names[axis]
            self.open(f"for (int {variable} = 0; {variable} < {self.bound(axis, False)}; {variable}++)")
            into, start = f"{into} + {variable} * {turned.stride(axis)}", f"{start} + {variable} * {source.stride(axis)}"
        shape = f"{source.dims[source.axes.index(columns)]}, {self.tile_extent(depth)}"
        strides = f"{source.stride(columns)}, {source.stride(depth)}"
        self.put(f"transpose({into}, {turned.stride(depth)}, {start}, {strides}, {shape});")
        for _ in order[:-2]:
            self.close()
        return turned

    # The whole kernel -----------------------------------------------------------------------------------------------

    def print_program(self) -> list[str]:
        """The program in its loops; the names of all that it needs are known then."""
        steps = self.lowering.steps(self.kernel.body)
        self.note_users(steps, {})
        return self.program(steps)

    def render(self, program: list[str], shared: Shared | None = None) -> str:
        """The C function, which leaves the work to ``shared`` where there is one program."""
        return template("kernel.c.jinja").render(
            shared=shared,
            static=False,
            more_arguments="",
            notes=[line for line in [self.kernel.note, *self.shape_of_work()] if line],
            name=self.kernel.name,
            arguments=self.arguments(),
            program=program,
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

    @property
    def entry(self) -> Entry:
        """How the kernel is called, known once it is printed."""
        return Entry(self.kernel.name, tuple(self.buffers), tuple(self.size_names), tuple(self.origin_names), tuple(self.param_names))
