"""Autocast: under ``torch.autocast`` the operands of contractions are cast, and nothing else is.

An operand is an input that stands as a factor of a summed product and has a summed axis, or whose partner has: q and k of
``sum[d](q * k)``, v of ``sum[j](w * v)``. Gates, biases and states keep their dtype.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..compiler import ir
from .arguments import FLOATS, Call, promoted_dtype


def cast_operands(call: Call) -> Call:
    """The call with its operands of contractions in the autocast dtype, where autocast is on."""
    device = call.bound.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)
    operands = call.kernel.contraction_inputs
    inputs = {
        name: t.to(dtype) if name in operands and t.dtype in FLOATS and t.dtype != torch.float64 else t for name, t in call.inputs.items()
    }
    return replace(call, inputs=inputs, bound=replace(call.bound, promoted=promoted_dtype(inputs), variants={}))


def contraction_inputs(graph: ir.Graph) -> frozenset[str]:
    """The inputs that are operands of a contraction."""
    roots = [*graph.outputs.values(), *(u for s in graph.states.values() for u in s.updates)]
    found: set[str] = set()
    for node in ir.topological(roots):
        if isinstance(node, ir.Reduce) and node.op == "sum":
            factors = [f for f in _factors(node.x) if set(f.axes) & set(node.over)]
            if len(factors) > 1:
                found.update(f.name for f in factors if isinstance(f, ir.Input))
    return frozenset(found)


def _factors(node: ir.Node) -> list[ir.Node]:
    """The factors of a product; a read of an input at other positions counts as the input."""
    found: list[ir.Node] = []
    stack = [node]
    while stack:
        match stack.pop():
            case ir.Pointwise(op="mul", args=args):
                stack.extend(args)
            case ir.Read(x=ir.Input() as x):
                found.append(x)
            case other:
                found.append(other)
    return found
