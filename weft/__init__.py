"""weft: attention, recurrence and mixture-of-experts variants as equations, compiled to fused kernels.

    import weft
    from weft.specs import softmax_attention

    o, l = softmax_attention(q, k, v)

``load`` and ``loads`` make kernels from a file or a text; importing weft also lets ``import`` find ``.weft`` files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .runtime import errors, import_hook
from .runtime.kernel import Kernel
from .runtime.load import Namespace, load, loads
from .runtime.version import __version__

if TYPE_CHECKING:
    from .runtime.check import check_kernel as check
    from .runtime.generated import build
    from .runtime.memory import release_memory

__all__ = ["Kernel", "Namespace", "__version__", "build", "check", "errors", "load", "loads", "release_memory"]

import_hook.install()


def __getattr__(name: str) -> Any:
    match name:
        case "build":
            from .runtime.generated import build

            return build
        case "check":
            from .runtime.check import check_kernel

            return check_kernel
        case "release_memory":
            from .runtime.memory import release_memory

            return release_memory
    raise AttributeError(f"module 'weft' has no attribute {name!r}")
