"""Trains a small character-level transformer on the Python standard library's own sources, with attention by a weft kernel.

    python -m examples.train_char_lm --attention sigmoid_attention --steps 200

Any attention spec will do: what its inputs are for is read off the declaration. Inputs with a sequence axis are projected
from the residual stream, other numbers (slopes, sinks, mixing weights) are learned as they are, and ``doc`` says which
source file a character is from. ``--experts moe_mixtral`` puts a mixture of experts in the place of every MLP.
"""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from weft.runtime.check_shapes import roles
from weft.runtime.kernel import Kernel
from weft.runtime.library import find
from weft.runtime.load import only_kernel
from weft.runtime.problem import Usual, numbers_heads, pose


@dataclass(frozen=True)
class Config:
    """The size of the model and of its training."""

    width: int = 128
    heads: int = 4
    layers: int = 2
    length: int = 256
    batch: int = 8
    steps: int = 200
    warmup: int = 20
    rate: float = 2e-3
    experts: int = 8
    characters: int = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """Text as character numbers, the number of the file that each character is from, and the alphabet."""

    text: Tensor
    doc: Tensor
    alphabet: str

    @staticmethod
    def standard_library(characters: int) -> Corpus:
        """The sources of the standard library's modules, in alphabetical order, as far as ``characters`` reach."""
        sources: list[str] = []
        left = characters
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            source = path.read_text(encoding="utf-8", errors="ignore")[:left]
            sources.append("".join(c for c in source if c == "\n" or " " <= c <= "~"))
            left -= len(sources[-1])
            if left <= 0:
                break
        alphabet = "".join(sorted(set("".join(sources))))
        numbers = {c: n for n, c in enumerate(alphabet)}
        text = torch.tensor([numbers[c] for source in sources for c in source])
        doc = torch.repeat_interleave(torch.arange(len(sources)), torch.tensor([len(s) for s in sources]))
        return Corpus(text, doc, alphabet)

    def batch(self, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, length) of characters, of their successors and of file numbers."""
        starts = torch.randint(len(self.text) - length - 1, (rows, 1), generator=generator)
        at = starts + torch.arange(length)
        return self.text[at], self.text[at + 1], self.doc[at]


class Attention(nn.Module):
    """Self-attention by any spec whose inputs have at most one sequence axis each. (batch, length, width) to the same."""

    def __init__(self, kernel: Kernel, config: Config, backend: str | None, params: dict[str, Any]) -> None:
        super().__init__()
        usual = Usual(config.length, config.width // config.heads, config.heads, config.batch)
        self.kernel, self.backend, self.params = kernel, backend, params
        self.problem = pose(kernel.graph, {}, params, usual)
        self.along = {a for a, role in roles(kernel.graph).items() if role == "sequence" and not numbers_heads(kernel.graph, a)}
        self.batch_axis = kernel.typed.inputs[0].axes[0]
        self.learned = nn.ParameterDict()
        self.projected: dict[str, tuple[int, ...]] = {}
        drawn = self.problem.inputs(seed=0)
        for tensor in kernel.typed.inputs:
            if self._is_activation(tensor.axes):
                self.projected[tensor.name] = self._inner(tensor.dims)
            elif tensor.dtype is None:
                self.learned[tensor.name] = nn.Parameter(drawn[tensor.name])
        widths = [math.prod(self.projected[n]) for n in self.projected if self._is_real(n)]
        self.into = nn.Linear(config.width, sum(widths), bias=False)
        self.out = nn.Linear(math.prod(self._inner(kernel.typed.outputs[0].dims)), config.width, bias=False)

    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        real = [n for n in self.projected if self._is_real(n)]
        parts = dict(zip(real, self.into(x).split([math.prod(self.projected[n]) for n in real], -1), strict=True))
        inputs = []
        for tensor in self.kernel.typed.inputs:
            if tensor.name in parts:
                inner = parts[tensor.name].unflatten(-1, self.projected[tensor.name] or (1,))
                inner = inner if self.projected[tensor.name] else inner.squeeze(-1)
                inputs.append(inner.movedim(1, self._place(tensor.dims)))
            elif tensor.name in self.learned:
                inputs.append(self.learned[tensor.name])
            else:
                inputs.append(context[tensor.name])
        result = self.kernel(*inputs, **self.params, backend=self.backend)
        output = result if isinstance(result, Tensor) else result[0]
        return self.out(output.movedim(self._place(self.kernel.typed.outputs[0].dims), 1).flatten(2))

    def _is_activation(self, axes: tuple[str, ...]) -> bool:
        return self.batch_axis in axes and any(a in self.along for a in axes)

    def _is_real(self, name: str) -> bool:
        return next(t.dtype for t in self.kernel.typed.inputs if t.name == name) is None

    def _place(self, dims: tuple[tuple[str, ...], ...]) -> int:
        """Which dimension is the sequence."""
        return next(n for n, dim in enumerate(dims) if dim[0] in self.along)

    def _inner(self, dims: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
        """The extents of all dimensions but those of batch and sequence."""
        place = self._place(dims)
        return tuple(math.prod(self.problem.extents[a] for a in dim) for n, dim in enumerate(dims) if n not in (0, place))


class Experts(nn.Module):
    """A mixture of experts by any spec that takes tokens ``x[t,d]`` and weights, and gives ``y[t,d]`` first. (.., width) to the same."""

    def __init__(self, kernel: Kernel, config: Config, backend: str | None) -> None:
        super().__init__()
        self.kernel, self.backend = kernel, backend
        tokens, *weights = kernel.typed.inputs
        sizes = {tokens.axes[0]: config.batch * config.length, tokens.axes[1]: config.width}
        problem = pose(kernel.graph, sizes, {}, Usual(feature=config.width, experts=config.experts))
        self.weights = nn.ParameterDict()
        for tensor in weights:
            shape = problem.shape(tensor.name)
            inner = shape[-2] if len(shape) > 2 else shape[-1]
            self.weights[tensor.name] = nn.Parameter(torch.randn(shape) / math.sqrt(inner))

    def forward(self, x: Tensor) -> Tensor:
        result = self.kernel(x.flatten(0, -2), *self.weights.values(), backend=self.backend)
        return (result if isinstance(result, Tensor) else result[0]).view_as(x)


class Perceptron(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, kernel: Kernel, config: Config, backend: str | None, params: dict[str, Any], experts: Kernel | None) -> None:
        super().__init__()
        self.attention = Attention(kernel, config, backend, params)
        self.before_attention, self.before_mlp = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.mlp = Perceptron(config) if experts is None else Experts(experts, config, backend)

    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        x = x + self.attention(self.before_attention(x), context)
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Characters (batch, length) to logits of the next one (batch, length, alphabet)."""

    def __init__(
        self, kernel: Kernel, config: Config, letters: int, backend: str | None, params: dict[str, Any], experts: Kernel | None = None
    ) -> None:
        super().__init__()
        self.letter, self.position = nn.Embedding(letters, config.width), nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(kernel, config, backend, params, experts) for _ in range(config.layers))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, letters)
        nn.init.normal_(self.letter.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, text: Tensor, context: dict[str, Tensor]) -> Tensor:
        x = self.letter(text) + self.position.weight
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x))


def train(
    attention: str,
    config: Config | None = None,
    *,
    experts: str | None = None,
    backend: str | None = None,
    seed: int = 0,
    params: dict[str, Any] | None = None,
    progress: bool = True,
) -> list[float]:
    """The losses of a training run, one a step, in nats per character. The same seed gives the same model and the same batches."""
    config = config or Config()
    corpus = Corpus.standard_library(config.characters)
    torch.manual_seed(seed)
    mixture = None if experts is None else only_kernel(find(experts))
    model = Transformer(only_kernel(find(attention)), config, len(corpus.alphabet), backend, params or {}, mixture)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, config))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(experts or attention, total=config.steps, loss="")
        for _ in range(config.steps):
            text, following, doc = corpus.batch(config.batch, config.length, generator)
            logits = model(text, {"doc": doc})
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update(task, advance=1, loss=f"loss {losses[-1]:.3f}")
    return losses


def _warm_cosine(step: int, config: Config) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


@click.command()
@click.option("--attention", default="softmax_attention", show_default=True, help="The name or path of an attention spec.")
@click.option("--experts", help="The name or path of a spec for mixtures of experts, in the place of MLPs.")
@click.option("--backend", type=click.Choice(("c", "triton", "reference")), help="Default: the generated kernels of this machine.")
@click.option("--steps", default=Config.steps, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(attention: str, experts: str | None, backend: str | None, steps: int, seed: int) -> None:
    """Train and print the loss every few steps."""
    losses = train(attention, Config(steps=steps), experts=experts, backend=backend, seed=seed)
    for step in range(0, len(losses), max(1, len(losses) // 10)):
        click.echo(f"step {step + 1:5d}  loss {losses[step]:.4f}")
    click.echo(f"step {len(losses):5d}  loss {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
