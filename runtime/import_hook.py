"""``import`` finds specs: ``from mypackage.kernels import my_variant`` loads ``my_variant.weft`` beside the package's code.

What the import system is given for such a name is the kernel itself. Python modules of the same name come first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

SUFFIX = ".weft"


class SpecFinder(MetaPathFinder):
    """A finder of ``sys.meta_path``, behind Python's own."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        name = fullname.rpartition(".")[2]
        for folder in sys.path if path is None else path:
            file = Path(folder or ".") / f"{name}{SUFFIX}"
            if file.is_file():
                return ModuleSpec(fullname, SpecLoader(file), origin=str(file))
        return None


class SpecLoader(Loader):
    """Makes the kernel of one file; see ``load.only_kernel`` for which one."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def create_module(self, spec: ModuleSpec) -> Any:
        from .load import only_kernel

        return only_kernel(self.file)

    def exec_module(self, module: Any) -> None:
        """Nothing: a kernel is complete when made."""


def install() -> None:
    """Adds the finder, once."""
    if not any(isinstance(finder, SpecFinder) for finder in sys.meta_path):
        sys.meta_path.append(SpecFinder())
