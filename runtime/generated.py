"""What the compiler made of a kernel, to look at: lowered form, plans and sources, and building ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from . import errors
from .arguments import FLOATS, TORCH_DTYPES, Bound, Number
from .backends import INTERPRETED
from .build import load_program, source_file
from .problem import Usual, pose
from .variants import Chosen, Unfused, Variant, chosen_for, find_made, lower_for

if TYPE_CHECKING:
    from ..compiler.pipeline import Lowered
    from ..compiler.plan import Plan
    from .kernel import Kernel

TARGETS = ("c", "sm_80", "sm_90", "sm_100", "gfx942")
Direction = Literal["forward", "backward"]
