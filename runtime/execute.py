"""Runs one call: generated kernels where there are some, the reference around them and in their place; strict calls say why instead."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import errors, operators
from .arguments import Call
from .autocast import cast_operands
from .backends import Unavailable, choose_target
from .operators import traced_call
from .reference import evaluate_call, evaluate_outside
from .transforms import guarded, refuse_transforms
from .variants import Unfused, Variant, find_variant

__all__ = ["execute", "traced_call"]

ASKED = "backend='reference' was asked for"
FLOAT64 = "the inputs are float64, and generated kernels compute in float32"
SHORT = 128
"""Sequences shorter than this are not worth a look at whether their sums separate."""
FIXED = "an origin is given along an axis that is read at a position which the spec names"
RENAMED = "an origin is given along an axis by whose other name a state is read"
NO_INPUTS = "there is no input whose device it could run on"


def execute(call: Call, tracing: bool = False) -> list[Tensor]:
    """The outputs of a call in declared order, then the final values of the states where they are asked for.

    ``tracing``: a compiler is recording, so what runs as PyTorch is one operator instead of its many.
    """
    watched = operators.is_watched(call.inputs.values())
    if watched:
        refuse_transforms(call.kernel.name, call.inputs.values())
        tracing = tracing or operators.is_recording(call.inputs.values())
    call = cast_operands(call)
    found = _in_chunks(call, watched, tracing) or _in_linear_time(call, watched, tracing)
    if found is not None:
        return found
    if (call.initial or call.return_final) and call.backend != "reference":
        return _execute_stateful(call, watched, tracing)
    call, variant = _as_recurrence(call) or (call, _choose(call))
    if isinstance(variant, Unfused):
        if call.strict:
            raise errors.NotFused(call.kernel.name, variant.reasons)
        return _run_reference(call, tracing)
    if call.strict and variant.reasons:
        raise errors.NotFused(call.kernel.name, variant.reasons)
    if 0 in call.bound.extents.values():  # nothing to launch
        return _run_reference(call, tracing)
    return _run_fused(call, variant, watched, tracing)


def _as_recurrence(call: Call) -> tuple[Call, Variant] | None:
    """A long call whose sums separate, as a call of the recurrence, if that is fused whole."""
    if call.backend == "reference" or call.bound.promoted == torch.float64 or max(call.bound.extents.values(), default=0) < SHORT:
        return None
    from .dual import with_dual

    other = with_dual(call)
    if other is call:
        return None
    variant = _choose(other)
    return None if isinstance(variant, Unfused) or variant.reasons else (other, variant)


def _in_chunks(call: Call, watched: bool, tracing: bool) -> list[Tensor] | None:
    """The outputs of a long recurrence on a GPU, in chunks of steps, if those are fused whole."""
    if not call.kernel.states or call.backend in ("c", "reference") or call.bound.promoted == torch.float64:
        return None
    if (call.bound.device.type == "cpu" and call.backend is None) or 0 in call.bound.extents.values():
        return None
    from .chunked import flat_call, joined, split
    from .flat import has_steps_within, taken

    if has_steps_within(call.kernel):
        flat = flat_call(call)
        done = None if flat is None else _in_chunks(flat, watched, tracing)
        return None if done is None else taken(call, done)
    parts = split(call)
    if parts is None:
        return None
    chunks, rest = parts
    if chunks.initial or chunks.return_final:
        from .stateful import with_states

        chunks = with_states(chunks)
    done = _run_whole(chunks, watched, tracing)
    if done is None or rest is None:
        return done
    count = len(call.kernel.output_names)
    states = dict(zip(call.kernel.states, done[count:], strict=True))
    time = next(iter(call.kernel.graph.states.values())).along[0]
    return joined(call.kernel, time, done[:count], execute(replace(rest, initial=states), tracing))


def _in_linear_time(call: Call, watched: bool, tracing: bool) -> list[Tensor] | None:
    """The outputs of a long call on a GPU whose sums separate, as a recurrence in chunks, if that is fused whole."""
    if call.backend == "reference" or call.bound.promoted == torch.float64 or max(call.bound.extents.values(), default=0) < SHORT:
        return None
    if call.kernel.states or 0 in call.bound.extents.values():
        return None
    from .chunked import joined
    from .dual import DualKernel, with_chunks

    parts = with_chunks(call)
    if parts is None:
        return None
    chunks, rest = parts
    done = _run_whole(chunks, watched, tracing)
    if done is None or rest is None:
        return done
    dual = DualKernel.of(call.kernel)
    assert isinstance(dual, DualKernel)
    return joined(call.kernel, dual.dual.query, done, execute(rest, tracing))


def _run_whole(call: Call, watched: bool, tracing: bool) -> list[Tensor] | None:
    """The outputs of a call of a derived kernel, if that is fused whole."""
    variant = _choose(call)
    if isinstance(variant, Unfused) or variant.reasons:
        return None
    return _run_fused(call, variant, watched, tracing)


def _execute_stateful(call: Call, watched: bool, tracing: bool) -> list[Tensor]:
    """A call that passes states in or out: a call of another kernel, if that is fused."""
    from .stateful import with_states

    other = with_states(call)
    variant = _choose(other)
    reasons = variant.reasons
    if call.strict and (reasons or isinstance(variant, Unfused)):
        raise errors.NotFused(call.kernel.name, reasons)
    if isinstance(variant, Unfused) or 0 in call.bound.extents.values():
        return _run_reference(call, tracing)
    return _run_fused(other, variant, watched, tracing)


def _choose(call: Call) -> Variant | Unfused:
    """The generated kernels for a call, or why there are none."""
    if call.origin and call.kernel.states and call.kernel.renamed_axes & {a for a, n in call.origin.items() if n}:
        return Unfused((RENAMED,))
    if call.origin and not call.kernel.states and call.kernel.fixed_axes & {a for a, n in call.origin.items() if n}:
        return Unfused((FIXED,))
    known = call.bound.variants.get(call.backend)
    if known is not None:
        return known
    if call.backend == "reference":
        return Unfused((ASKED,))
    if not call.inputs:
        return Unfused((NO_INPUTS,))
    if call.bound.promoted == torch.float64:
        return Unfused((FLOAT64,))
    target = choose_target(call)
    if isinstance(target, Unavailable):
        return Unfused((target.why,))
    found = find_variant(call, target)
    if isinstance(found, Variant):
        call.bound.variants[call.backend] = found
    return found


def _run_reference(call: Call, tracing: bool) -> list[Tensor]:
    return operators.reference_operator(call) if tracing else evaluate_call(_guarded(call))


def _guarded(call: Call) -> Call:
    name = call.kernel.name
    return replace(call, inputs=guarded(name, call.inputs), initial=guarded(name, call.initial))


def _run_fused(call: Call, variant: Variant, watched: bool, tracing: bool) -> list[Tensor]:
    tensors = call.complete_inputs()
    if variant.outside:
        values = operators.outside_operator(call, variant) if tracing else evaluate_outside(_guarded(call), variant)
        tensors = {**tensors, **values}
    return operators.fused_operator(call, variant, [tensors[name] for name in variant.inputs], watched)
