"""Kernels made of another one's equations: the same calls, another way to compute them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self, cast

from .cache import digest
from .kernel import Kernel, SpecFile

if TYPE_CHECKING:
    from ..compiler import ir
    from ..dsl import typed


class DerivedKernel(Kernel):
    """``base`` by other equations."""

    refusal: ClassVar[type[Exception]]
    """What ``derive`` raises where there are none."""

    def __init__(self, base: Kernel) -> None:
        self._base = base
        self._made, mark = self.derive(base)
        made = self._made
        axes = tuple(a.name for a in made.kernel.axes)
        inputs = tuple(t.name for t in made.kernel.inputs)
        head = base.header()._replace(identity=digest(base.identity, mark), axes=axes, inputs=inputs)
        super().__init__(head, SpecFile(base.file.filename, base.spec))

    def derive(self, base: Kernel) -> tuple[ir.Graph, str]:
        """The equations, and a mark that tells the kernels derived from one base apart."""
        raise NotImplementedError

    @property
    def typed(self) -> typed.Kernel:
        """The declaration that the derived equations are written for."""
        return self._made.kernel

    @property
    def graph(self) -> ir.Graph:
        """The derived equations."""
        return self._made

    @classmethod
    def of(cls, kernel: Kernel) -> Self | str:
        """The one made of a kernel, once in a process; or why there is none."""
        known = kernel.families.derived
        if cls not in known:
            with kernel.families.lock:
                if cls not in known:
                    try:
                        known[cls] = cls(kernel)
                    except cls.refusal as error:
                        known[cls] = str(error)
        return cast("Self | str", known[cls])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._base,)
