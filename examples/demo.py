"""What weft does, in a few minutes on a CPU: compiles attention variants, checks and times them, and trains (a recurrence and a
mixture of experts, too).

    make demo          # or: python -m examples.demo

Writes loss curves and pictures of masks and weights to ``demo-output``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.train_char_lm import Config, train
from weft.runtime import bench, plots
from weft.runtime.check import check_kernel
from weft.runtime.check_report import worst_measure
from weft.runtime.check_shapes import roles
from weft.runtime.generated import build
from weft.runtime.kernel import Kernel
from weft.runtime.library import find
from weft.runtime.load import only_kernel
from weft.runtime.problem import Usual, pose

ATTENTION = (
    "softmax_attention", "full", "alibi", "softcap", "sliding_window", "dilated_window", "global_window", "prefix_lm", "kitchen_sink",
    "sigmoid_attention", "gelu_attention", "relu2_attention", "qk_norm", "rope", "mla", "mla_full", "differential", "shaped", "fastgen",
    "natten1d", "natten2d", "natten3d", "sta2d", "hierarchical", "spacetime", "deberta", "graphormer", "t5_bias", "tree",
    "in_context_blocks", "maxsim", "based", "retention",
)  # fmt: skip
TIMED = ("softmax_attention", "full", "sliding_window", "softcap", "kitchen_sink", "sigmoid_attention")
TRAINED = ("softmax_attention", "kitchen_sink", "mlstm")
EXPERTS = "moe_mixtral"
"""A mixture of experts in the place of MLPs, trained beside the first of ``TRAINED``."""
PICTURED = ("softmax_attention", "kitchen_sink", "natten2d", "differential", "retention")

console = Console(highlight=False)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--steps", default=120, show_default=True, help="Training steps of each run.")
@click.option("--length", default=1024, show_default=True, help="Positions in the benchmark.")
def main(out: Path, steps: int, length: int) -> None:
    """Compile, check, time and train with attention variants on this machine's CPU."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    kernels = [only_kernel(find(name)) for name in ATTENTION]
    console.rule("1. Compile: spec to loaded kernels, forward and backward")
    compile_all(kernels)
    console.rule("2. Check: outputs and gradients against the float64 meaning")
    passed = check_all(kernels)
    console.rule("3. Time")
    time_some(length)
    console.rule("4. Train a character-level model on the standard library's sources")
    train_some(out, steps)
    console.rule("5. Pictures")
    draw_some(out)
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s. Pictures are in {out}/.")
    if not passed:
        raise SystemExit(1)


def compile_all(kernels: Sequence[Kernel]) -> None:
    """Builds every kernel, or finds it in the cache, and says how long each took."""
    seconds: dict[str, float] = {}
    with progress("compiling", len(kernels)) as advance:
        for kernel in kernels:
            advance(kernel.name)
            begun = time.perf_counter()
            problem = pose(kernel.graph, {}, {}, Usual())
            if kernel.lowered("c", extents=problem.extents, params=problem.params).forward is not None:
                build(kernel, "c", extents=problem.extents, params=problem.params)
                seconds[kernel.name] = time.perf_counter() - begun
    unfused = [k.name for k in kernels if k.name not in seconds]
    console.print(f"{len(seconds)} of {len(kernels)} specs compiled in {sum(seconds.values()):.0f} s.")
    if unfused:
        console.print(f"Run as PyTorch, see `weft explain`: {', '.join(unfused)}.")


def check_all(kernels: Sequence[Kernel]) -> bool:
    """One case for every kernel, at the head dims it was compiled for, as a table; whether all passed. `weft check` does more."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("spec", "result", "cases", "worst", "of its bound", "seconds"):
        table.add_column(heading, justify="left" if heading in ("spec", "result", "worst") else "right")
    failed = []
    with progress("checking", len(kernels)) as advance:
        for kernel in kernels:
            advance(kernel.name)
            problem = pose(kernel.graph, {}, {}, Usual())
            built = {axis: problem.extents[axis] for axis, role in roles(kernel.graph).items() if role == "feature"}
            report = check_kernel(kernel, backend="c", quick=True, trials=1, sizes=built)
            worst = worst_measure(report.results)
            colour = {"passed": "green", "failed": "red"}.get(report.status, "yellow")
            shown = ("", "") if worst is None else (worst.quantity, f"{worst.ratio:.0%}")
            table.add_row(kernel.name, f"[{colour}]{report.status}[/{colour}]", str(len(report.results)), *shown, f"{report.seconds:.1f}")
            if not report.passed:
                failed.append(report)
    console.print(table)
    for report in failed:
        click.echo(str(report))
    return not failed


def time_some(length: int) -> None:
    """A benchmark table: weft against eager PyTorch and SDPA. `weft bench` has compiled FlexAttention as well."""
    peers = bench.find_peers()
    for name in TIMED:
        kernel = only_kernel(find(name))
        problem = pose(kernel.graph, {}, {}, Usual(length=length))
        contenders = bench.contenders(kernel, problem, "float32", "c", peers, ("flex",), seed=0)
        with progress(name, len(contenders) + 2) as advance:
            result = bench.run(name, problem, contenders, 5, True, "float32", lambda _, label, advance=advance: advance(label))
        console.print(bench.table(result))
        console.print()


def train_some(out: Path, steps: int) -> None:
    """Trains once with each kernel of ``TRAINED``, and with experts, and draws the loss curves."""
    curves = {name: train(name, Config(steps=steps), backend="c") for name in TRAINED}
    curves[EXPERTS] = train(TRAINED[0], Config(steps=steps), experts=EXPERTS, backend="c")
    for name, losses in curves.items():
        tail = losses[-10:]
        console.print(f"{name}: loss {losses[0]:.3f} at the first step, {sum(tail) / len(tail):.3f} over the last ten, nats per character")
    plots.save_curves(curves, out / "loss.png", "Character-level models on the Python standard library", "loss, nats per character")


def draw_some(out: Path) -> None:
    """Draws masks and weights of a few kernels."""
    for name in PICTURED:
        kernel = only_kernel(find(name))
        params = {"window": {"kitchen_sink": 24, "natten2d": 3}[name]} if name in ("kitchen_sink", "natten2d") else {}
        problem = pose(kernel.graph, {}, params, Usual(length=64, feature=16, heads=2))
        plots.save(plots.pictures(kernel.graph, problem, seed=1), out / f"{name}.png", name)
    console.print(f"{len(PICTURED)} pictures and the loss curves written to {out}/")


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A progress bar; the function that is given advances it and shows what comes next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        done = -1

        def advance(label: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=f"{what} {label}")

        yield advance


if __name__ == "__main__":
    main()
