"""Gates from weak to extreme: mean decays of exp(-0.01) to exp(-20) a step, in every gated recurrence.

``check`` bounds the error of a kernel by that of eager PyTorch. A gradient of a strong gate is a small number beside what it is made
of, so that it is compared by itself too, with its own size.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import pytest
import torch

import weft
from tests.evidence.library import SPECS
from weft.runtime.check import check_kernel
from weft.runtime.problem import Usual, pose

if TYPE_CHECKING:
    from weft.runtime.kernel import Kernel

LOGS = {
    "gla": "g", "simple_gla": "g", "hgrn": "g", "hgrn2": "g", "rwkv6": "w", "rwkv7": "g", "kda": "log_a", "gated_delta": "g",
    "gated_delta_product": "g", "gdn2": "g", "comba": "g", "gsa": "g", "momentum_delta": "log_alpha",
}  # fmt: skip
"""Gates that are logarithms of decays."""
OTHERS = {"ssd": "dt", "selective_scan": "dt", "mlstm": "fg", "mlstm_sigmoid": "fg", "slstm": "fx", "rwkv4": "decay"}
"""Gates of other kinds, with the same mean decays."""
LEVELS = (0.01, 1.0, 5.0, 10.0, 20.0)


@functools.cache
def gated(name: str) -> Kernel:
    """A shipped kernel whose gate is drawn around a mean log-decay, its parameter ``level``."""
    gate = LOGS.get(name) or OTHERS[name]
    spread = "level * exp(normal() / 4)"
    drawn = {"dt": spread, "decay": f"log({spread})"}.get(gate, f"-{spread}")
    text = (SPECS / f"{name}.weft").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not re.match(rf"    sample ({gate}|a) = ", line)]
    start = next(n for n, line in enumerate(lines) if line.startswith("kernel "))
    end = next(n for n, line in enumerate(lines) if n >= start and line.endswith(":"))
    lines.insert(end + 1, f"    sample {gate} = {drawn}")
    if gate == "dt":
        lines.insert(end + 1, "    sample a = -exp(normal() / 4)")
    lines.insert(end + 1, "    param level: float = 1")
    return getattr(weft.loads("\n".join(lines) + "\n"), name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [*LOGS, *OTHERS])
def test_gates_of_every_strength(name: str, level: float) -> None:
    report = check_kernel(gated(name), backend="c", trials=1, quick=True, dtypes=("float32", "bfloat16"), params={"level": level})
    assert report.passed, str(report)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [*LOGS, "ssd", "selective_scan", "mlstm"])
def test_gradients_of_gates_are_exact_for_their_size(name: str, level: float) -> None:
    made = gated(name)
    gate = LOGS.get(name) or OTHERS[name]
    problem = pose(made.graph, {}, {"level": level}, Usual(70, 16, 2, 1))
    inputs = problem.inputs(seed=3)
    leaf = inputs[gate].clone().requires_grad_()
    exact = {n: x.double() for n, x in inputs.items()}
    wide = exact[gate].requires_grad_()
    got = made(**{**inputs, gate: leaf}, **problem.params, strict=True)
    want = made.reference(**{**exact, gate: wide}, **problem.params)
    first, right = (o[0] if isinstance(o, tuple) else o for o in (got, want))
    cotangent = torch.randn(right.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (found,) = torch.autograd.grad(first, [leaf], cotangent.float())
    (reference,) = torch.autograd.grad(right, [wide], cotangent)
    assert torch.isfinite(found).all()
    error, size = (found - reference).square().mean().sqrt(), reference.square().mean().sqrt()
    assert error <= 1e-4 * size + 1e-30, (float(error), float(size))


@pytest.mark.parametrize("name", ["gla", "gated_delta", "kda", "ssd", "mlstm", "gsa"])
def test_a_prefix_does_not_depend_on_its_future(name: str) -> None:
    """Whatever comes later, NaN and extreme gates included."""
    made = gated(name)
    problem = pose(made.graph, {}, {"level": 20.0}, Usual(70, 16, 2, 1))
    inputs = problem.inputs()
    (along,) = {s.along[0] for s in made.graph.states.values()}
    axes = {t.name: t.axes for t in made.typed.inputs}
    later = {n: x.clone() for n, x in inputs.items()}
    for n, x in later.items():
        if along in axes[n]:
            x.narrow(axes[n].index(along), 33, 37).fill_(float("nan"))
    output = made.typed.outputs[0].axes.index(along)

    def prefix(given: dict[str, torch.Tensor]) -> torch.Tensor:
        found = made(**given, **problem.params, strict=True)
        return (found[0] if isinstance(found, tuple) else found).narrow(output, 0, 33)

    torch.testing.assert_close(prefix(later), prefix(inputs), rtol=0, atol=0)
