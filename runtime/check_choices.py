"""What a kernel chose, beside what float64 chooses.

A selection is a step: where two scores are nearly equal, rounding decides, and everything after it differs. So the references are given
the kernel's selections, after these have been held to the scores: what was chosen may be worse than what was not by rounding errors only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..compiler import ir
from ..compiler.choices import Choices, Chosen
from .check_noise import NUDGE
from .check_report import Failure

NOISY = 16.0
"""A score may be off by so many rounding errors (eps), each as large as its amplification says."""


def matching(references: Choices, kernels: Choices) -> dict[ir.Node, Tensor]:
    """For each selection of the reference the kernel's: of those with its axes the one that agrees with it most."""
    found: dict[ir.Node, Tensor] = {}
    for own in references.seen:
        alike = [k.data.to(own.data.device) for k in kernels.seen if k.node.axes == own.node.axes and k.node.over == own.node.over]
        if alike:
            found[own.node] = max(alike, key=lambda k: int((k == own.data).sum()))
    return found


def differs(references: Choices, given: Mapping[ir.Node, Tensor]) -> bool:
    """Whether an evaluation chose anything else than what is given."""
    return any(own.node in given and not torch.equal(own.data, given[own.node]) for own in references.seen)


def mistaken(exact: Choices, nudged: Sequence[Choices], dtype: torch.dtype, names: Mapping[ir.Node, str]) -> list[Failure]:
    """Selections that rounding errors do not explain. ``nudged`` are evaluations with rounding errors of a known size (``check_noise``)."""
    failures = []
    for n, own in enumerate(exact.seen):
        assert own.usual is not None
        if torch.equal(own.data, own.usual):
            continue
        moved = [((other.seen[n].scores - own.scores).abs() / NUDGE).nan_to_num(0.0) for other in nudged]  # type: ignore[operator]
        wrong = _wrong(own, torch.stack(moved).amax(0), dtype)
        if bool(wrong.any()):
            where = [int(i) for i in wrong.nonzero()[0]]
            axes = [a for a in own.node.axes if a not in own.node.over]
            message = (
                f"what is chosen over {', '.join(own.node.over)} is not what the scores say, for {int(wrong.sum())} of {wrong.numel()}"
            )
            failures.append(
                Failure("value", names.get(own.node, "topk"), message, dict(zip(axes, where, strict=True)), "another", "the largest")
            )
    return failures


def _wrong(own: Chosen, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Per range of a selection, whether something was chosen that is worse than what was not, by more than rounding errors."""
    assert own.usual is not None and own.scores is not None
    dims = [own.node.axes.index(a) for a in own.node.over]
    scores = own.scores.double()
    there = torch.ones_like(own.data) if own.where is None else own.where
    counts = own.data.sum(dims) != own.usual.sum(dims)
    outside = (own.data & ~there).int().amax(dims) > 0
    lowest = scores.masked_fill(~own.data, torch.inf).amin(dims)
    highest = scores.masked_fill(own.data | ~there, -torch.inf).amax(dims)
    single = torch.finfo(torch.float32)
    finite = scores.nan_to_num(0.0, 0.0, 0.0).abs().amax(dims)
    allowed = NOISY * (torch.finfo(dtype).eps * noise.amax(dims) + single.eps * finite + single.tiny)
    return counts | outside | ~(lowest >= highest - allowed)
