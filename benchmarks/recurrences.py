"""Times recurrences against PyTorch written by hand: a chunked form of matrix products, and a loop over steps.

    python -m benchmarks.recurrences
    python -m benchmarks.recurrences gla lstm_np --length 1024 --rounds 9

Both directions; the gradients of all inputs. The chunked forms are what a careful author writes without a kernel: chunks of 64 steps, all
chunks at once but for the states, triangular solves for delta rules. The loops take their inputs apart once, and step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from weft.runtime import bench
from weft.runtime.kernel import Kernel
from weft.runtime.library import find
from weft.runtime.load import only_kernel
from weft.runtime.problem import Usual, pose

FILE = Path(__file__).parent / "results" / "cpu_recurrences.json"
NAMES = ("gla", "simple_gla", "ssd", "delta_rule", "gated_delta", "lstm_np")
CHUNK = 64

out = Console(highlight=False)
Inputs = Mapping[str, Tensor]


# Chunks -----------------------------------------------------------------------------------------------------------


def chunks(x: Tensor) -> Tensor:
    """(b, h, t, ...) to (b, h, chunk, step, ...)."""
    return x.unflatten(2, (-1, CHUNK))


def carried(decay: Tensor, written: Tensor) -> Tensor:
    """The state before every chunk: each chunk decays it and writes to it."""
    state, found = torch.zeros_like(written[:, :, 0]), []
    for n in range(written.shape[2]):
        found.append(state)
        state = decay[:, :, n] * state + written[:, :, n]
    return torch.stack(found, 2)


def scalar_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One log-decay a step. ``q, k``: (b, h, t, d), ``v``: (b, h, t, e), ``g``: (b, h, t)."""
    q, k, v, g = chunks(q), chunks(k), chunks(v), chunks(g).cumsum(-1)
    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    within = (g[..., :, None] - g[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    last = g[..., -1:]
    states = carried(last.exp()[..., None], (k * (last - g).exp()[..., None]).mT @ v)
    return (((q @ k.mT) * within) @ v + (q * g.exp()[..., None]) @ states).flatten(2, 3)


def vector_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One log-decay a step and key channel: (b, h, t, d). Factored at the chunk's start, which gates near 0 allow."""
    q, k, v, g = chunks(q), chunks(k), chunks(v), chunks(g).cumsum(-2)
    queries, keys = q * g.exp(), k * (-g).exp()
    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    last = g[..., -1:, :]
    states = carried(last.exp().mT, (k * (last - g).exp()).mT @ v)
    return ((queries @ keys.mT).masked_fill(~allowed, 0) @ v + queries @ states).flatten(2, 3)


def delta_chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> Tensor:
    """Delta rules by the WY form: a triangular solve in every chunk, then the chunks in turn."""
    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]
    total = chunks(g).cumsum(-1) if g is not None else torch.zeros(k.shape[:-1])
    allowed = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    system = torch.eye(CHUNK) + ((beta * k) @ k.mT * within).tril(-1)
    right = torch.cat([beta * v, beta * k * total.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores, queries, last = (q @ k.mT) * within, q * total.exp()[..., None], total[..., -1:]
    keys = k * (last - total).exp()[..., None]
    state, found = torch.zeros_like(k[:, :, 0].mT @ v[:, :, 0]), []
    for n in range(q.shape[2]):
        new = u[:, :, n] - w[:, :, n] @ state
        found.append(queries[:, :, n] @ state + scores[:, :, n] @ new)
        state = last[:, :, n, :, None].exp() * state + keys[:, :, n].mT @ new
    return torch.stack(found, 2).flatten(2, 3)


def chunked(name: str, x: Inputs) -> Callable[[], Any]:
    """The chunked form of a spec."""
    match name:
        case "gla":
            return lambda: vector_chunks(x["q"] / x["q"].shape[-1] ** 0.5, x["k"], x["v"], x["g"])
        case "simple_gla":
            return lambda: scalar_chunks(x["q"] / x["q"].shape[-1] ** 0.5, x["k"], x["v"], x["g"])
        case "delta_rule" | "gated_delta":
            return lambda: delta_chunks(x["q"] / x["q"].shape[-1] ** 0.5, x["k"], x["v"], x["beta"], x.get("g"))
        case "ssd":

            def ssd() -> Tensor:
                heads = x["dt"].shape[-1]
                keys, queries = (x[n][:, None].expand(-1, heads, -1, -1) for n in ("bb", "c"))
                dt = x["dt"].mT
                y = scalar_chunks(queries, keys, x["x"].transpose(1, 2) * dt[..., None], dt * x["a"][:, None])
                return y.transpose(1, 2) + x["skip"][:, None] * x["x"]

            return ssd
        case _:
            raise KeyError(name)


# Steps ------------------------------------------------------------------------------------------------------------


def stepped(name: str, x: Inputs) -> Callable[[], Any]:
    """A loop over steps."""
    taken = {"gla": 2, "simple_gla": 2, "delta_rule": 2, "gated_delta": 2, "ssd": 1, "lstm_np": 1}[name]

    def apart(*names: str) -> list[tuple[Tensor, ...]]:
        return [x[n].unbind(taken) for n in names]

    def decayed() -> Tensor:
        state, found = 0.0, []
        for q, k, v, g in zip(*apart("q", "k", "v", "g"), strict=True):
            state = (g.exp()[..., None] if name == "gla" else g.exp()[..., None, None]) * state + k[..., None] * v[..., None, :]
            found.append((q[..., None, :] @ state)[..., 0, :])
        return torch.stack(found, 2) / x["q"].shape[-1] ** 0.5

    def corrected() -> Tensor:
        q0, k0, v0, b0 = apart("q", "k", "v", "beta")
        g0 = x["g"].unbind(2) if "g" in x else [None] * len(q0)
        state, found = torch.zeros(*k0[0].shape, v0[0].shape[-1]), []
        for q, k, v, b, g in zip(q0, k0, v0, b0, g0, strict=True):
            state = state if g is None else g.exp()[..., None, None] * state
            wrong = b[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
            state = state + k[..., None] * wrong[..., None, :]
            found.append((q[..., None, :] @ state)[..., 0, :])
        return torch.stack(found, 2) / x["q"].shape[-1] ** 0.5

    def discretised() -> Tensor:
        state, found = 0.0, []
        for u, dt, b, c in zip(*apart("x", "dt", "bb", "c"), strict=True):
            state = (dt * x["a"]).exp()[..., None, None] * state + (dt[..., None] * u)[..., None] * b[:, None, None, :]
            found.append((state @ c[:, None, :, None])[..., 0] + x["skip"][:, None] * u)
        return torch.stack(found, 1)

    def gated() -> Tensor:
        weights = torch.cat([x[n] for n in ("rz", "ri", "rf", "ro")], 1)
        n = x["zx"].shape[-1]
        y = c = torch.zeros(x["zx"].shape[0], n)
        found = []
        for given in torch.cat([x[i] for i in ("zx", "ix", "fx", "ox")], -1).unbind(1):
            z, i, f, o = (given + y @ weights).split(n, -1)
            c = i.sigmoid() * z.tanh() + f.sigmoid() * c
            y = o.sigmoid() * c.tanh()
            found.append(y)
        return torch.stack(found, 1)

    return {"delta_rule": corrected, "gated_delta": corrected, "ssd": discretised, "lstm_np": gated}.get(name, decayed)


def lstm_contenders(kernel: Kernel, batch: int, length: int, width: int, seed: int, without: Sequence[str]) -> list[bench.Contender]:
    """A whole layer from the same weights: weft with its input projection by F.linear, torch.nn.LSTM, and the loop over steps."""
    torch.manual_seed(seed)
    module = torch.nn.LSTM(width, width, batch_first=True)
    x = torch.randn(batch, length, width, requires_grad=True)
    leaves = (x, *module.parameters())
    names = ("i", "f", "z", "o")
    order = [t.name for t in kernel.typed.inputs]

    def projected() -> dict[str, Tensor]:
        given = F.linear(x, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0).split(width, -1)
        recurrent = [w.mT for w in module.weight_hh_l0.split(width, 0)]
        return {f"{n}x": g for n, g in zip(names, given, strict=True)} | {f"r{n}": r for n, r in zip(names, recurrent, strict=True)}

    def weft() -> Any:
        found = projected()
        result = kernel(*(found[n] for n in order), strict=True)
        return result if isinstance(result, Tensor) else result[0]

    def steps() -> Any:
        loop = stepped("lstm_np", projected())
        return loop()

    with torch.no_grad():
        expected = module(x)[0]
    found = [
        bench.Contender("weft", weft, leaves, True, expected),
        bench.Contender("torch.nn.LSTM", lambda: module(x)[0], leaves, True, expected),
        bench.Contender("steps", steps, leaves, True, expected),
    ]
    return [c for c in found if c.name not in without]


def peers(kernel: str, inputs: Inputs, params: Mapping[str, Any], extents: Mapping[str, int]) -> Sequence[bench.Peer]:
    return [bench.Peer("chunked", chunked(kernel, inputs)), bench.Peer("steps", stepped(kernel, inputs))]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(NAMES))
@click.option("--length", default=4096, show_default=True, help="Steps, a multiple of 64.")
@click.option("--heads", default=4, show_default=True)
@click.option("--dim", default=64, show_default=True, help="Key and value dims of a head.")
@click.option("--batch", default=1, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--without", multiple=True, metavar="PEER", help="A contender to leave out: chunked, steps, torch.nn.LSTM.")
@click.option("--json", "path", default=FILE, type=click.Path(dir_okay=False, path_type=Path), help="The file of results.")
def main(
    names: Sequence[str], length: int, heads: int, dim: int, batch: int, rounds: int, seed: int, without: Sequence[str], path: Path
) -> None:
    """Time recurrences, all of them unless NAMEs are given, and write the file."""
    results = []
    for name in names or NAMES:
        kernel = only_kernel(find(name))
        sizes = {"n": 256, "m": 256, "t": 256} if name == "lstm_np" else {"h": heads, "p": dim, "n": dim} if name == "ssd" else {}
        problem = pose(kernel.graph, sizes, {}, Usual(length, dim, heads, batch))
        if name == "lstm_np":
            entered = lstm_contenders(kernel, batch, problem.extents["t"], problem.extents["n"], seed, without)
        else:
            entered = bench.contenders(kernel, problem, "float32", None, peers, ("eager", *without), seed)
        results.append(bench.run(name, problem, entered, rounds, True, "float32"))
        out.print(bench.table(results[-1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bench.to_json(results, ["python", "-m", "benchmarks.recurrences", *sys.argv[1:]]), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
