"""What can be wrong with a spec: one class per mistake, each saying what is wrong, where, and how to mend it.

A class holds two templates, ``what`` and ``mend``; an instance fills them in and points at a span of a source. All
the mistakes that are found in one go are raised together as ``SpecErrors``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .typed import Span

EXCERPT_WIDTH = 120
SHOWN_ERRORS = 20


@dataclass(frozen=True, slots=True)
class Source:
    """A text and the name under which messages show it."""

    filename: str
    text: str

    def line(self, number: int) -> str:
        lines = self.text.split("\n")
        return lines[number - 1] if 0 < number <= len(lines) else ""


def point(line: int, column: int, width: int = 1) -> Span:
    return Span(line, column, line, column + width)


def printable(text: str) -> str:
    """``text`` with every character that could disturb a terminal or the caret's column replaced, one for one."""
    return "".join(c if c.isprintable() and not unicodedata.combining(c) else " " if c == "\t" else "?" for c in text)


def columns(text: str) -> int:
    """The number of terminal columns of ``text``: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def excerpt(source: Source, span: Span) -> str:
    """The source line of ``span`` with carets under it; long lines are cut around the caret."""
    line = printable(source.line(span.line))
    start = min(span.column - 1, len(line))
    end = span.end_column - 1 if span.end_line == span.line else len(line)
    end = max(min(end, len(line)), start + 1)
    cut = max(0, start - EXCERPT_WIDTH // 2) if len(line) > EXCERPT_WIDTH else 0
    shown = line[cut : cut + EXCERPT_WIDTH]
    start, end = start - cut, min(end - cut, max(len(shown), start - cut + 1))
    before, marked = columns(shown[:start]), max(columns(shown[start:end]), 1)
    gutter = len(str(span.line))
    return f"  {span.line} | {shown}\n  {' ' * gutter} | {' ' * before}{'^' * marked}"


class SpecError(Exception):
    """A mistake in a spec. ``errors`` are the single mistakes: itself, or those of a group."""

    what: ClassVar[str] = "{what}"
    mend: ClassVar[str] = ""

    def __init__(self, source: Source, span: Span, /, **fields: object) -> None:
        self.source = source
        self.span = span
        self.fields = fields
        self.message = self.what.format(**fields)
        self.advice = self.mend.format(**fields)
        super().__init__(self.message)

    @property
    def errors(self) -> tuple[SpecError, ...]:
        return (self,)

    @property
    def where(self) -> str:
        return f"{self.source.filename}:{self.span.line}:{self.span.column}"

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.message}", excerpt(self.source, self.span)]
        if self.advice:
            parts.append(f"  help: {self.advice}")
        return "\n".join(parts)


class SpecErrors(SpecError):
    """Several mistakes, in the order of the text."""

    def __init__(self, errors: Sequence[SpecError]) -> None:
        ordered = sorted(errors, key=lambda e: (e.source.filename, e.span.line, e.span.column))
        self._errors = tuple(ordered)
        super().__init__(ordered[0].source, ordered[0].span, what=f"{len(ordered)} mistakes")

    @property
    def errors(self) -> tuple[SpecError, ...]:
        return self._errors

    def __str__(self) -> str:
        shown = [str(e) for e in self._errors[:SHOWN_ERRORS]]
        hidden = len(self._errors) - len(shown)
        more = [f"... and {hidden} more"] if hidden else []
        return "\n\n".join([*shown, *more, f"{len(self._errors)} mistakes in {self.source.filename}"])


def raise_all(errors: Sequence[SpecError]) -> None:
    """Raises what was found: a single mistake as itself, several as ``SpecErrors``."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SpecErrors(errors)


# The text itself -----------------------------------------------------------------------------------------------------


class FileUnreadable(SpecError):
    what = "the file cannot be read: {reason}"
    mend = "a spec is a file of UTF-8 text; check the path and the encoding"


class TextTooLong(SpecError):
    what = "the text has {size} characters, more than the limit of {limit}"
    mend = "split the file: one variant a file"


class StrangeCharacter(SpecError):
    what = "the character {code} ({name}) has no place in a spec"
    mend = "{advice}"


class NameTooLong(SpecError):
    what = "the name has more than {limit} characters"
    mend = "choose a shorter one"


class NestedTooDeep(SpecError):
    what = "the expression is nested more than {limit} levels deep"
    mend = "name a part of it on a line of its own; long chains of operators and macros count as levels"


class TooManyNodes(SpecError):
    what = "with its macros expanded this has more than {limit} terms"
    mend = "name repeated parts on lines of their own instead of passing them through macros"


class TooMany(SpecError):
    what = "there are more than {limit} {things} here"
    mend = "{advice}"


class TabIndent(SpecError):
    what = "this line is indented with a tab"
    mend = "indent with spaces"


class UnexpectedIndent(SpecError):
    what = "this line is indented, but no kernel is open"
    mend = "start the line at the margin, or put a `kernel ...:` line above it"


class UnevenIndent(SpecError):
    what = "this line is indented by {found} spaces, but the block is indented by {expected}"
    mend = "all statements of a kernel start in the same column; a line goes on only inside brackets"


class UnclosedBracket(SpecError):
    what = "`{bracket}` is never closed"
    mend = "add `{closer}`"


class StrayBracket(SpecError):
    what = "`{bracket}` closes nothing"
    mend = "remove it, or open the bracket that it should close"


class MismatchedBracket(SpecError):
    what = "`{bracket}` cannot close the `{opener}` of line {line}, column {column}"
    mend = "write `{closer}` here, or check the brackets between"


class UnclosedDocstring(SpecError):
    what = 'the text that starts with `"""` is never closed'
    mend = 'add `"""` at its end'


class TextInCode(SpecError):
    what = "quoted text has no place in an expression"
    mend = 'only docstrings are text (in `"""`, as the first thing of a file or a kernel); comments start with `#`'


# Syntax --------------------------------------------------------------------------------------------------------------


class UnexpectedText(SpecError):
    what = "{found} does not fit here"
    mend = "expected {expected}"


class UnfinishedLine(SpecError):
    what = "the line ends too early"
    mend = "expected {expected}; a line goes on only inside brackets"


class ReservedWord(SpecError):
    what = "`{name}` is a word of the language and cannot be a name"
    mend = "choose another name, for example `{name}_`"


class ReservedFunction(SpecError):
    what = "`{name}` is a function of the language and cannot be a name here"
    mend = "choose another name, for example `{name}_`"


class ReservedCallName(SpecError):
    what = "`{name}` is a keyword of every kernel call and cannot name {role}"
    mend = "choose another name, for example `{name}_`"


class AssignInCondition(SpecError):
    what = "`=` defines a value, it does not compare"
    mend = "write `==` to compare"


class ForeignOperator(SpecError):
    what = "`{operator}` is not an operator of the language"
    mend = "{advice}"


class ForeignStatement(SpecError):
    what = "there is no `{word}` in the language"
    mend = "{advice}"


class UnknownStatement(SpecError):
    what = "no statement starts like this"
    mend = "{hint}a statement is `name = expr`, `S <- expr`, or starts with `mask`, `axis`, `state`, `param`, `assume` or `sample`"


class UnknownTopLevel(SpecError):
    what = "nothing at the margin starts like this"
    mend = "{hint}only a docstring, `use`, `def` and `kernel` stand at the margin"


class StatementOutsideKernel(SpecError):
    what = "a statement stands outside of a kernel"
    mend = "indent it below a `kernel ...:` line; only docstring, `use`, `def` and `kernel` stand at the margin"


class CompareAsStatement(SpecError):
    what = "`==` compares, it does not define"
    mend = "write `{name} = ...` to define `{name}`"


class AxesOnValue(SpecError):
    what = "a value is defined without its axes"
    mend = "write `{name} = ...`: the axes follow from the equation"


class MissingArrow(SpecError):
    what = "the outputs of a kernel stand after `->`"
    mend = "write `kernel name(inputs) -> outputs:`"


class StatementOnKernelLine(SpecError):
    what = "a statement stands on the kernel line"
    mend = "write it on a line of its own below, indented"


class MacroShape(SpecError):
    what = "a macro is one expression after `=`"
    mend = "write `def name(x, d) = expr`; steps with names of their own belong into a kernel"


class MissingBlock(SpecError):
    what = "the kernel has no statements"
    mend = "write them on the lines below, indented; every output is defined there"


class MissingColon(SpecError):
    what = "the kernel line does not end in `:`"
    mend = "write `kernel name(inputs) -> outputs:`"


class MissingOutputs(SpecError):
    what = "the kernel `{name}` has no outputs"
    mend = "write them after `->`: `kernel {name}(...) -> o[b,i,e]:`"


class MissingOperator(SpecError):
    what = "an operator is missing before {found}"
    mend = "a product is written with `*`"


class MissingAxes(SpecError):
    what = "`{name}` has no axes"
    mend = "write them in brackets: `{name}[b,t]`, or `{name}[]` for a single number"


class MissingAlong(SpecError):
    what = "the state `{name}` does not say along which axis it is carried"
    mend = "write `state {name}[...] along t`"


class MissingParamType(SpecError):
    what = "the parameter `{name}` has no type"
    mend = "write `param {name}: int`, `: bool` or `: float`"


# Files, macros -------------------------------------------------------------------------------------------------------


class NothingDefined(SpecError):
    what = "the file defines no kernel and no macro"
    mend = "write `kernel name(inputs) -> outputs:` and its equations below it"


class UseShape(SpecError):
    what = "`use` takes one module and one macro"
    mend = "write `use masks.causal`"


class UnknownModule(SpecError):
    what = "there is no module `{name}`"
    mend = "{hint}a module is a file `{name}.weft` beside the spec, or one of {known}"


class UnknownMember(SpecError):
    what = "the module `{module}` has no macro `{name}`"
    mend = "{hint}it defines {known}"


class UseCycle(SpecError):
    what = "the module `{name}` uses itself, through {chain}"
    mend = "move what both need into a third file"


class ModuleBroken(SpecError):
    what = "the module `{name}` has a mistake: {reason}"
    mend = "mend {where}"


class MacroShadows(SpecError):
    what = "the macro parameter `{name}` appears twice"
    mend = "give every parameter a name of its own"


class MacroFreeName(SpecError):
    what = "`{name}` in the macro `{macro}` is not one of its parameters"
    mend = "{hint}a macro sees only its parameters; pass `{name}` as one (axes may be passed, too)"


class MacroArguments(SpecError):
    what = "the macro `{name}` takes {expected}, not {found}"
    mend = "it is defined as `def {name}({params})`"


class MacroRecursion(SpecError):
    what = "the macro `{name}` uses itself, through {chain}"
    mend = "macros are expanded where they stand, so none may contain itself"


class MacroNotCalled(SpecError):
    what = "the macro `{name}` needs its arguments"
    mend = "write `{name}({params})`"


# Names ---------------------------------------------------------------------------------------------------------------


class UnknownName(SpecError):
    what = "nothing here is called `{name}`"
    mend = "{hint}a name is an input, an axis, a parameter, or a value or state of a line above"


class UsedBeforeDefined(SpecError):
    what = "`{name}` is used before line {line} defines it"
    mend = "move its definition up: a line sees only the lines above it"


class NameTaken(SpecError):
    what = "`{name}` is already {role}, on line {line}"
    mend = "choose another name: axes, values, states, parameters and macros share one set of names, and each is defined once"


class KernelTaken(SpecError):
    what = "there are two kernels called `{name}`"
    mend = "rename one of them; the first is on line {line}"


class UnknownAxis(SpecError):
    what = "there is no axis `{name}`"
    mend = "{hint}an axis belongs to an input, or is declared: `axis {name} = ...`"


class NotAnAxis(SpecError):
    what = "`{name}` is {role}, not an axis"
    mend = "{hint}write the name of an axis"


class UnknownFunction(SpecError):
    what = "there is no function `{name}`"
    mend = "{hint}write it out, or as a macro: `def {name}(x) = ...`"


class FunctionNotCalled(SpecError):
    what = "the function `{name}` needs its arguments"
    mend = "write `{example}`"


class NotAFunction(SpecError):
    what = "this is not a function, so it cannot be called"
    mend = "a product is written with `*`"


class OnlyInSample(SpecError):
    what = "`{name}` is random or reorders, and may only stand in a `sample`"
    mend = "pass what it should give as an input, with a `sample` line that draws it"


class OnlyInputs(SpecError):
    what = "`{name}` is {role}, which {statement} cannot see"
    mend = "{advice}"


class AxisTwice(SpecError):
    what = "the axis `{name}` appears twice here"
    mend = "name every axis once; a second axis of the same extent is `axis other = size({name})`"


# Axes and extents ----------------------------------------------------------------------------------------------------


class UnsolvableSplit(SpecError):
    what = "the extents of {axes} in `{dim}` cannot be told apart"
    mend = "give one of them: `axis {axis} = ...`, or an input with that axis alone"


class AxisCycle(SpecError):
    what = "the extent of `{name}` depends on itself"
    mend = "an extent is computed from parameters, numbers and the sizes of other axes"


class BadExtent(SpecError):
    what = "the extent of `{name}` is {found}"
    mend = "an extent is a whole number of at least 1, without axes of its own"


class OptionalExtent(SpecError):
    what = "the axis `{name}` has no extent when `{tensor}` is left out"
    mend = "declare it (`axis {name} = ...`), use it in another input, or drop the default"


class UnknownDtype(SpecError):
    what = "there is no type `{name}`"
    mend = "{hint}a tensor is {known}; without a type it has the floating type of the call"


class ParamType(SpecError):
    what = "a parameter cannot be `{name}`"
    mend = "it is `int`, `bool` or `float`; a number with a gradient is an input `x[]`"


class BadDefault(SpecError):
    what = "the default of `{name}` must be {expected}"
    mend = "write a plain literal, for example `{example}`"


class BadNumber(SpecError):
    what = "the number is too large"
    mend = "an int has 64 bits, a real number is at most 1.8e308; write `inf` for infinity"


# Reductions, masks, reads --------------------------------------------------------------------------------------------


class NeedsAxes(SpecError):
    what = "`{name}` needs the axes that it runs over"
    mend = "write `{example}`"


class NoAxesTaken(SpecError):
    what = "`{name}` is pointwise and takes no axes"
    mend = "{advice}"


class OneAxis(SpecError):
    what = "`{name}` runs along exactly one axis"
    mend = "write `{name}[t](x)`"


class ScanFlag(SpecError):
    what = "`{name}` knows no `{flag}`"
    mend = "`reverse` and `exclusive` belong to {scans}"


class ArgumentCount(SpecError):
    what = "`{name}` takes {expected}, not {found}"
    mend = "{advice}"


class ReducedAxisMissing(SpecError):
    what = "the operand of `{name}` has no axis `{axis}`"
    mend = "it has {axes}; reduce along one of these, or restrict the reduction (`{name}[{axis} where ..](..)`) to count positions"


class MaskAxisMissing(SpecError):
    what = "the mask of line {line} restricts `{name}[{over}]` but the operand has no axis `{axis}`"
    mend = "write this value above the mask if it should not be restricted, or `{name}[{over} where ..](..)` to give it the axis `{axis}`"


class MaskWithoutAxes(SpecError):
    what = "the condition of this mask has no axes, so it restricts nothing"
    mend = "compare positions or tensors, as in `mask j <= i`; a choice by a parameter is `where(flag, a, b)`"


class StateMaskAxis(SpecError):
    what = "the mask of line {line} has the axis `{axis}`, which the state `{name}` lacks"
    mend = "a step is skipped where the mask on `{time}` is false: give the state that axis, or write it above the mask"


class MaskInsideStep(SpecError):
    what = "this mask restricts `{axis}`, between the state `{name}` of line {line} and its update"
    mend = "write the mask above the `state` line, so that the whole step is restricted"


class SelectionAxis(SpecError):
    what = "the number kept by `topk` varies along `{axis}`, along which it selects"
    mend = "`k` may vary only along other axes"


class BareIndex(SpecError):
    what = "an index needs the axis that it reads along"
    mend = "write `{example}`: the axis, `->`, and the position"


class ReadAxisMissing(SpecError):
    what = "what is read here has no axis `{name}`"
    mend = "{hint}it has {axes}"


class ArrowInReduction(SpecError):
    what = "`{name}` takes axes in its bracket, not positions"
    mend = "write `{name}[{axis}](...)`, and read with `x[{axis} -> position]`"


class WhereInRead(SpecError):
    what = "a read takes no `where`"
    mend = "write `where(cond, x[...], 0)`"


# Kinds ---------------------------------------------------------------------------------------------------------------


class NeedsBool(SpecError):
    what = "{place} must be true or false, but this is {kind}"
    mend = "compare it, for example `{example}`"


class NeedsNumber(SpecError):
    what = "{place} must be a number, but this is true or false"
    mend = "write `where(cond, 1, 0)` to make it a number; `sum` and `mean` count it"


class NeedsInt(SpecError):
    what = "{place} must be an int, but this is {kind}"
    mend = "{advice}"


class MixedKinds(SpecError):
    what = "{place} are {left} and {right}"
    mend = "make both numbers, or both true or false"


class NegativePower(SpecError):
    what = "an int to a negative power is not an int"
    mend = "make the base real: `{base}.0**...`"


# States --------------------------------------------------------------------------------------------------------------


class NotAState(SpecError):
    what = "`{name}` is {role}, so `<-` cannot update it"
    mend = "{advice}"


class StateAssigned(SpecError):
    what = "`{name}` is a state, so `=` cannot define it"
    mend = "write `{name} <- ...`"


class StateNeverUpdated(SpecError):
    what = "the state `{name}` is never updated"
    mend = "write `{name} <- ...` below it"


class StateTimeAxis(SpecError):
    what = "`{axis}` is both an axis of the state `{name}` and the axis that it is carried along"
    mend = "leave `{axis}` out of the bracket; as a value the state has it anyway"


class StateAxes(SpecError):
    what = "{place} `{name}` has the axis `{axis}`, which the state lacks"
    mend = "reduce along `{axis}`, or add it to the state's axes"


class StepLooksElsewhere(SpecError):
    what = "the next `{name}` needs `{other}` at other positions along `{axis}`, along which it is carried"
    mend = "a step sees the step before and what is not carried; look along `{axis}` in an equation that no `<-` needs"


class StepsInterleave(SpecError):
    what = "the states `{name}` and `{other}` need each other, but are carried in different orders"
    mend = "carry both along the same axes, in the same direction"


class InitNeedsState(SpecError):
    what = "the start of `{name}` needs `{other}`, which is carried in the same steps"
    mend = "a state starts from inputs, and from states along other axes"


# Outputs, samples, assumptions ---------------------------------------------------------------------------------------


class OutputUndefined(SpecError):
    what = "the output `{name}` is never defined"
    mend = "{hint}write `{name} = ...` in the kernel"


class OutputRole(SpecError):
    what = "the output `{name}` is {role}"
    mend = "an output is a value or a state; give it a name of its own and define it: `out = {name}`"


class OutputAxes(SpecError):
    what = "the output `{name}` is declared with {declared}, but its value has {found}"
    mend = "{advice}"


class OutputKind(SpecError):
    what = "the output `{name}` is declared `{dtype}`, but its value is {kind}"
    mend = "{advice}"


class OutputDefault(SpecError):
    what = "the output `{name}` cannot have a default"
    mend = "defaults belong to inputs that may be left out"


class SampleTarget(SpecError):
    what = "`{name}` is not an input, so it is not drawn"
    mend = "{hint}`sample` says how an input is drawn"


class SampleTwice(SpecError):
    what = "the input `{name}` is drawn twice"
    mend = "keep one of the two `sample` lines; the first is line {line}"


class SampleAxes(SpecError):
    what = "the sample of `{name}` has the axis `{axis}`, which the input lacks"
    mend = "use only {axes}"


class SampleKind(SpecError):
    what = "the input `{name}` is {expected}, but its sample is {found}"
    mend = "{advice}"
