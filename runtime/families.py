"""The variants that a kernel has in this process, and the lock under which they are made."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .derived import DerivedKernel
    from .packed import PackedKernel
    from .stateful import StatefulKernel
    from .variants import Chosen, Unfused, Variant


class Families:
    """Every variant of one kernel in this process, and the lock under which they are made."""

    def __init__(self) -> None:
        self.found: dict[Chosen, list[Variant | Unfused]] = {}
        self.stateful: dict[tuple[tuple[str, ...], bool], StatefulKernel] = {}
        """The kernel with states as inputs and outputs, by which go in and whether they come out."""
        self.packed: dict[str, PackedKernel] = {}
        """The kernel on packed sequences, by the axis along which they lie."""
        self.derived: dict[type[DerivedKernel], DerivedKernel | str] = {}
        """Other ways to compute the kernel, or why there is none; what is not there was not looked for yet."""
        self._lock = threading.RLock()
        self._owner = os.getpid()

    @property
    def lock(self) -> threading.RLock:
        """A new one in a forked child: the parent's might be held by a thread that does not exist there."""
        if self._owner != os.getpid():
            self._lock, self._owner = threading.RLock(), os.getpid()
        return self._lock
