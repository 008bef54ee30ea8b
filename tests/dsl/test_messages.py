"""Every mistake has its own class and an exact message: the cases are in messages.txt, as text that can be read."""

from pathlib import Path

import pytest

from weft import dsl
from weft.dsl import diagnostics, syntax
from weft.dsl.build import parser

CASES = Path(__file__).with_name("messages.txt")

# These are raised by limits and by files; test_hostile.py and test_modules.py have them.
ELSEWHERE = {"TooMany", "TooManyNodes", "NestedTooDeep", "TextTooLong", "FileUnreadable", "UseCycle", "ModuleBroken"}


def cases() -> list[tuple[str, str, str]]:
    _, *blocks = CASES.read_text(encoding="utf-8").split("===== ")
    found = []
    for block in blocks:
        title, rest = block.split("\n", 1)
        text, message = rest.split("-----\n", 1)
        found.append((title, text, message.rstrip("\n")))
    return found


def failure(text: str) -> dsl.SpecError:
    with pytest.raises(dsl.SpecError) as caught:
        dsl.parse(text, "bad.weft")
    return caught.value


@pytest.mark.parametrize(("text", "message"), [pytest.param(t, m, id=title) for title, t, m in cases()])
def test_exact_message(text: str, message: str) -> None:
    assert str(failure(text)) == message


def test_titles_are_unique() -> None:
    titles = [title for title, _, _ in cases()]
    assert len(titles) >= 25
    assert len(set(titles)) == len(titles)


def test_every_class_has_a_case() -> None:
    raised = {type(e).__name__ for _, text, _ in cases() for e in failure(text).errors}
    classes = {c.__name__ for c in diagnostics.SpecError.__subclasses__()} - {"SpecErrors"}
    assert classes - raised == ELSEWHERE


def test_every_class_says_how_to_mend() -> None:
    for mistake in diagnostics.SpecError.__subclasses__():
        assert mistake is diagnostics.SpecErrors or (mistake.what != "{what}" and mistake.mend), mistake


def test_parser_internals_do_not_leak() -> None:
    for _, _, message in cases():
        assert not any(word in message for word in ("__", "ANON", "_NEWLINE", "_INDENT", "_DEDENT", "$END", "RPAR", "Token("))


def test_every_terminal_has_a_readable_name() -> None:
    terminals = {terminal.name for terminal in parser().terminals} - {"COMMENT", "BLANK"}
    assert terminals <= set(syntax.TERMINALS)
    assert not any("ANON" in name or name.startswith("__") for name in terminals)


def test_a_single_mistake_is_raised_as_itself() -> None:
    error = failure("kernel f(x[t]) -> y[t]:\n    y = xx\n")
    assert type(error) is diagnostics.UnknownName
    assert error.errors == (error,)
    assert (error.where, error.message) == ("bad.weft:2:9", "nothing here is called `xx`")


def test_several_mistakes_are_raised_together_in_order() -> None:
    error = failure("kernel f(x[t]) -> y[t]:\n    a = xx\n    b = yy[t]\n    y = x\nkernel g(x[t]) -> y[t]:\n    y = zz\n")
    assert isinstance(error, dsl.SpecErrors)
    assert [e.span.line for e in error.errors] == [2, 3, 6]


def test_a_broken_definition_is_reported_once() -> None:
    error = failure("kernel f(x[t]) -> y[t]:\n    a = sin(xx)\n    b = a + a\n    y = b\n")
    assert len(error.errors) == 1


def test_long_lists_of_mistakes_are_cut() -> None:
    lines = "".join(f"    y{n} = missing{n}\n" for n in range(50))
    message = str(failure(f"kernel f(x[t]) -> y[t]:\n{lines}    y = x\n"))
    assert message.count("nothing here is called") == diagnostics.SHOWN_ERRORS
    assert message.endswith("... and 30 more\n\n50 mistakes in bad.weft")


def test_the_caret_is_under_the_mistake_in_a_long_line() -> None:
    text = "kernel f(x[t]) -> y[t]:\n    y = " + "+ ".join(["x "] * 80) + "+ oops\n"
    head, line, caret, *_ = str(failure(text)).split("\n")
    assert head.startswith("bad.weft:2:")
    assert len(line) < 150
    assert line[caret.index("^") : caret.rindex("^") + 1] == "oops"


def test_the_caret_counts_wide_characters_as_two_columns() -> None:
    line, caret = diagnostics.excerpt(diagnostics.Source("x", "注 oops"), diagnostics.point(1, 3, 4)).split("\n")
    assert caret.index("^") == line.index("oops") + 1
