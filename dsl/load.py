"""From a text or a file to a ``Spec``: reads modules, expands macros, resolves every kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from . import diagnostics as d
from . import names, tree
from . import typed as t
from .diagnostics import Source, SpecError, point, raise_all
from .expand import Macro, check_macro
from .guard import MAX_CHARACTERS, normalised
from .resolve import resolve_kernel
from .syntax import read_tree

Search = Callable[[str], tuple[str, str] | None]
"""Finds the module of a ``use``: its file name and its text, or None where there is none."""

PRELUDE = Path(__file__).parent / "prelude"


def parse(text: str, filename: str = "<spec>", search: Search | None = None) -> t.Spec:
    """The spec that ``text`` is. ``search`` finds the modules that it uses, before the ones that come with weft.

    Raises ``SpecError``: a single mistake as its own class, several as ``SpecErrors``.
    """
    source = Source(filename, normalised(text))
    file = read_tree(source)
    errors: list[SpecError] = []
    modules = _Modules(search)
    macros = modules.scope(source, file, errors, ())
    if not errors and not file.kernels and not file.macros:
        errors.append(d.NothingDefined(source, point(1, 1)))
    first: dict[str, tree.Kernel] = {}
    kernels: list[t.Kernel | None] = []
    for kernel in file.kernels:
        if kernel.name.name in names.KEYWORDS:
            errors.append(d.ReservedWord(source, kernel.name.span, name=kernel.name.name))
        earlier = first.setdefault(kernel.name.name, kernel)
        if earlier is not kernel:
            errors.append(d.KernelTaken(source, kernel.name.span, name=kernel.name.name, line=earlier.span.line))
        kernels.append(resolve_kernel(source, kernel, macros, modules.missing, errors))
    raise_all(errors)
    return t.Spec(filename, source.text, file.doc, tuple(k for k in kernels if k is not None))


def load_file(path: str | Path) -> t.Spec:
    """The spec in the file ``path``; modules that it uses are looked for beside it. Raises ``SpecError``."""
    path = Path(path)
    return parse(read_text(path), str(path), beside(path.parent))


def read_text(path: Path) -> str:
    """The text of a spec file. Raises ``FileUnreadable`` or ``TextTooLong``, also before a huge file is read whole."""
    source = Source(str(path), "")
    try:
        with path.open("rb") as file:
            data = file.read(4 * MAX_CHARACTERS + 1)
        if len(data) > 4 * MAX_CHARACTERS:
            raise d.TextTooLong(source, point(1, 1), size=path.stat().st_size, limit=MAX_CHARACTERS)
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise d.FileUnreadable(source, point(1, 1), reason=f"byte {error.start} is not UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise d.FileUnreadable(source, point(1, 1), reason=reason) from None


def beside(folder: Path) -> Search:
    """Finds modules among the spec files of ``folder``."""

    def search(name: str) -> tuple[str, str] | None:
        path = folder / f"{name}.weft"
        return (str(path), read_text(path)) if path.is_file() else None

    return search


class _Modules:
    """The modules that one parse has read; each is read once. ``missing`` are macros whose ``use`` has a mistake."""

    def __init__(self, search: Search | None) -> None:
        self.search = search
        self.known: dict[str, Mapping[str, Macro]] = {}
        self.missing: set[str] = set()

    def scope(self, source: Source, file: tree.File, errors: list[SpecError], inside: tuple[str, ...]) -> dict[str, Macro]:
        """The macros that are visible in ``file``: its own and those that it uses."""
        scope: dict[str, Macro] = {}
        for use in file.uses:
            try:
                macro = self.used(source, use, inside)
            except SpecError as error:
                errors.append(error)
                self.missing.add(use.path[-1].name)
            else:
                define(source, use.path[-1], replace(macro, span=use.path[-1].span), scope, errors)
        for node in file.macros:
            params = tuple(p.name for p in node.params)
            define(source, node.name, Macro(node.name.span, node.name.name, params, node.body, scope), scope, errors)
        for node in file.macros:
            errors += check_macro(source, node, (*scope, *self.missing))
        return scope

    def used(self, source: Source, use: tree.Use, inside: tuple[str, ...]) -> Macro:
        if len(use.path) != 2:
            raise d.UseShape(source, use.span)
        module, member = use.path
        macros = self.module(source, module, inside)
        if member.name not in macros:
            hint, known = names.closest(member.name, macros), ", ".join(f"`{m}`" for m in sorted(macros))
            raise d.UnknownMember(source, member.span, module=module.name, name=member.name, hint=hint, known=known or "none")
        return macros[member.name]

    def module(self, source: Source, name: tree.Name, inside: tuple[str, ...]) -> Mapping[str, Macro]:
        """The macros that a module defines; what it uses itself is its own affair."""
        if name.name in inside:
            chain = " -> ".join(f"`{m}`" for m in (*inside[inside.index(name.name) :], name.name))
            raise d.UseCycle(source, name.span, name=name.name, chain=chain)
        if name.name not in self.known:
            filename, text = self.find(source, name)
            try:
                self.known[name.name] = self.read(Source(filename, normalised(text)), (*inside, name.name))
            except SpecError as error:
                raise broken(source, name, error) from error
        return self.known[name.name]

    def read(self, source: Source, inside: tuple[str, ...]) -> Mapping[str, Macro]:
        file = read_tree(source)
        errors: list[SpecError] = []
        macros = self.scope(source, file, errors, inside)
        raise_all(errors)
        return {node.name.name: macros[node.name.name] for node in file.macros}

    def find(self, source: Source, name: tree.Name) -> tuple[str, str]:
        found = self.search(name.name) if self.search is not None else None
        if found is not None:
            return found
        shipped = {path.stem: path for path in PRELUDE.glob("*.weft")}
        if name.name in shipped:
            path = shipped[name.name]
            return str(path), read_text(path)
        hint, known = names.closest(name.name, shipped), ", ".join(f"`{m}`" for m in sorted(shipped))
        raise d.UnknownModule(source, name.span, name=name.name, hint=hint, known=known)


def define(source: Source, name: tree.Name, macro: Macro, scope: dict[str, Macro], errors: list[SpecError]) -> None:
    """Adds a macro to the names of a file."""
    if name.name in names.KEYWORDS:
        errors.append(d.ReservedWord(source, name.span, name=name.name))
    if name.name in scope:
        errors.append(d.NameTaken(source, name.span, name=name.name, role="a macro", line=scope[name.name].span.line))
    else:
        scope[name.name] = macro


def broken(source: Source, name: tree.Name, error: SpecError) -> SpecError:
    """The mistake of a module, shown where it is used: the first one at its root."""
    for first in error.errors:
        if isinstance(first, d.UseCycle | d.ModuleBroken):
            return type(first)(source, name.span, **first.fields)
    first = error.errors[0]
    return d.ModuleBroken(source, name.span, name=name.name, reason=first.message, where=first.where)
