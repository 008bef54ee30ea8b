"""A program that several threads go through together, each with its own part of the units: for recurrences with weights, when there is
one program only.

Tiles are shared. An innermost loop along an axis of units is cut into as many parts as there are threads, the same for every value along
it, so a thread mostly reads what it made itself. A product reads all of its left factor: before it, and before that is written again, the
threads wait for each other. However many there are, one or more, it is the same code: results do not depend on their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..compiler.plan import Loop, Store
from .c_expressions import Text
from .c_kernel import KernelPrinter, Shared
from .c_library import template
from .c_lowering import Alias, Diagonal, Product, Step, Sweep, TileLoad
from .c_pieces import Define, Folded, Gather, Nest, Piece, Spread, all_reads, innermost, inside, writes
from .c_storage import PAD, Tile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..compiler import ir
    from ..compiler.plan import Begin, Kernel

UNITS = 64
"""The fewest units that a thread gets."""

WORK = 100_000
"""Elements of weights, the fewest in a step that are worth it: with 192 units the two cores of a machine are 1.2 times as fast as one at an
LSTM (forward and backward), with 128 they are slower."""


class Unshareable(Exception):
    """What a program does cannot be shared out by units."""


class SharedPrinter(KernelPrinter):
    """Prints a kernel of one time loop as a program of several threads; raises ``Unshareable`` where it is none."""

    units: dict[str, int]
    """The axes that are shared out, with their extents."""

    def find_units(self) -> None:
        """Raises ``Unshareable`` where memory is summed in place, or read after it was written."""
        kernel = self.kernel
        stored = {s.buffer for s in self.lowering.statements if isinstance(s, Store)}
        if kernel.owner or kernel.columns is not None or self.lowering.in_place or any(s in stored for s in self.loaded()):
            raise Unshareable
        self.units = {a: e for a, e in self.extents.items() if a in kernel.whole and e >= 2 * UNITS and e % PAD == 0}
        self.written: set[str] = set()
        self.awaited: set[str] = set()
        """Tiles that were written, and tiles that threads read of which others made parts, since the threads last waited."""
        self.together: set[str] = set()
        """Tiles of which every thread has its columns by themselves: products, their only readers, go through less memory."""
        self.spans = {a: (self.names.new(f"{a}_first"), self.names.new(f"{a}_end")) for a in self.units}

    def loaded(self) -> list[str]:
        return [load.buffer for load in self.lowering.loads.values()]

    @property
    def members(self) -> int:
        """The most threads that have something to do."""
        return max(self.units.values(), default=0) // UNITS

    def span(self, axis: str, relaxed: bool = False) -> tuple[str, str]:
        return self.spans.get(axis) or super().span(axis, relaxed)

    # Who waits for whom ---------------------------------------------------------------------------------------------

    def before(self, read: set[str], written: set[str]) -> None:
        """What comes next reads parts of tiles that other threads made, and writes parts of its own."""
        if read & written:
            raise Unshareable
        if read & self.written or written & self.awaited:
            self.wait()
        self.awaited |= read
        self.written |= written

    def wait(self) -> None:
        if self.written or self.awaited:
            self.pragma("omp barrier")
        self.written, self.awaited = set(), set()

    def root(self, tile: Tile) -> str:
        """The memory of a tile, which may take the place of another one."""
        if not tile.axes or tile.axes[-1] not in self.units:
            raise Unshareable
        while tile.place_of:
            tile = next(t for t in self.tiles if t.name == tile.place_of)
        return tile.name

    # Steps ----------------------------------------------------------------------------------------------------------

    def before_run(self, items: list[Piece | Nest]) -> None:
        read: set[str] = set()
        written: set[str] = set()
        own: set[Piece] = set()
        for nest in (n for item in items if isinstance(item, Nest) for n in innermost(item)):
            if nest.axis not in self.units:
                continue
            for piece in inside(nest.items):
                if isinstance(piece, Spread) or (isinstance(piece, Folded) and nest.axis in piece.folded):
                    raise Unshareable
                own.add(piece)
                written |= {self.root(t) for n in writes(piece) for t in self.held(n)}
                read |= {self.root(t) for n in all_reads(piece) for t in self.held(n) if t.axes[-1:] != (nest.axis,)}
        for piece in inside(items):
            if piece not in own and not (isinstance(piece, Define | Gather) and isinstance(self.values[writes(piece)[0]], Text)):
                raise Unshareable
        self.before(read, written)

    def held(self, node: ir.Node) -> list[Tile]:
        """The tile of a value, if it is not a variable of a loop."""
        value = self.values.get(node)
        if value is None and not self.lowering.is_index_only(node):
            return [self.carried(node)]
        return [value[0]] if isinstance(value, list) else []

    def tile_load(self, step: TileLoad) -> None:
        if step.load.where is not None or any(order[-1] not in self.units for order in self.tile_orders(step)):
            raise Unshareable
        node = step.load.node
        if all(isinstance(user, Product) and user.right is node and user.left is not node for user in self.users[step]):
            orders = self.tile_orders(step)
            suffixes = ["" if order == self.lowering.space(node) else "_t" for order in orders]
            self.together |= {self.kept_tile(node, o, s).name for o, s in zip(orders, suffixes, strict=True) if len(o) == 2}
        super().tile_load(step)
        tiles = self.values[node]
        assert isinstance(tiles, list)
        roots = {self.root(t) for t in tiles}
        if roots & self.awaited:
            raise Unshareable
        self.written |= roots

    def part_of(self, tile: Tile, pitch: int) -> tuple[str, str]:
        first, end = self.span(tile.axes[-1])
        if tile.name in self.together:
            return f"{tile.dims[-2]} * {first}", f"{end} - {first}"
        return first, str(pitch)

    def alias(self, step: Alias) -> None:
        source = self.pick(self.tiles_of(step.rename.x))
        target = self.kept_tile(step.rename.node, self.lowering.space(step.rename.node), "")
        renamed = dict(step.rename.renamed)
        alike = all(self.extents[a] == self.extents[b] for a, b in renamed.items())
        if not alike or tuple(renamed.get(a, a) for a in source.axes) != target.axes:
            raise Unshareable
        self.root(source)
        self.before(set(), {self.root(target)})
        super().alias(step)

    def product(self, product: Product) -> None:
        left = self.pick(self.tiles_of(product.left))
        turned = all(t.axes != self.right_order(product) for t in self.tiles_of(product.right))
        if turned or product.outer is not None or product.rescale is not None or product.columns not in self.units:
            raise Unshareable
        if product in self.users:
            out = self.kept_tile(product.target, self.target_order(product), "")
        else:
            out = self.carried(product.target)
        self.before({self.root(left)}, {self.root(out)})
        super().product(product)

    def diagonal(self, step: Diagonal) -> None:
        raise Unshareable

    def clear(self, begin: Begin) -> None:
        raise Unshareable

    def sweep(self, loop: Loop, steps: list[Step]) -> None:
        if loop.block is not None:
            raise Unshareable
        self.wait()
        super().sweep(loop, steps)

    def inner_steps(self, steps: list[Step]) -> None:
        comment, outside = self.last_comment, self.definitions
        self.definitions = {}
        self.steps(steps)
        self.wait()
        self.last_comment, self.definitions = comment, outside
        self.close()

    # The whole function ---------------------------------------------------------------------------------------------

    def release_scratch(self) -> None:
        """The end of a program: the next one writes the same tiles."""
        self.wait()

    def around(self, loops: list[str]) -> list[str]:
        if any(not t.axes for t in self.tiles):
            raise Unshareable
        self.functions.add("first_of")
        pad = "    "
        return [
            *(pad + line for line in self.heap_tiles()),
            "",
            "#pragma omp parallel num_threads(members)",
            pad + "{",
            pad * 2 + "const int member = omp_get_thread_num(), team = omp_get_num_threads();",
            *(
                pad * 2 + f"const int {first} = first_of({extent}, member, team), {end} = first_of({extent}, member + 1, team);"
                for (first, end), extent in zip(self.spans.values(), self.units.values(), strict=True)
            ),
            *(pad * (n + 2) + line for n, line in enumerate(loops)),
            pad * (len(loops) + 1) + "{",
            *(pad + line if line and not line.startswith("#") else line for line in self.lines),
            pad * (len(loops) + 1) + "}",
            pad + "}",
            pad + "free(scratch);",
        ]

    def work(self, steps: list[Step]) -> int:
        """Elements of the factors that products go through in a step."""
        products = [p for p in steps if isinstance(p, Product) and p.columns in self.units]
        return sum(self.tile_extent(p.depth) * self.units[p.columns] for p in products)

    def shared_text(self, name: str) -> str:
        """The function, which takes the arguments of the kernel and the number of threads. Raises ``Unshareable``."""
        self.find_units()
        steps = self.lowering.steps(self.kernel.body)
        if max((self.work(s.steps) for s in steps if isinstance(s, Sweep)), default=0) < WORK:
            raise Unshareable
        self.note_users(steps, {})
        program = self.program(steps)
        return template("kernel.c.jinja").render(
            shared=None,
            notes=["The same by several threads, each with its part of the units."],
            static=True,
            name=name,
            more_arguments=", int members",
            arguments=self.arguments(),
            program=program,
        )


def may_be_shared(kernel: Kernel, extents: Mapping[str, int]) -> bool:
    """Whether there are steps, and enough units: cheap to ask."""
    return any(extents.get(a, 0) >= 2 * UNITS for a in kernel.whole) and any(isinstance(s, Loop) and s.block is None for s in kernel.body)


def share_out(printer: KernelPrinter, shared: SharedPrinter) -> Shared | None:
    """A kernel that has been printed, as a function for several threads, and when to call it; None where it cannot be shared out."""
    kernel = printer.kernel
    sizes, origins, params = printer.size_names, printer.origin_names, printer.param_names
    shared.size_names, shared.origin_names, shared.param_names = dict(sizes), dict(origins), dict(params)
    shared.names.taken |= {*sizes.values(), *origins.values(), *params.values()}
    name = f"{kernel.name}_shared"
    try:
        text = shared.shared_text(name)
    except Unshareable:
        return None
    if (shared.size_names, shared.origin_names, shared.param_names) != (sizes, origins, params):
        return None
    programs = [printer.size(a) for a in kernel.grid]
    if kernel.rows is not None:
        block = kernel.tiled[kernel.rows]
        programs.append(f"({printer.size(kernel.rows)} + {block - 1}) / {block}")
    return Shared(text, name, shared.members, " * ".join(programs) or "1", shared.functions)
