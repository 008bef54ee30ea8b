"""One case of a check: the reference, eager PyTorch and the kernel on the same inputs, and everything that is asked of the kernel."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import deterministic

from ..compiler import ir
from ..compiler.choices import Choices, watching
from ..compiler.reference import evaluate
from ..dsl.typed import Kernel as TypedKernel
from ..dsl.typed import Spec
from . import check_compare as judge
from .check_choices import differs, matching, mistaken
from .check_noise import Nudged, amplification
from .check_report import Failure, FailureKind, Measure
from .check_rounding import OtherWay
from .check_shapes import Case, Limits, batch_axes, call_sizes
from .check_values import Inputs, broken_assumptions, dead_slices, draw_cotangents, make_inputs, with_gradients, with_nan

DRAWS = 3
"""Nudges that measure conditioning: one would show little of a single number by chance."""

Direction = Literal["forward", "backward"]


class Checkable(Protocol):
    """What a kernel must offer to be checked."""

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> Spec: ...
    @property
    def typed(self) -> TypedKernel: ...
    @property
    def graph(self) -> ir.Graph: ...
    def lowered(self, target: str) -> Any: ...
    def __call__(self, *tensors: Tensor, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for all cases of a run."""

    backend: str
    device: torch.device
    directions: tuple[Direction, ...]
    limits: Limits
    shrink_seconds: float
    invariance: bool
    nan_in_masked: bool
    in_turn: bool
    """Programs run one after the other, in Triton's interpreter: that two runs differ is seen where a sample is called by itself, too."""
    strict: bool
    """Everything is said to be fused, so a call that falls back to PyTorch is a failure."""


class Rejected(Exception):
    """A case that means nothing for this spec: its reference raises, or has no finite or representable number."""


class Raised(Exception):
    """The kernel raised; the message says what."""


@dataclass(frozen=True)
class Values:
    """Outputs and gradients of one evaluation; a gradient that does not exist is None."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    def items(self) -> Iterator[tuple[str, Tensor | None]]:
        """Everything that is compared, gradients under the names ``d_q``, ``d_k``."""
        yield from self.outputs.items()
        for name, gradient in self.gradients.items():
            yield f"d_{name}", gradient


class Trial:
    """One case in one dtype: its inputs, its three evaluations, and everything that is asked of the kernel's."""

    def __init__(self, kernel: Checkable, case: Case, dtype: str, settings: Settings) -> None:
        self.kernel, self.case, self.settings = kernel, case, settings
        self.dtype: torch.dtype = getattr(torch, dtype)
        with _rejecting("the inputs cannot be made"):
            self.inputs = make_inputs(kernel.typed, case, self.dtype, settings.device)
            self.sizes = call_sizes(kernel.typed, case, self.inputs.extents)
        self.dims = _dimension_names(kernel.typed)
        self.given: dict[ir.Node, Tensor] = {}
        """What selections of the references are to choose: what the kernel chose."""

    def findings(self, only_numbers: bool = False) -> tuple[list[Measure], list[Failure]]:
        """The measured errors and all failures, or those of a single run. Raises ``Rejected`` where the case means nothing."""
        _ = self.eager
        self._reject_what_does_not_fit()
        failures = [
            Failure("assume", "", f"the drawn inputs break '{line}'. Give these inputs a 'sample' line that keeps it.")
            for line in broken_assumptions(self.kernel.typed, self.inputs, self.kernel.spec.text)
        ]
        try:
            with watching() as choices:
                first = self.run(self.inputs)
            failures += self.adopt(choices)
            measures, wrong = self.judged(first)
            failures += wrong
            if only_numbers:
                return measures, failures
            if self.sample_axis is None or not self.settings.in_turn:
                failures += self.repeated(first)
            failures += self.masked() if self.settings.nan_in_masked else []
            failures += self.alone(first)
        except Raised as error:
            return [], [*failures, Failure("raised", "", str(error))]
        return measures, failures

    # Three evaluations ------------------------------------------------------------------------------------------------

    @property
    def exact(self) -> Values:
        """The meaning, in float64, of the inputs as rounded to the dtype."""
        return self._exact[0]

    @property
    def eager(self) -> Values:
        """What eager PyTorch makes of the same inputs in the dtype itself."""
        return self._eager[0]

    @cached_property
    def _exact(self) -> tuple[Values, Choices]:
        with _rejecting("the reference raises"), watching(self.given) as choices:
            return self.reference(self.inputs, torch.float64), choices

    @cached_property
    def _eager(self) -> tuple[Values, Choices]:
        _ = self._exact
        with _rejecting(f"the reference raises in {self.dtype}"), watching(self.given) as choices, without_denormals():
            return self.reference(self.inputs, None), choices

    def adopt(self, kernels: Choices) -> list[Failure]:
        """Takes the kernel's selections for those of the references, so that ties which rounding broke otherwise are no error; a selection
        that is no such tie is one."""
        self.given = matching(self._exact[1], kernels)
        if differs(self._exact[1], self.given):
            del self._exact
        if differs(self._eager[1], self.given):
            del self._eager
        if self._exact[1].given is not self.given:
            return []
        moved = []
        for seed, sign in itertools.product(range(self.case.seed, self.case.seed + DRAWS), (1, -1)):
            with Nudged(seed, sign, partial_sums=self.dtype.itemsize >= 4), watching(self.given) as nudged:
                self.reference(self.inputs, torch.float64)
            moved.append(nudged)
        return mistaken(self._exact[1], moved, self.dtype, self.kernel.graph.names)

    def reference(self, inputs: Inputs, dtype: torch.dtype | None) -> Values:
        tensors = {n: t.detach().to("cpu").contiguous() for n, t in inputs.tensors.items()}
        if dtype is not None:
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        on_cpu = Inputs(tensors, inputs.params, inputs.extents, inputs.origin)

        def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            exact = dtype == torch.float64
            return evaluate(
                self.kernel.graph, leaves, inputs.params, inputs.extents, origin=inputs.origin, dtype=dtype, declared_dtypes=not exact
            )

        return self.differentiated(on_cpu, call, self.cotangents)

    def run(self, inputs: Inputs, cotangents: Mapping[str, Tensor] | None = None) -> Values:
        """The kernel itself, its memory poisoned. Raises ``Raised``."""
        settings = self.settings
        sizes = {axis: inputs.extents[axis] for axis in self.sizes}

        def call(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            result = self.kernel(
                *leaves.values(), **inputs.params, sizes=sizes, origin=inputs.origin, backend=settings.backend, strict=settings.strict
            )
            outputs = (result,) if isinstance(result, Tensor) else tuple(result)
            return dict(zip([t.name for t in self.kernel.typed.outputs], outputs, strict=True))

        try:
            with poisoned():
                return self.differentiated(inputs, call, self.cotangents if cotangents is None else cotangents)
        except Exception as error:  # whatever it is, it is the kernel's: it belongs into the report
            raise Raised(f"the kernel raised {type(error).__name__}: {error}") from error

    def differentiated(
        self, inputs: Inputs, call: Callable[[dict[str, Tensor]], dict[str, Tensor]], cotangents: Mapping[str, Tensor]
    ) -> Values:
        """Outputs and, where the run asks for them, gradients under the cotangents."""
        if "backward" not in self.settings.directions:
            return Values(call(inputs.detached()), {})
        leaves, names = with_gradients(inputs, self.kernel.typed, self.case.wrt)
        outputs = call(leaves)
        reached = {n: o for n, o in outputs.items() if o.requires_grad}
        detached = {n: o.detach() for n, o in outputs.items()}
        if not reached or not names:
            return Values(detached, dict.fromkeys(names))
        given = [cotangents[n].to(dtype=o.dtype, device=o.device) for n, o in reached.items()]
        found = torch.autograd.grad(list(reached.values()), [leaves[n] for n in names], given, allow_unused=True)
        return Values(detached, dict(zip(names, found, strict=True)))

    @cached_property
    def cotangents(self) -> dict[str, Tensor]:
        """A random cotangent for every output, rounded to the dtype, so that all evaluations are given the same numbers."""
        return draw_cotangents(self.kernel.typed, self.inputs.extents, self.case.seed, self.dtype)

    # What is asked ----------------------------------------------------------------------------------------------------

    def judged(self, got: Values) -> tuple[list[Measure], list[Failure]]:
        """Every output and gradient against the float64 reference."""
        measures, failures = [], []
        wanted, eager = dict(self.exact.items()), dict(self.eager.items())
        for quantity, tensor in got.items():
            want, same_precision = wanted[quantity], eager[quantity]
            if want is None or same_precision is None:  # no output depends on this input
                same_precision = torch.zeros_like(self.inputs.tensors[quantity[2:]], device="cpu").contiguous()
                want = same_precision.double()
            noise = partial(self.noise_of, quantity)
            measure, failure = judge.compare(
                quantity, self.dims[quantity], tensor, want, same_precision, noise, partial(self.steps_of, quantity)
            )
            measures += [measure] if measure is not None else []
            failures += [failure] if failure is not None else []
        return measures, failures

    def noise_of(self, quantity: str) -> judge.Floor:
        return self.noise[quantity]

    def steps_of(self, quantity: str) -> Tensor | None:
        """How much each element changes where undecided roundings and comparisons go the other way; None where all are decided."""
        if self._other_way is None:
            return None
        exact, moved = dict(self.exact.items())[quantity], dict(self._other_way.items())[quantity]
        return None if exact is None or moved is None else (moved - exact).abs()

    @cached_property
    def _other_way(self) -> Values | None:
        with OtherWay() as rounded, watching(self.given):
            moved = self.reference(self.inputs, torch.float64)
        return moved if rounded.undecided else None

    @cached_property
    def noise(self) -> dict[str, judge.Floor]:
        """How much each quantity amplifies rounding errors: the most that a few nudges, and their opposites, show of it."""
        found = dict.fromkeys(dict(self.exact.items()), judge.Floor(0.0, 0.0))
        for seed, sign in itertools.product(range(self.case.seed, self.case.seed + DRAWS), (1, -1)):
            with Nudged(seed, sign, partial_sums=self.dtype.itemsize >= 4), watching(self.given):
                moved = dict(self.reference(self.inputs, torch.float64).items())
            for quantity, value in self.exact.items():
                rms, largest = amplification(value, moved[quantity])
                found[quantity] = judge.Floor(max(rms, found[quantity].rms), max(largest, found[quantity].max))
        for name, gradient in self.exact.gradients.items():
            if gradient is not None and not bool(gradient.any()):
                rms, largest = found[f"d_{name}"]
                found[f"d_{name}"] = judge.Floor(max(rms, self._term), max(largest, self._term))
        return found

    @cached_property
    def _term(self) -> float:
        """How large the terms of a gradient may be that cancel to 0: a cotangent times an output times the inputs. In half precision times
        the largest input only, for what kernels compute there is rounded to float32."""
        given = [max(1.0, _largest([self.inputs.tensors[n]])) for n in self.exact.gradients]
        joined = math.prod(given) if self.dtype.itemsize >= 4 else max(given, default=1.0)
        return _largest(self.cotangents.values()) * max(1.0, _largest(self.exact.outputs.values())) * joined

    def repeated(self, first: Values) -> list[Failure]:
        """The same call again gives the same bits."""
        return self._same_bits(first, self.run(self.inputs), "determinism", "differs between two runs on the same inputs")

    def masked(self) -> list[Failure]:
        """NaN and infinities where nothing is read change nothing. The reference is tried first: it says where that is."""
        suspects = dead_slices({n: g for n, g in self.exact.gradients.items() if g is not None})
        dead = {n: where for n, where in suspects.items() if self._changes_nothing({n: where})}
        if not dead or not self._changes_nothing(dead):
            return []
        _, failures = self.judged(self.run(with_nan(self.inputs, dead)))
        place = f"with NaN in elements of {', '.join(dead)} that are masked everywhere"
        return [replace(f, kind="masked", message=f"{place}: {f.message}") for f in failures]

    def _changes_nothing(self, dead: Mapping[str, Tensor]) -> bool:
        """NaN alone, too: an infinity that changes nothing may be a limit (a decay that forgets everything), and is then read. In the dtype
        itself, too: where a selection meets a tie that rounding makes, other elements are masked."""
        for infinities in (False, True):
            after = self.reference(with_nan(self.inputs, dead, infinities=infinities), torch.float64)
            if not all(_close(a, b) for (_, a), (_, b) in zip(self.exact.items(), after.items(), strict=True)):
                return False
        rounded = self.reference(with_nan(self.inputs, dead), None)
        return all(_same_nans(a, b) for (_, a), (_, b) in zip(self.eager.items(), rounded.items(), strict=True))

    @cached_property
    def sample_axis(self) -> str | None:
        """An axis whose indices are calls by themselves, where there are several and they are to be compared. In the interpreter not one
        along which tensors lie: in what order NumPy sums other axes of a tile depends on its extent."""
        axes = batch_axes(self.kernel.graph) if self.settings.invariance else []
        lying = {t.axes[-1] for t in self.kernel.typed.inputs if len(t.dims) > 1} if self.settings.in_turn else set()
        return next((a for a in axes if self.inputs.extents[a] > 1 and a not in lying), None)

    def alone(self, first: Values) -> list[Failure]:
        """One sample of a batch, called by itself, gives the same bits as within the batch, where it is computed by the same program."""
        inputs, axis = self.inputs, self.sample_axis
        if axis is None:
            return []
        last = inputs.extents[axis] - 1
        tensors = {n: _narrowed(t, self.dims[n], axis, last) for n, t in inputs.tensors.items()}
        cotangents = {n: _narrowed(c, self.dims[n], axis, last) for n, c in self.cotangents.items()}
        sample = self.run(replace(inputs, tensors=tensors, extents={**inputs.extents, axis: 1}), cotangents)
        outputs = {n: _narrowed(o, self.dims[n], axis, last) for n, o in first.outputs.items()}
        gradients = {n: g if g is None else _narrowed(g, self.dims[n], axis, last) for n, g in first.gradients.items()}
        message = f"of sample {axis}={last} alone differs from the one within its batch"
        found = self._same_bits(
            _of_samples(Values(outputs, gradients), self.dims, axis), _of_samples(sample, self.dims, axis), "batch", message
        )
        return found if found and axis not in self._kept_whole() else []

    def _kept_whole(self) -> set[str]:
        """The axes that some tile keeps whole: their extents are compiled in, so that another one is another program."""
        lowered = self.kernel.lowered("c" if self.settings.backend == "c" else "sm_80")
        if lowered.forward is None:
            return set()
        plans = [lowered.forward, *([lowered.backward(frozenset(lowered.differentiable))] if lowered.differentiable else [])]
        return {a for plan in plans for k in plan.kernels for a in k.whole}

    def _same_bits(self, a: Values, b: Values, kind: FailureKind, message: str) -> list[Failure]:
        failures = []
        for (quantity, x), (_, y) in zip(a.items(), b.items(), strict=True):
            if x is None or y is None:
                continue
            x, y = x.detach().to("cpu"), y.detach().to("cpu")
            if x.shape != y.shape:
                failures.append(Failure(kind, quantity, f"{message}: shape {list(y.shape)} in place of {list(x.shape)}"))
            elif not judge.same_bits(x, y):
                failures.append(replace(judge.first_difference(quantity, self.dims[quantity], y, x), kind=kind, message=message))
        return failures

    def _reject_what_does_not_fit(self) -> None:
        """Rejects a case without a finite number or with numbers that the dtype cannot hold."""
        for quantity, want in self.exact.items():
            if want is None or not want.is_floating_point():
                continue
            if want.numel() and not bool(want.isfinite().any()) and not bool(want.isinf().all()):
                raise Rejected(f"no number of {quantity} is finite for {self.case}")
            if not judge.representable(want, self.dtype):
                raise Rejected(f"{quantity} overflows {self.dtype} for {self.case}".replace("torch.", ""))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills memory that PyTorch allocates with NaN (ints with the largest), on every thread, so that elements never written show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled: bool = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Numbers below the normal range of a dtype are 0 in eager PyTorch, as they are in kernels."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _rejecting(what: str) -> Iterator[None]:
    """Turns errors of the reference into rejections of the case."""
    try:
        yield
    except (ValueError, ArithmeticError, IndexError, RuntimeError) as error:
        raise Rejected(f"{what}: {error}") from error


def _dimension_names(kernel: TypedKernel) -> dict[str, tuple[str, ...]]:
    """The names of the dimensions of every input, output and gradient; composite ones are written ``(g r)``."""
    found: dict[str, tuple[str, ...]] = {}
    for tensor in (*kernel.inputs, *kernel.outputs):
        found[tensor.name] = tuple(d[0] if len(d) == 1 else f"({' '.join(d)})" for d in tensor.dims)
    return found | {f"d_{t.name}": found[t.name] for t in kernel.inputs}


def _of_samples(values: Values, dims: Mapping[str, Sequence[str]], axis: str) -> Values:
    """Without the gradients that are sums over the samples of a batch."""
    return Values(values.outputs, {n: g for n, g in values.gradients.items() if axis in dims[n]})


def _narrowed(tensor: Tensor, dims: Sequence[str], axis: str, index: int) -> Tensor:
    return tensor.narrow(dims.index(axis), index, 1) if axis in dims else tensor


def _same_nans(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a.isnan(), b.isnan())


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12, equal_nan=True)


def _largest(tensors: Iterable[Tensor]) -> float:
    """The largest absolute value among the finite numbers of tensors."""
    found = [t.detach().double().abs() for t in tensors if t.is_floating_point() and t.numel()]
    return max((float(x[x.isfinite()].amax()) for x in found if bool(x.isfinite().any())), default=0.0)
