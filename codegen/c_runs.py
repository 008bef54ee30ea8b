"""Runs of pieces as C loops: what is a variable of a loop and what needs a tile, and how folds begin, go on and end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, assert_never

from ..compiler import ir
from ..compiler.affine import affine
from ..compiler.plan import Index, Load
from .c_expressions import ORDER, PRIMARY, PRODUCT, SUM, UNARY, Text, wrap
from .c_lowering import Alias, Diagonal, Product, Step, TileLoad
from .c_pieces import (
    Copy,
    Define,
    Fill,
    Folded,
    Gather,
    Move,
    Nest,
    Piece,
    Scale,
    Spread,
    Write,
    all_reads,
    arrange,
    innermost,
    inside,
    writes,
)
from .c_scope import Scope
from .c_storage import PAD, Tile

Definition = Define | Gather | Folded | TileLoad | Product | Diagonal | Alias
"""What gives a value that is not carried."""

_STARTS = {"sum": "0", "any": "0", "prod": "1", "all": "1", "max": "-INFINITY", "highest": "-INFINITY", "min": "INFINITY", "argmax": "-1"}
_FUNCTIONS = {"max": "maximum", "min": "minimum", "highest": "highest"}
_SYMBOLS = {"sum": "+", "prod": "*", "any": "|", "all": "&"}
_TOTAL = {"sum": "total", "highest": "top", "max": "top", "min": "bottom", "argmax": "place"}


class Runs(Scope):
    """Prints runs. ``users`` says who reads each definition, ``definitions`` which one is in force."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.users: dict[Definition, list[Piece | Step]] = {}
        self.definitions: dict[ir.Node, Definition] = {}
        self.totals: dict[Folded, str] = {}
        self.lanes: dict[Folded, str] = {}
        """Folds whose elements join one of ``PAD`` partial sums, by the name of these."""
        self.lane = ""

    # Runs of pieces -------------------------------------------------------------------------------------------------

    def run(self, pieces: list[Piece]) -> None:
        items = arrange(pieces)
        for piece in pieces:
            if piece in self.users:
                self.definitions[writes(piece)[0]] = piece
        self.place(items)
        self.before_run(items)
        self.phase(n for p in pieces for n in writes(p))
        self.emit(items, ())

    def before_run(self, items: list[Piece | Nest]) -> None:
        """Called when it is known where the values of a run will be."""

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
            if isinstance(piece, Define) and piece.becomes is not None:
                self.values[node] = [self.carried(piece.becomes)]
            elif piece not in self.users:
                self.carried(node)
            elif not self.lowering.space(node) or all(u in paths and paths[u][: len(home)] == home for u in self.users[piece]):
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
            if not isinstance(value, list) or definition is None or node.kind != "real":
                continue
            if isinstance(definition, Define) and definition.becomes is not None:
                continue  # it is a carried value by now
            if value[0] not in self.tiles:
                continue  # it lies in memory
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
        ending = [p for p in ending if p not in self.totals and p not in self.lanes]
        vectors = {p for inner in innermost(nest) if self.by_lanes(inner) for p in inside(inner.items)}
        for fold in ending:
            self.start_total(fold, fold in vectors)
        if nest.innermost and any(p in self.lanes for p in members):
            self.loop_by_lanes(nest, fixed)
        else:
            self.loop(nest, members, fixed)
        for fold in ending:
            self.finish_total(fold)

    def loop(self, nest: Nest, members: list[Piece], fixed: tuple[str, ...]) -> None:
        if nest.innermost:
            self.simd(nest.axis, members, [p for p in members if isinstance(p, Folded) and p in self.totals and nest.axis in p.folded])
        relaxed = nest.innermost and all(
            isinstance(p, Define | Fill | Scale | Move | Copy) or (isinstance(p, Folded) and nest.axis not in p.folded) for p in members
        )
        relaxed = relaxed and not any(n in self.lowering.in_place for p in members for n in writes(p) + all_reads(p))
        variable = self.axis_names[nest.axis]
        first, end = self.span(nest.axis, relaxed) if nest.innermost else ("0", self.bound(nest.axis, relaxed))
        self.open(f"for (int {variable} = {first}; {variable} < {end}; {variable}++)")
        self.emit(nest.items, (*fixed, nest.axis))
        self.close()

    def by_lanes(self, nest: Nest) -> bool:
        """Whether an innermost loop can be cut into whole vectors, each lane with a sum of its own: what a compiler makes of a reduction
        adds the lanes one after the other."""
        members = inside(nest.items)
        folds = [p for p in members if isinstance(p, Folded) and nest.axis in p.folded]
        if any(f.op != "sum" or f.target.kind != "real" for f in folds) or any(isinstance(p, Spread) for p in members):
            return False
        bound = self.bound(nest.axis, False)
        return bound.isdigit() and int(bound) % PAD == 0

    def loop_by_lanes(self, nest: Nest, fixed: tuple[str, ...]) -> None:
        self.functions.add("UNROLL")
        variable, bound = self.axis_names[nest.axis], self.bound(nest.axis, False)
        first = self.names.new(f"{variable}_first")
        self.lane = f"{variable} - {first}"
        self.open(f"UNROLL for (int {first} = 0; {first} < {bound}; {first} += {PAD})")
        self.pragma("omp simd")
        self.open(f"for (int {variable} = {first}; {variable} < {first} + {PAD}; {variable}++)")
        self.emit(nest.items, (*fixed, nest.axis))
        self.close()
        self.close()

    def simd(self, axis: str, members: list[Piece], ending: list[Folded]) -> None:
        """The pragma that lets the innermost loop be vectorised, unless its order matters."""
        if any(isinstance(p, Folded) and p.op == "argmax" for p in members):
            return
        if any(isinstance(p, Spread) and not _steps_by_one(p.at, axis) for p in members):
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
            case Write(buffer=buffer, node=node, at=at):
                self.write(buffer, node, {axis: self.expressions.show(e) for axis, e in at})
            case Copy(local=local, node=node):
                self.put(f"{self.target(local)} = {self.show(node)};")
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

    def write(self, buffer: str, node: ir.Node, at: dict[str, Text]) -> None:
        dtype = self.dtypes[buffer]
        value = self.expressions.show(node)
        if dtype in ("float16", "bfloat16"):
            value = self.expressions.use(f"to_{dtype}", value)
        self.put(f"{self.element(buffer, at)} = {value.text};")

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

    def start_total(self, fold: Folded, by_lanes: bool) -> None:
        if by_lanes:
            self.functions.add("sum_of_lanes")
            self.lanes[fold] = self.names.new(f"{self.name_of(fold.target)}_lanes")
            self.put(f"float {self.lanes[fold]}[{PAD}] = {{0}};")
            return
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
        if fold in self.lanes:
            self.combine(f"{self.lanes[fold]}[{self.lane}]", fold.op, fold.target, x)
        elif fold.op == "argmax":
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
        if fold in self.lanes:
            self.total_known(fold, f"sum_of_lanes({self.lanes.pop(fold)})")
            return
        total = self.totals.pop(fold)
        if fold.op == "argmax" and fold.mode == "join":
            assert fold.best is not None
            self.keep_larger(f"{total}_value", total or "", self.target(fold.best), self.target(fold.target))
        else:
            self.total_known(fold, total)

    def total_known(self, fold: Folded, total: str) -> None:
        if fold.mode == "set":
            self.assign(fold.target, total)
        else:
            self.combine(self.target(fold.target), fold.op, fold.target, Text(total, PRIMARY), fold.rescale)

    def limits(self, load: Load, at: dict[str, Text]) -> list[str]:
        """Tests that an address lies inside the tensor."""
        checked = [(index, self.size(axis)) for axis, index in at.items() if axis in load.checked]
        return [f"{wrap(index, ORDER)} >= 0 && {wrap(index, ORDER)} < {size}" for index, size in checked]


def _steps_by_one(at: ir.Node, axis: str) -> bool:
    """Whether a position moves by one place, up or down, with every step along ``axis``: no two elements of a loop add to one place."""
    moving = [(atom, c) for atom, c in affine(at).terms.items() if axis in atom.axes]
    return len(moving) == 1 and isinstance(moving[0][0], Index) and abs(moving[0][1]) == 1
