"""Products with few rows, as in a decoding step: programs share out the columns, and weights that no row wants are not read."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from weft.compiler.plan import Load, inner_statements
from weft.runtime.kernel import Kernel
from weft.specs import cats, ksparse, moe_swiglu

WIDE = {"d": 1024, "f": 4096}


@pytest.mark.parametrize(("target", "dtype"), [("c", torch.float32), ("sm_90", torch.float16)])
@pytest.mark.parametrize(("kernel", "extents"), [(cats, WIDE), (moe_swiglu, {"d": 512, "f": 512, "n": 16})])
def test_few_rows_are_work_for_many_programs(kernel: Kernel, extents: dict[str, int], target: str, dtype: torch.dtype) -> None:
    def rows(tokens: int) -> dict[str, str | None]:
        lowered = kernel.lowered(target, dtype=dtype, extents={**extents, "t": tokens})
        assert lowered.forward is not None
        return {k.name: k.rows for k in lowered.forward.kernels if k.columns is not None}

    few, many = rows(16), rows(17)
    assert set(many.values()) <= {"t", None}
    assert set(few.values()) <= {"d", "f", "n"}


@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
def test_a_step_gives_what_the_sequence_gives(tokens: int) -> None:
    """Bit by bit: sums are in the same order however many rows there are."""
    torch.manual_seed(0)
    for kernel, params in ((cats, {"threshold": 0.3}), (moe_swiglu, {"k": 2})):
        sizes = {"t": 40, "d": 300, "f": 270, "n": 5}
        tensors = [torch.randn([sizes[a] for a in t.axes]) for t in kernel.typed.inputs]
        whole = kernel(*tensors, **params, backend="c", strict=True)
        part = kernel(tensors[0][:tokens], *tensors[1:], **params, backend="c", strict=True)
        y, z = (v if isinstance(v, torch.Tensor) else v[0] for v in (whole, part))
        assert torch.equal(y[:tokens], z)


@pytest.mark.parametrize("target", ["c", "sm_90"])
@pytest.mark.parametrize(
    ("kernel", "restricted"), [(cats, {"w_gate": [False], "w_up": [True], "w_down": [True]}), (ksparse, {"w": [False, True]})]
)
def test_what_no_token_keeps_is_not_loaded(kernel: Kernel, restricted: dict[str, list[bool]], target: str) -> None:
    """The gate of every unit is, in a kernel of its own, as it says which are kept; with many tokens everything is."""
    for tokens in (3, 17):
        lowered = kernel.lowered(target, dtype=torch.float32, extents={**WIDE, "t": tokens})
        assert lowered.forward is not None
        loads = [s for k in lowered.forward.kernels for s in inner_statements(k.body) if isinstance(s, Load)]
        found = {name: [load.where is not None for load in loads if load.buffer == name] for name in restricted}
        assert found == (restricted if tokens == 3 else {name: [False] * len(loads) for name, loads in restricted.items()})


GUARDED = """
import ctypes, mmap
import torch
from weft.specs import cats

libc = ctypes.CDLL(None, use_errno=True)
page, d, f = mmap.PAGESIZE, mmap.PAGESIZE // 4, 130
torch.manual_seed(0)
memories = mmap.mmap(-1, page * f), mmap.mmap(-1, page * f)
w_down, columns = (torch.frombuffer(memory, dtype=torch.float32).view(f, d) for memory in memories)
w_down.copy_(torch.randn(f, d))
columns.copy_(torch.randn(f, d) / 8)
x, w_gate, w_up = torch.randn({tokens}, d), torch.randn(d, f) / 8, columns.T
a = torch.nn.functional.silu(x @ w_gate)
kept = a.abs() >= 3.0
want = torch.where(kept, a * (x @ w_up), 0.0) @ w_down
wanted = kept.any(0)
assert 0 < int(wanted.sum()) < f - 20, int(wanted.sum())
for number, memory in enumerate(memories):
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for row in range(f):
        if number == {guard} or not wanted[row]:
            assert libc.mprotect(ctypes.c_void_p(base + row * page), page, 0) == 0
with torch.no_grad():
    got = cats(x, w_gate, w_up, w_down, threshold=3.0, backend="c", strict=True)
torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
print("read nothing else")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by mprotect")
@pytest.mark.parametrize("tokens", [1, 3])
def test_memory_that_no_token_wants_is_never_touched(tokens: int) -> None:
    """Its pages may not be read: the process would die. It does where the pages of kept units are protected as well. A unit's column of
    the weights that go up lies together here, as a kernel for decoding wants it."""

    def run(guard: int | None) -> subprocess.CompletedProcess[str]:
        text = GUARDED.replace("{tokens}", str(tokens)).replace("{guard}", str(guard))
        return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=120)

    done = run(None)
    assert done.stdout == "read nothing else\n", done.stderr
    assert run(0).returncode < 0
    assert run(1).returncode < 0
