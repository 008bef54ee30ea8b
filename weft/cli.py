"""The command line. Each command finds its specs, asks the runtime, and prints; what is slow to import is imported there.

Exit status: 0, 1 where a check failed or weft itself did, 2 for a mistake in a spec or in the command.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from .runtime.check_report import Report
    from .runtime.kernel import Backend, Kernel
    from .runtime.problem import Problem
    from .runtime.show import Part, What

TRACEBACK = "WEFT_TRACEBACK"
"""Set this variable to see where an error was raised."""
DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = ("c", "triton", "reference")
TARGETS = ("c", "sm_80", "sm_90", "sm_100", "gfx942")
F = TypeVar("F", bound=Callable[..., Any])

out = Console(soft_wrap=True, highlight=False)
notes = Console(stderr=True, highlight=False)


class Failed(click.ClickException):
    """Something that is not the user's mistake."""

    exit_code = 1


class Mistake(click.ClickException):
    """A mistake in a spec or in the command."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(self.format_message(), file=file or sys.stderr)


class Commands(click.Group):
    """Turns every error into a message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            raise _explained(error) from error


def _explained(error: Exception) -> click.ClickException:
    """An error as a message: what the user can mend as it is, anything else with a word on how to report it."""
    from .dsl.diagnostics import SpecError
    from .runtime import errors
    from .runtime.plots import NothingToPlot
    from .runtime.show import NoLongForm, NothingFused, UnknownPass

    mistakes: tuple[type[Exception], ...] = (SpecError, errors.CallError, errors.SpecNotFound, errors.UnknownKernel, errors.NoKernels)
    mistakes += (errors.UnknownTarget, NothingToPlot, NothingFused, UnknownPass, NoLongForm)
    if isinstance(error, mistakes):
        return Mistake(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
        return Mistake('pictures need matplotlib, which is not installed. Run: pip install "weft[plot]"')
    if isinstance(error, OSError):
        return Mistake(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return Failed(f"{type(error).__name__}: {error}\nThis is a defect of weft. Set {TRACEBACK}=1 to see where it was raised.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="weft")
def main() -> None:
    """Attention, recurrence and mixture-of-experts variants as equations, compiled to fused kernels.

    A SPEC is the path of a .weft file or the name of a spec that comes with weft (see `weft list`).
    """


# Options that several commands share ------------------------------------------------------------------------------


def _assignments(value_of: Callable[[str], object]) -> Callable[[click.Context, click.Parameter, Sequence[str]], dict[str, Any]]:
    """Reads repeated NAME=VALUE options into a dict."""

    def read(ctx: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text in given:
            name, equals, value = text.partition("=")
            try:
                if not (name and equals):
                    raise ValueError
                found[name.strip()] = value_of(value.strip())
            except ValueError:
                raise click.BadParameter(f"'{text}' is not of the form {option.metavar}.", ctx, option) from None
        return found

    return read


def _number(text: str) -> bool | int | float:
    """A param's value: true, false, an int or a float. Raises ValueError."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _setting(command: F) -> F:
    """The options that choose a kernel of a file, its sizes and its params."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Seed of the drawn inputs."),
        click.option(
            "--param", "params", multiple=True, metavar="NAME=VALUE", callback=_assignments(_number), help="The value of a param."
        ),
        click.option("--size", "sizes", multiple=True, metavar="AXIS=N", callback=_assignments(int), help="The extent of an axis."),
        click.option("--kernel", "kernel_name", metavar="NAME", help="One kernel of a file that has several."),
    ):
        command = option(command)
    return command


spec_argument = click.argument("spec", metavar="SPEC")
specs_argument = click.argument("specs", metavar="SPEC...", nargs=-1, required=True)


def _kernels(spec: str, name: str | None) -> list[Kernel]:
    """The kernels of a spec, or the named one. Raises what ``load`` raises."""
    from .runtime.library import find
    from .runtime.load import load

    found = load(find(spec))
    return [getattr(found, name)] if name else list(found)


def _one_kernel(spec: str, name: str | None) -> Kernel:
    """The kernel that a command is about: the named one, the one named like its file, or the only one."""
    found = _kernels(spec, name)
    if len(found) == 1:
        return found[0]
    like_file = [k for k in found if k.name == Path(spec).stem]
    if like_file:
        return like_file[0]
    raise Mistake(f"{spec} has {len(found)} kernels: {', '.join(k.name for k in found) or 'none'}. Choose one with --kernel NAME.")


@contextmanager
def _progress(what: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on standard error; the function that is given takes the number of steps done and what comes next."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True, disable=not (shown and notes.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, label: bar.update(task, completed=done, description=label)


# Finding and starting specs ---------------------------------------------------------------------------------------


@main.command("list")
@click.argument("pattern", default="")
@click.option("--json", "as_json", is_flag=True, help="Print names, titles and files as JSON.")
def list_(pattern: str, as_json: bool) -> None:
    """List the specs that come with weft, or those whose name or title contains PATTERN."""
    from .runtime.library import shipped, title

    found = [(name, title(path), path) for name, path in shipped().items()]
    found = [entry for entry in found if pattern.lower() in f"{entry[0]} {entry[1]}".lower()]
    if as_json:
        click.echo(json.dumps([{"name": n, "title": t, "path": str(p)} for n, t, p in found], indent=1))
        return
    width = max((len(name) for name, _, _ in found), default=0)
    for name, line, _ in found:
        out.print(f"[bold]{name:<{width}}[/bold]  {escape(line)}")
    notes.print(f"{len(found)} specs")


@main.command()
@click.argument("name")
@click.option("--from", "origin", required=True, metavar="SPEC", help="The spec to start from.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Where to write NAME.weft.")
def new(name: str, origin: str, folder: Path) -> None:
    """Start a variant of your own: copy a spec to NAME.weft and rename its kernel."""
    from .runtime.load import loads

    source = _one_kernel(origin, None)
    target = folder / f"{name}.weft"
    if target.exists():
        raise Mistake(f"{target} exists already. Choose another name or remove it first.")
    text = re.sub(rf"^(kernel\s+){re.escape(source.name)}\b", rf"\g<1>{name}", source.spec.text, count=1, flags=re.MULTILINE)
    loads(text, str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    out.print(f"Wrote {target}. Next:")
    for command, purpose in (
        (f"$EDITOR {target}", "change the equations"),
        (f"weft check {target}", "compare the kernel with its equations, forward and backward"),
        (f"weft explain {target}", "see what it costs and what is fused"),
        (f"weft plot {target}", "see its mask and weights"),
    ):
        out.print(f"  {command:<40} {purpose}")


# Evidence -----------------------------------------------------------------------------------------------------------


@main.command()
@specs_argument
@_setting
@click.option("--backend", type=click.Choice(BACKENDS), help="Default: triton on a GPU, c on the CPU.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May be given several times; default float32.")
@click.option("--trials", type=click.IntRange(1), help="Cases for each dtype.")
@click.option("--case", metavar="JSON", help="Run one case again, as printed by a failing check.")
@click.option("--quick", is_flag=True, help="Few and small cases.")
@click.option("--strict", is_flag=True, help="Fail where nothing is fused.")
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
def check(
    specs: Sequence[str],
    kernel_name: str | None,
    sizes: dict[str, int],
    params: dict[str, Any],
    seed: int,
    backend: str | None,
    dtypes: Sequence[str],
    trials: int | None,
    case: str | None,
    quick: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Compare kernels and their gradients with the float64 meaning of their specs, on cases drawn to break them."""
    options: dict[str, Any] = {"dtypes": tuple(dtypes) or ("float32",), "trials": trials, "seed": seed, "sizes": sizes, "params": params}
    options |= {"quick": quick, "strict": strict, "case": case}
    kernels = [kernel for spec in specs for kernel in _kernels(spec, kernel_name)]
    reports: list[Report] = []
    for kernel in kernels:
        try:
            reports.append(_checked(kernel, backend, options, shown=not as_json))
        except ValueError as error:
            raise Mistake(str(error)) from error
        if not as_json:
            out.print(_coloured(reports[-1]), markup=False) if not out.is_terminal else out.print(_coloured(reports[-1]))
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], indent=1))
    elif len(reports) > 1:
        failed = sum(not report.passed for report in reports)
        out.print(f"{len(reports)} kernels, {failed} failed" if failed else f"{len(reports)} kernels, none failed")
    if not all(report.passed for report in reports):
        sys.exit(1)


def _checked(kernel: Kernel, backend: str | None, options: dict[str, Any], shown: bool) -> Report:
    """One check; Triton without a GPU runs in a process of its own, under its interpreter."""
    import torch

    from .runtime.check import check_in_subprocess, check_kernel

    if backend == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        with _progress(f"{kernel.name} under Triton's interpreter", None, shown):
            return check_in_subprocess(kernel.spec.text, kernel.spec.filename, kernel.name, backend=backend, **options)
    with _progress(kernel.name, None, shown) as advance:
        device = "cuda" if backend in (None, "triton") and torch.cuda.is_available() else None
        return check_kernel(kernel, backend=backend, device=device, progress=lambda done, _: advance(done, kernel.name), **options)


def _coloured(report: Report) -> str:
    text = str(report)
    if not out.is_terminal:
        return text
    colour = {"passed": "green", "failed": "red"}.get(report.status, "yellow")
    first, newline, rest = escape(text).partition("\n")
    return first.replace(report.status, f"[{colour}]{report.status}[/{colour}]", 1) + newline + rest


# Looking inside -----------------------------------------------------------------------------------------------------


@main.command()
@spec_argument
@_setting
@click.option("--what", type=click.Choice(("equations", "graph", "plan", "source")), default="plan", show_default=True)
@click.option("--after", metavar="PASS", help="The graph or plan as this pass leaves it; 'list' names the passes.")
@click.option("--backend", type=click.Choice(("c", "triton")), help="Which source; default c.")
@click.option("--target", type=click.Choice(TARGETS), help="Which machine; default c, or sm_90 for triton.")
@click.option("--part", type=click.Choice(("forward", "backward")), default="forward", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--long", "long", is_flag=True, help="What long calls run on: chunks of steps on GPUs, recurrences where sums separate.")
def show(
    spec: str,
    kernel_name: str | None,
    sizes: dict[str, int],
    params: dict[str, Any],
    seed: int,
    what: What,
    after: str | None,
    backend: str | None,
    target: str | None,
    part: Part,
    dtype: str,
    long: bool,
) -> None:
    """Print a kernel's equations, graph, plan or generated source."""
    from .runtime import show as shown

    kernel = _one_kernel(spec, kernel_name)
    place = target or ("sm_90" if backend == "triton" else "c")
    text = shown.text(kernel, what, after=after, target=place, part=part, dtype=dtype, extents=sizes, params=params, long=long)
    language = {"source": "c" if place == "c" else "python", "equations": "python"}.get(what, "text")
    if out.is_terminal and language != "text":
        from rich.syntax import Syntax

        out.print(Syntax(text, language, background_color="default"))
    else:
        click.echo(text)


@main.command()
@spec_argument
@_setting
@click.option("--target", type=click.Choice(TARGETS), default="c", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def explain(
    spec: str, kernel_name: str | None, sizes: dict[str, int], params: dict[str, Any], seed: int, target: str, dtype: str, as_json: bool
) -> None:
    """Say what a kernel costs: its class, sweeps, saved tensors, bytes, FLOPs, and what runs outside it and why."""
    from .runtime.explain import explain as explained

    kernel = _one_kernel(spec, kernel_name)
    with _progress(f"compiling for {target}", None, not as_json):
        found = explained(kernel, _posed(kernel, sizes, params), target, dtype)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))


def _posed(kernel: Kernel, sizes: dict[str, int], params: dict[str, Any], **usual: int) -> Problem:
    from .runtime.problem import Usual, pose

    return pose(kernel.graph, sizes, params, Usual(**usual))


@main.command()
@spec_argument
@_setting
@click.option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), help="The image file; default NAME.png.")
@click.option("--text", "as_text", is_flag=True, help="Print the pictures as characters instead.")
def plot(
    spec: str, kernel_name: str | None, sizes: dict[str, int], params: dict[str, Any], seed: int, path: Path | None, as_text: bool
) -> None:
    """Draw a kernel's mask and weights, on drawn inputs."""
    from .runtime import plots

    kernel = _one_kernel(spec, kernel_name)
    problem = _posed(kernel, sizes, params, length=64, feature=16, heads=2)
    with _progress("evaluating the reference", None, not as_text):
        made = plots.pictures(kernel.graph, problem, seed=seed)
    if as_text:
        for picture in made:
            click.echo(f"{picture.title}: {' '.join(picture.rows)} down, {' '.join(picture.columns)} across\n{plots.text(picture)}\n")
        return
    target = path or Path(f"{kernel.name}.png")
    plots.save(made, target, f"{kernel.name}: {problem}")
    out.print(f"Wrote {target}")


# Speed ----------------------------------------------------------------------------------------------------------------


@main.command()
@specs_argument
@_setting
@click.option("--backend", type=click.Choice(("c", "triton")), help="Default: triton on a GPU, c on the CPU.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--length", default=2048, show_default=True, help="Positions of a sequence, where --size does not say.")
@click.option("--heads", default=8, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Runs of each contender; they take turns.")
@click.option("--forward-only", is_flag=True)
@click.option("--without", multiple=True, metavar="PEER", help="Leave out a peer: eager, sdpa, flex.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results and the command as JSON.")
def bench(
    specs: Sequence[str],
    kernel_name: str | None,
    sizes: dict[str, int],
    params: dict[str, Any],
    seed: int,
    backend: Backend | None,
    dtype: str,
    length: int,
    heads: int,
    batch: int,
    head_dim: int,
    rounds: int,
    forward_only: bool,
    without: Sequence[str],
    as_json: bool,
    path: Path | None,
) -> None:
    """Time kernels against eager PyTorch, SDPA and compiled FlexAttention, where these can express them."""
    from .runtime import bench as harness

    usual = {"length": length, "heads": heads, "batch": batch, "feature": head_dim}
    kernels = [_one_kernel(spec, kernel_name) for spec in specs]
    peers = harness.find_peers()
    results = []
    for kernel in kernels:
        problem = _posed(kernel, sizes, params, **usual)
        contenders = harness.contenders(kernel, problem, dtype, backend, peers, without, seed)
        with _progress(kernel.name, None, not as_json) as advance:
            results.append(harness.run(kernel.name, problem, contenders, rounds, not forward_only, dtype, advance))
        if not as_json:
            out.print(harness.table(results[-1]))
    data = harness.to_json(results, ["weft", *sys.argv[1:]])
    if as_json:
        click.echo(json.dumps(data, indent=1))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# Building and keeping -------------------------------------------------------------------------------------------------


@main.command()
@specs_argument
@_setting
@click.option("--target", "targets", multiple=True, type=click.Choice(TARGETS), help="May be given several times; default c.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May be given several times; default float32.")
@click.option("--out", "folder", type=click.Path(file_okay=False, path_type=Path), help="Also write the sources here.")
def build(
    specs: Sequence[str],
    kernel_name: str | None,
    sizes: dict[str, int],
    params: dict[str, Any],
    seed: int,
    targets: Sequence[str],
    dtypes: Sequence[str],
    folder: Path | None,
) -> None:
    """Compile kernels ahead of time, forward and backward, for targets that need not be this machine."""
    from .runtime.ahead import build_ahead

    jobs = [(k, t, d) for spec in specs for k in _kernels(spec, kernel_name) for t in targets or ("c",) for d in dtypes or ("float32",)]
    failed = 0
    with _progress("building", len(jobs)) as advance:
        for n, (kernel, target, dtype) in enumerate(jobs):
            advance(n, f"{kernel.name} for {target}, {dtype}")
            built = build_ahead(kernel, _posed(kernel, sizes, params), target, dtype, folder)
            failed += not built.fused
            out.print(str(built), markup=False)
    if failed:
        raise Failed(f"{failed} of {len(jobs)} have nothing that is fused; `weft explain` says why.")


@main.command()
@click.option("--clear", is_flag=True, help="Remove everything in it.")
def cache(clear: bool) -> None:
    """Say where the cache of built kernels is and how large, or clear it."""
    from .runtime.cache import disk_cache

    found = disk_cache()
    count, size = found.clear() if clear else found.size()
    what = "removed" if clear else "holds"
    out.print(f"{found.root} {what} {count} entries, {_megabytes(size)}")


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
