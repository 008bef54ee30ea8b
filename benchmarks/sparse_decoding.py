"""Decoding with hidden units that no token keeps: time over the share that is kept.

    python -m benchmarks.sparse_decoding

CATS, a gated MLP with a threshold, for a few tokens at a time. A unit's weights that go up are given as one row of memory, like those
that go down. ``dense`` is the MLP in PyTorch, which reads every weight; ``gathered`` is PyTorch that picks the kept rows first, for one
token. Medians of interleaved calls in one process, without gradients.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from weft.runtime import bench
from weft.specs import cats

KEPT = (1.0, 0.5, 0.2, 0.05)
out = Console(highlight=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tokens", default="1,8", show_default=True, help="Numbers of tokens, with commas.")
@click.option("--width", default=1024, show_default=True, help="Features of a token.")
@click.option("--hidden", default=8192, show_default=True, help="Hidden units.")
@click.option("--rounds", default=31, show_default=True, help="Interleaved calls, of which the median is taken.")
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=Path("benchmarks/results/cpu_sparse_decoding.json")
)
def main(tokens: str, width: int, hidden: int, rounds: int, path: Path) -> None:
    """Measures, prints a table and writes the numbers to a file."""
    torch.manual_seed(0)
    gate, up, down = (torch.randn(hidden, width) / width**0.5 for _ in range(3))
    rows: list[dict[str, float]] = []
    cases = [(int(t), kept) for t in tokens.split(",") for kept in KEPT]
    for count, kept in track(cases, "measuring", transient=True):
        x = torch.randn(count, width)
        sizes = F.silu(x @ gate.T).abs().flatten().sort().values
        last = round(len(sizes) * (1 - kept))
        threshold = float(sizes[last - 1 : last + 1].mean()) if last else 0.0  # between two units, so that rounding decides nothing
        rows.append({"tokens": count, "kept": kept, **measured(x, gate, up, down, threshold, rounds)})
    table = Table("tokens", "kept", "weft ms", "dense ms", "gathered ms", title=f"cats, float32, d={width} f={hidden}")
    for row in rows:
        times = [f"{1e3 * row[name]:.2f}" if name in row else "" for name in ("weft", "dense", "gathered")]
        table.add_row(str(row["tokens"]), f"{row['kept']:.0%}", *times)
    out.print(table)
    command = " ".join(["python", "-m", "benchmarks.sparse_decoding", *sys.argv[1:]])
    written = {"command": command, "machine": bench.machine(), "sizes": {"d": width, "f": hidden}, "rounds": rounds, "results": rows}
    path.write_text(json.dumps(written, indent=1) + "\n", "utf-8")


def measured(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, threshold: float, rounds: int) -> dict[str, float]:
    """Seconds of a call, by who makes it, and the largest difference of the results."""

    def weft() -> Tensor:
        y = cats(x, gate.T, up.T, down, threshold=threshold, strict=True)
        assert isinstance(y, Tensor)
        return y

    def dense() -> Tensor:
        a = F.silu(x @ gate.T)
        return torch.where(a.abs() >= threshold, a * (x @ up.T), 0.0) @ down

    def gathered() -> Tensor:
        a = F.silu(x @ gate.T)
        kept = (a.abs() >= threshold)[0].nonzero()[:, 0]
        return a[:, kept] * (x @ up[kept].T) @ down[kept]

    calls: dict[str, Callable[[], Tensor]] = {"weft": weft, "dense": dense} | ({"gathered": gathered} if len(x) == 1 else {})
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        found = {name: call() for name, call in calls.items()}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    error = max(float((y - found["dense"]).abs().max()) for y in found.values())
    return {name: statistics.median(times) for name, times in seconds.items()} | {"difference": error}


if __name__ == "__main__":
    main()
