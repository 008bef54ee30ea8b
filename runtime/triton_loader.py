"""Generated Triton text -> functions that launch it.

Triton reads the source of a kernel from its file, so the text is written to one, under a name that tells its contents, and
imported by path. Several processes may write the same file: each writes its own copy and renames it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from ..codegen.source import Module

if TYPE_CHECKING:
    import torch


class NoDevice(RuntimeError):
    """Triton has nothing to run a kernel on: no GPU, and its interpreter was not asked for."""


class Launcher(Protocol):
    """Launches one kernel; the arguments are in the order of the module's ``Entry``."""

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        strides: Sequence[int],
        extents: Sequence[int],
        origins: Sequence[int],
        params: Sequence[float],
    ) -> None: ...


def load_triton(module: Module, folder: Path, filename: str | None = None) -> dict[str, Launcher]:
    """The launchers of a generated module, by the names of its entries; the source is kept in ``folder``, as ``filename`` if given.

    Raises ``NoDevice`` where no GPU is there and Triton does not interpret. Triton decides when it is first imported whether
    it interprets: ``TRITON_INTERPRET=1`` must be set by then.
    """
    _require_device()
    imported = import_generated(module, folder, filename)
    return {entry.name: _on_device_of_tensors(getattr(imported, f"launch_{entry.name}")) for entry in module.entries}


def import_generated(module: Module, folder: Path, filename: str | None = None) -> ModuleType:
    """The module as Python imports it; nothing is compiled yet, and no GPU is needed."""
    digest = hashlib.sha256(module.text.encode()).hexdigest()[:16]
    stem = "_".join(entry.name for entry in module.entries)[:60]
    path = Path(folder) / (filename or f"{stem}__{digest}.py")
    if not path.exists() or path.read_text(encoding="utf-8") != module.text:
        _write(path, module.text)
    name = f"weft_generated_{digest}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import the generated file {path}")
    imported = importlib.util.module_from_spec(spec)
    sys.modules[name] = imported  # Triton looks the module of a kernel up by its name
    try:
        spec.loader.exec_module(imported)
    except BaseException:
        del sys.modules[name]
        raise
    return imported


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _require_device() -> None:
    import torch
    import triton

    if not (triton.knobs.runtime.interpret or torch.cuda.is_available() or torch.xpu.is_available()):
        raise NoDevice("Triton finds no GPU. Set TRITON_INTERPRET=1 before Python starts to run its kernels in the interpreter.")


def _on_device_of_tensors(launch: Launcher) -> Launcher:
    """Triton launches on the current device, which need not be that of the tensors."""

    def launch_there(
        tensors: Sequence[torch.Tensor],
        strides: Sequence[int],
        extents: Sequence[int],
        origins: Sequence[int],
        params: Sequence[float],
    ) -> None:
        if tensors and tensors[0].is_cuda:
            import torch

            with torch.cuda.device(tensors[0].device):
                launch(tensors, strides, extents, origins, params)
        else:
            launch(tensors, strides, extents, origins, params)

    return launch_there
