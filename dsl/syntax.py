"""Text to syntax tree: guards, the parser, and the translation of its errors into the language's own words.

Lark is loaded at the first parse, so that importing this package stays cheap.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from . import diagnostics as d
from . import guard, names, tree
from .diagnostics import Source, SpecError, point
from .typed import Span

if TYPE_CHECKING:
    from lark import Token, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

TERMINALS = {
    "DOCSTRING": "a docstring", "NUMBER": "a number", "NAME": "a name", "USE": "`use`", "DEF": "`def`", "KERNEL": "`kernel`",
    "MASK": "`mask`", "AXIS": "`axis`", "STATE": "`state`", "ALONG": "`along`", "REVERSE": "`reverse`", "EXCLUSIVE": "`exclusive`",
    "PARAM": "`param`", "ASSUME": "`assume`", "SAMPLE": "`sample`", "WHERE": "`where`", "AND": "`and`", "OR": "`or`", "NOT": "`not`",
    "INF": "`inf`", "TRUE": "`true`", "FALSE": "`false`", "TITLE_TRUE": "`True`", "TITLE_FALSE": "`False`", "LPAR": "`(`",
    "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "COMMA": "`,`", "DOT": "`.`", "COLON": "`:`", "BLOCK_COLON": "`:`", "ASSIGN": "`=`",
    "UPDATE": "`<-`", "ARROW": "`->`", "LESS": "`<`", "LESS_EQUAL": "`<=`", "GREATER": "`>`", "GREATER_EQUAL": "`>=`",
    "EQUAL": "`==`", "NOT_EQUAL": "`!=`", "PLUS": "`+`", "MINUS": "`-`", "STAR": "`*`", "SLASH": "`/`", "DOUBLE_SLASH": "`//`",
    "PERCENT": "`%`", "POWER": "`**`", "_NEWLINE": "the end of the line", "_INDENT": "an indented block", "_DEDENT": "the end of the block",
    "$END": "the end of the file",
}  # fmt: skip
"""What a terminal of the grammar stands for in a message."""


class _Spanned(Protocol):
    @property
    def span(self) -> Span: ...


_EXPRESSION_START = frozenset(("NAME", "NUMBER", "LPAR", "MINUS"))
_OPERATORS = frozenset(
    "PLUS MINUS STAR SLASH DOUBLE_SLASH PERCENT POWER LESS LESS_EQUAL GREATER GREATER_EQUAL EQUAL NOT_EQUAL AND OR".split()
)
_NOISE = frozenset(("INF", "TRUE", "FALSE", "TITLE_TRUE", "TITLE_FALSE", "PLUS"))
_WORDS = {word.upper(): word for word in names.KEYWORDS if word.islower()} | {"TITLE_TRUE": "True", "TITLE_FALSE": "False"}

FOREIGN_STATEMENTS = {
    "for": "there are no loops: reduce along an axis (`sum[j](x)`), or carry a `state` along one",
    "while": "there are no loops: reduce along an axis (`sum[j](x)`), or carry a `state` along one",
    "if": "write `where(cond, a, b)`",
    "elif": "write `where(cond, a, b)`",
    "else": "write `where(cond, a, b)`",
    "return": "define the output: `o = ...`",
    "import": "write `use masks.causal`",
    "from": "write `use masks.causal`",
    "let": "write `name = expr`",
    "const": "write `name = expr`",
    "var": "write `name = expr`",
    "class": "a file holds `kernel`s and `def` macros",
    "lambda": "write a macro: `def f(x) = ...`",
    "input": "inputs are declared on the `kernel` line",
    "output": "outputs are declared on the `kernel` line",
}


def read_tree(source: Source) -> tree.File:
    """The syntax tree of ``source``. Raises ``SpecError`` for the first mistake of form."""
    guard.check_text(source)
    from lark import UnexpectedInput

    from .build import build

    try:
        file = build(source.text + "\n")
    except UnexpectedInput as error:
        raise translated(source, error) from None
    check_depth(source, file)
    check_counts(source, file)
    return file


def check_counts(source: Source, file: tree.File) -> None:
    """Bounds what later rooms pay for more than linearly."""
    split = "split the file: one variant a file"
    _at_most(source, 100, "kernels", file.kernels, split)
    _at_most(source, 1000, "macros", (*file.uses, *file.macros), split)
    for kernel in file.kernels:
        tensors = (*kernel.inputs, *kernel.outputs)
        _at_most(source, 200, "inputs and outputs", tensors, "join tensors along a new axis")
        for tensor in tensors:
            _at_most(source, 60, "dimensions", tensor.dims, "join axes before the call")
        _at_most(source, 1000, "statements", kernel.body, "split the kernel")
        masks = [s for s in kernel.body if isinstance(s, tree.Mask)]
        _at_most(source, 60, "masks", masks, "join conditions with `and`, or number them in an input")


def _at_most(source: Source, limit: int, things: str, found: Sequence[_Spanned], advice: str) -> None:
    if len(found) > limit:
        raise d.TooMany(source, found[limit].span, limit=limit, things=things, advice=advice)


def check_depth(source: Source, file: tree.File) -> None:
    """Bounds every expression's depth, so that later rooms may recurse. Iterative: chains may have thousands of terms."""
    roots: list[tree.Expr] = [macro.body for macro in file.macros]
    for kernel in file.kernels:
        roots += [t.default for t in (*kernel.inputs, *kernel.outputs) if t.default is not None]
        for statement in kernel.body:
            match statement:
                case tree.State(init=init):
                    roots += [] if init is None else [init]
                case tree.Param(default=default):
                    roots += [] if default is None else [default]
                case _:
                    roots.append(statement.expr)
    for root in roots:
        stack = [(root, 1)]
        while stack:
            node, depth = stack.pop()
            if depth > guard.MAX_DEPTH:
                raise d.NestedTooDeep(source, root.span, limit=guard.MAX_DEPTH)
            stack.extend((child, depth + 1) for child in tree.children(node))


def translated(source: Source, error: UnexpectedInput) -> SpecError:
    """The language's own error for one of Lark's."""
    from lark import UnexpectedCharacters, UnexpectedToken

    match error:
        case UnexpectedToken():
            return _Context(source, error).explain()
        case UnexpectedCharacters():
            return unexpected_character(source, error)
        case _:
            return d.UnexpectedText(source, point(max(error.line, 1), max(error.column, 1)), found="this", expected="something else")


def unexpected_character(source: Source, error: UnexpectedCharacters) -> SpecError:
    offset = error.pos_in_stream or 0
    operator = guard.foreign_operator(source.text, offset)
    if operator is None:
        found = f"`{source.text[offset : offset + 1]}`"
        return d.UnexpectedText(source, point(error.line, error.column), found=found, expected=listed(error.allowed or ()))
    return d.ForeignOperator(source, point(error.line, error.column, len(operator)), operator=operator, advice=guard.FOREIGN[operator])


def listed(terminals: set[str] | frozenset[str] | tuple[str, ...]) -> str:
    """What was expected, without what is always possible and with operators as one word."""
    expected = set(terminals)
    words: list[str] = []
    if expected >= _EXPRESSION_START:
        words.append("an expression")
        expected -= _EXPRESSION_START | _NOISE | {"WHERE", "NOT"}
    if expected & _OPERATORS - {"MINUS", "PLUS"}:
        words.append("an operator")
        expected -= _OPERATORS | {"LPAR", "LSQB"}
    if {"MASK", "AXIS", "STATE"} <= expected:
        words.append("a statement")
        expected -= {"MASK", "AXIS", "STATE", "PARAM", "ASSUME", "SAMPLE", "NAME"}
    words += sorted({TERMINALS.get(t, "something else") for t in expected - {"_DEDENT"}})
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else "the end of the file"


class _Context:
    """What surrounds an unexpected token."""

    def __init__(self, source: Source, error: UnexpectedToken) -> None:
        self.source = source
        self.token: Token = error.token
        self.accepts: set[str] = set(error.accepts or error.expected or ())
        line, column = self.token.line or 1, self.token.column or 1
        if self.token.type in ("_NEWLINE", "_INDENT", "_DEDENT", "$END"):
            line, column = self.end_of_line()
        self.line, self.column = line, column
        self.text = source.line(line)
        words = self.text.split()
        self.first = re.split(r"\W", words[0], maxsplit=1)[0] if words else ""

    def end_of_line(self) -> tuple[int, int]:
        """Just after the last code before an unexpected line end."""
        end = self.token.start_pos if self.token.type == "_NEWLINE" else None
        before = self.source.text[: end if end is not None else len(self.source.text)]
        lines = before.rstrip().split("\n")
        code = re.sub(r"#.*", "", lines[-1]).rstrip() if '"""' not in lines[-1] else lines[-1]
        return len(lines), len(code) + 1

    def span(self) -> Span:
        single = self.token.type not in ("_NEWLINE", "_INDENT", "_DEDENT", "$END") and "\n" not in self.token
        return point(self.line, self.column, max(len(self.token), 1) if single else 1)

    def error(self, kind: type[SpecError], /, **fields: object) -> SpecError:
        return kind(self.source, self.span(), **fields)

    def explain(self) -> SpecError:
        """The most telling class for the mistake."""
        for attempt in (self.blocks, self.statements, self.words, self.expressions):
            found = attempt()
            if found is not None:
                return found
        if self.token.type in ("_NEWLINE", "$END"):
            return self.error(d.UnfinishedLine, expected=listed(self.accepts))
        shown = TERMINALS.get(self.token.type, "this") if self.token.type.startswith("_") else f"`{str(self.token)[:40]}`"
        return self.error(d.UnexpectedText, found=shown, expected=listed(self.accepts))

    def blocks(self) -> SpecError | None:
        """Mistakes around a kernel's first line and its block."""
        kind = self.token.type
        if "_INDENT" in self.accepts:
            return self.error(d.MissingBlock)
        if kind == "_NEWLINE" and "BLOCK_COLON" in self.accepts:
            inline = re.search(r"\]\s*:\s*\w+\s*=", self.text)
            return self.error(d.StatementOnKernelLine) if inline else self.error(d.MissingColon)
        if self.first == "kernel" and "ARROW" in self.accepts:
            return self.error(d.MissingArrow)
        if self.first == "def" and "ASSIGN" in self.accepts:
            return self.error(d.MacroShape)
        if kind == "_DEDENT" or (kind in ("KERNEL", "USE", "DEF", "$END") and "MASK" in self.accepts):
            return self.error(d.MissingBlock)
        if "USE" in self.accepts and kind in ("NAME", "MASK", "AXIS", "STATE", "PARAM", "ASSUME", "SAMPLE"):
            return self.foreign_statement() or self.misspelt_top() or self.error(d.StatementOutsideKernel)
        if self.first == "use" and kind == "_NEWLINE" and "DOT" in self.accepts:
            return self.error(d.UseShape)
        return None

    def foreign_statement(self) -> SpecError | None:
        advice = FOREIGN_STATEMENTS.get(self.first)
        if advice is None:
            return None
        column = self.text.index(self.first) + 1
        return d.ForeignStatement(self.source, point(self.line, column, len(self.first)), word=self.first, advice=advice)

    def misspelt_top(self) -> SpecError | None:
        hint = names.closest(self.first, names.TOP_LEVEL)
        if not hint or not re.match(r"\w+\s+\w+\s*[(.]", self.text):
            return None
        return d.UnknownTopLevel(self.source, point(self.line, 1, len(self.first)), hint=hint)

    def statements(self) -> SpecError | None:
        """A line that starts as no statement does."""
        if self.first in names.KEYWORDS or self.token.type not in ("NAME", "NUMBER", "COLON", "BLOCK_COLON", "LPAR", "INF", "_NEWLINE"):
            return None
        if self.accepts & {"ASSIGN", "UPDATE"} and "LSQB" not in self.accepts:
            column = len(self.text) - len(self.text.lstrip()) + 1
            hint = names.closest(self.first, names.STATEMENTS)
            where = point(self.line, column, max(len(self.first), 1))
            return self.foreign_statement() or d.UnknownStatement(self.source, where, hint=hint)
        return self.foreign_statement() if self.token.type == "BLOCK_COLON" else None

    def words(self) -> SpecError | None:
        """Words of the language, or of other languages, where a name or an operator is expected."""
        word = _WORDS.get(self.token.type)
        if word is not None and "NAME" in self.accepts:
            return self.error(d.ReservedWord, name=word)
        if word is not None and self.accepts & {"ASSIGN", "UPDATE"}:
            return self.error(d.ReservedWord, name=word)
        if self.token.type in ("ASSIGN", "UPDATE", "LSQB") and self.first in names.KEYWORDS:
            column = self.text.index(self.first) + 1
            if self.text[: self.column - 1].strip() == self.first:
                return d.ReservedWord(self.source, point(self.line, column, len(self.first)), name=self.first)
        if self.token.type == "NAME" and str(self.token) in ("if", "else", "for", "lambda", "is", "in"):
            advice = FOREIGN_STATEMENTS.get(str(self.token), "compare with `==`, or with `<=` and `<`")
            return self.error(d.ForeignStatement, word=str(self.token), advice=advice)
        return None

    def expressions(self) -> SpecError | None:
        """Mistakes inside an expression."""
        kind = self.token.type
        offset = self.token.start_pos
        symbolic = offset is not None and kind in _OPERATORS | {"ASSIGN", "COLON"}
        operator = guard.foreign_operator(self.source.text, offset or 0) if symbolic else None
        if operator is not None:
            start = self.source.text.index(operator, max(0, (offset or 0) - 2))
            where = point(self.line, self.column + start - (offset or 0), len(operator))
            return d.ForeignOperator(self.source, where, operator=operator, advice=guard.FOREIGN[operator])
        if kind == "ASSIGN" and self.text[: self.column].replace(" ", "") == f"{self.first}==":
            return d.CompareAsStatement(self.source, point(self.line, self.column - 1, 2), name=self.first)
        if kind == "ASSIGN" and "EQUAL" in self.accepts:
            return self.error(d.AssignInCondition)
        if kind == "LSQB" and "ASSIGN" in self.accepts:
            return self.error(d.AxesOnValue, name=self.first)
        if self.accepts == {"LSQB"}:
            return self.error(d.MissingAxes, name=self.word_before() or "x")
        if kind in ("NAME", "NUMBER", "INF", "LPAR") and "STAR" in self.accepts:
            word = self.word_before()
            if word in FOREIGN_STATEMENTS:
                where = point(self.line, self.text.rindex(word, 0, self.column - 1) + 1, len(word))
                return d.ForeignStatement(self.source, where, word=word, advice=FOREIGN_STATEMENTS[word])
            return self.error(d.MissingOperator, found=f"`{str(self.token)[:40]}`")
        return None

    def word_before(self) -> str:
        """The last name before the token, on its line."""
        before = re.findall(r"[A-Za-z_]\w*", self.text[: self.column - 1])
        return before[-1] if before else ""
