"""Generated Triton compiled for GPUs that need not be there, and what can be read from the binaries.

    for report in compile_for(module, spec, "sm_90", folder):
        print(report)          # forward on sm_90: 168 registers, no spills, 48.0 KiB shared, 64 tensor-core instructions, 4 dots

NVIDIA's tools come with Triton. Registers that do not fit are spilled to memory, which shows as stack bytes, as STL and LDL
instructions, and in what ``ptxas -v`` says; a binary with spills works, but slowly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..codegen.source import Entry, Module, Specialization
from .triton_loader import import_generated

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

TargetName = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
TARGETS: tuple[TargetName, ...] = get_args(TargetName)

SHARED_LIMIT: dict[str, int] = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program can have: CUDA C++ Programming Guide, table of compute capabilities; CDNA3 ISA, LDS."""

_POINTEES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "bool": "i1"}
_NVIDIA_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
"""In PTX: each becomes instructions of tensor cores, and nothing else does."""
_ROUNDED_DOT = re.compile(r"\btt\.dot .*(?:: tensor<[\dx]+x(?:bf16|f16)|inputPrecision = tf32)")
_AMD_TENSOR_CORE = re.compile(r"\bv_s?mfma_")


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What the binary of one kernel needs of the GPU. ``spill_bytes`` is per thread; stores and loads are instructions; ``dots`` are
    the matrix products of half precision or tf32, which tensor cores can take (float32 is multiplied exactly, without them)."""

    kernel: str
    target: TargetName
    registers: int
    spill_bytes: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    tensor_core_instructions: int
    dots: int

    @property
    def spills(self) -> bool:
        return self.spill_bytes > 0 or self.spill_stores > 0 or self.spill_loads > 0

    @property
    def fits(self) -> bool:
        """Whether a program finds the shared memory it needs."""
        return self.shared_bytes <= SHARED_LIMIT[self.target]

    def __str__(self) -> str:
        spills = f"{self.spill_bytes} bytes spilled" if self.spills else "no spills"
        return (
            f"{self.kernel} on {self.target}: {self.registers} registers, {spills}, {self.shared_bytes / 1024:.1f} KiB shared, "
            f"{self.tensor_core_instructions} tensor-core instructions, {self.dots} dots"
        )


def compile_for(
    module: Module, spec: Specialization, target: TargetName, folder: Path, options: Mapping[str, int | bool] | None = None
) -> list[KernelReport]:
    """Compiles every kernel of a module for a target and reads the binaries. No GPU is needed.

    Tensors are taken as a call gives them as a rule: 16-byte aligned, the last axis contiguous, other strides multiples of 16.
    ``options`` override the constants and launch options of the file (``BLOCK_I``, ``num_warps`` ...).

    Raises ``RuntimeError`` where Triton interprets, and what Triton raises for a kernel that it cannot compile.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets in this process (TRITON_INTERPRET=1), and then cannot compile.")
    generated = import_generated(module, folder)
    dtypes = dict(spec.dtypes)
    reports = []
    for entry in module.entries:
        function = getattr(generated, entry.name)
        chosen = {**getattr(generated, f"{entry.name}_options"), **(options or {})}
        reports.append(compile_kernel(function, entry, dtypes, chosen, target))
    return reports


def compile_kernel(
    function: Any, entry: Entry, dtypes: Mapping[str, str], options: Mapping[str, int | bool], target: TargetName
) -> KernelReport:
    """One ``@triton.jit`` function of a generated file, compiled and read."""
    compiled = _compile(function, entry, dtypes, options, target)
    dots = len(_ROUNDED_DOT.findall(compiled.asm["ttir"]))
    if target == "gfx942":
        return _read_amd(entry.name, target, compiled.asm["amdgcn"], dots)
    return _read_nvidia(entry.name, target, compiled, dots)


def spilled_bytes(function: Any, entry: Entry, dtypes: Mapping[str, str], options: Mapping[str, int | bool], target: TargetName) -> int:
    """Bytes that a thread of one kernel, compiled for a GPU of NVIDIA, keeps in memory for want of registers."""
    compiled = _compile(function, entry, dtypes, options, target)
    stack = _number(r"\bSTACK:(\d+)", _resource_usage(compiled.asm["cubin"]))
    return stack if stack and _assembler_spills(compiled.asm["ptx"], target) else 0


def _compile(function: Any, entry: Entry, dtypes: Mapping[str, str], options: Mapping[str, int | bool], target: TargetName) -> Any:
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(function, entry, dtypes, options)
    launch = {name: value for name, value in options.items() if name not in function.arg_names}
    key = (_text(function), repr((signature, constants, sorted(launch.items()))), target)
    if key not in _compiled:
        made = triton.compile(ASTSource(function, signature, constants, attributes), target=_gpu_target(target), options=launch)
        if len(_compiled) >= _REMEMBERED:
            _compiled.pop(next(iter(_compiled)))
        _compiled[key] = made
    return _compiled[key]


def _text(function: Any) -> str:
    """A kernel's text with those of the helpers beside it. Unlike Triton's own key it says nothing of the line where the kernel begins:
    a kernel stays what it is when another one above it in the file changes."""
    from triton.runtime.jit import JITFunction

    beside = function.__globals__
    helpers = [f.src for name, f in sorted(beside.items()) if isinstance(f, JITFunction) and f"{name}_options" not in beside]
    return "\n".join([*helpers, function.src])


_compiled: dict[tuple[str, str, str], Any] = {}
_REMEMBERED = 64
"""Binaries that are at hand: those of a kernel that is fitted are wanted again when they are reported, and when a kernel beside it is."""


@lru_cache(64)
def _resource_usage(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _run_tool("cuobjdump", "--dump-resource-usage", str(path))


def _gpu_target(target: TargetName) -> GPUTarget:
    from triton.backends.compiler import GPUTarget

    if target == "gfx942":
        return GPUTarget("hip", "gfx942", 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _signature(
    function: Any, entry: Entry, dtypes: Mapping[str, str], options: Mapping[str, int | bool]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[object]]]]:
    """Types of the arguments, values of those that are compiled in, and what is known of the others."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    multiple_of_16: list[list[object]] = [["tt.divisibility", 16]]
    contiguous = _last_strides(function.arg_names)
    for position, (name, param) in enumerate(zip(function.arg_names, function.params, strict=True)):
        if position < len(entry.buffers):
            signature[name] = "*" + _POINTEES[dtypes[entry.buffers[position]]]
            attributes[(position,)] = multiple_of_16
        elif param.is_constexpr or name in contiguous:
            signature[name] = "constexpr"
            constants[name] = options[name] if param.is_constexpr else 1
        elif param.annotation_type:
            signature[name] = param.annotation_type
        else:
            signature[name] = "i32"
            attributes[(position,)] = multiple_of_16
    return signature, constants, attributes


def _last_strides(names: list[str]) -> set[str]:
    """The stride arguments of the last axis of every tensor: those of one tensor follow each other."""
    last = {name.rpartition("_stride_")[0]: name for name in names if "_stride_" in name}
    return set(last.values())


def _read_nvidia(kernel: str, target: TargetName, compiled: Any, dots: int) -> KernelReport:
    usage = _resource_usage(compiled.asm["cubin"])
    stack = _number(r"\bSTACK:(\d+)", usage)
    spilled = bool(stack) and _assembler_spills(compiled.asm["ptx"], target)
    assembly = _disassembled(kernel, compiled.asm["cubin"]) if spilled else ""
    return KernelReport(
        kernel=kernel,
        target=target,
        registers=_number(r"\bREG:(\d+)", usage),
        spill_bytes=stack if spilled else 0,
        spill_stores=len(re.findall(r"\bSTL(?:\.\w+)*\b", assembly)),
        spill_loads=len(re.findall(r"\bLDL(?:\.\w+)*\b", assembly)),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(_NVIDIA_TENSOR_CORE.findall(compiled.asm["ptx"])),
        dots=dots,
    )


def _disassembled(kernel: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kernel}.cubin"
        path.write_bytes(cubin)
        return _run_tool("nvdisasm", "--print-code", str(path))


@lru_cache(64)
def _assembler_spills(ptx: str, target: TargetName) -> bool:
    """Whether the stack of a binary holds spilled registers, as ``ptxas -v`` says. A sine or cosine of a large angle has a table there,
    with nothing spilled."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = target + ("a" if target != "sm_80" else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(int(target.removeprefix("sm_"))).path, "-v", f"--gpu-name={architecture}", str(source), "-o", f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
    return _number(r"(\d+) bytes spill stores", done.stderr) + _number(r"(\d+) bytes spill loads", done.stderr) > 0


def _read_amd(kernel: str, target: TargetName, assembly: str, dots: int) -> KernelReport:
    """AMD's assembler writes what a kernel needs into the metadata at the end of its text."""
    return KernelReport(
        kernel=kernel,
        target=target,
        registers=_number(r"\.vgpr_count:\s*(\d+)", assembly),
        spill_bytes=_number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
        spill_stores=len(re.findall(r"\bscratch_store_", assembly)),
        spill_loads=len(re.findall(r"\bscratch_load_", assembly)),
        shared_bytes=_number(r"\.group_segment_fixed_size:\s*(\d+)", assembly),
        tensor_core_instructions=len(_AMD_TENSOR_CORE.findall(assembly)),
        dots=dots,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern!r} is not in the report of the binary: {text[:200]!r}")
    return int(found.group(1))


def has_tools() -> bool:
    """Whether what reads the binaries for GPUs of NVIDIA came with Triton."""
    return _tool_path("cuobjdump").exists() and _tool_path("ptxas").exists()


def _tool_path(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


@cache
def _tool(name: str) -> str:
    path = _tool_path(name)
    if not path.exists():
        raise RuntimeError(f"{name} is not in Triton's package at {path.parent}")
    return str(path)


def _run_tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout
