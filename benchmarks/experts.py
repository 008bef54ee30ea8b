"""Times mixtures of experts against PyTorch.

    python -m benchmarks.experts
    python -m benchmarks.experts --experts 8 --experts 128 --rounds 9

A layer of SwiGLU experts with normalised top-k weights, both directions, gradients of all inputs. ``sorted`` is PyTorch written by hand:
tokens sorted by expert once, a loop over experts whose weights are unbound once, one addition into place. ``transformers`` is Mixtral's
loop over experts, with weights of its own layout. A last table has our layer alone, for all numbers of experts in turns: how its time grows
with experts that a token does not use. It is measured first, before the others have scattered what is free of the memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from weft.runtime import bench
from weft.runtime.library import find
from weft.runtime.load import only_kernel
from weft.runtime.problem import Problem, Usual, pose

FILE = Path(__file__).parent / "results" / "cpu_experts.json"
out = Console(highlight=False)
Inputs = Mapping[str, Tensor]


def routed(x: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts: (t, k) each."""
    weights, chosen = torch.softmax(x["x"] @ x["router"].mT, -1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True), chosen


def by_sorting(x: Inputs, k: int) -> Callable[[], Tensor]:
    """Tokens sorted by expert, and a loop over the experts."""

    def run() -> Tensor:
        weights, chosen = routed(x, k)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        token = order // k
        counts = torch.bincount(flat, minlength=len(x["w_gate"])).tolist()
        made = []
        experts = (x[n].unbind(0) for n in ("w_gate", "w_up", "w_down"))
        for rows, gate, up, down in zip(x["x"][token].split(counts), *experts, strict=True):
            made.append((F.silu(rows @ gate) * (rows @ up)) @ down)
        rows = torch.cat(made) * weights.flatten()[order][:, None]
        return torch.zeros_like(x["x"]).index_add(0, token, rows)

    return run


def by_transformers(x: Inputs, k: int) -> Callable[[], Tensor] | None:
    """Mixtral's experts; None where transformers is not installed."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError:
        return None
    experts, width, hidden = x["w_gate"].shape
    config = MixtralConfig(hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    with torch.no_grad():
        gate_up = torch.cat([x["w_gate"], x["w_up"]], -1).mT.contiguous()
        down = x["w_down"].mT.contiguous()
    module.gate_up_proj, module.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)

    def run() -> Tensor:
        weights, chosen = routed(x, k)
        found: Tensor = module(x["x"], chosen, weights)
        return found

    run.leaves = (x["x"], x["router"], module.gate_up_proj, module.down_proj)  # type: ignore[attr-defined]
    return run


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tokens", default=2048, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--hidden", default=256, show_default=True, help="Hidden units of an expert.")
@click.option("--experts", multiple=True, type=int, default=(8, 32, 128), show_default=True)
@click.option("--top", default=4, show_default=True, help="Experts of a token.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "path", default=FILE, type=click.Path(dir_okay=False, path_type=Path), help="The file of results.")
def main(tokens: int, width: int, hidden: int, experts: Sequence[int], top: int, rounds: int, seed: int, path: Path) -> None:
    """Time the layer for each number of experts, and write the file."""
    kernel = only_kernel(find("moe_swiglu"))
    compared: list[tuple[Problem, list[bench.Contender]]] = []
    alone: list[bench.Contender] = []
    for count in experts:
        problem = pose(kernel.graph, {"t": tokens, "d": width, "f": hidden, "n": count}, {"k": top}, Usual())
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Tensor] = {}
        for tensor in kernel.typed.inputs:
            shape = problem.shape(tensor.name)
            scale = 1.0 if tensor.name == "x" else (shape[-2] if len(shape) > 2 else shape[-1]) ** -0.5
            inputs[tensor.name] = (torch.randn(shape, generator=generator) * scale).requires_grad_()
        leaves = tuple(inputs.values())
        with torch.no_grad():
            expected = kernel.reference(*inputs.values(), k=top).y if count <= 8 else by_sorting(inputs, top)()

        def weft(given: tuple[Tensor, ...] = leaves) -> Any:
            return kernel(*given, k=top, strict=True).y

        entered = [
            bench.Contender("weft", weft, leaves, True, expected),
            bench.Contender("sorted", by_sorting(inputs, top), leaves, True, expected),
        ]
        loop = by_transformers(inputs, top)
        if loop is not None:
            entered.append(bench.Contender("transformers", loop, loop.leaves, True, expected))  # type: ignore[attr-defined]
        compared.append((problem, entered))
        alone.append(replace(entered[0], name=f"n={count}"))
    growth = bench.run("moe_swiglu", compared[0][0], alone, rounds, True, "float32")
    results = [bench.run("moe_swiglu", problem, entered, rounds, True, "float32") for problem, entered in compared]
    for result in results:
        out.print(bench.table(result))
    out.print(bench.table(growth, alone[0].name))
    results.append(growth)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bench.to_json(results, ["python", "-m", "benchmarks.experts", *sys.argv[1:]]), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
