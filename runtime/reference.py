"""The reference as a path of execution: a call, or what a plan leaves outside, evaluated in PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler import ir
from ..compiler.reference import evaluate, evaluate_nodes
from .arguments import Call

if TYPE_CHECKING:
    from .variants import Variant


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Operands have been cast by then: PyTorch must not cast what the language leaves alone."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def evaluate_call(call: Call) -> list[Tensor]:
    """The outputs in declared order, then the final values of the states where they are asked for."""
    with without_autocast(call.bound.device):
        graph, bound = call.kernel.graph, call.bound
        if not call.return_final:
            outputs = evaluate(graph, call.inputs, bound.params, bound.extents, origin=call.origin, initial=call.initial)
            return list(outputs.values())
        outputs, finals = evaluate(
            graph, call.inputs, bound.params, bound.extents, origin=call.origin, initial=call.initial, return_final=True
        )
        return [*outputs.values(), *(finals[s] for s in call.kernel.states)]


def evaluate_outside(call: Call, variant: Variant) -> dict[str, Tensor]:
    """The values that a fused part takes as inputs: real ones in float32, whatever PyTorch computed them in."""
    with without_autocast(call.bound.device):
        nodes = list(variant.outside.values())
        values = evaluate_nodes(call.kernel.graph, nodes, call.inputs, call.bound.params, call.bound.extents, origin=call.origin)
    return {name: value.to(outside_dtype(node)) for (name, node), value in zip(variant.outside.items(), values, strict=True)}


def outside_dtype(node: ir.Node) -> torch.dtype:
    return torch.bool if node.kind == "bool" else torch.int64 if node.kind == "int" else torch.float32
