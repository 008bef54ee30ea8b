"""Ahead-of-time compilation for GPUs that need not be there: every fused kernel, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.evidence.library import OTHERS, REQUIRED, kernel
from weft.runtime.ahead import build_ahead
from weft.runtime.problem import Usual, pose

if TYPE_CHECKING:
    from weft.runtime.ahead import Built

pytest.importorskip("triton")


def _built(name: str, target: str, dtype: str, feature: int = 64) -> Built:
    made = kernel(name)
    built = build_ahead(made, pose(made.graph, {}, {}, Usual(feature=feature)), target, dtype)
    for report in built.reports:
        assert report.fits, str(report)
        assert report.tensor_core_instructions >= report.dots, f"a product without tensor cores: {report}"
    return built


@pytest.mark.parametrize("name", REQUIRED)
def test_required_kernels_for_sm_90(name: str) -> None:
    """Whole, and without a spill."""
    built = _built(name, "sm_90", "bfloat16")
    assert built.fused, built.reasons
    assert built.reports
    for report in built.reports:
        assert not report.spills, str(report)


SPILLING = frozenset("gru ids4 lstm_fgr m2rnn h3 titans ttt_linear".split())
"""What still spills with every launch option and tile: states of several matrices, and many weights that every step reads."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_for_sm_90(name: str) -> None:
    built = _built(name, "sm_90", "float16")
    if not built.fused:
        pytest.skip(f"not fused: {built.reasons[-1]}")
    assert any(report.spills for report in built.reports) == (name in SPILLING), str(built)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("feature", [64, 128])
@pytest.mark.parametrize("name", [n if n == "full" else pytest.param(n, marks=pytest.mark.slow) for n in (*REQUIRED, "talking_heads")])
def test_no_spills(name: str, target: str, feature: int) -> None:
    for report in _built(name, target, "float16", feature).reports:
        assert not report.spills, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", REQUIRED)
def test_other_targets(name: str, target: str) -> None:
    assert _built(name, target, "bfloat16").fused
