"""A kernel at every stage as text: for `weft show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..compiler.show_graph import show_graph, show_outputs

if TYPE_CHECKING:
    from ..compiler.pipeline import Lowered
    from ..compiler.plan import Plan
    from .kernel import Kernel
    from .problem import Problem

What = Literal["equations", "graph", "plan", "source"]
Part = Literal["forward", "backward"]


class UnknownPass(ValueError):
    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"there is no pass {name!r} for this kernel and target. The passes are {', '.join(known)}.")


class NothingFused(ValueError):
    def __init__(self, kernel: str, target: str, what: str, reasons: Sequence[str]) -> None:
        why = "".join(f"\n  - {reason}" for reason in reasons)
        super().__init__(f"{kernel}: there is no {what} for {target}, because the kernel runs as PyTorch there:{why}")


class NoLongForm(ValueError):
    def __init__(self, kernel: str, target: str, why: str) -> None:
        super().__init__(f"{kernel}: long calls for {target} run like short ones: {why}. Leave out --long.")


def long_form(kernel: Kernel, target: str, extents: Mapping[str, int], params: Mapping[str, Any]) -> tuple[Kernel, Problem]:
    """What long calls of a kernel run on, and its problem: a recurrence where its sums separate, in chunks of steps on GPUs.

    Raises ``NoLongForm`` where there is none.
    """
    from .chunked import chunks_of, posed_in_chunks
    from .dual import DualKernel, posed_as_dual
    from .problem import Usual, pose

    problem = pose(kernel.graph, extents, params, Usual())
    separated = DualKernel.of(kernel) if not kernel.states else kernel
    if isinstance(separated, str):
        raise NoLongForm(kernel.name, target, separated)
    posed: tuple[Kernel, Problem] | None = (kernel, problem) if kernel.states else posed_as_dual(kernel, problem)
    if posed is not None and target != "c":
        chunks = chunks_of(separated)
        if isinstance(chunks, str):
            raise NoLongForm(kernel.name, target, chunks)
        posed = posed_in_chunks(*posed)
    if posed is None or posed[0] is kernel:
        raise NoLongForm(kernel.name, target, "steps are taken one by one" if kernel.states else "the sizes are too small, or not the same")
    return posed


def text(
    kernel: Kernel,
    what: What,
    *,
    after: str | None = None,
    target: str = "c",
    part: Part = "forward",
    dtype: str = "float32",
    extents: Mapping[str, int] | None = None,
    params: Mapping[str, Any] | None = None,
    long: bool = False,
) -> str:
    """What a kernel is at one stage; ``long``: what long calls run on. Raises ``NothingFused`` where there is no plan or source,
    ``UnknownPass`` for ``after``, and ``NoLongForm``."""
    if long:
        kernel, problem = long_form(kernel, target, extents or {}, params or {})
        extents, params = problem.extents, problem.params
    options: dict[str, Any] = {"target": target, "dtype": getattr(torch, dtype), "extents": extents or {}, "params": params or {}}
    if after is None and what == "equations":
        return equations(kernel)
    if after is None and what == "graph":
        return show_graph(kernel.graph)
    lowered = kernel.lowered(**options)
    if after is not None:
        return _after(lowered, after, part)
    if lowered.forward is None:
        raise NothingFused(kernel.name, target, what, lowered.reasons)
    if what == "plan":
        return str(_plan(lowered, part))
    return kernel.source("c" if target == "c" else "triton", part, **options)


def equations(kernel: Kernel) -> str:
    """The lines of the spec that define the kernel."""
    span = kernel.typed.span
    lines = kernel.spec.text.split("\n")
    start = span.line - 1
    stop = next((n for n in range(start + 1, len(lines)) if lines[n] and not lines[n][0].isspace() and lines[n][0] not in "#)"), len(lines))
    return "\n".join(lines[start:stop]).rstrip() + "\n"


def _after(lowered: Lowered, name: str, part: Part) -> str:
    """The graph or plan after one pass; ``list`` names the passes."""
    if name == "list":
        return "\n".join(lowered.passes) + "\n"
    if name not in lowered.passes:
        raise UnknownPass(name, list(lowered.passes))
    found = lowered.passes[name]
    if name == "build":
        return show_graph(lowered.graph)
    if isinstance(found, Mapping):
        derived = name in ("differentiate", "exchange")
        named = {lowered.gradients.get(n, f"d_{n}"): node for n, node in found.items()} if derived else found
        return show_outputs(named, lowered.graph.names)
    return str(_plan(lowered, part))


def _plan(lowered: Lowered, part: Part) -> Plan:
    assert lowered.forward is not None
    return lowered.forward if part == "forward" else lowered.backward(frozenset(lowered.differentiable))
