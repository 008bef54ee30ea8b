"""What the compiler is, as a hash: part of every cache key, so that a changed compiler never meets an old result.

The hash is over the package's own source files. It is kept in the cache under their names, sizes and times, so that a
process that finds them unchanged does not read them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .cache import digest, disk_cache

__version__ = "0.1.0"

FRONT = ("dsl", "runtime")
"""The rooms that decide what a text means and how that is kept."""
ALL = ("dsl", "compiler", "codegen", "runtime")
"""The rooms that decide what is generated."""

_PACKAGE = Path(__file__).parent.parent
_SOURCES = (".py", ".lark", ".weft", ".jinja", ".j2", ".c", ".h")


@cache
def compiler_digest(rooms: tuple[str, ...] = ALL) -> str:
    """A hash of the sources of some rooms and of the version."""
    files = sorted((entry.path[len(str(_PACKAGE)) :], entry) for room in rooms for entry in _sources(str(_PACKAGE / room)))
    stamp = digest(__version__, *(f"{name} {e.stat().st_size} {e.stat().st_mtime_ns}" for name, e in files))
    known = disk_cache().read("version", stamp)
    if known is not None:
        return known.decode()
    found = digest(__version__, *(part for name, e in files for part in (name, Path(e.path).read_bytes())))
    disk_cache().write("version", stamp, found.encode())
    return found


def _sources(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _sources(entry.path)
            elif entry.name.endswith(_SOURCES):
                yield entry
