"""Operators bind as in Python: random expressions are compared with Python's own parser."""

import ast
import random

import pytest

from weft.dsl import tree
from weft.dsl.diagnostics import Source
from weft.dsl.syntax import read_tree

ARITHMETIC = ("+", "-", "*", "/", "//", "%", "**")
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
PYTHON = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.Lt: "<",
    ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.And: "and", ast.Or: "or", ast.USub: "-",
    ast.UAdd: "+", ast.Not: "not",
}  # fmt: skip


def written(draw: random.Random, depth: int) -> str:
    """A random expression with few brackets, so that precedence decides."""
    if depth == 0:
        return draw.choice(["a", "b", "1", "2.5", "f(a, b)", "g(a)"])
    inner = [written(draw, depth - 1) for _ in range(3)]
    match draw.randrange(8):
        case 0:
            return f"({inner[0]})"
        case 1:
            return f"-{inner[0]}"
        case 2:
            return f"not {inner[0]}"
        case 3:
            return f"{inner[0]} {draw.choice(['and', 'or'])} {inner[1]}"
        case 4:
            return f"{inner[0]} {draw.choice(COMPARISONS)} {inner[1]} {draw.choice(COMPARISONS)} {inner[2]}"
        case _:
            return f"{inner[0]} {draw.choice(ARITHMETIC)} {inner[1]}"


def parsed(text: str) -> tree.Expr:
    file = read_tree(Source("x", f"def m(a, b) = {text}\n"))
    return file.macros[0].body


def brackets(node: tree.Expr) -> str:
    """The expression with every bracket written."""
    match node:
        case tree.Number(text=text):
            return text
        case tree.Name(name=name):
            return name
        case tree.Unary(op=op, x=x):
            return f"({op} {brackets(x)})"
        case tree.Binary(op=op, left=left, right=right):
            return f"({brackets(left)} {op} {brackets(right)})"
        case tree.Compare(ops=ops, args=args):
            return f"({brackets(args[0])}{''.join(f' {op} {brackets(a)}' for op, a in zip(ops, args[1:], strict=True))})"
        case tree.Call(head=head, args=args):
            return f"{brackets(head)}({', '.join(map(brackets, args))})"
        case tree.Index():
            raise AssertionError("no brackets are written")


def python_brackets(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(op=op, operand=x):
            return f"({PYTHON[type(op)]} {python_brackets(x)})"
        case ast.BinOp(op=op, left=left, right=right):
            return f"({python_brackets(left)} {PYTHON[type(op)]} {python_brackets(right)})"
        case ast.BoolOp(op=op, values=values):
            text = python_brackets(values[0])
            for value in values[1:]:
                text = f"({text} {PYTHON[type(op)]} {python_brackets(value)})"
            return text
        case ast.Compare(left=left, ops=ops, comparators=others):
            pairs = zip(ops, others, strict=True)
            return f"({python_brackets(left)}{''.join(f' {PYTHON[type(op)]} {python_brackets(a)}' for op, a in pairs)})"
        case ast.Call(func=func, args=args):
            return f"{python_brackets(func)}({', '.join(map(python_brackets, args))})"
        case _:
            raise AssertionError(ast.dump(node))


@pytest.mark.parametrize("seed", range(8))
def test_precedence_is_that_of_python(seed: int) -> None:
    draw = random.Random(seed)
    compared = 0
    while compared < 60:
        text = written(draw, draw.randint(1, 4))
        try:
            expected = ast.parse(text, mode="eval").body
        except SyntaxError:  # `1 + not a`, which is no expression in either language
            continue
        assert brackets(parsed(text)) == python_brackets(expected), text
        compared += 1


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("-a**2", "(- (a ** 2))"),
        ("2**-a**b", "(2 ** (- (a ** b)))"),
        ("-a * b", "((- a) * b)"),
        ("a - b - 1", "((a - b) - 1)"),
        ("a / b * 2", "((a / b) * 2)"),
        ("not a == b", "(not (a == b))"),
        ("a or b and not a", "(a or (b and (not a)))"),
        ("0 <= a - b < 2", "(0 <= (a - b) < 2)"),
    ],
)
def test_precedence_examples(text: str, meaning: str) -> None:
    assert brackets(parsed(text)) == meaning
