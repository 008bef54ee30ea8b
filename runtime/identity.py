"""The header and the identity of a kernel. The identity hashes its equations: comments, layout, docstrings and spans do not count."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import NamedTuple

from ..dsl import typed
from .cache import digest


class Header(NamedTuple):
    """What can be said about a kernel without its equations: plain strings, so that it is quickly restored."""

    name: str
    doc: str
    identity: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: tuple[str, ...]
    axes: tuple[str, ...]
    states: tuple[str, ...]


def header(kernel: typed.Kernel, spec: typed.Spec) -> Header:
    return Header(
        kernel.name,
        kernel.doc or spec.doc,
        identity(kernel),
        tuple(t.name for t in kernel.inputs),
        tuple(t.name for t in kernel.outputs),
        tuple(p.name for p in kernel.params),
        tuple(a.name for a in kernel.axes),
        tuple(s.name for s in kernel.body if isinstance(s, typed.State)),
    )


def identity(kernel: typed.Kernel) -> str:
    """A hex hash that equal equations share and different ones do not."""
    return digest(canonical_text(kernel))


def canonical_text(kernel: typed.Kernel) -> str:
    """The equations as one line of text. Iterative, since a spec may nest deeply; what occurs again is named by its number."""
    words: list[str] = []
    numbers: dict[int, int] = {}
    stack: list[object] = [kernel]
    while stack:
        item = stack.pop()
        if isinstance(item, _Word):
            words.append(item)
        elif id(item) in numbers:
            words.append(f"#{numbers[id(item)]}")
        elif is_dataclass(item):
            numbers[id(item)] = len(numbers)
            parts = [getattr(item, f.name) for f in fields(item) if f.compare and f.name != "doc"]
            _push(stack, type(item).__name__, parts)
        elif isinstance(item, frozenset):
            _push(stack, "set", sorted(item))
        elif isinstance(item, tuple):
            _push(stack, "", list(item))
        else:
            words.append(repr(item))
    return " ".join(words)


class _Word(str):
    """A piece of the finished text, as opposed to a string among the equations."""


def _push(stack: list[object], name: str, parts: list[object]) -> None:
    stack.append(_Word(")"))
    stack.extend(reversed(parts))
    stack.append(_Word(f"{name}("))
