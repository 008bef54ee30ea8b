"""Triton's interpreter, as the tests use it. Importable where Triton interprets (``TRITON_INTERPRET=1``) and where it does not."""

from __future__ import annotations

import dataclasses


def skip_unused_checks() -> None:
    """Leaves out the interpreter's look for integer overflow, a third of its time: it asserts on the device, and such assertions do nothing
    there unless Triton debugs."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    if not options.debug and hasattr(options, "sanitize_overflow"):
        interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
