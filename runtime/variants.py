"""The generated variants of a kernel: one for each target, dtypes, compiled-in params, extents of whole axes and sizes of tiles.

A variant is found in the process, else restored from the disk cache without the compiler, else made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler import ir
from ..compiler.blocks import SMALL
from . import pickling
from .arguments import INTS, TORCH_DTYPES, Bound, Call
from .build import BUFFER_DTYPES, ProgramRecord, cache_key, generate
from .cache import disk_cache
from .launch import Dims, Program, dims_shape
from .reference import outside_dtype
from .registry import VARIANTS

if TYPE_CHECKING:
    from ..compiler.pipeline import Lowered
    from .kernel import Kernel

NAMES = {dtype: name for name, dtype in BUFFER_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Unfused:
    """Why no generated kernel runs. ``extents`` it depends on; none: whatever the extents are."""

    reasons: tuple[str, ...]
    extents: tuple[tuple[str, int], ...] = ()

    def fits(self, extents: Mapping[str, int]) -> bool:
        return all(extents[a] == n for a, n in self.extents)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a family of variants is made for. ``dtypes`` are those of the inputs, in declared order."""

    target: str
    dtypes: tuple[str, ...]
    promoted: str
    params: tuple[tuple[str, int | bool], ...]


@dataclass(frozen=True, slots=True)
class Extents:
    """What a variant's code takes for granted of a call: the extents of ``whole`` axes, and which tiled axes are ``small``."""

    whole: tuple[tuple[str, int], ...]
    small: tuple[tuple[str, bool], ...]

    def fits(self, extents: Mapping[str, int]) -> bool:
        return all(extents[a] == n for a, n in self.whole) and all((extents[a] <= SMALL) == small for a, small in self.small)


@dataclass(frozen=True, slots=True)
class Dependence:
    """The axes whose extents make a difference to a kernel's code."""

    whole: tuple[str, ...]
    tiled: tuple[str, ...] = ()

    def of(self, extents: Mapping[str, int]) -> Extents:
        return Extents(tuple((a, extents[a]) for a in self.whole), tuple((a, extents[a] <= SMALL) for a in self.tiled))


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """A variant as the cache keeps it. ``extents`` are those compiled in, ``made_for`` those of the call that it was made for;
    ``inputs`` is the order of the tensors of a call."""

    chosen: Chosen
    extents: Extents
    reasons: tuple[str, ...]
    outside: tuple[tuple[str, ir.Node], ...]
    inputs: tuple[str, ...]
    saved: tuple[str, ...]
    cotangents: tuple[tuple[str, str], ...]
    gradients: tuple[tuple[str, str], ...]
    differentiable: tuple[str, ...]
    forward: ProgramRecord
    made_for: tuple[tuple[str, int], ...]


def find_variant(call: Call, target: str) -> Variant | Unfused:
    """The variant for a call on a target, or why there is none."""
    return variant_for(call.kernel, target, call.bound, {name: t.dtype for name, t in call.inputs.items()})


def variant_for(kernel: Kernel, target: str, bound: Bound, given: Mapping[str, torch.dtype]) -> Variant | Unfused:
    """The variant for inputs of these dtypes; those not given are left to their default."""
    chosen = _choose(kernel, target, bound, given)
    known = _search(kernel, chosen, bound.extents)
    if known is None:
        with kernel.families.lock:
            known = _search(kernel, chosen, bound.extents)
            if known is None:
                known = _restore(kernel, chosen, bound.extents) or _make(kernel, chosen, bound.extents)
                kernel.families.found.setdefault(chosen, []).append(known)
    return known


def _choose(kernel: Kernel, target: str, bound: Bound, given: Mapping[str, torch.dtype]) -> Chosen:
    dtypes = tuple([NAMES[generated_dtype(given.get(t.name, _default_dtype(t.dtype, bound.promoted)))] for t in kernel.typed.inputs])
    params = tuple([(name, value) for name, value in bound.params.items() if isinstance(value, int)])
    return Chosen(target, dtypes, NAMES[bound.promoted], params)


def generated_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that generated kernels read for an input: small ints are widened."""
    return torch.int32 if dtype in INTS and dtype not in NAMES else dtype


def _default_dtype(declared: str | None, promoted: torch.dtype) -> torch.dtype:
    return promoted if declared is None else TORCH_DTYPES[declared]


def _search(kernel: Kernel, chosen: Chosen, extents: Mapping[str, int]) -> Variant | Unfused | None:
    return next((v for v in kernel.families.found.get(chosen, ()) if v.fits(extents)), None)


def _restore(kernel: Kernel, chosen: Chosen, extents: Mapping[str, int]) -> Variant | Unfused | None:
    """From the disk cache: first which extents matter, then the variant for them."""
    dependence = _stored(kernel, "dependence", chosen)
    if not isinstance(dependence, Dependence):
        return None
    found = _stored(kernel, "variant", chosen, dependence.of(extents))
    if isinstance(found, VariantRecord):
        return Variant(kernel, found)
    return found if isinstance(found, Unfused) else None


def _make(kernel: Kernel, chosen: Chosen, extents: Mapping[str, int]) -> Variant | Unfused:
    unsupported = [t.dtype for t in kernel.typed.outputs if t.dtype is not None and t.dtype not in BUFFER_DTYPES and t.dtype != "int"]
    if unsupported:
        return Unfused((f"an output is declared {unsupported[0]}, which generated kernels do not write",))
    lowered = lower_for(kernel, chosen, extents)
    made: VariantRecord | Unfused
    if lowered.forward is None:
        made = _unfused(kernel, chosen, extents, lowered)
        dependence = Dependence(tuple(a for a, _ in made.extents))
    else:
        kept = {a for plan in (lowered.forward, _full_backward(lowered)) for k in plan.kernels for a in k.whole}
        tiled = lowered.tiled if chosen.target == "c" else set()
        whole, tiles = lowered.named(kept | lowered.by_extent), lowered.named(tiled | lowered.small)
        dependence = Dependence(tuple(sorted(whole)), tuple(sorted(tiles)))
        made = _record(kernel, chosen, lowered, dependence.of(extents), extents)
    _store(kernel, dependence, "dependence", chosen)
    _store(kernel, made, "variant", chosen, dependence.of(extents))
    return Variant(kernel, made, lowered) if isinstance(made, VariantRecord) else made


def lower_for(kernel: Kernel, chosen: Chosen, extents: Mapping[str, int]) -> Lowered:
    from ..compiler.pipeline import Hints, Target, lower

    size = BUFFER_DTYPES[chosen.promoted].itemsize
    return lower(kernel.graph, Target(chosen.target), Hints(chosen.params, tuple(extents.items()), size))


def _full_backward(lowered: Lowered) -> Any:
    return lowered.backward(frozenset(lowered.differentiable)) if lowered.differentiable else lowered.forward


def _unfused(kernel: Kernel, chosen: Chosen, extents: Mapping[str, int], lowered: Lowered) -> Unfused:
    """Whether it is the extents: without them the same kernel may have a plan, and then the reasons hold for these extents only."""
    depends = lower_for(kernel, chosen, {}).forward is not None
    return Unfused(tuple(lowered.reasons), tuple(extents.items()) if depends else ())


def _record(kernel: Kernel, chosen: Chosen, lowered: Lowered, extents: Extents, made_for: Mapping[str, int]) -> VariantRecord:
    assert lowered.forward is not None
    inputs = (*kernel.input_names, *lowered.outside)
    dtypes = concrete_dtypes(kernel, chosen, lowered)
    forward = generate(kernel, lowered.forward, chosen.target, dtypes, dict(extents.whole), dict(chosen.params))
    return VariantRecord(
        chosen,
        extents,
        tuple(lowered.reasons),
        tuple(lowered.outside.items()),
        inputs,
        tuple(lowered.saved),
        tuple(lowered.cotangents.items()),
        tuple(lowered.gradients.items()),
        tuple(lowered.differentiable),
        forward,
        tuple(made_for.items()),
    )


def backend_of(target: str) -> str:
    return "c" if target == "c" else "triton"


def concrete_dtypes(kernel: Kernel, chosen: Chosen, lowered: Lowered) -> dict[str, str]:
    """The dtypes of what a caller passes and gets, by buffer; "input" is the promoted floating one."""
    found = {"input": chosen.promoted, **dict(zip(kernel.input_names, chosen.dtypes, strict=True))}
    found.update((name, NAMES[outside_dtype(node)]) for name, node in lowered.outside.items())
    for tensor in kernel.typed.outputs:
        if tensor.dtype is not None:
            found[tensor.name] = "int64" if tensor.dtype == "int" else tensor.dtype
        elif tensor.name in kernel.graph.states:
            found[tensor.name] = "float32"
        if tensor.name in lowered.cotangents:
            found[lowered.cotangents[tensor.name]] = found.get(tensor.name, chosen.promoted)
    found.update((buffer, found[name]) for name, buffer in lowered.gradients.items())
    return found


def _stored(kernel: Kernel, kind: str, *parts: object) -> Any:
    data = disk_cache().read("variants", cache_key(kernel, kind, *parts))
    if data is None:
        return None
    try:
        return pickling.restore(data)
    except pickling.DAMAGED:
        return None


def _store(kernel: Kernel, value: object, kind: str, *parts: object) -> None:
    with suppress(RecursionError):  # nested deeper than can be stored: made again next time
        disk_cache().write("variants", cache_key(kernel, kind, *parts), pickling.dump(value))


class Variant:
    """The generated kernels of one kernel for one choice, forward and backward. Made of a record; loads and builds by need."""

    def __init__(self, kernel: Kernel, record: VariantRecord, lowered: Lowered | None = None) -> None:
        self.kernel = kernel
        self.record = record
        self.reasons = record.reasons
        self.outside = dict(record.outside)
        self.inputs = record.inputs
        self.axes = tuple(a.name for a in kernel.typed.axes)
        self.no_origin = [0] * len(self.axes)
        self.float_params = tuple(p.name for p in kernel.typed.params if p.kind == "float")
        self.outputs = kernel.output_names
        self.output_count = len(self.outputs)
        self.key = f"{kernel.name}_{record.chosen.target}_{cache_key(kernel, record.chosen, record.extents)[:16]}"
        self.differentiable_inputs = [name in record.differentiable for name in record.inputs]
        results = (*self.outputs, *(n for n in record.saved if n not in self.outputs and n not in self.inputs))
        self._results = results
        self._saved = tuple(n for n in record.saved if n not in self.inputs)
        self.saved_results = tuple(results.index(n) for n in self._saved)
        self._dims = {t.name: t.dims for t in (*kernel.typed.inputs, *kernel.typed.outputs)}
        self._cotangents = dict(record.cotangents)
        self._gradients = dict(record.gradients)
        self._lowered = lowered
        self._backward: dict[frozenset[str], Program] = {}
        VARIANTS[self.key] = self

    def fits(self, extents: Mapping[str, int]) -> bool:
        return self.record.extents.fits(extents)

    def forward(self, tensors: Sequence[Tensor], params: Sequence[float], extents: Sequence[int], origin: Sequence[int]) -> list[Tensor]:
        """The outputs, then what is saved besides."""
        program = self.forward_program
        made = program.run([_readable(tensors[n]) for n in self._forward_given], extents, origin, params, tensors[0].device)
        return [made[name] for name in self._results]

    def empty_results(self, extents: Sequence[int], device: torch.device) -> list[Tensor]:
        """What ``forward`` returns, without its numbers."""
        sizes = dict(zip(self.axes, extents, strict=True))
        program = self.forward_program
        return [torch.empty(program.made_shape(n, sizes), dtype=program.dtypes[n], device=device) for n in self._results]

    def backward(
        self,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
        params: Sequence[float],
        extents: Sequence[int],
        origin: Sequence[int],
    ) -> list[Tensor]:
        """The gradients of the wanted inputs, in their order and shapes."""
        names = [name for name, want in zip(self.inputs, wanted, strict=True) if want]
        program = self.backward_program(frozenset(names))
        known = dict(zip((*self.inputs, *self._saved), (*tensors, *saved), strict=True))
        for name, cotangent in zip(self.outputs, cotangents, strict=True):
            buffer = self._cotangents.get(name)
            if buffer in program.buffers:
                known[buffer] = self._zero(name, buffer, program, extents, tensors[0].device) if cotangent is None else cotangent
        given = [_readable(known[name]) for name in program.given]
        made = program.run(given, extents, origin, params, tensors[0].device)
        return [made[self._gradients[name]] for name in names]

    @cached_property
    def forward_program(self) -> Program:
        return Program(self.record.forward, self._dims, self.axes, self.float_params, self.inputs)

    @cached_property
    def _forward_given(self) -> list[int]:
        return [self.inputs.index(name) for name in self.forward_program.given]

    def backward_program(self, wanted: frozenset[str]) -> Program:
        """The program that computes the gradients of exactly these inputs."""
        found = self._backward.get(wanted)
        if found is None:
            with self.kernel.families.lock:
                found = self._backward.get(wanted)
                if found is None:
                    given = (*self.inputs, *self._saved, *self._cotangents.values())
                    record = self._backward_record(wanted)
                    found = self._backward[wanted] = Program(record, self._backward_dims(), self.axes, self.float_params, given)
        return found

    def lowered(self) -> Lowered:
        """The compiler's view of the variant, made again where the variant came from the cache: for the same extents, as plans follow from
        all of them."""
        if self._lowered is None:
            self._lowered = lower_for(self.kernel, self.record.chosen, dict(self.record.made_for))
        return self._lowered

    def _backward_record(self, wanted: frozenset[str]) -> ProgramRecord:
        chosen, extents = self.record.chosen, self.record.extents
        parts = ("backward", chosen, extents, self.record.made_for, sorted(wanted))
        stored = _stored(self.kernel, *parts)
        if isinstance(stored, ProgramRecord):
            return stored
        lowered = self.lowered()
        plan = lowered.backward(wanted)
        if lowered.named(a for k in plan.kernels for a in k.whole) - dict(extents.whole).keys():
            return self._backward_record(frozenset(self.record.differentiable))  # of that axis the extent is not compiled in
        dtypes = concrete_dtypes(self.kernel, chosen, lowered)
        made = generate(self.kernel, plan, chosen.target, dtypes, dict(extents.whole), dict(chosen.params))
        _store(self.kernel, made, *parts)
        return made

    def _backward_dims(self) -> dict[str, Dims]:
        found = dict(self._dims)
        found.update((buffer, self._dims[name]) for name, buffer in self.record.cotangents)
        found.update((buffer, self._dims[name]) for name, buffer in self.record.gradients if name in self._dims)
        return found

    def _zero(self, name: str, buffer: str, program: Program, extents: Sequence[int], device: torch.device) -> Tensor:
        """The cotangent of an output that the loss does not use: one zero, expanded."""
        shape = dims_shape(self._dims[name], dict(zip(self.axes, extents, strict=True)))
        return torch.zeros((), dtype=program.dtypes[buffer], device=device).expand(shape)


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in NAMES else tensor.to(generated_dtype(tensor.dtype))
