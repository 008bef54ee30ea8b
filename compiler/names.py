"""Pass: every value of a plan gets a name that a person would give it, unique and safe in Python and C."""

from __future__ import annotations

import keyword
import re
from typing import TYPE_CHECKING

from . import ir
from .plan import (
    Accumulate,
    Advance,
    Assign,
    Begin,
    Compute,
    Contract,
    Fold,
    Index,
    Load,
    Local,
    Plan,
    Rename,
    Scatter,
    Store,
    inner_statements,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

WORDS = {
    "add": "sum_of", "sub": "difference", "mul": "product", "div": "quotient", "expdiff": "weights", "where": "kept", "and": "inside",
    "or": "either", "not": "outside", "lt": "before", "le": "upto", "gt": "after", "ge": "since", "eq": "same", "ne": "other",
    "exp": "exponential", "log": "logarithm", "max": "larger", "min": "smaller", "neg": "negative", "pow": "power", "abs": "size_of",
    "floordiv": "part", "mod": "rest", "clamp": "clamped",
}  # fmt: skip
RESERVED = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register restrict "
    "return short signed sizeof static struct switch typedef union unsigned void volatile while bool true false once "
    "tl triton torch math main NULL vf vi".split()
)


def name_nodes(plan: Plan, graph: ir.Graph) -> None:
    """Fill ``plan.names`` and ``plan.lines``."""
    taken: set[str] = set(plan.buffers)
    for kernel in plan.kernels:
        for s in inner_statements(kernel.body):
            for node in _made(s):
                if node in plan.names or isinstance(node, Index):
                    continue
                plan.names[node] = _unique(_word(node, graph, plan), taken, isinstance(node, ir.Input))
                span = graph.spans.get(node)
                if span is not None:
                    plan.lines[node] = span.line


def _made(s: object) -> Iterable[ir.Node]:
    match s:
        case Load(node=n) | Compute(node=n) | Contract(node=n) | Fold(node=n) | Rename(node=n):
            yield n
        case Begin(local=n) | Accumulate(local=n) | Scatter(local=n) | Assign(local=n):
            yield n
        case Advance(local=n, rescale=r):
            yield n
            yield r
        case Store(node=n):
            if isinstance(n, Local):
                yield n
        case _:
            return


def _word(node: ir.Node, graph: ir.Graph, plan: Plan) -> str:
    if node in graph.names:
        return graph.names[node]
    match node:
        case ir.Input(name=name) | Local(name=name):
            return name
        case ir.Read(x=ir.Input(name=name)):
            return f"{name}_at"
        case ir.Pointwise(op="add", args=(Index(axis=axis), _)):
            return f"pos_{axis}"
        case ir.Pointwise(op="where", args=(_, x, ir.Const())) if x in plan.names:
            return f"masked_{plan.names[x]}"
        case ir.Pointwise(op="lt", args=(Index(axis=axis), ir.Size())):
            return f"{axis}_exists"
        case ir.Pointwise(op=op):
            return WORDS.get(op, op)
        case ir.Reduce(op="sum"):
            inner = [n.name for n in ir.topological([node.x]) if isinstance(n, ir.Input)]
            return "_".join([*inner[:2], "dot"]) if len(inner) >= 2 else "total"
        case ir.Reduce(op=op):
            return f"{op}_of"
        case _:
            return "value"


def _unique(word: str, taken: set[str], is_input: bool) -> str:
    word = re.sub(r"[^A-Za-z0-9_]", "_", word)
    if keyword.iskeyword(word) or word in RESERVED or word.startswith("_"):
        word = f"w_{word.lstrip('_')}"
    if is_input and word in taken:
        word = f"{word}_tile"
    name, count = word, 1
    while name in taken:
        count += 1
        name = f"{word}_{count}"
    taken.add(name)
    return name
