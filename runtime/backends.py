"""Which backend a call runs on, and whether it can run here."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from . import errors
from .arguments import Call

INTERPRETED = "sm_80"
"""The target whose plans Triton's interpreter runs."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why no generated kernel can run on these tensors here."""

    why: str


def choose_target(call: Call) -> str | Unavailable:
    """The target to compile a call for: asked for by ``backend``, or triton for GPUs and c for CPUs.

    Raises ``BackendUnavailable`` where a backend that was asked for cannot run; without such a wish, a missing C compiler
    is a warning, once.
    """
    name, device = call.kernel.name, call.bound.device
    match call.backend or {"cpu": "c", "cuda": "triton"}.get(device.type):
        case "c" if device.type != "cpu":
            raise errors.BackendUnavailable(name, "c", f"the tensors are on {device}", "Move them to the CPU, or leave backend out.")
        case "c":
            return "c" if c_compiler_works() else _without_compiler(call)
        case "triton":
            return _triton_target(call)
        case _:
            return Unavailable(f"there is no backend for {device.type} devices")


def _without_compiler(call: Call) -> Unavailable:
    why = "no C compiler was found"
    mend = "Install gcc or clang, or name one in the environment variable CC."
    if call.backend == "c" or call.strict:
        raise errors.BackendUnavailable(call.kernel.name, "c", why, mend)
    _warn_once(f"{why}: kernels on the CPU run as the reference, many times slower. {mend}")
    return Unavailable(why)


def _triton_target(call: Call) -> str | Unavailable:
    name, device = call.kernel.name, call.bound.device
    if not triton_installed():
        raise errors.BackendUnavailable(name, "triton", "Triton is not installed", "Install triton, or choose another backend.")
    if device.type == "cuda":
        return gpu_target(device)
    if os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu":
        return INTERPRETED
    raise errors.BackendUnavailable(
        name, "triton", f"the tensors are on {device}", "Move them to a GPU, or set TRITON_INTERPRET=1 before Python starts."
    )


@cache
def gpu_target(device: torch.device) -> str:
    """The target of a GPU: the newest one that is not newer than the device."""
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def c_compiler_works() -> bool:
    from .c_compiler import MissingCompiler, compiler_id

    try:
        compiler_id()
    except MissingCompiler:
        return False
    return True


@cache
def triton_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, errors.CompilerMissing, stacklevel=6)
