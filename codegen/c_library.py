"""The templates of a C file, and the C functions that it may carry: of ``templates/functions.c`` only those that it uses.

Each section of that file begins with a line ``//// name`` and defines that name; what it needs is found by looking for the
names of other sections in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


@cache
def sections() -> dict[str, str]:
    """The text of every function, by name."""
    text = resources.files(__package__).joinpath("templates", "functions.c").read_text(encoding="utf-8")
    parts = re.split(r"^//// (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


@cache
def _needs(name: str) -> tuple[str, ...]:
    code = re.sub(r"//[^\n]*", "", sections()[name])
    return tuple(dict.fromkeys(word for word in re.findall(r"[A-Za-z_]\w*", code) if word in sections() and word != name))


def library(used: Iterable[str]) -> list[str]:
    """The functions of ``used`` and whatever they need, each after what it needs."""
    order: dict[str, None] = {}

    def add(name: str) -> None:
        for needed in _needs(name):
            if needed not in order:
                add(needed)
        order[name] = None

    for name in sorted(used):
        add(name)
    return [sections()[name] for name in order]


@cache
def template(name: str) -> jinja2.Template:
    """A skeleton in ``templates``."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8"))
