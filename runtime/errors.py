"""What can go wrong when a kernel is loaded or called: one class per mistake, saying what, where and how to mend it.

Mistakes in shapes, extents, params and states are ``compiler.errors``; they are exported here as well, so that this
module has every class a caller may want to catch. Mistakes in a spec's text are ``SpecError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..compiler.errors import (
    BadExtent,
    CallError,
    ExtentMismatch,
    ExtentNotComputable,
    MissingInput,
    MissingParam,
    NegativeExtent,
    NegativePower,
    RankMismatch,
    SplitMismatch,
    SplitNotDivisible,
    UnknownAxis,
    UnknownExtent,
    UnknownInput,
    UnknownParam,
    UnknownState,
    UnsolvableSplit,
    WrongParamType,
    WrongShape,
)
from ..dsl.diagnostics import SpecError
from ..dsl.names import closest

__all__ = [
    "AmbiguousKernel", "BackendUnavailable", "BadExtent", "BadOption", "BadOrigin", "CacheUnavailable", "CallError", "CompilerMissing",
    "ExtentMismatch", "ExtentNotComputable", "InputGivenTwice", "MetaInput", "MissingInput", "MissingParam", "MixedDevices",
    "NegativeExtent", "NegativePower", "NoKernels", "NoStates", "NotATensor", "NotFused", "NotSupported", "RankMismatch", "SpecError",
    "SpecNotFound", "SplitMismatch", "SplitNotDivisible", "TooManyInputs", "UnknownAxis", "UnknownBackend", "UnknownExtent",
    "UnknownInput", "UnknownKernel", "UnknownKeyword", "UnknownParam", "UnknownState", "UnknownTarget", "UnsolvableSplit",
    "UnsupportedLayout", "WrongDtype", "WrongParamType", "WrongShape",
]  # fmt: skip


# Loading ----------------------------------------------------------------------------------------------------------


class SpecNotFound(FileNotFoundError):
    def __init__(self, path: str, near: Iterable[str]) -> None:
        hint = closest(path.rsplit("/", 1)[-1].removesuffix(".weft"), near)
        super().__init__(f"there is no spec file {path}. {hint}Pass the path of a .weft file.")


class NoKernels(ImportError):
    def __init__(self, filename: str) -> None:
        super().__init__(f"{filename} defines macros but no kernel. Take them into a spec with `use`.")


class AmbiguousKernel(ImportError):
    """A file with several kernels, none of them named like the file, was imported as if it were one."""

    def __init__(self, filename: str, stem: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{filename} defines the kernels {', '.join(names)} and none of them is named {stem}, so it is not clear which one to import. "
            f"Write weft.load({filename!r}).{names[0]}, or give one the name {stem}."
        )


class UnknownKernel(AttributeError):
    def __init__(self, filename: str, name: str, known: Sequence[str]) -> None:
        hint = closest(name, known)
        super().__init__(f"{filename} has no kernel {name!r}. {hint}It has: {', '.join(known) or 'none'}.")


# Calling ----------------------------------------------------------------------------------------------------------


class TooManyInputs(CallError):
    def __init__(self, kernel: str, given: int, names: Sequence[str]) -> None:
        super().__init__(
            f"{kernel}: {given} tensors were passed but the inputs are {', '.join(names)} ({len(names)}). Pass params by keyword."
        )


class InputGivenTwice(CallError):
    def __init__(self, kernel: str, name: str, index: int) -> None:
        super().__init__(f"{kernel}: input '{name}' is passed twice, as tensor number {index + 1} and by name. Pass it once.")


class UnknownKeyword(CallError):
    def __init__(self, kernel: str, name: str, inputs: Sequence[str], params: Sequence[str]) -> None:
        known = [f"inputs {', '.join(inputs)}" if inputs else "", f"params {', '.join(params)}" if params else ""]
        hint = closest(name, (*inputs, *params))
        super().__init__(
            f"{kernel}: there is no input or param '{name}'. {hint}It has the {' and the '.join(k for k in known if k) or 'no inputs'}."
        )


class NotATensor(CallError):
    def __init__(self, kernel: str, name: str, value: object) -> None:
        super().__init__(f"{kernel}: '{name}' must be a tensor, not {type(value).__name__}. Pass torch.as_tensor(...).")


class WrongDtype(CallError):
    def __init__(self, kernel: str, name: str, wanted: str, dtype: torch.dtype, mend: str) -> None:
        super().__init__(f"{kernel}: '{name}' has dtype {_short(dtype)} but {wanted} is wanted. {mend}")


class MixedDevices(CallError):
    def __init__(self, kernel: str, first: str, device: torch.device, second: str, other: torch.device) -> None:
        super().__init__(
            f"{kernel}: '{first}' is on {device} but '{second}' is on {other}. Move them to one device, as with {second}.to('{device}')."
        )


class UnsupportedLayout(CallError):
    def __init__(self, kernel: str, name: str, layout: str) -> None:
        super().__init__(f"{kernel}: '{name}' is a {layout} tensor, and kernels read strided memory. Pass {name}.{_DENSE[layout]}.")


_DENSE = {"nested": "to_padded_tensor(0.0)", "quantized": "dequantize()", "sparse": "to_dense()"}


class MetaInput(CallError):
    def __init__(self, kernel: str, name: str) -> None:
        super().__init__(
            f"{kernel}: '{name}' is on the meta device and holds no numbers. "
            f"Pass a tensor with data, or work out shapes under torch._subclasses.FakeTensorMode."
        )


class BadOption(CallError):
    def __init__(self, kernel: str, option: str, wanted: str, value: object) -> None:
        super().__init__(f"{kernel}: {option}= takes {wanted}, not {type(value).__name__}. Write {option}={_EXAMPLES[option]}.")


_EXAMPLES = {"sizes": "{'m': 4}", "origin": "{'i': 100}", "initial": "{'S': tensor}", "cu_seqlens": "{'t': tensor}", "history": "{}"}


class BadSequences(CallError):
    """Bounds of packed sequences that are none."""

    def __init__(self, kernel: str, axis: str, what: str) -> None:
        mend = f"Write cu_seqlens={{'{axis}': torch.tensor([0, 5, 12])}} for a sequence of 5 steps and one of 7."
        super().__init__(f"{kernel}: cu_seqlens['{axis}'] {what}. {mend}")


class BadInitial(CallError):
    """Initial values of packed sequences that are not one for each."""

    def __init__(self, kernel: str, state: str, sequences: int, value: object) -> None:
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        super().__init__(
            f"{kernel}: initial['{state}'] of packed sequences has them as its first dimension, here {sequences}, not {found}. "
            f"Stack a value for every sequence with torch.stack."
        )


class BadOrigin(CallError):
    def __init__(self, kernel: str, axis: str, value: object) -> None:
        super().__init__(
            f"{kernel}: the origin of axis '{axis}' must be an int, not {value!r}. Pass the position of its first element, as in "
            f"origin={{'{axis}': 100}}."
        )


class NoStates(CallError):
    def __init__(self, kernel: str, option: str) -> None:
        super().__init__(f"{kernel}: {option} was passed but the kernel carries no state. Leave {option} out.")


class UnknownBackend(CallError):
    def __init__(self, kernel: str, backend: object) -> None:
        super().__init__(f"{kernel}: there is no backend {backend!r}. Choose 'c', 'triton' or 'reference', or leave it out.")


class UnknownTarget(ValueError):
    def __init__(self, target: str, known: Sequence[str]) -> None:
        super().__init__(f"there is no target {target!r}. The targets are {', '.join(known)}.")


class BackendUnavailable(CallError, RuntimeError):
    """A backend was asked for that cannot run here or on these tensors."""

    def __init__(self, kernel: str, backend: str, why: str, mend: str) -> None:
        super().__init__(f"{kernel}: backend '{backend}' cannot run: {why}. {mend}")


class NotSupported(CallError, NotImplementedError):
    """Something that the language promises and this version does not do yet."""

    def __init__(self, kernel: str, what: str, mend: str) -> None:
        super().__init__(f"{kernel}: {what} not supported yet. {mend}")


class NotFused(CallError, RuntimeError):
    """Generated kernels alone were asked for, and something would run as PyTorch."""

    def __init__(self, kernel: str, reasons: Sequence[str]) -> None:
        why = "".join(f"\n  - {reason}" for reason in reasons)
        super().__init__(f"{kernel}: not all of it runs in generated kernels:{why}\nWithout strict=True that runs as PyTorch.")


# Warnings -----------------------------------------------------------------------------------------------------------


class CacheUnavailable(UserWarning):
    """The disk cache cannot be used; a temporary one takes its place."""


class CompilerMissing(UserWarning):
    """There is no C compiler: kernels on the CPU run as the reference."""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
