"""Runs the C of a plan on torch tensors: what the runtime does, in a few lines."""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from pathlib import Path

import torch

from tests.codegen.sample_plans import specialization
from weft.codegen.print_c import print_c
from weft.compiler.plan import Plan
from weft.runtime.c_compiler import compile_c, load

FOLDER = Path(tempfile.gettempdir()) / "weft-test-c"
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64,
    "bool": torch.bool,
}  # fmt: skip


class CPlan:
    """A compiled plan. Calling it with tensors by buffer name gives every tensor of the plan; missing ones are made, full of nan."""

    def __init__(
        self, plan: Plan, dtype: str, extents: dict[str, int], params: dict[str, int | bool] | None = None, text: str = ""
    ) -> None:
        self.plan = plan
        self.spec = specialization(plan, dtype, extents, params)
        self.extents = extents
        self.module = print_c(plan, self.spec, text)
        path = FOLDER / f"{hashlib.sha256(self.module.text.encode()).hexdigest()[:24]}.so"
        if not path.exists():
            compile_c(self.module.text, path)
        self.functions = load(path, [e.name for e in self.module.entries])

    def __call__(
        self,
        tensors: dict[str, torch.Tensor],
        origins: dict[str, int] | None = None,
        params: dict[str, float] | None = None,
        threads: int = 1,
    ) -> dict[str, torch.Tensor]:
        tensors = dict(tensors)
        for name, dtype in self.spec.dtypes:
            shape = [self.extents[a] for a in self.plan.buffers[name].axes]
            if name not in tensors:
                fill = float("nan") if DTYPES[dtype].is_floating_point else 0
                tensors[name] = torch.full(shape, fill, dtype=DTYPES[dtype])
            assert tensors[name].dtype == DTYPES[dtype] and list(tensors[name].shape) == shape, name
        self.functions["set_threads"](threads)
        for entry in self.module.entries:
            pointers = (ctypes.c_void_p * len(entry.buffers))(*(tensors[b].data_ptr() for b in entry.buffers))
            strides = [s for b in entry.buffers for s in tensors[b].stride()]
            sizes = [self.extents[a] for a in entry.extents]
            starts = [(origins or {}).get(a, 0) for a in entry.origins]
            numbers = [(params or {})[name] for name in entry.params]
            self.functions[entry.name](
                pointers,
                (ctypes.c_int64 * max(1, len(strides)))(*strides),
                (ctypes.c_int64 * max(1, len(sizes)))(*sizes),
                (ctypes.c_int64 * max(1, len(starts)))(*starts),
                (ctypes.c_double * max(1, len(numbers)))(*numbers),
            )
        return tensors
