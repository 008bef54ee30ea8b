"""Looking at what was generated, building it before the first call, and running Triton's through its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weft
from weft.runtime import build, errors
from weft.runtime.variants import Variant
from weft.specs import softmax_attention, stickbreaking

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_plan_reads_like_an_algorithm(direction: str) -> None:
    shown = str(softmax_attention.plan(direction))  # type: ignore[arg-type]
    assert f"kernel {direction}_" in shown and "; sweeps " in shown and " by 64:" in shown


def test_a_plan_is_made_for_a_backend() -> None:
    assert len(softmax_attention.plan("backward", "triton").kernels) == len(softmax_attention.plan("backward", "c").kernels) + 1
    with pytest.raises(errors.UnknownTarget) as caught:
        softmax_attention.plan(target="sm_75")
    assert str(caught.value) == "there is no target 'sm_75'. The targets are c, sm_80, sm_90, sm_100, gfx942."
    with pytest.raises(errors.UnknownBackend):
        softmax_attention.source("reference")


def test_what_is_not_fused_has_reasons() -> None:
    assert stickbreaking.lowered().forward is None
    with pytest.raises(errors.NotFused, match="a scan"):
        stickbreaking.source("c")


@pytest.mark.parametrize(("backend", "mark"), [("c", "#include"), ("triton", "@triton.jit")])
def test_sources_show_the_spec(backend: str, mark: str) -> None:
    for part in ("forward", "backward"):
        text = softmax_attention.source(backend, part, extents={"d": 40})  # type: ignore[arg-type]
        assert mark in text and "o = sum[j](softmax[j](s) * v)" in text and "40" in text


def test_building_ahead_builds_what_a_call_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    text = "kernel rows(x[n,d], w[d]) -> m[n]:\n    param times: int = 1\n    m = times * sum[d](x * w)\n"
    files = weft.build(weft.loads(text).rows, extents={"n": 3, "d": 5}, params={"times": 2})
    assert sorted(files) == ["backward", "forward"]
    assert all(path.with_suffix(".so").exists() for path in files.values())
    monkeypatch.setattr("weft.runtime.c_compiler.compile_c", lambda *_: pytest.fail("compiled again"))
    x = torch.ones(3, 5, requires_grad=True)
    m = weft.loads(text).rows(x, torch.ones(5, requires_grad=True), times=2, strict=True)
    m.sum().backward()
    assert m.tolist() == [10.0] * 3 and x.grad is not None and x.grad.unique().tolist() == [2.0]


INTERPRETED = """
import torch
from weft.specs import softmax_attention
torch.manual_seed(0)
sources = [torch.randn(shape, requires_grad=True) for shape in ((1, 4, 5, 16), (1, 2, 7, 16), (1, 2, 7, 8))]
found = softmax_attention(*sources, backend="triton", strict=True, origin={"i": 2})
wanted = softmax_attention.reference(*sources, origin={"i": 2})
pairs = list(zip(found, wanted))
pairs += zip(*(torch.autograd.grad(r.o.sin().sum() + r.l.sum(), sources) for r in (found, wanted)))
print(max((a - b).abs().max().item() for a, b in pairs) < 1e-5)
"""


def test_triton_runs_in_its_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "WEFT_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "True"
    assert {path.name.rsplit("__", 1)[0] for path in tmp_path.glob("triton/*/*.py")} == {
        "softmax_attention__forward",
        "softmax_attention__backward",
    }


def test_a_small_extent_has_a_variant_of_its_own() -> None:
    """A decoding step does not compute a tile of 64 queries."""
    kernel = weft.load(ROOT / "specs" / "full.weft").full
    torch.manual_seed(0)
    for queries in (1, 16, 17, 1):
        q, k, v = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
        torch.testing.assert_close(kernel(q, k, v), kernel.reference(q, k, v), rtol=1e-4, atol=1e-5)
    small = {dict(v.record.extents.small)["i"] for found in kernel.families.found.values() for v in found if isinstance(v, Variant)}
    assert small == {True, False}
    assert "i_start += 16" in kernel.source("c", extents={"i": 1}) and "i_start += 64" in kernel.source("c")
