"""Tensors -> pointers and strides -> kernels.

A buffer of a plan has one stride per axis, while a tensor has one per dimension: the axes of a composite dimension
get theirs from the dimension's, so that any view of a tensor is read where it lies, without a copy.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..compiler.plan import Buffer
from .build import BUFFER_DTYPES, Launch, ProgramRecord, load_program

Dims = tuple[tuple[str, ...], ...]

_REMEMBERED = 64
"""Different extents for which sizes and strides are kept."""
ALLOCATED = ("output", "saved", "temporary", "gradient")


@dataclass(frozen=True, slots=True)
class Sized:
    """What a program's memory is for given extents: by buffer its shape by axes and its contiguous strides."""

    shapes: dict[str, tuple[int, ...]]
    strides: dict[str, tuple[int, ...]]
    extents: tuple[tuple[int, ...], ...]


class Program:
    """One generated module, ready to run. ``dims`` are the declared dimensions of the tensors that have some."""

    def __init__(self, record: ProgramRecord, dims: Mapping[str, Dims]) -> None:
        self.record = record
        self.buffers = {b.name: b for b in record.buffers}
        self.dtypes = {name: BUFFER_DTYPES[dtype] for name, dtype in record.dtypes}
        self._dims = {b.name: dims.get(b.name, tuple((a,) for a in b.axes)) for b in record.buffers}
        self._sized: dict[tuple[int, ...], Sized] = {}

    @cached_property
    def functions(self) -> tuple[Launch, ...]:
        return load_program(self.record)

    def run(
        self, tensors: dict[str, Tensor], extents: Mapping[str, int], origin: Mapping[str, int], params: Mapping[str, float], device: torch.device
    ) -> None:
        """Runs every kernel. ``tensors`` must hold what is read and is completed by what is allocated and written."""
        sized = self._size(extents)
        strides = sized.strides.copy()
        for name in self.buffers:
            if name in tensors:
                strides[name] = axis_strides(tensors[name], self._dims[name], extents)
            else:
                tensors[name] = torch.empty(sized.shapes[name], dtype=self.dtypes[name], device=device)
        call = self._call_c if self.record.backend == "c" else self._call_triton
        for function, entry, sizes in zip(self.functions, self.record.entries, sized.extents, strict=True):
            flat = [s for name in entry.buffers for s in strides[name]]
            call(function, [tensors[n] for n in entry.buffers], flat, sizes, [origin[a] for a in entry.origins], [params[p] for p in entry.params])

    @staticmethod
    def _call_c(
        function: Launch, tensors: list[Tensor], strides: Sequence[int], extents: Sequence[int], origins: Sequence[int], params: Sequence[float]
    ) -> None:
        pointers = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
        function(pointers, _ints(strides), _ints(extents), _ints(origins), (ctypes.c_double * len(params))(*params))

    @staticmethod
    def _call_triton(
        function: Launch, tensors: list[Tensor], strides: Sequence[int], extents: Sequence[int], origins: Sequence[int], params: Sequence[float]
    ) -> None:
        if tensors[0].is_cuda:
            with torch.cuda.device(tensors[0].device):
                function(tensors, strides, extents, origins, params)
        else:
            function(tensors, strides, extents, origins, params)

    def _size(self, extents: Mapping[str, int]) -> Sized:
        key = tuple(extents.values())
        found = self._sized.get(key)
        if found is None:
            shapes = {b.name: buffer_shape(b, extents) for b in self.buffers.values() if b.role in ALLOCATED}
            strides = {name: contiguous_strides(shape) for name, shape in shapes.items()}
            sizes = tuple(tuple(extents[a] for a in entry.extents) for entry in self.record.entries)
            if len(self._sized) >= _REMEMBERED:
                self._sized.clear()
            found = self._sized[key] = Sized(shapes, strides, sizes)
        return found


def axis_strides(tensor: Tensor, dims: Dims, extents: Mapping[str, int]) -> tuple[int, ...]:
    """One stride per axis, in order: within a dimension an axis steps over the ones after it."""
    found: list[int] = []
    for dim, stride in zip(dims, tensor.stride(), strict=True):
        if len(dim) == 1:
            found.append(stride)
        else:
            found.extend(stride * math.prod(extents[a] for a in dim[n + 1 :]) for n in range(len(dim)))
    return tuple(found)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


def buffer_shape(buffer: Buffer, extents: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(extents[a] for a in buffer.axes)


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
