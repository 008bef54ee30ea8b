"""No text, however hostile, gets anything but a SpecError out of the parser, and none takes long."""

import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft import dsl
from weft.dsl import diagnostics as d
from weft.dsl import expand, guard

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.weft"))
HEAD = "kernel f(x[t]) -> y[t]:\n    y = "
FULL = 12_000


def kernel(lines: list[str]) -> str:
    return "kernel f(x[t]) -> y[t]:\n" + "".join(f"    {line}\n" for line in lines)


def doubling(depth: int) -> str:
    """Macros that double what they are given, one through the next."""
    macros = "".join(f"def f{n}(x) = f{n + 1}(x) + f{n + 1}(x)\n" for n in range(depth))
    return f"{macros}def f{depth}(x) = x\n{HEAD}f0(x)\n"


def discarding(depth: int) -> str:
    """Macros that do the work of doubling and throw the result away."""
    macros = "".join(f"def f{n}(x) = first(x, f{n + 1}(x) + f{n + 1}(x))\n" for n in range(depth))
    return f"def first(a, b) = a\n{macros}def f{depth}(x) = x\n{HEAD}f0(x)\n"


HOSTILE = {
    "a sum of 5000 terms": (HEAD + "+".join(["x"] * 5000), d.NestedTooDeep),
    "a line full of a sum": (HEAD + "x+" * (FULL // 2) + "x", d.NestedTooDeep),
    "a line full of powers": (HEAD + "x**" * (FULL // 3) + "x", d.NestedTooDeep),
    "a line full of signs": (HEAD + "-" * FULL + "x", d.NestedTooDeep),
    "a line full of not": (HEAD + "not " * (FULL // 4) + "x", d.NestedTooDeep),
    "a line full of comparisons": (HEAD + "x<" * (FULL // 2) + "x", d.NestedTooDeep),
    "a line full of arguments": (HEAD + "max(" + "x," * (FULL // 2) + "x)", d.NestedTooDeep),
    "a line full of reads": (HEAD + "x" + "[t->0]" * (FULL // 6), d.NestedTooDeep),
    "a line full of calls": (HEAD + "x" + "()" * (FULL // 2), d.NestedTooDeep),
    "a line full of positions": (HEAD + "x[" + "t->0," * (FULL // 5) + "]", d.AxisTwice),
    "open brackets": (HEAD + "(" * FULL, d.NestedTooDeep),
    "closed brackets": (HEAD + "(" * 101 + "x" + ")" * 101, d.NestedTooDeep),
    "a deep composition": (HEAD + "exp(" * 101 + "x" + ")" * 101, d.NestedTooDeep),
    "too much text": ("#" * (guard.MAX_CHARACTERS + 1), d.TextTooLong),
    "a long name": (HEAD + "x" * FULL, d.NameTooLong),
    "a long number": (HEAD + "9" * FULL, d.BadNumber),
    "a long fraction": (HEAD + "9" * FULL + ".5", d.BadNumber),
    "a long exponent": (HEAD + "1e" + "9" * FULL, d.BadNumber),
    "many statements": (kernel([f"y{n} = x" for n in range(3000)]), d.TooMany),
    "many masks": (kernel(["mask t < 1"] * 100), d.TooMany),
    "many inputs": ("kernel f(" + ",".join(f"x{n}[t]" for n in range(3000)) + ") -> y[t]:\n    y = x0\n", d.TooMany),
    "many dimensions": ("kernel f(x[" + "t," * 3000 + "]) -> y[t]:\n    y = x\n", d.TooMany),
    "many kernels": ("".join(f"kernel f{n}(x[t]) -> y[t]:\n    y = x\n" for n in range(1000)), d.TooMany),
    "many macros": ("".join(f"def f{n}(x) = x\n" for n in range(3000)), d.TooMany),
    "many mistakes": (kernel([f"y{n} = max({','.join(['oops'] * 40)})" for n in range(200)]), d.SpecErrors),
    "doubling macros": (doubling(60), d.TooManyNodes),
    "doubling macros that discard": (discarding(60), d.TooManyNodes),
    "doubling arguments": (f"def d(x) = x + x\n{HEAD}{'d(' * 60}x{')' * 60}\n", d.TooManyNodes),
    "a macro in itself": (f"def d(x) = d(x)\n{HEAD}d(x)\n", d.MacroRecursion),
    "a macro given to itself": (f"def d(g, x) = g(g, x)\n{HEAD}d(d, x)\n", d.NotAFunction),
    "a null byte": (HEAD + "x\0", d.StrangeCharacter),
    "a null byte in a comment": ("# \0\n" + HEAD + "x", d.StrangeCharacter),
    "an escape sequence in a comment": ("# \x1b[31m\n" + HEAD + "x", d.StrangeCharacter),
    "reversed text in a docstring": ('"""\u202e"""\n' + HEAD + "x", d.StrangeCharacter),
    "half of a character": (HEAD + "\ud800", d.StrangeCharacter),
    "a line separator": ("kernel f(x[t]) -> y[t]:\u2028    y = x", d.StrangeCharacter),
    "a carriage return": ("kernel f(x[t]) -> y[t]:\r    y = x", d.StrangeCharacter),
    "a form feed": ("\f" + HEAD + "x", d.StrangeCharacter),
    "a letter that looks Latin": (HEAD + "\u0445", d.StrangeCharacter),
    "quotes only": ('"' * 5, d.UnclosedDocstring),
    "a continued line": (HEAD + "x + \\\n    x", d.ForeignOperator),
    "a decorator": ("@x\n" + HEAD + "x", d.ForeignOperator),
    "only a colon": (":", d.UnexpectedText),
}


@pytest.mark.parametrize(("text", "mistake"), [pytest.param(*case, id=title) for title, case in HOSTILE.items()])
def test_hostile_text(text: str, mistake: type[d.SpecError]) -> None:
    start = time.perf_counter()
    with pytest.raises(mistake) as caught:
        dsl.parse(text)
    message = str(caught.value)
    assert message.isprintable() or all(line.isprintable() for line in message.split("\n"))
    assert len(message) < 10_000
    assert time.perf_counter() - start < 20


def test_what_is_just_allowed_is_parsed() -> None:
    for text in (
        HEAD + "+".join(["x"] * 99),
        HEAD + "exp(" * 99 + "x" + ")" * 99,
        HEAD + "(" * 99 + "x" + ")" * 99,
        HEAD + "x" + "[t -> t - 1]" * 98,
        kernel([*["mask t > 0"] * 60, "y = x"]),
        kernel(["state S[] along t", "z = S" + "[t -> t - 1]" * 97, "S <- x", "y = z"]),
    ):
        (made,) = dsl.parse(text).kernels
        assert made.body


def test_deep_specs_leave_room_on_the_stack() -> None:
    """A caller that is itself deep in the stack can still parse the deepest spec."""

    def at_depth(n: int) -> dsl.Spec:
        return at_depth(n - 1) if n else dsl.parse(HEAD + "exp(" * 99 + "x" + ")" * 99)

    assert at_depth(sys.getrecursionlimit() // 4).kernels


def test_unusual_text_that_is_fine() -> None:
    text = '\ufeff"""Élan: ∑ softmax 🎉"""\n\n# ∂o/∂q\nkernel class(lambda[t]) -> y[t]:  # naïve\n    int = lambda\n    y = int\n'
    spec = dsl.parse(text.replace("\n", "\r\n"))
    assert spec.doc == "Élan: ∑ softmax 🎉"
    assert [k.name for k in spec.kernels] == ["class"]
    assert spec.kernels[0].inputs[0].name == "lambda"


def mutations(seed: int, count: int) -> Iterator[str]:
    """Specs with tokens deleted, inserted, replaced and swapped."""
    draw = random.Random(seed)
    texts = [re.findall(r"\w+|\s+|[^\w\s]+", path.read_text(encoding="utf-8")) for path in SPECS]
    pool = [token for text in texts for token in text]
    for _ in range(count):
        tokens = list(draw.choice(texts))
        for _ in range(draw.randint(1, 4)):
            at, other = draw.randrange(len(tokens)), draw.randrange(len(tokens))
            match draw.randrange(5):
                case 0:
                    tokens[at] = ""
                case 1:
                    tokens.insert(at, draw.choice(pool))
                case 2:
                    tokens[at] = draw.choice(pool)
                case 3:
                    tokens[at], tokens[other] = tokens[other], tokens[at]
                case _:
                    tokens[at] = chr(draw.randrange(32, 0x3000))
        yield "".join(tokens)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_specs_parse_or_raise_a_spec_error(seed: int) -> None:
    failed = 0
    for text in mutations(seed, 150):
        try:
            dsl.lint(dsl.parse(text))
        except dsl.SpecError as error:
            failed += 1
            assert str(error)
            assert "_NEWLINE" not in str(error)
            assert "__ANON" not in str(error)
    assert failed > 50


def test_expansion_limit_is_reached_by_the_whole_kernel() -> None:
    lines = [f"y{n} = d(d(d(x)))" for n in range(60)]
    with pytest.raises(d.SpecError) as caught:
        dsl.parse("def d(x) = x * x * x * x * x * x * x * x\n" + kernel(lines))
    assert all(isinstance(e, d.TooManyNodes | d.OutputUndefined) for e in caught.value.errors)
    assert str(expand.MAX_NODES) in str(caught.value)
