"""An equation graph as text: one equation a line, in an order that can be read from top to bottom.

Outputs, values that the spec names and values that are used more than once have a line of their own; everything else is
written where it is used.

    s[b, g, i, j, r] = sum[d](q * k) / sqrt(size(d))
    o[b, e, g, i, r] = sum[j where j <= i](where(j <= i, expdiff(s, l), 0.0) * v)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from . import ir
from .plan import Edge, Index, Local, Origin

INFIX = {
    "or": ("or", 1), "and": ("and", 2), "lt": ("<", 4), "le": ("<=", 4), "gt": (">", 4), "ge": (">=", 4), "eq": ("==", 4), "ne": ("!=", 4),
    "add": ("+", 5), "sub": ("-", 5), "mul": ("*", 6), "div": ("/", 6), "floordiv": ("//", 6), "mod": ("%", 6), "pow": ("**", 8),
}  # fmt: skip
ATOM = 9
LONGEST = 110
"""A longer expression gets a line of its own, so that no line grows without end."""


def show_graph(graph: ir.Graph) -> str:
    """A whole graph: its equations and its states."""
    writer = _Writer(graph.names)
    roots = list(graph.outputs.values())
    for state in graph.states.values():
        roots += [n for n in (state.init, state.where, *state.updates) if n is not None]
    writer.define(roots, graph.outputs)
    for state in graph.states.values():
        writer.state(state)
    return writer.finish(graph.outputs)


def show_outputs(outputs: Mapping[str, ir.Node], names: Mapping[ir.Node, str]) -> str:
    """The equations of some named nodes, such as derived gradients."""
    writer = _Writer(names)
    writer.define(list(outputs.values()), outputs)
    return writer.finish(outputs)


class _Writer:
    def __init__(self, names: Mapping[ir.Node, str]) -> None:
        self.given = names
        self.lines: list[str] = []
        self.written: dict[ir.Node, tuple[str, int]] = {}
        self.taken: set[str] = set()

    def define(self, roots: list[ir.Node], outputs: Mapping[str, ir.Node]) -> None:
        """Writes every line that the roots need, operands first."""
        nodes = list(ir.topological(roots))
        uses = Counter(c for n in nodes for c in dict.fromkeys(ir.children(n)))
        first_name = {node: name for name, node in reversed(list(outputs.items()))}
        self.taken |= set(outputs) | {n.name for n in nodes if isinstance(n, ir.Input)}
        for node in nodes:
            text, level = self._expression(node)
            name = first_name.get(node) or self.given.get(node)
            if ir.children(node) and (name is not None or uses[node] > 1 or len(text) > LONGEST):
                name = name if node in first_name else self._free(name)
                self.lines.append(f"{name}[{', '.join(node.axes)}] = {text}")
                text, level = str(name), ATOM
            self.written[node] = text, level

    def state(self, state: ir.State) -> None:
        """The lines of a state, as in a spec."""
        order = " reverse" if state.reverse else ""
        start = f" = {self._text(state.init)}" if state.init is not None else ""
        where = f" where {self._text(state.where)}" if state.where is not None else ""
        self.lines.append(f"state {state.name}[{', '.join(state.axes)}] along {' '.join(state.along)}{order}{start}{where}")
        self.lines += [f"{state.name}@{n + 1} <- {self._text(update)}" for n, update in enumerate(state.updates)]

    def finish(self, outputs: Mapping[str, ir.Node]) -> str:
        """All lines; outputs that are other values get theirs last."""
        for name, node in outputs.items():
            if self._text(node) != name:
                self.lines.append(f"{name} = {self._text(node)}")
        return "\n".join(self.lines) + "\n"

    def _free(self, name: str | None) -> str:
        """A name that no other line has: the given one, or the next number."""
        wanted, count = name or "t1", 1
        reserved = set() if name else set(self.given.values())
        while wanted in self.taken | reserved:
            count += 1
            wanted = f"{name}_{count}" if name else f"t{count}"
        self.taken.add(wanted)
        return wanted

    def _text(self, node: ir.Node) -> str:
        return self.written[node][0]

    def _operand(self, node: ir.Node, level: int) -> str:
        text, own = self.written[node]
        return text if own >= level else f"({text})"

    def _expression(self, node: ir.Node) -> tuple[str, int]:
        """The text of a node from those of its operands, and how tightly it binds."""
        match node:
            case ir.Input(name=name) | ir.Param(name=name) | Local(name=name):
                return name, ATOM
            case ir.Size(axis=axis):
                return f"size({axis})", ATOM
            case ir.Position(axis=axis) | Index(axis=axis):
                return axis, ATOM
            case Origin(axis=axis):
                return f"origin({axis})", ATOM
            case Edge(axis=axis, side=side):
                return f"{axis}.{side}", ATOM
            case ir.Const(value=value):
                return f"{value:.12g}" if isinstance(value, float) else str(value).lower(), ATOM
            case ir.Pointwise(op=op, args=args):
                return self._pointwise(op, args)
            case ir.Reduce(op=op, over=over, x=x, where=where):
                return f"{op}[{', '.join(over)}{self._where(where)}]({self._text(x)})", ATOM
            case ir.Scan(op=op, axis=axis, x=x, where=where, reverse=reverse, exclusive=exclusive):
                flags = (", reverse" if reverse else "") + (", exclusive" if exclusive else "")
                return f"{op}[{axis}{flags}{self._where(where)}]({self._text(x)})", ATOM
            case ir.Read(x=x, at=at):
                return f"{self._operand(x, ATOM)}[{', '.join(f'{a} -> {self._text(e)}' for a, e in at)}]", ATOM
            case ir.Select(over=over, x=x, k=k, where=where):
                return f"topk[{', '.join(over)}{self._where(where)}]({self._text(x)}, {self._text(k)})", ATOM
            case ir.StateValue(name=name, version=version):
                return f"{name}@{version}", ATOM
            case ir.Recurrence(body=body):
                return f"steps of {', '.join(c.name for c in body.states)} along {', '.join(body.along)}", 0
            case ir.Result(recurrence=recurrence, name=name):
                return f"{name} of {self._operand(recurrence, ATOM)}", 0
            case _:
                raise AssertionError(f"{type(node).__name__} is no node of an equation graph")

    def _pointwise(self, op: str, args: tuple[ir.Node, ...]) -> tuple[str, int]:
        match op, args:
            case "neg", (x,):
                return f"-{self._operand(x, 7)}", 7
            case "not", (x,):
                return f"not {self._operand(x, 3)}", 3
            case _ if op in INFIX:
                sign, level = INFIX[op]
                left, right = (level + 1, level) if op == "pow" else (level, level + 1)
                left += level == 4
                return f"{self._operand(args[0], left)} {sign} {self._operand(args[1], right)}", level
            case _:
                return f"{op}({', '.join(self._text(a) for a in args)})", ATOM

    def _where(self, where: ir.Node | None) -> str:
        return "" if where is None else f" where {self._text(where)}"
