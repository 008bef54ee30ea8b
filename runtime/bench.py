"""Timing: a kernel and its peers take turns in one process, and medians are compared.

What a peer is, the harness does not know: a table of peers (``benchmarks/peers_attention.py`` in the repository) gives
calls that compute the same output. Every contender is held to the reference before it is timed.
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .check_shapes import differentiable_inputs
from .problem import Problem

if TYPE_CHECKING:
    from rich.table import Table

    from .kernel import Backend, Kernel

PEERS = "benchmarks.peers_attention"
SECONDS = 8.0
"""About how long one contender is timed in one direction; slow ones get fewer rounds, but three at least."""
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""How far a contender's output may be from the reference, relative to its RMS, before the table says so."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another program for the same outputs. ``forward`` returns a tensor or a tuple, the output named ``output`` first."""

    name: str
    forward: Callable[[], Any]
    backward: bool = True
    output: str = ""


FindPeers = Callable[[str, Mapping[str, Tensor], Mapping[str, Any], Mapping[str, int]], Sequence[Peer]]
"""What a table of peers offers as ``peers(kernel, inputs, params, extents)``."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to be timed. ``leaves`` are what gradients are taken of."""

    name: str
    forward: Callable[[], Any]
    leaves: tuple[Tensor, ...]
    backward: bool
    expected: Tensor | None = None


@dataclass(slots=True)
class Timing:
    """Seconds of one contender: medians over its rounds, and what the first call took (compilation included)."""

    name: str
    first: float = 0.0
    forward: float | None = None
    both: float | None = None
    error: float | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    kernel: str
    dtype: str
    sizes: dict[str, int]
    params: dict[str, Any]
    rounds: int
    timings: tuple[Timing, ...] = field(default=())


def find_peers() -> FindPeers | None:
    """The repository's table of peers, or None where weft runs without the repository."""
    try:
        found: FindPeers = importlib.import_module(PEERS).peers
    except ModuleNotFoundError:
        return None
    return found


def contenders(
    kernel: Kernel, problem: Problem, dtype: str, backend: Backend | None, peers: FindPeers | None, without: Sequence[str], seed: int
) -> list[Contender]:
    """The kernel, its reference in eager PyTorch, and what the table of peers knows of the same name."""
    device = "cuda" if backend != "c" and torch.cuda.is_available() else "cpu"
    inputs = problem.inputs(getattr(torch, dtype), device, seed)
    names = [n for n in differentiable_inputs(kernel.typed) if n in inputs]
    for name in names:
        inputs[name].requires_grad_()
    leaves = tuple(inputs[n] for n in names)
    options: dict[str, Any] = {**problem.params, "sizes": _needed(kernel, problem)}
    with torch.no_grad():
        outputs = _by_name(kernel, kernel.reference(*inputs.values(), **options))
    first = kernel.output_names[0]

    def weft() -> Any:
        return kernel(*inputs.values(), **options, backend=backend)

    def eager() -> Any:
        return kernel.reference(*inputs.values(), **options)

    found = [Contender("weft", weft, leaves, True, outputs[first])]
    if "eager" not in without:
        found.append(Contender("eager", eager, leaves, True, outputs[first]))
    for peer in peers(kernel.name, inputs, problem.params, problem.extents) if peers is not None else ():
        if peer.name not in without:
            found.append(Contender(peer.name, peer.forward, leaves, peer.backward, outputs[peer.output or first]))
    return found


def run(
    kernel: str,
    problem: Problem,
    entered: Sequence[Contender],
    rounds: int,
    backward: bool,
    dtype: str,
    advance: Callable[[int, str], None] = lambda done, label: None,
) -> Result:
    """Times the contenders in turns. One that raises is left out, and its row says why."""
    timings = {c.name: Timing(c.name) for c in entered}
    ready: list[Contender] = []
    for n, contender in enumerate(entered):
        advance(n, f"{kernel}: first call of {contender.name}")
        if _first_call(contender, timings[contender.name], TOLERANCE[dtype], backward):
            ready.append(contender)
    for n, (direction, calls) in enumerate(_directions(ready, backward)):
        advance(len(entered) + n, f"{kernel}: {direction}")
        for name, median in _medians(calls, rounds).items():
            setattr(timings[name], direction, median)
    return Result(kernel, dtype, problem.extents, problem.params, rounds, tuple(timings.values()))


def table(result: Result, base: str = "weft") -> Table:
    """A result as a table for the terminal, times in milliseconds and how many times longer than those of ``base`` each is."""
    from rich.table import Table

    sizes = " ".join(f"{a}={n}" for a, n in result.sizes.items())
    shown = Table(title=f"{result.kernel}, {result.dtype}, {sizes}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "forward ms", f"x {base}", "fwd+bwd ms", f"x {base}", "first call s", "error"):
        shown.add_column(heading, justify="left" if not heading else "right")
    one = next(t for t in result.timings if t.name == base)
    for t in result.timings:
        shown.add_row(
            t.name, _ms(t.forward), _ratio(t.forward, one.forward), _ms(t.both), _ratio(t.both, one.both),
            f"{t.first:.2f}" if t.first else "", "" if t.error is None else f"{t.error:.0e}",
        )  # fmt: skip
    faults = [f"{t.name}: {t.fault}" for t in result.timings if t.fault]
    shown.caption, shown.caption_justify = "\n".join(faults) or None, "left"
    return shown


def to_json(results: Sequence[Result], command: Sequence[str]) -> dict[str, Any]:
    """Results with the command and the machine they were measured on; times in seconds."""
    return {"command": " ".join(command), "machine": machine(), "results": [asdict(r) for r in results]}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    found |= {"torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


# One contender ----------------------------------------------------------------------------------------------------


def _first_call(contender: Contender, timing: Timing, tolerance: float, backward: bool) -> bool:
    """Runs a contender once in each direction and notes how far its output is off; whether it can be timed."""
    started = time.perf_counter()
    try:
        with torch.no_grad():
            output = _first_tensor(contender.forward()).detach()
        if backward and contender.backward:
            _forward_backward(contender)()
        _wait()
    except Exception as error:
        timing.fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:80]
        return False
    timing.first = time.perf_counter() - started
    if contender.expected is not None:
        timing.error = _distance(output, contender.expected)
        if not timing.error <= tolerance:
            timing.fault = "does not agree with the reference"
    return True


def _directions(ready: Sequence[Contender], backward: bool) -> list[tuple[str, dict[str, Callable[[], Any]]]]:
    found: list[tuple[str, dict[str, Callable[[], Any]]]] = [("forward", {c.name: _without_gradients(c.forward) for c in ready})]
    if backward:
        found.append(("both", {c.name: _forward_backward(c) for c in ready if c.backward and c.leaves}))
    return found


def _medians(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of every call; they take turns, so that a slow minute of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {name: max(1, min(100, round(0.005 / max(_timed(call, 1), 1e-6)))) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            if len(times[name]) < 3 or sum(times[name]) * repeats[name] < SECONDS:
                times[name].append(_timed(call, repeats[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def _timed(call: Callable[[], Any], repeats: int) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return (time.perf_counter() - started) / repeats


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _forward_backward(contender: Contender) -> Callable[[], Any]:
    """Forward and the gradients of all leaves, under cotangents that are drawn once."""
    cotangents: list[Tensor] = []

    def run() -> Any:
        outputs = [o for o in _tensors(contender.forward()) if o.requires_grad]
        if not cotangents:
            generator = torch.Generator().manual_seed(1)
            cotangents.extend(torch.randn(o.shape, generator=generator).to(o) for o in outputs)
        return torch.autograd.grad(outputs, contender.leaves, cotangents, allow_unused=True)

    return run


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Small things -----------------------------------------------------------------------------------------------------


def _needed(kernel: Kernel, problem: Problem) -> dict[str, int]:
    """The extents that no input tells."""
    told = {a for t in kernel.typed.inputs for dim in t.dims if len(dim) == 1 for a in dim}
    split = {a for t in kernel.typed.inputs for dim in t.dims if len(dim) > 1 for a in dim[1:]} - told
    named = {a.name for a in kernel.typed.axes if a.extent is None}
    return {a: n for a, n in problem.sizes.items() if a in split or (a in named and a not in told)}


def _by_name(kernel: Kernel, result: Any) -> dict[str, Tensor]:
    return dict(zip(kernel.output_names, _tensors(result), strict=True))


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def _first_tensor(result: Any) -> Tensor:
    return _tensors(result)[0]


def _distance(got: Tensor, want: Tensor) -> float:
    """The largest difference relative to the RMS of what is wanted."""
    got, want = got.double(), want.double().reshape(got.shape)
    scale = float(want.square().mean().sqrt()) or 1.0
    return float((got - want).abs().max()) / scale if want.numel() else 0.0


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _ratio(seconds: float | None, base: float | None) -> str:
    return "" if not seconds or not base else f"{seconds / base:.2f}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()
