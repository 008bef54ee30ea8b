"""Large tensors on CPUs in large pages.

A fresh tensor costs a page fault for every 4 KiB when it is first written: more, for large outputs and gradients, than to write it. Where
the system leaves the choice to programs (``madvise``), memory that kernels are about to fill is asked for in pages of 2 MiB.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LEAST = 4 << 20
"""Bytes of a tensor that is worth it."""
PAGE = 4096
_ADVICE = 14
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def advise(tensor: Tensor) -> None:
    """Asks for large pages for a tensor that was just allocated. Does nothing where there are none."""
    size = tensor.nbytes
    if size < LEAST:
        return
    call = _madvise()
    if call is not None:
        start = tensor.data_ptr()
        first = -(-start // PAGE) * PAGE
        call(first, (start + size) // PAGE * PAGE - first, _ADVICE)  # a hint: what it returns does not matter


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not _SETTING.exists() or "[madvise]" not in _SETTING.read_text():
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
