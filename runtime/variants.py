"""The generated variants of a kernel: one for each target, dtypes, compiled-in params and extents of whole axes.

A variant is found in the process, else restored from the disk cache without the compiler, else made.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler import ir
from . import operators, pickling
from .arguments import INTS, Bound, Call, axis_extents
from .build import BUFFER_DTYPES, ProgramRecord, cache_key, generate
from .cache import disk_cache
from .launch import Dims, Program

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
class VariantRecord:
    """A variant as the cache keeps it. ``whole`` are the extents compiled in; ``inputs`` the order of the tensors of a call."""

    chosen: Chosen
    whole: tuple[tuple[str, int], ...]
    reasons: tuple[str, ...]
    outside: tuple[tuple[str, ir.Node], ...]
    inputs: tuple[str, ...]
    saved: tuple[str, ...]
    cotangents: tuple[tuple[str, str], ...]
    gradients: tuple[tuple[str, str], ...]
    differentiable: tuple[str, ...]
    forward: ProgramRecord


@dataclass(slots=True)
class Families:
    """Every variant of one kernel in this process."""

    found: dict[Chosen, list[Variant | Unfused]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


def find_variant(call: Call, target: str) -> Variant | Unfused:
    """The variant for a call on a target, or why there is none."""
    kernel, bound = call.kernel, call.bound
    chosen = chosen_for(kernel, target, bound, {name: t.dtype for name, t in call.inputs.items()})
    known = _search(kernel, chosen, bound.extents)
    if known is None:
        with kernel.families.lock:
            known = _search(kernel, chosen, bound.extents)
            if known is None:
                known = _restore(kernel, chosen, bound.extents) or _make(kernel, chosen, bound.extents)
                kernel.families.found.setdefault(chosen, []).append(known)
    return known


def chosen_for(kernel: Kernel, target: str, bound: Bound, given: Mapping[str, torch.dtype]) -> Chosen:
    dtypes = tuple([NAMES[generated_dtype(given.get(t.name, _default_dtype(t.dtype, bound.promoted)))] for t in kernel.typed.inputs])
    params = tuple([(name, value) for name, value in bound.params.items() if isinstance(value, int)])
    return Chosen(target, dtypes, NAMES[bound.promoted], params)


def generated_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that generated kernels read for an input: small ints are widened."""
    return torch.int32 if dtype in INTS and dtype not in NAMES else dtype


def _default_dtype(declared: str | None, promoted: torch.dtype) -> torch.dtype:
    from .arguments import TORCH_DTYPES

    return promoted if declared is None else TORCH_DTYPES[declared]


def _search(kernel: Kernel, chosen: Chosen, extents: Mapping[str, int]) -> Variant | Unfused | None:
    return next((v for v in kernel.families.found.get(chosen, ()) if v.fits(extents)), None)


def _restore(kernel: Kernel, chosen: Chosen, extents: Mapping[str, int]) -> Variant | Unfused | None:
    """From the disk cache: first which axes are whole, then the variant for their extents."""
    whole = _stored(kernel, "whole", chosen)
    if not isinstance(whole, tuple):
        return None
    found = _stored(kernel, "variant", chosen, tuple((a, extents[a]) for a in whole))
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
        whole = tuple(a for a, _ in made.extents)
    else:
        whole = tuple(sorted({a for plan in (lowered.forward, _full_backward(lowered)) for k in plan.kernels for a in k.whole}))
        made = _record(kernel, chosen, lowered, tuple((a, extents[a]) for a in whole))
    _store(kernel, whole, "whole", chosen)
    _store(kernel, made, "variant", chosen, tuple((a, extents[a]) for a in whole))
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


def _record(kernel: Kernel, chosen: Chosen, lowered: Lowered, whole: tuple[tuple[str, int], ...]) -> VariantRecord:
    assert lowered.forward is not None
    inputs = (*kernel.input_names, *lowered.outside)
    dtypes = concrete_dtypes(kernel, chosen, lowered)
    forward = generate(kernel, lowered.forward, backend_of(chosen.target), dtypes, dict(whole), dict(chosen.params))
    return VariantRecord(
        chosen,
        whole,
        tuple(lowered.reasons),
        tuple(lowered.outside.items()),
        inputs,
        tuple(lowered.saved),
        tuple(lowered.cotangents.items()),
        tuple(lowered.gradients.items()),
        tuple(lowered.differentiable),
        forward,
    )


def backend_of(target: str) -> str:
    return "c" if target == "c" else "triton"


def concrete_dtypes(kernel: Kernel, chosen: Chosen, lowered: Lowered) -> dict[str, str]:
    """The dtypes of what a caller passes and gets, by buffer; "input" is the promoted floating one."""
    found = {"input": chosen.promoted, **dict(zip(kernel.input_names, chosen.dtypes, strict=True))}
    found.update((name, NAMES[operators.reference.outside_dtype(node)]) for name, node in lowered.outside.items())
    for tensor in kernel.typed.outputs:
        if tensor.dtype is not None:
            found[tensor.name] = "int64" if tensor.dtype == "int" else tensor.dtype
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
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError, ValueError):
        return None


def _store(kernel: Kernel, value: object, kind: str, *parts: object) -> None:
    try:
        disk_cache().write("variants", cache_key(kernel, kind, *parts), pickling.dump(value))
    except RecursionError:  # nested deeper than can be stored: made again next time
        pass


class Variant:
    """The generated kernels of one kernel for one choice, forward and backward. Made of a record; loads and builds by need."""

    def __init__(self, kernel: Kernel, record: VariantRecord, lowered: Lowered | None = None) -> None:
        self.kernel = kernel
        self.record = record
        self.reasons = record.reasons
        self.outside = dict(record.outside)
        self.inputs = record.inputs
        self.axes = tuple(a.name for a in kernel.typed.axes)
        self.float_params = tuple(p.name for p in kernel.typed.params if p.kind == "float")
        self.outputs = kernel.output_names
        self.output_count = len(self.outputs)
        self.key = f"{kernel.name}_{record.chosen.target}_{cache_key(kernel, record.chosen, record.whole)[:16]}"
        self.differentiable_inputs = [name in record.differentiable for name in record.inputs]
        results = (*self.outputs, *(n for n in record.saved if n not in self.outputs and n not in self.inputs))
        self._results = results
        self._saved = tuple(n for n in record.saved if n not in self.inputs)
        self.saved_results = tuple(results.index(n) for n in self._saved)
        self._dims = {t.name: t.dims for t in (*kernel.typed.inputs, *kernel.typed.outputs)}
        self._lowered = lowered
        self._backward: dict[frozenset[str], Program] = {}
        operators.VARIANTS[self.key] = self

    def fits(self, extents: Mapping[str, int]) -> bool:
        return all(extents[a] == n for a, n in self.record.whole)

    def forward(self, tensors: list[Tensor], params: list[float], extents: list[int], origin: list[int]) -> list[Tensor]:
        """The outputs in declared shapes, then what is saved."""
        tensors_by_name = dict(zip(self.inputs, self._readable(tensors), strict=True))
        sizes = dict(zip(self.axes, extents, strict=True))
        self.forward_program.run(tensors_by_name, sizes, self._origin(origin), self._params(params), tensors[0].device)
        return [self._declared(tensors_by_name[name], name, sizes) for name in self._results]

    def empty_outputs(self, extents: list[int], device: torch.device) -> list[Tensor]:
        """What ``forward`` returns, without its numbers."""
        sizes = dict(zip(self.axes, extents, strict=True))
        program = self.forward_program
        shapes = {n: [sizes[a] for a in program.buffers[n].axes] for n in self._results}
        made = {n: torch.empty(shape, dtype=program.dtypes[n], device=device) for n, shape in shapes.items()}
        return [self._declared(made[n], n, sizes) for n in self._results]

    def backward(
        self,
        tensors: list[Tensor],
        saved: list[Tensor],
        cotangents: list[Tensor | None],
        wanted: list[bool],
        params: list[float],
        extents: list[int],
        origin: list[int],
    ) -> list[Tensor]:
        """The gradients of the wanted inputs, in their order and shapes."""
        names = [name for name, want in zip(self.inputs, wanted, strict=True) if want]
        program = self.backward_program(frozenset(names))
        sizes = dict(zip(self.axes, extents, strict=True))
        by_name = dict(zip(self.inputs, self._readable(tensors), strict=True)) | dict(zip(self._saved, saved, strict=True))
        targets = dict(self.record.cotangents)
        for name, cotangent in zip(self.outputs, cotangents, strict=True):
            buffer = targets.get(name)
            if buffer in program.buffers:
                by_name[buffer] = self._cotangent(name, buffer, cotangent, program, sizes, tensors[0].device)
        program.run(by_name, sizes, self._origin(origin), self._params(params), tensors[0].device)
        gradients = dict(self.record.gradients)
        return [self._declared(by_name[gradients[name]], name, sizes) for name in names]

    @cached_property
    def forward_program(self) -> Program:
        return Program(self.record.forward, self._dims)

    def backward_program(self, wanted: frozenset[str]) -> Program:
        """The program that computes the gradients of exactly these inputs."""
        found = self._backward.get(wanted)
        if found is None:
            with self.kernel.families.lock:
                found = self._backward.get(wanted)
                if found is None:
                    record = self._backward_record(wanted)
                    found = self._backward[wanted] = Program(record, self._backward_dims())
        return found

    def lowered(self) -> Lowered:
        """The compiler's view of the variant, made again where the variant came from the cache."""
        if self._lowered is None:
            self._lowered = lower_for(self.kernel, self.record.chosen, dict(self.record.whole))
        return self._lowered

    def _backward_record(self, wanted: frozenset[str]) -> ProgramRecord:
        chosen, whole = self.record.chosen, self.record.whole
        stored = _stored(self.kernel, "backward", chosen, whole, sorted(wanted))
        if isinstance(stored, ProgramRecord):
            return stored
        lowered = self.lowered()
        dtypes = concrete_dtypes(self.kernel, chosen, lowered)
        made = generate(self.kernel, lowered.backward(wanted), backend_of(chosen.target), dtypes, dict(whole), dict(chosen.params))
        _store(self.kernel, made, "backward", chosen, whole, sorted(wanted))
        return made

    def _backward_dims(self) -> dict[str, Dims]:
        found = dict(self._dims)
        found.update((buffer, self._dims[name]) for name, buffer in self.record.cotangents)
        found.update((buffer, self._dims[name]) for name, buffer in self.record.gradients if name in self._dims)
        return found

    def _readable(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t if t.dtype in NAMES else t.to(generated_dtype(t.dtype)) for t in tensors]

    def _cotangent(
        self, name: str, buffer: str, given: Tensor | None, program: Program, extents: Mapping[str, int], device: torch.device
    ) -> Tensor:
        if given is not None:
            return given.to(program.dtypes[buffer])
        shape = [_product(dim, extents) for dim in self._dims[name]]
        return torch.zeros((), dtype=program.dtypes[buffer], device=device).expand(shape)

    def _declared(self, tensor: Tensor, name: str, extents: Mapping[str, int]) -> Tensor:
        dims = self._dims.get(name)
        return tensor if dims is None or len(dims) == tensor.dim() else tensor.view([_product(dim, extents) for dim in dims])

    def _origin(self, origin: list[int]) -> dict[str, int]:
        return dict(zip(self.axes, origin, strict=True))

    def _params(self, params: list[float]) -> dict[str, float]:
        return dict(zip(self.float_params, params, strict=True))


def _product(dim: tuple[str, ...], extents: Mapping[str, int]) -> int:
    result = 1
    for axis in dim:
        result *= extents[axis]
    return result
