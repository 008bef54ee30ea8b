"""Drawing inputs: ``sample`` lines, defaults, seeds; and ``assume`` lines on what was drawn."""

from __future__ import annotations

import torch
from torch import Tensor

import weft.dsl
from weft.compiler import sampling

TEXT = """
kernel f(x[t,d], g[d,t], u[t], doc[b,(t c)]: int, keep[t]: bool, at[t]: int, table[n], count[t]: int, a[]) -> y[t]:
    param low: int = 3
    axis c = 2
    assume g <= 0
    assume u >= low
    sample g = logsigmoid(normal()) / size(d)
    sample u = uniform(low, low + 2)
    sample doc = sort[t](randint(0, low))
    sample a = 2
    y = u + a + sum[d](x * g) + table[n -> at] + count + where(keep, 1, 0) + sum[b, c](doc)
"""
EXTENTS = {"t": 400, "d": 3, "b": 2, "c": 2, "n": 5}


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    kernel = weft.dsl.parse(TEXT).kernels[0]
    return sampling.sample(kernel, EXTENTS, torch.Generator().manual_seed(seed), dtype, params={"low": 3})


def test_every_input_is_drawn_in_its_shape_and_dtype() -> None:
    drawn = draw(dtype=torch.bfloat16)
    shapes = {n: tuple(t.shape) for n, t in drawn.items()}
    assert shapes == {"x": (400, 3), "g": (3, 400), "u": (400,), "doc": (2, 800), "keep": (400,), "at": (400,), "table": (5,),
                      "count": (400,), "a": ()}  # fmt: skip
    floats = {n for n, t in drawn.items() if t.dtype == torch.bfloat16}
    assert floats == {"x", "g", "u", "table", "a"}
    assert (drawn["keep"].dtype, drawn["doc"].dtype) == (torch.bool, torch.int64)


def test_lines_are_obeyed() -> None:
    drawn = draw()
    assert (drawn["g"] < 0).all()
    assert drawn["g"].mean() > -0.5
    assert (drawn["u"] >= 3).all()
    assert (drawn["u"] < 5).all()
    assert drawn["u"].max() - drawn["u"].min() > 1.9
    doc = drawn["doc"].reshape(2, 400, 2)
    assert (doc.diff(dim=1) >= 0).all()
    assert set(doc.flatten().tolist()) == {0, 1, 2}
    assert float(drawn["a"]) == 2


def test_defaults() -> None:
    drawn = draw()
    assert abs(float(drawn["x"].mean())) < 0.1
    assert abs(float(drawn["x"].std()) - 1) < 0.1
    assert 0.7 < float(drawn["keep"].double().mean()) < 0.9
    assert set(drawn["at"].tolist()) == {0, 1, 2, 3, 4}
    assert set(drawn["count"].tolist()) == set(range(sampling.LARGEST_INT))


def test_a_seed_means_the_same_numbers_in_every_dtype() -> None:
    high, low = draw(3), draw(3, torch.float32)
    for name, tensor in high.items():
        assert torch.equal(tensor.float() if tensor.is_floating_point() else tensor, low[name])
    assert not torch.equal(draw(4)["x"], high["x"])


def test_violated_promises_are_found() -> None:
    kernel = weft.dsl.parse(TEXT).kernels[0]
    drawn = draw()
    assert sampling.violated(kernel, drawn, {"low": 3}, EXTENTS) == []
    drawn["g"][1, 7] = 0.5
    assert [e.span.line for e in sampling.violated(kernel, drawn, {"low": 3}, EXTENTS)] == [5]
    drawn["u"][0] = float("nan")
    assert len(sampling.violated(kernel, drawn, {"low": 3}, EXTENTS)) == 2
