"""Kernels made of another one's equations: the same calls, another way to compute them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cache import digest
from .kernel import Kernel, SpecFile

if TYPE_CHECKING:
    from ..compiler import ir
    from ..dsl import typed


class DerivedKernel(Kernel):
    """``base`` by the equations of ``made``. A subclass is constructed from its base alone."""

    def __init__(self, base: Kernel, made: ir.Graph, mark: str) -> None:
        """``mark`` tells the kernels derived from one base apart."""
        self._base, self._made = base, made
        axes = tuple(a.name for a in made.kernel.axes)
        head = base.header()._replace(identity=digest(base.identity, mark), axes=axes)
        super().__init__(head, SpecFile(base.file.filename, base.spec))

    @property
    def typed(self) -> typed.Kernel:
        """The declaration that the derived equations are written for."""
        return self._made.kernel

    @property
    def graph(self) -> ir.Graph:
        """The derived equations."""
        return self._made

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._base,)
