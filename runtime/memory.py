"""Memory for large tensors on CPUs: in large pages, and kept for the next tensor when one is freed.

The system hands out memory page by page, each cleared when it is first written. For large outputs and gradients that costs more than
to write them, and a training step frees and asks for the same sizes again and again. So what a large tensor leaves behind is kept, up to
``KEPT`` bytes, as PyTorch's allocator does on GPUs, and is asked for in pages of 2 MiB where the system has them.

Such a tensor is like any other, but that PyTorch cannot resize its storage.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KEPT", "LEAST", "Pool", "allocate", "release_memory"]

LEAST = 4 << 20
"""Bytes from which on a tensor has its own pages."""
KEPT = 1 << 30
"""Bytes that are kept at most."""
SLACK = 4
"""A tensor takes kept memory of up to 1 + 1/SLACK times its size."""
PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class Pages:
    """``size`` bytes of memory from ``start`` on, where a large page begins."""

    memory: mmap.mmap
    start: int
    size: int


class Pool:
    """Memory that tensors left behind, the oldest first.

    Nobody waits for the lock: memory is given back wherever the last reference to a tensor goes, which may be within ``take`` itself. Who
    does not get the lock asks the system, or leaves the memory to it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[Pages] = []
        self._lock = threading.Lock()

    @property
    def kept(self) -> int:
        """Bytes that no tensor has."""
        return sum(pages.size for pages in self._kept)

    def take(self, size: int) -> Pages:
        """Memory for ``size`` bytes: the smallest kept that will do, or new. Raises ``OSError`` where the system has none."""
        size = -(-size // PAGE) * PAGE
        if self._lock.acquire(blocking=False):
            try:
                fitting = [p for p in self._kept if size <= p.size <= size + size // SLACK]
                if fitting:
                    found = min(fitting, key=lambda p: p.size)
                    self._kept.remove(found)
                    return found
                while self._kept and self.kept + size > self.limit:  # sizes that are not asked for any more
                    del self._kept[0]
            finally:
                self._lock.release()
        return fresh(size)

    def give_back(self, pages: Pages) -> None:
        """Keeps memory that no tensor has any more, if there is room for it."""
        if self._lock.acquire(blocking=False):
            try:
                if self.kept + pages.size <= self.limit:
                    self._kept.append(pages)
            finally:
                self._lock.release()

    def release(self) -> None:
        """Leaves what is kept to the system."""
        with self._lock:
            kept, self._kept = self._kept, []
        del kept

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor whose elements are whatever was there. Raises ``OSError`` where the system has no memory."""
        count = math.prod(shape)
        pages = self.take(count * dtype.itemsize)
        view = memoryview(pages.memory)
        found = torch.frombuffer(view, dtype=dtype, count=count, offset=pages.start).view(shape)
        weakref.finalize(view, self.give_back, pages).atexit = False  # the tensor's storage has the view
        return found


def fresh(size: int) -> Pages:
    """New memory, aligned to large pages and asked for in them."""
    memory = mmap.mmap(-1, size + PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return Pages(memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE, size)


_pool = Pool(KEPT)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, for tensors that kernels are about to fill."""
    large = device.type == "cpu" and math.prod(shape) * dtype.itemsize >= LEAST
    if large and not torch.are_deterministic_algorithms_enabled():  # which may fill what torch.empty returns
        with contextlib.suppress(OSError):  # torch.empty will say it better
            return _pool.tensor(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def release_memory() -> None:
    """Returns to the system what weft keeps of freed tensors on CPUs: at most 1 GiB, kept because new memory is slow to write to first."""
    _pool.release()
