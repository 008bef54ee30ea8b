"""What recorded graphs name: every kernel and every generated variant of the process, by key.

A key holds a hash of the equations and of the compiler, so it means the same in every process. Entries stay: a graph may
be run as long as the process lives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kernel import Kernel
    from .variants import Variant

KERNELS: dict[str, Kernel] = {}
VARIANTS: dict[str, Variant] = {}
