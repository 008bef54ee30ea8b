"""Names in a printed kernel, each given once: nodes keep the names of the plan, and what the printer adds gives way to them."""

from __future__ import annotations

from collections.abc import Iterable


class KernelNames:
    """Gives every key a readable identifier of its own. A key is a role with what it is played for: ("stride", "q", "i")."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._given: dict[tuple[str, ...], str] = {}

    def get(self, wish: str, *key: str) -> str:
        """The name of ``key``: ``wish``, with underscores where that is taken."""
        if key not in self._given:
            name = wish.replace(".", "_")
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            self._given[key] = name
        return self._given[key]

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._given

    def index(self, axis: str) -> str:
        """Indices of a tile along an axis, as int32."""
        return self.get(f"{axis}_index", "index", axis)

    def offsets(self, axis: str) -> str:
        """Offsets in a tile along an axis, from 0, to be multiplied with strides."""
        return self.get(f"{axis}_offsets", "offsets", axis)

    def offset_type(self) -> str:
        """The int dtype of offsets in a tile."""
        return self.get("OFFSET", "offset type")

    def base(self, axis: str) -> str:
        """Where the tile starts, as int64."""
        return self.get(f"{axis}_base", "base", axis)

    def inside(self, axis: str) -> str:
        return self.get(f"{axis}_inside", "inside", axis)

    def start(self, axis: str) -> str:
        return self.get(f"{axis}_start", "start", axis)

    def stop(self, axis: str) -> str:
        return self.get(f"{axis}_stop", "stop", axis)

    def scalar(self, axis: str) -> str:
        """The index along an axis that the grid or a loop fixes, as int64."""
        return self.get(axis if axis.replace(".", "_").isidentifier() else f"{axis}_", "scalar", axis)

    def step(self, axis: str) -> str:
        return self.get(f"{axis}_step", "step", axis)

    def size(self, axis: str) -> str:
        return self.get(f"{axis}_size", "size", axis)

    def origin(self, axis: str) -> str:
        return self.get(f"{axis}_origin", "origin", axis)

    def block(self, axis: str) -> str:
        return self.get(f"BLOCK_{axis.upper()}", "block", axis)

    def extent(self, axis: str) -> str:
        return self.get(axis.upper() if axis.upper() != axis else f"{axis}_EXTENT", "extent", axis)

    def padded(self, axis: str) -> str:
        return self.get(f"PADDED_{axis.upper()}", "padded", axis)

    def pointer(self, buffer: str) -> str:
        return self.get(f"{buffer}_ptr", "pointer", buffer)

    def stride(self, buffer: str, axis: str) -> str:
        return self.get(f"{buffer}_stride_{axis}", "stride", buffer, axis)

    def param(self, param: str) -> str:
        return self.get(param, "param", param)
