"""Data of the compiler as bytes and back, for the disk cache.

This is pickle with a closed list of classes: reading makes dataclasses of the named modules and nothing else, so that
not even a forged entry can run code. Nodes of an equation graph are made through ``ir.make``, which keeps one object
per node also across the disk.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from ..compiler import ir

_DATA = ("dsl.typed", "compiler.ir", "compiler.plan", "codegen.source", "runtime.build", "runtime.variants")
_MODULES = tuple(f"{__package__.rsplit('.', 1)[0]}.{name}" for name in _DATA)
_NODE_FIELDS = ("axes", "kind")
DAMAGED = (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError)
"""What ``restore`` may raise for bytes of another version."""


def dump(value: object) -> bytes:
    """Raises ``RecursionError`` for what nests deeper than Python's stack."""
    out = io.BytesIO()
    _Pickler(out, protocol=5).dump(value)
    return out.getvalue()


def restore(data: bytes) -> Any:
    """Raises ``pickle.UnpicklingError`` for anything but what ``dump`` wrote."""
    return _Unpickler(io.BytesIO(data)).load()


def make_node(cls: type[ir.Node], axes: tuple[str, ...], kind: ir.Kind, *rest: object) -> ir.Node:
    node: ir.Node = ir.make(cls, axes, kind, *rest)
    return node


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, ir.Node):
            rest = tuple(getattr(obj, f.name) for f in fields(obj) if f.name not in _NODE_FIELDS)
            return make_node, (type(obj), obj.axes, obj.kind, *rest)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, "make_node"):
            return make_node
        if module in _MODULES:
            found = getattr(import_module(module), name, None)
            if isinstance(found, type) and is_dataclass(found):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not data of the compiler")
