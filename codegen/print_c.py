"""Plan -> one C file: C11 with OpenMP and vector extensions, an entry for each kernel.

A program (a grid point and a tile of rows) keeps its tiles in arrays of its own, so nothing is shared between threads and
results do not depend on their number. Matrix products go through one register-blocked function; everything pointwise
between two products is fused into loops that the compiler vectorises.
"""

from __future__ import annotations

from ..compiler.plan import Plan
from .c_kernel import KernelPrinter
from .c_library import library, template
from .c_shared import SharedPrinter, may_be_shared, share_out
from .source import Module, Specialization


def print_c(plan: Plan, spec: Specialization, spec_text: str = "", filename: str = "spec.weft", version: str = "") -> Module:
    """The C source of a plan. ``spec_text`` goes into the header and beside the statements that it explains."""
    functions: set[str] = set()
    printed, kernels = [], []
    for kernel in plan.kernels:
        printer = KernelPrinter(kernel, plan, spec, spec_text, filename, functions)
        program = printer.print_program()
        shared = None
        if may_be_shared(kernel, dict(spec.extents)):
            shared = share_out(printer, SharedPrinter(kernel, plan, spec, spec_text, filename, set()))
            functions |= shared.functions if shared is not None else set()
        printed.append(printer)
        kernels.append(printer.render(program, shared))
    header = [f"{plan.direction} pass, written by weft {version}".rstrip() + "."]
    if spec_text:
        header += ["", *spec_text.rstrip().splitlines()]
    text = template("module.c.jinja").render(header=[h.rstrip() for h in header], functions=library(functions), kernels=kernels)
    clean = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    return Module("c", clean, tuple(p.entry for p in printed))
