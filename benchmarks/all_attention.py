"""Times all attention variants against eager PyTorch, SDPA and compiled FlexAttention, and holds the ratios to targets.

    python -m benchmarks.all_attention
    python -m benchmarks.all_attention alibi rope --rounds 9 --limit 30

The contenders of one kernel take turns and medians are compared; backward passes make the gradients of all inputs that a
spec differentiates. The file is written after every kernel, and what it has of other kernels, from the same machine, is kept.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.peers_attention import peers, visible
from benchmarks.shapes import NAMES, SPECS, posed
from weft.runtime import bench
from weft.runtime.kernel import Kernel

FILE = Path(__file__).parent / "results" / "cpu_attention.json"
CAUSAL = 0.6
"""A mask that leaves no more than this share of the pairs is held to what causal masks are held to."""

out = Console(highlight=False)
out.width = max(out.width, 140)
Row = dict[str, Any]
"""A result as it stands in the file: a ``bench.Result``, and ``visible``, the share of pairs that its mask leaves."""


def power_of_two(ctx: click.Context, option: click.Parameter, value: int) -> int:
    if value < 128 or value & (value - 1):
        raise click.BadParameter("a power of two from 128 on is needed.", ctx, option)
    return value


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(NAMES))
@click.option("--length", default=2048, show_default=True, callback=power_of_two, help="Positions of a sequence.")
@click.option("--heads", default=8, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Rounds of a kernel's contenders.")
@click.option("--limit", default=60.0, show_default=True, help="Seconds of timing for one kernel; slow contenders take 3 rounds at least.")
@click.option("--seed", default=0, show_default=True, help="Seed of the drawn inputs.")
@click.option("--without", multiple=True, metavar="PEER", help="A contender to leave out: eager-torch, sdpa, flex.")
@click.option("--forward-only", is_flag=True, help="Leave out the backward passes.")
@click.option("--resume", is_flag=True, help="Measure only what the file does not have.")
@click.option("--summary", "only_summary", is_flag=True, help="Measure nothing, print what the file has.")
@click.option("--json", "path", default=FILE, type=click.Path(dir_okay=False, path_type=Path), help="The file of results.")
def main(
    names: Sequence[str],
    length: int,
    heads: int,
    head_dim: int,
    batch: int,
    rounds: int,
    limit: float,
    seed: int,
    without: Sequence[str],
    forward_only: bool,
    resume: bool,
    only_summary: bool,
    path: Path,
) -> None:
    """Time attention variants, all of them unless NAMEs are given, and print which targets are met."""
    if only_summary:
        out.print(summary(_rows(path, None)))
        return
    rows = {row["kernel"]: row for row in _rows(path, bench.machine())}
    wanted = [name for name in names or NAMES if not (resume and name in rows)]
    for n, name in enumerate(wanted, 1):
        out.print(f"[bold]{n}/{len(wanted)}[/bold] {name}")
        try:
            rows[name] = measured(name, length, heads, head_dim, batch, rounds, limit, seed, without, not forward_only)
        except Exception as error:  # one kernel that cannot be measured leaves the others to be
            out.print(f"  {type(error).__name__}: {error}", markup=False)
            continue
        _write(path, [rows[name] for name in NAMES if name in rows])
        out.print(line(rows[name]), markup=False)
        gc.collect()
    out.print(summary([rows[name] for name in NAMES if name in rows]))


def measured(
    name: str,
    length: int,
    heads: int,
    head_dim: int,
    batch: int,
    rounds: int,
    limit: float,
    seed: int,
    without: Sequence[str],
    backward: bool,
) -> Row:
    """The result of one variant and its peers, as it is written."""
    kernel = _kernel(SPECS.get(name, name))
    problem = posed(kernel, length, heads, head_dim, batch, name)
    entered = bench.contenders(kernel, problem, "float32", None, peers, ("eager", *without), seed)
    timed = len(entered) + (sum(c.backward for c in entered) if backward else 0)
    bench.SECONDS = limit / timed
    result = bench.run(name, problem, entered, rounds, backward, "float32")
    share = visible(kernel.name, problem.inputs(seed=seed), problem.params, problem.extents)
    return {**bench.to_json([result], [])["results"][0], "visible": share}


def summary(rows: Sequence[Row]) -> Table:
    """A line for every kernel: times in milliseconds, and how many times faster than its peers weft is."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    headings = ("", "visible", "forward ms", "vs flex", "vs sdpa", "fwd+bwd ms", "vs eager-torch", "vs sdpa", "target")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("", "target") else "right", no_wrap=True)
    for row in rows:
        ours = _timing(row, "weft")
        forward = [_ms(ours.get("forward")), *(_times(row, peer, "forward") for peer in ("flex", "sdpa"))]
        both = [_ms(ours.get("both")), *(_times(row, peer, "both") for peer in ("eager-torch", "sdpa"))]
        shown.add_row(row["kernel"], f"{row['visible']:.2f}", *forward, *both, "; ".join(missed(row)) or "met")
    met = sum(not missed(row) for row in rows)
    faults = [f"{row['kernel']}, {t['name']}: {t['fault']}" for row in rows for t in row["timings"] if t["fault"]]
    shown.caption, shown.caption_justify = "\n".join([f"{met} of {len(rows)} met", *faults]), "left"
    return shown


def missed(row: Row) -> list[str]:
    """What a kernel is held to and does not reach. A peer that there is no time of holds it to nothing."""
    faults = [f"weft: {t['fault']}" for t in row["timings"] if t["name"] == "weft" and t["fault"]]
    found = [(direction, ratio(row, peer, direction), factor) for peer, direction, factor in targets(row)]
    words = {"forward": "forward", "both": "fwd+bwd"}
    return faults + [f"{words[d]} {reached:.2f} < {factor}" for d, reached, factor in found if reached is not None and reached < factor]


def targets(row: Row) -> tuple[tuple[str, str, float], ...]:
    """(peer, direction, how many times faster than it weft is to be)."""
    if row["kernel"] == "softmax_attention":
        return ("sdpa", "forward", 1.0), ("sdpa", "both", 1.1)
    return ("flex", "forward", 1.2), ("eager-torch", "both", 4.0 if row["visible"] <= CAUSAL else 1.8)


def ratio(row: Row, peer: str, direction: str) -> float | None:
    """How many times as long as weft a peer takes."""
    ours, theirs = (_timing(row, name).get(direction) for name in ("weft", peer))
    return theirs / ours if ours and theirs else None


def line(row: Row) -> str:
    """Medians of one kernel as text."""
    parts = [f"{t['name']} {_ms(t['forward'])}/{_ms(t['both']) or '-'}{' ' + t['fault'] if t['fault'] else ''}" for t in row["timings"]]
    return "  forward/fwd+bwd ms: " + ", ".join(parts)


def _timing(row: Row, name: str) -> Mapping[str, Any]:
    return next((t for t in row["timings"] if t["name"] == name), {})


def _times(row: Row, peer: str, direction: str) -> str:
    found = ratio(row, peer, direction)
    return "" if found is None else f"{found:.2f}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _kernel(name: str) -> Kernel:
    from weft.runtime.library import find
    from weft.runtime.load import load

    kernel: Kernel = getattr(load(find(name)), name)
    return kernel


def _rows(path: Path, machine: Mapping[str, Any] | None) -> list[Row]:
    """What a file has, if it was measured on this machine (on any, where None)."""
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    found: list[Row] = data["results"] if machine is None or data["machine"] == machine else []
    return found


def _write(path: Path, rows: Sequence[Row]) -> None:
    data = bench.to_json([], ["python", "-m", "benchmarks.all_attention", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**data, "results": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
