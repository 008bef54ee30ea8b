"""Time and memory of one kernel over the length of its sequence.

    python -m benchmarks.scaling sliding_window --lengths 4096,8192,16384,32768 --json out.json

Every length is measured in a process of its own, after a call at a tiny length that compiles the kernel and one at the full
length. Extra memory is what a forward and backward pass adds to the resident memory at its peak, less the outputs and the
gradients that it returns; the inputs and cotangents are resident before. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import weft
from benchmarks.shapes import posed
from weft.runtime import bench
from weft.runtime.check_shapes import differentiable_inputs
from weft.runtime.kernel import Kernel
from weft.runtime.problem import Problem

TINY = 128
ROOT = Path(__file__).parents[1]
out = Console(highlight=False)
out.width = max(out.width, 100)
Row = dict[str, Any]


def lengths_of(ctx: click.Context, option: click.Parameter, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of ints.", ctx, option) from None
    if min(found) < 1:
        raise click.BadParameter("a length is at least 1.", ctx, option)
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", metavar="SPEC")
@click.option("--lengths", default="4096,8192,16384,32768", show_default=True, callback=lengths_of, help="Positions, with commas.")
@click.option("--heads", default=8, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Rounds of timing, of which the median is taken.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to this file too.")
@click.option("--here", is_flag=True, hidden=True, help="Measure the one length in this process and print its row as JSON.")
def main(name: str, lengths: Sequence[int], heads: int, head_dim: int, batch: int, rounds: int, path: Path | None, here: bool) -> None:
    """Measure SPEC at several lengths, in float32, with its usual params."""
    if here:
        click.echo(json.dumps(measured(name, lengths[0], heads, head_dim, batch, rounds)))
        return
    options = {"heads": heads, "head-dim": head_dim, "batch": batch, "rounds": rounds}
    rows: list[Row] = []
    for length in lengths:
        with out.status(f"{name}: {length}"):
            rows.append(_in_a_process(name, length, options))
        if path is not None:
            data = bench.to_json([], ["python", "-m", "benchmarks.scaling", *sys.argv[1:]])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**data, "results": rows}, indent=1) + "\n", encoding="utf-8")
    out.print(table(rows))


def _in_a_process(name: str, length: int, options: dict[str, int]) -> Row:
    command = [sys.executable, "-m", "benchmarks.scaling", name, "--lengths", str(length), "--here"]
    command += [f"--{option}={value}" for option, value in options.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"length {length}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measured(name: str, length: int, heads: int, head_dim: int, batch: int, rounds: int) -> Row:
    """Times in seconds and memory in bytes at one length."""
    from weft.runtime.library import find
    from weft.runtime.load import load

    kernel: Kernel = getattr(load(find(name)), name)
    Call(kernel, posed(kernel, TINY, heads, head_dim, batch)).forward_backward()
    problem = posed(kernel, length, heads, head_dim, batch)
    call = Call(kernel, problem)
    memory = call.memory()
    result = bench.run(kernel.name, problem, [bench.Contender("weft", call.forward, call.leaves, True)], rounds, True, "float32")
    timing = result.timings[0]
    if timing.fault:
        raise RuntimeError(timing.fault)
    return {
        "kernel": kernel.name,
        "dtype": "float32",
        "length": length,
        "tokens": batch * length,
        "sizes": problem.extents,
        "params": problem.params,
        "rounds": rounds,
        "forward": timing.forward,
        "both": timing.both,
        **memory,
    }


class Call:
    """A kernel with inputs, and cotangents for its outputs."""

    def __init__(self, kernel: Kernel, problem: Problem) -> None:
        self.kernel, self.problem = kernel, problem
        self.inputs = problem.inputs(torch.float32)
        wanted = differentiable_inputs(kernel.typed)
        self.leaves = tuple(x.requires_grad_() for name, x in self.inputs.items() if name in wanted)
        generator = torch.Generator().manual_seed(1)
        self.cotangents = {name: torch.randn(problem.shape(name), generator=generator) for name in kernel.output_names}

    def forward(self) -> Any:
        params: dict[str, Any] = self.problem.params
        return self.kernel(*self.inputs.values(), **params)

    def forward_backward(self) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs and the gradients of all leaves."""
        result = self.forward()
        outputs = dict(zip(self.kernel.output_names, [result] if isinstance(result, Tensor) else result, strict=True))
        kept = {name: o for name, o in outputs.items() if o.requires_grad}
        gradients = torch.autograd.grad([*kept.values()], self.leaves, [self.cotangents[name] for name in kept], allow_unused=True)
        return [*outputs.values()], [g for g in gradients if g is not None]

    def memory(self) -> dict[str, int]:
        """Bytes of the tensors of a forward and backward pass, and of what it needs besides them at its peak."""
        before = _resident()
        self.forward_backward()
        _resident()
        outputs, gradients = self.forward_backward()
        grown = _status("VmHWM") - before
        returned = {"output_bytes": _bytes(outputs), "gradient_bytes": _bytes(gradients)}
        return {"input_bytes": _bytes(self.inputs.values()), **returned, "peak_bytes": grown, "extra_bytes": grown - sum(returned.values())}


def table(rows: Sequence[Row]) -> Table:
    """A line for every length. Tensors are inputs, outputs and gradients; bytes per token are of the extra memory."""
    first = rows[0]
    shown = Table(title=f"{first['kernel']}, {first['dtype']}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    headings = ("length", "forward ms", "ns/token", "fwd+bwd ms", "ns/token", "tensors MiB", "extra MiB", "bytes/token")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        tensors = sum(row[f"{kind}_bytes"] for kind in ("input", "output", "gradient"))
        forward, both, tokens = row["forward"], row["both"], row["tokens"]
        shown.add_row(
            str(row["length"]), f"{forward * 1e3:.3g}", f"{forward / tokens * 1e9:.0f}", f"{both * 1e3:.3g}", f"{both / tokens * 1e9:.0f}",
            _mebi(tensors), _mebi(row["extra_bytes"]), f"{row['extra_bytes'] / tokens:.0f}",
        )  # fmt: skip
    return shown


def _mebi(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)


def _resident() -> int:
    """Bytes that are resident once freed memory is back with the system (PyTorch's: only glibc can be asked); the peak becomes that."""
    gc.collect()
    weft.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _status(entry: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


if __name__ == "__main__":
    main()
