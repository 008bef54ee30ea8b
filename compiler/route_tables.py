"""The tables of a routing, made on the device of its condition. On GPUs nothing waits for it: no size depends on what was chosen."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from . import ir


class Tables:
    """The tables of a routing by name, as int32 tensors:

    ``token:a`` and ``expert:a``: the position along axis a of the token and of the expert of a pair. ``first`` and ``last``: the bounds
    of the pairs of an expert. ``tile_start`` and ``tile_stop``: the bounds of the pairs of a tile, equal beyond the last tile, and
    ``tile:a``: its expert. ``pair``: the pair of a token and an expert, -1 where there is none. ``choices:a,b``: the pairs at an index of
    axes a and b, in order of the other axes, -1 after the last. ``count``: how many pairs there are.

    ``condition`` has the axes of the tokens, then those of the experts.
    """

    def __init__(
        self, condition: Tensor, route: ir.Route, extents: Mapping[str, int], origin: Mapping[str, int], waits: bool | None = None
    ) -> None:
        """``waits``: whether sizes may depend on what was chosen, which takes less work: on CPUs, unless it is said otherwise."""
        self.route, self.extents, self.origin = route, extents, origin
        self.device = condition.device
        self.waits = condition.device.type == "cpu" if waits is None else waits
        self.tokens = math.prod(extents[a] for a in route.tokens)
        self.experts = math.prod(extents[a] for a in route.experts)
        chosen = condition.reshape(self.tokens, self.experts)
        self.by_expert = chosen.t().contiguous()
        if self.waits:
            self.expert, self.token = self.by_expert.nonzero(as_tuple=True)
            counts = torch.bincount(self.expert, minlength=self.experts)
        else:
            counts = chosen.sum(0)
        self.last = counts.cumsum(0)
        self.first = self.last - counts

    def table(self, name: str, axes: Sequence[str]) -> Tensor:
        """A table with its ``axes``, in this order."""
        kind, _, axis = name.partition(":")
        order: Sequence[str] = axes
        match kind:
            case "token":
                found = self._index(self._source(self.extents[axes[0]])[1], self.route.tokens, axis)
            case "expert":
                found = self._index(self._source(self.extents[axes[0]])[0], self.route.experts, axis)
            case "first" | "last":
                found, order = self.first if kind == "first" else self.last, self.route.experts
            case "count":
                found = self.last[-1]
            case "pair":
                found, order = self.number, (*self.route.experts, *self.route.tokens)
            case "choices":
                kept = axis.split(",") if axis else []
                (counted,) = set(axes) - set(kept)
                found, order = self._choices(kept, self.extents[counted]), (*kept, counted)
            case _:
                found = self._tile(kind, axis, self.extents[axes[0]])
        full = found.reshape([self.extents[a] for a in order])
        return full.permute([list(order).index(a) for a in axes]).to(torch.int32)

    @cached_property
    def number(self) -> Tensor:
        """The pair of an expert and a token, -1 where there is none: (experts, tokens)."""
        if self.waits:
            found = torch.full((self.experts, self.tokens), -1, dtype=torch.int32, device=self.device)
            found[self.expert, self.token] = torch.arange(len(self.token), dtype=torch.int32, device=self.device)
            return found
        running = self.by_expert.reshape(-1).cumsum(0).reshape(self.experts, self.tokens) - 1
        return torch.where(self.by_expert, running, -1)

    def _source(self, count: int) -> tuple[Tensor, Tensor]:
        """The expert and the token that each of ``count`` pairs comes from; the first ones for pairs that do not exist."""
        if self.waits:
            fill = (0, count - len(self.token))
            return F.pad(self.expert, fill), F.pad(self.token, fill)
        place = torch.where(self.by_expert, self.number, count).reshape(-1).clamp(max=count)
        found = torch.zeros(count + 1, dtype=torch.int64, device=self.device)
        flat = found.scatter_(0, place, torch.arange(place.numel(), device=self.device))[:count]
        tokens = max(self.tokens, 1)
        return flat // tokens, flat % tokens

    def _index(self, flat: Tensor, axes: tuple[str, ...], axis: str, *, counted: bool = True) -> Tensor:
        """The position along one of several axes; the index, if it is not ``counted`` from the origin."""
        inner = math.prod(self.extents[a] for a in axes[axes.index(axis) + 1 :])
        found = flat if len(axes) == 1 else flat // max(inner, 1) % max(self.extents[axis], 1)
        first = self.origin.get(axis, 0) if counted else 0
        return found + first if first else found

    def _choices(self, kept: list[str], most: int) -> Tensor:
        axes = (*self.route.experts, *self.route.tokens)
        rows = math.prod(self.extents[a] for a in kept)
        if self.waits:
            expert, token = self._source(len(self.token))
            at = [self._index(expert if a in self.route.experts else token, self._among(a), a, counted=False) for a in axes]
            row, rest = (
                self._flat([a for a in axes if (a in kept) == mine], dict(zip(axes, at, strict=True)), kept) for mine in (True, False)
            )
            others = max(math.prod(self.extents[a] for a in axes if a not in kept), 1)
            order = (row * others + rest).argsort()
            counts = torch.bincount(row, minlength=rows)
            sorted_row = row[order]
            place = torch.arange(len(order), device=self.device) - (counts.cumsum(0) - counts)[sorted_row]
            found = torch.full((rows, most), -1, dtype=torch.int64, device=self.device)
            found[sorted_row, place] = order
            return found
        order_of_axes = [*(axes.index(a) for a in kept), *(n for n, a in enumerate(axes) if a not in kept)]
        pairs = self.number.reshape([self.extents[a] for a in axes]).permute(order_of_axes).reshape(rows, -1)
        chosen = pairs >= 0
        slot = torch.where(chosen, chosen.cumsum(1) - 1, most).clamp(max=most)
        table = torch.full((rows, most + 1), -1, dtype=torch.int64, device=self.device)
        return table.scatter_(1, slot, pairs.long())[:, :most]

    def _among(self, axis: str) -> tuple[str, ...]:
        return self.route.experts if axis in self.route.experts else self.route.tokens

    def _flat(self, axes: list[str], at: dict[str, Tensor], first: list[str]) -> Tensor:
        """One index over several axes, in the order of ``first`` where it has them."""
        found = torch.zeros_like(self.token)
        for axis in sorted(axes, key=lambda a: first.index(a) if a in first else 0):
            found = found * self.extents[axis] + at[axis]
        return found

    def _tile(self, kind: str, axis: str, count: int) -> Tensor:
        block = self.route.block
        tiles = (self.last - self.first + block - 1) // block
        after = tiles.cumsum(0)
        number = torch.arange(count, device=self.device)
        expert = torch.searchsorted(after, number, right=True).clamp(max=self.experts - 1)
        if kind == "tile":
            return self._index(expert, self.route.experts, axis)
        start = self.first[expert] + (number - (after - tiles)[expert]) * block
        exists = number < after[-1]
        wanted = start if kind == "tile_start" else torch.minimum(start + block, self.last[expert])
        return torch.where(exists, wanted, 0)
