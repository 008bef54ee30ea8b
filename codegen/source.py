"""What a printer is asked for and what it delivers. Nothing here prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Specialization:
    """What is compiled into the source: everything else is an argument of the call.

    ``dtypes`` gives every buffer of the plan its concrete dtype (float32, float16, bfloat16, int32, int64, bool);
    ``extents`` the extents of the axes that some kernel keeps whole; ``params`` the int and bool params.
    """

    dtypes: tuple[tuple[str, str], ...]
    extents: tuple[tuple[str, int], ...]
    params: tuple[tuple[str, int | bool], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel of a module and the order of what it is called with.

    C: ``void NAME(void *const *tensors, const int64_t *strides, const int64_t *extents, const int64_t *origins, const double *params)``
    where ``strides`` holds, for each tensor of ``buffers`` in turn, one element stride per axis of the buffer, in its order.
    Triton: ``launch_NAME(tensors, strides, extents, origins, params)`` in the generated file, same order, Python sequences.
    """

    name: str
    buffers: tuple[str, ...]
    extents: tuple[str, ...]
    origins: tuple[str, ...]
    params: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Module:
    """A generated source file: self-contained, one entry per kernel of the plan, in order of launch."""

    backend: str
    text: str
    entries: tuple[Entry, ...]
