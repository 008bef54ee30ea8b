"""Where a value of a C kernel lives: in a variable, in a tile, or in place in a tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .c_expressions import PRIMARY, Text

PAD = 16
"""Rows of a tile are padded to a multiple of this many numbers: whole vectors on every machine."""

_RESERVED = frozenset(
    """auto break case char const continue default do double else enum extern float for goto if inline int long register restrict return
    short signed sizeof static struct switch typedef union unsigned void volatile while asm main errno stdin stdout stderr
    tensors strides extents origins params thread_count set_threads NULL NAN INFINITY int32_t int64_t uint8_t uint16_t uint32_t
    j0 j1 jn y0 y1 yn gamma signgam index div abs exp log sin cos tan tanh sqrt pow floor ceil round erf fabs fmod log1p expm1 free
    remove rename system rand random time""".split()
)


def padded(extent: int) -> int:
    return (extent + PAD - 1) // PAD * PAD


class Names:
    """Unique C identifiers."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = set(_RESERVED) | taken

    def new(self, wish: str) -> str:
        base = re.sub(r"\W", "_", wish)
        if not base or base[0].isdigit():
            base = "n" + base
        name, count = base, 2
        while name in self.taken:
            name, count = f"{base}_{count}", count + 1
        self.taken.add(name)
        return name


@dataclass(frozen=True, slots=True)
class Tile:
    """An array with a dimension for each of ``axes``, the last one padded; rank 0 is a variable. It may take the place of a
    tile that is no longer needed."""

    name: str
    axes: tuple[str, ...]
    dims: tuple[int, ...]
    ctype: str
    place_of: str = ""

    def element(self, variables: dict[str, str]) -> Text:
        return Text(self.name + "".join(f"[{variables[a]}]" for a in self.axes), PRIMARY)

    @property
    def first(self) -> str:
        """The address of the first element."""
        match len(self.axes):
            case 0:
                return f"&{self.name}"
            case 1:
                return self.name
            case rank:
                return self.name + "[0]" * (rank - 1)

    def stride(self, axis: str) -> int:
        """Distance of neighbours along an axis; 0 where the tile lacks it."""
        if axis not in self.axes:
            return 0
        result = 1
        for size in self.dims[self.axes.index(axis) + 1 :]:
            result *= size
        return result

    @property
    def bytes(self) -> int:
        count = 8 if self.ctype == "int64_t" else 4
        for size in self.dims:
            count *= size
        return count

    @property
    def declaration(self) -> str:
        return f"{self.ctype} {self.name}" + "".join(f"[{d}]" for d in self.dims)

    @property
    def pointer(self) -> str:
        """A pointer that is used like the array."""
        inner = "".join(f"[{d}]" for d in self.dims[1:])
        return f"{self.ctype} (*const {self.name}){inner}" if inner else f"{self.ctype} *const {self.name}"

    @property
    def cast(self) -> str:
        inner = "".join(f"[{d}]" for d in self.dims[1:])
        return f"({self.ctype} (*){inner})" if inner else f"({self.ctype} *)"
