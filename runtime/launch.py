"""Tensors -> pointers and strides -> kernels.

A buffer of a plan has one stride per axis, while a tensor has one per dimension: the axes of a composite dimension
get theirs from the dimension's, so that any view of a tensor is read where it lies, without a copy. What depends only on
extents and strides is made once and kept, so that a call like an earlier one fills in pointers and launches.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..codegen.source import Entry
from ..compiler.choices import current as watched
from ..compiler.choices import note
from ..compiler.plan import Buffer, with_derived
from ..compiler.structure import original
from .build import BUFFER_DTYPES, Launch, ProgramRecord, load_program
from .memory import allocate

Dims = tuple[tuple[str, ...], ...]
Shape = tuple[int, ...]
Run = Callable[[list[Tensor], Sequence[int], Sequence[float]], None]

_REMEMBERED = 64
"""Calls that differ in extents or strides and are kept prepared."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A program for given extents and strides: the shapes of what it allocates, and its launches, waiting for tensors."""

    shapes: tuple[Shape, ...]
    launches: tuple[Run, ...]


class Program:
    """One generated module, ready to run.

    ``dims`` are the declared dimensions of the tensors that have some. ``given`` names the buffers that a caller passes, in
    order, ``made`` those that the program allocates: outputs, saved values, temporaries, gradients. In a backward program
    what the forward saved is given, and so is ``forward``'s output.
    """

    def __init__(
        self, record: ProgramRecord, dims: Mapping[str, Dims], axes: tuple[str, ...], params: tuple[str, ...], given: Sequence[str]
    ) -> None:
        self.record = record
        self.axes = axes
        self.params = params
        self.buffers = {b.name: b for b in record.buffers}
        self.dtypes = {name: BUFFER_DTYPES[dtype] for name, dtype in record.dtypes}
        self.given = tuple([name for name in given if name in self.buffers])
        self.made = tuple([b.name for b in record.buffers if b.name not in self.given])
        self._dims = {b.name: dims.get(b.name, tuple((a,) for a in b.axes)) for b in record.buffers}
        self._made_dtypes = [self.dtypes[name] for name in self.made]
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    @cached_property
    def functions(self) -> tuple[Launch, ...]:
        return load_program(self.record)

    def run(
        self, given: Sequence[Tensor], extents: Sequence[int], origin: Sequence[int], params: Sequence[float], device: torch.device
    ) -> dict[str, Tensor]:
        """Runs every kernel on the tensors of ``given`` and returns what it made, by name, in declared dimensions.

        ``extents`` and ``origin`` are in the order of ``axes``, ``params`` in that of ``params``.
        """
        key = (tuple(extents), *[t.stride() for t in given])
        prepared = self._prepared.get(key)
        if prepared is None:
            if len(self._prepared) >= _REMEMBERED:
                self._prepared.clear()
            prepared = self._prepared[key] = self._prepare(dict(zip(self.axes, extents, strict=True)), given)
        made = [allocate(shape, dtype, device) for shape, dtype in zip(prepared.shapes, self._made_dtypes, strict=True)]
        tensors = [*given, *made]
        for launch in prepared.launches:
            launch(tensors, origin, params)
        found = dict(zip(self.made, made, strict=True))
        if self.record.selections and watched() is not None:
            sizes = with_derived(dict(zip(self.axes, extents, strict=True)), dict(self.record.derived))
            for name, over in self.record.selections:
                axes = self.buffers[name].axes
                note(over, axes, found[name].reshape([sizes[a] for a in axes]))
        return found

    def made_shape(self, name: str, extents: Mapping[str, int]) -> Shape:
        """The shape of what is allocated for a buffer, in its declared dimensions."""
        return dims_shape(self._dims[name], with_derived(extents, dict(self.record.derived)))

    def _prepare(self, extents: Mapping[str, int], given: Sequence[Tensor]) -> Prepared:
        extents = with_derived(extents, dict(self.record.derived))
        strides = {name: axis_strides(t, self._dims[name], extents) for name, t in zip(self.given, given, strict=True)}
        strides.update((name, contiguous_strides(self.buffers[name], extents)) for name in self.made)
        make = self._launch_c if self.record.backend == "c" else self._launch_triton
        launches = [make(f, entry, strides, extents) for f, entry in zip(self.functions, self.record.entries, strict=True)]
        if self.record.library:
            launches = self._with_library(launches, strides, extents)
        return Prepared(tuple(self.made_shape(name, extents) for name in self.made), tuple(launches))

    def _with_library(self, launches: list[Run], strides: Mapping[str, Shape], extents: Mapping[str, int]) -> list[Run]:
        """Launches of kernels with the library's steps between them."""
        from .library_steps import library_launches

        place = {name: n for n, name in enumerate((*self.given, *self.made))}
        found: list[Run] = []
        for n in range(len(launches) + 1):
            steps = [s for s in self.record.library if s.before == n]
            found += library_launches(steps, self.buffers, place, strides, extents, self.axes)
            found += launches[n : n + 1]
        return found

    def _launch_c(self, function: Launch, entry: Entry, strides: Mapping[str, Shape], extents: Mapping[str, int]) -> Callable[..., None]:
        which, origins, params = self._indices(entry)
        pointers, positions, numbers = ctypes.c_void_p * len(which), ctypes.c_int64 * len(origins), ctypes.c_double * len(params)
        flat = _ints([s for name in entry.buffers for s in strides[name]])
        sizes = _ints([extents[a] for a in entry.extents])

        def launch(tensors: list[Tensor], origin: Sequence[int], values: Sequence[float]) -> None:
            function(
                pointers(*[tensors[n].data_ptr() for n in which]),
                flat,
                sizes,
                positions(*[origin[n] for n in origins]),
                numbers(*[values[n] for n in params]),
            )

        return launch

    def _launch_triton(
        self, function: Launch, entry: Entry, strides: Mapping[str, Shape], extents: Mapping[str, int]
    ) -> Callable[..., None]:
        which, origins, params = self._indices(entry)
        flat = [s for name in entry.buffers for s in strides[name]]
        sizes = [extents[a] for a in entry.extents]

        def launch(tensors: list[Tensor], origin: Sequence[int], values: Sequence[float]) -> None:
            function([tensors[n] for n in which], flat, sizes, [origin[n] for n in origins], [values[n] for n in params])

        return launch

    def _indices(self, entry: Entry) -> tuple[list[int], list[int], list[int]]:
        order = (*self.given, *self.made)
        return (
            [order.index(name) for name in entry.buffers],
            [self.axes.index(a if a in self.axes else original(a)) for a in entry.origins],
            [self.params.index(p) for p in entry.params],
        )


def axis_strides(tensor: Tensor, dims: Dims, extents: Mapping[str, int]) -> Shape:
    """One stride per axis, in order: within a dimension an axis steps over the ones after it."""
    found: list[int] = []
    for dim, stride in zip(dims, tensor.stride(), strict=True):
        found.extend(stride * math.prod(extents[a] for a in dim[n + 1 :]) for n in range(len(dim)))
    return tuple(found)


def dims_shape(dims: Dims, extents: Mapping[str, int]) -> Shape:
    return tuple(math.prod(extents[a] for a in dim) for dim in dims)


def contiguous_strides(buffer: Buffer, extents: Mapping[str, int]) -> Shape:
    shape = [extents[a] for a in buffer.axes]
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


def _ints(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
