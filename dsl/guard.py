"""Checks of the bare text, before it is parsed: size, characters, brackets, indentation.

They are made by hand because their messages can then name the opening bracket or the column, and because the parser
may afterwards rely on balanced brackets, bounded nesting and one level of blocks.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from . import diagnostics as d
from .diagnostics import Source, SpecError, point

MAX_CHARACTERS = 64 * 1024
MAX_NAME = 64
MAX_DEPTH = 100

CLOSERS = {"(": ")", "[": "]"}
OPENERS = {closer: opener for opener, closer in CLOSERS.items()}

SIMILAR = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/",
    "\u2264": "<=", "\u2265": ">=", "\u2260": "!=", "\u2192": "->", "\u2190": "<-", "\u221e": "inf",
    "\u2018": "", "\u2019": "", "\u201c": '"""', "\u201d": '"""', "\u2211": "sum[axis](...)", "\u221a": "sqrt(...)",
    "\u00b2": "**2", "\u00b3": "**3", "\u00a0": "a plain space", "\uff08": "(", "\uff09": ")", "\uff0c": ",", "\uff1a": ":",
}  # fmt: skip
"""What to write instead of a character that looks or means like something of the language."""

FOREIGN = {
    "&": "write `and`", "&&": "write `and`", "|": "write `or`", "||": "write `or`", "!": "write `not`", "~": "write `not`",
    "^": "write `**` for a power", "@": "write the contraction as `sum[d](a * b)`", ":=": "write `=`",
    "+=": "write `<-` for a state, or a new name", "-=": "write `<-` for a state, or a new name",
    "*=": "write `<-` for a state, or a new name", "/=": "write `<-` for a state, or a new name",
    "===": "write `==`", "!==": "write `!=`", "<>": "write `!=`", "=>": "write `->` for a read, `>=` to compare", "=<": "write `<=`",
    "++": "write `+ 1`", "?": "write `where(cond, a, b)`", ";": "put every statement on a line of its own",
    "{": "axes are written in `[...]`, groups in `(...)`", "}": "axes are written in `[...]`, groups in `(...)`",
    "$": "remove it", "\\": "a line goes on inside brackets, without a mark", "`": "remove it", "'": "remove it", '"': "remove it",
}  # fmt: skip
"""Operators of other languages, with what to write instead."""

_FOREIGN = re.compile("|".join(re.escape(op) for op in sorted(FOREIGN, key=len, reverse=True)))
_ONE_LINER = re.compile(r"use\b|def\b(?!.*:[ \t]*$)", re.MULTILINE)
_TOKEN = re.compile(rf'"""|[#()\[\]"\']|[^\x20-\x7e\n\t]|\n|(?<![A-Za-z0-9_.])[A-Za-z_][A-Za-z0-9_]{{{MAX_NAME},}}')


def normalised(text: str) -> str:
    """``text`` with plain line ends and without a byte order mark."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def check_text(source: Source) -> None:
    """Raises the first mistake that makes parsing pointless: a ``SpecError`` of the section "The text itself"."""
    if len(source.text) > MAX_CHARACTERS:
        raise d.TextTooLong(source, point(1, 1), size=len(source.text), limit=MAX_CHARACTERS)
    _Scan(source).run()


@dataclass(slots=True)
class _Open:
    bracket: str
    line: int
    column: int


class _Scan:
    """One pass over the text that knows comments, docstrings and brackets."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.open: list[_Open] = []
        self.line = 1
        self.line_start = 0
        self.block: int | None = None
        self.in_kernel = False

    def run(self) -> None:
        text = self.source.text
        self.check_indent(0)
        at = 0
        while found := _TOKEN.search(text, at):
            at = self.token(found.group(), found.start())
        if self.open:
            first = self.open[-1]
            raise self.error(d.UnclosedBracket, first.line, first.column, bracket=first.bracket, closer=CLOSERS[first.bracket])

    def error(self, kind: type[SpecError], line: int, column: int, width: int = 1, /, **fields: object) -> SpecError:
        return kind(self.source, point(line, column, width), **fields)

    def here(self, kind: type[SpecError], start: int, /, **fields: object) -> SpecError:
        return self.error(kind, self.line, start - self.line_start + 1, **fields)

    def token(self, token: str, start: int) -> int:
        """Handles one token and returns where to go on."""
        match token:
            case "\n":
                self.line += 1
                self.line_start = start + 1
                if not self.open:
                    self.check_indent(start + 1)
                return start + 1
            case "#":
                return self.skip_comment(start)
            case '"""':
                return self.skip_docstring(start)
            case '"' | "'":
                raise self.here(d.TextInCode, start)
            case "(" | "[":
                self.open.append(_Open(token, self.line, start - self.line_start + 1))
                if len(self.open) > MAX_DEPTH:
                    raise self.here(d.NestedTooDeep, start, limit=MAX_DEPTH)
            case ")" | "]":
                self.close(token, start)
            case _ if len(token) > 1:
                raise self.error(d.NameTooLong, self.line, start - self.line_start + 1, len(token), limit=MAX_NAME)
            case _:
                raise self.strange(token, start, in_code=True)
        return start + 1

    def close(self, bracket: str, start: int) -> None:
        if not self.open:
            raise self.here(d.StrayBracket, start, bracket=bracket)
        last = self.open.pop()
        if last.bracket != OPENERS[bracket]:
            where = {"line": last.line, "column": last.column}
            raise self.here(d.MismatchedBracket, start, bracket=bracket, opener=last.bracket, closer=CLOSERS[last.bracket], **where)

    def skip_comment(self, start: int) -> int:
        end = self.source.text.find("\n", start)
        end = len(self.source.text) if end < 0 else end
        self.check_prose(start, end)
        return end

    def skip_docstring(self, start: int) -> int:
        end = self.source.text.find('"""', start + 3)
        if end < 0:
            raise self.error(d.UnclosedDocstring, self.line, start - self.line_start + 1, 3)
        self.check_prose(start, end)
        inside = self.source.text[start:end]
        self.line += inside.count("\n")
        if "\n" in inside:
            self.line_start = start + inside.rindex("\n") + 1
        return end + 3

    def check_prose(self, start: int, end: int) -> None:
        """Comments and docstrings may hold any character that can be printed."""
        prose = self.source.text[start:end]
        if prose.isascii() and prose.replace("\n", "").replace("\t", "").isprintable():
            return
        line, line_start = self.line, self.line_start
        for index, character in enumerate(prose, start):
            if character == "\n":
                self.line, self.line_start = self.line + 1, index + 1
            elif character != "\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
                raise self.strange(character, index, in_code=False)
        self.line, self.line_start = line, line_start

    def strange(self, character: str, start: int, in_code: bool) -> SpecError:
        if SIMILAR.get(character):
            advice = f"write {SIMILAR[character]}" if character == "\u00a0" else f"write `{SIMILAR[character]}`"
        elif in_code and character.isprintable():
            advice = "names are ASCII letters, digits and `_`; spell it out"
        else:
            advice = "remove it"
        name = unicodedata.name(character, "unnamed").lower()
        return self.here(d.StrangeCharacter, start, code=f"U+{ord(character):04X}", name=name, advice=advice)

    def check_indent(self, start: int) -> None:
        """A statement stands at the margin or in the column of its block."""
        text = self.source.text
        end = start
        while end < len(text) and text[end] in " \t":
            end += 1
        if end == len(text) or text[end] in "\n#":
            return
        if "\t" in text[start:end]:
            raise self.error(d.TabIndent, self.line, 1, end - start)
        width = end - start
        if width == 0:
            self.block = None
            self.in_kernel = not _ONE_LINER.match(text, start)
        elif not self.in_kernel:
            raise self.error(d.UnexpectedIndent, self.line, 1, width)
        elif self.block is None:
            self.block = width
        elif self.block != width:
            raise self.error(d.UnevenIndent, self.line, 1, width, found=width, expected=self.block)


def foreign_operator(text: str, offset: int) -> str | None:
    """The operator of another language that stands at ``offset`` or just before it, longest first."""
    for start in range(max(0, offset - 2), offset + 1):
        found = _FOREIGN.match(text, start)
        if found and found.end() > offset:
            return found.group()
    return None
