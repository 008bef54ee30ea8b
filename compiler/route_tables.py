"""The tables of a routing, made on the device of its condition and without waiting for it: no size depends on what was chosen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

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

    def __init__(self, condition: Tensor, route: ir.Route, extents: Mapping[str, int], origin: Mapping[str, int]) -> None:
        self.route, self.extents, self.origin = route, extents, origin
        self.device = condition.device
        self.tokens = math.prod(extents[a] for a in route.tokens)
        self.experts = math.prod(extents[a] for a in route.experts)
        self.chosen = condition.reshape(self.tokens, self.experts)
        by_expert = self.chosen.t().contiguous()
        running = by_expert.reshape(-1).cumsum(0)
        self.number = running - 1
        self.flat = by_expert.reshape(-1)
        self.last = running.reshape(self.experts, self.tokens)[:, -1] if self.tokens else running.new_zeros(self.experts)
        self.first = torch.cat([self.last.new_zeros(1), self.last[:-1]])
        self.pairs = torch.where(by_expert, self.number.reshape(self.experts, self.tokens), -1).t()

    def table(self, name: str, axes: Sequence[str]) -> Tensor:
        """A table with its ``axes``, in this order."""
        kind, _, axis = name.partition(":")
        order: Sequence[str] = axes
        match kind:
            case "token":
                found = self._index(self._source(self.extents[axes[0]]) % max(self.tokens, 1), self.route.tokens, axis)
            case "expert":
                found = self._index(self._source(self.extents[axes[0]]) // max(self.tokens, 1), self.route.experts, axis)
            case "first" | "last":
                found, order = self.first if kind == "first" else self.last, self.route.experts
            case "count":
                found = self.last[-1]
            case "pair":
                found, order = self.pairs, (*self.route.tokens, *self.route.experts)
            case "choices":
                kept = axis.split(",") if axis else []
                (counted,) = set(axes) - set(kept)
                found, order = self._choices(kept, self.extents[counted]), (*kept, counted)
            case _:
                found = self._tile(kind, axis, self.extents[axes[0]])
        full = found.reshape([self.extents[a] for a in order])
        return full.permute([list(order).index(a) for a in axes]).to(torch.int32)

    def _source(self, count: int) -> Tensor:
        """The place in order of experts and then of tokens that each of ``count`` pairs comes from; 0 for those that do not exist."""
        place = torch.where(self.flat, self.number, count).clamp(max=count)
        found = torch.zeros(count + 1, dtype=torch.int64, device=self.device)
        return found.scatter_(0, place, torch.arange(place.numel(), device=self.device))[:count]

    def _index(self, flat: Tensor, axes: tuple[str, ...], axis: str) -> Tensor:
        """The position along one of several axes."""
        inner = math.prod(self.extents[a] for a in axes[axes.index(axis) + 1 :])
        return flat // max(inner, 1) % max(self.extents[axis], 1) + self.origin.get(axis, 0)

    def _choices(self, kept: list[str], most: int) -> Tensor:
        axes = (*self.route.tokens, *self.route.experts)
        order = [*(axes.index(a) for a in kept), *(n for n, a in enumerate(axes) if a not in kept)]
        shape = [self.extents[a] for a in axes]
        rows = math.prod(self.extents[a] for a in kept)
        pairs = self.pairs.reshape(shape).permute(order).reshape(rows, -1)
        chosen = pairs >= 0
        place = torch.where(chosen, chosen.cumsum(1) - 1, most).clamp(max=most)
        found = torch.full((rows, most + 1), -1, dtype=torch.int64, device=self.device)
        return found.scatter_(1, place, pairs)[:, :most]

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
