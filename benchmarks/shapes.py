"""The attention variants that are measured together, and the shapes they are measured at.

``length`` is the number of positions of a sequence, a power of two; every spec gets that many, with these choices:

- `natten2d`: an image of 1:1 or 1:2, at 2048 positions 32 by 64; `natten3d`: at 2048 positions 8 by 16 by 16.
- `sta2d`: tiles of 64 positions, at 2048 positions 4 by 8 of them, windows of 3 by 3 tiles.
- `spacetime`: ``length`` frames of one pixel; a bias for every distance of frames. `spacetime_video`: the same spec as it is used, 16
  frames, at 2048 positions of 8 by 16 pixels. Four frames of five are a video, the rest independent images behind it, as the paper
  trains them jointly (16 frames and 4 images); frames drawn one by one, as the spec's sample line does for checks, would leave no tile
  of 64 by 64 without a kept pair.
- `tree`: a tree of half of ``length`` tokens after a prefix of as many, and every one of the ``length`` queries belongs to the tree
  (two lists of candidates). `tree_drafted`: the same spec as it is used, 64 drafted tokens; prefix and drafted tokens together are
  ``length`` keys.
- `hierarchical`: an eighth of ``length`` extra keys.
- `mla`, `mla_full`: latent and rope dims in DeepSeek-V2's proportion to the head dim: 4 and 1/2 times.
- `rope`: half the head dim of frequencies.
- `deberta`: 32 buckets a side that reach over all distances; `t5_bias`: 32 buckets in two directions.
- `global_window`: the first 16 tokens are global, a question before a text; tokens drawn anywhere, as the spec's sample line does for
  checks, would leave no tile of 64 by 64 without one.
- `maxsim`: one query and as many documents as there are heads elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.runtime.kernel import Kernel
from weft.runtime.problem import Problem, Usual, pose

NAMES = (
    "softmax_attention full alibi softcap sliding_window dilated_window global_window prefix_lm kitchen_sink sigmoid_attention "
    "gelu_attention relu2_attention qk_norm rope mla mla_full differential shaped fastgen natten1d natten2d natten3d sta2d "
    "hierarchical spacetime spacetime_video deberta graphormer t5_bias tree tree_drafted in_context_blocks maxsim based retention"
).split()
SPECS = {"spacetime_video": "spacetime", "tree_drafted": "tree"}
"""The spec of a name, where it has another one."""

Shape = tuple[dict[str, int], dict[str, bool | int | float]]


def shape(name: str, length: int, head_dim: int) -> Shape:
    """Sizes and params of a spec where the usual ones do not do."""
    match name:
        case "natten2d":
            high = _root(length, 2)
            return {"y": high, "yk": high, "x": length // high, "xk": length // high}, {}
        case "natten3d":
            deep = _root(length, 3)
            high = _root(length // deep, 2)
            wide = length // deep // high
            return {"z": deep, "zk": deep, "y": high, "yk": high, "x": wide, "xk": wide}, {}
        case "sta2d":
            tile = 64 if length >= 1024 else 4
            high = _root(length // tile, 2)
            return {}, {"tile": tile, "tiles_x": length // tile // high, "tiles_y": high}
        case "spacetime":
            return {"y": 1, "x": 1, "n": 2 * length - 1}, {}
        case "spacetime_video":
            high = _root(length // 16, 2)
            return {"f": 16, "g": 16, "y": high, "x": length // 16 // high, "n": 31}, {}
        case "tree":
            return {"n": length // 2}, {"prefix": length // 2}
        case "tree_drafted":
            return {"i": 64, "n": 64}, {"prefix": length - 64}
        case "hierarchical":
            return {"n": length // 8}, {}
        case "mla":
            return {"l": 4 * head_dim, "r": head_dim // 2}, {}
        case "mla_full":
            return {"r": head_dim // 2}, {}
        case "rope":
            return {"f": head_dim // 2}, {}
        case "deberta":
            return {"n": 63}, {"longest": length}
        case "t5_bias":
            return {"n": 32}, {}
    return {}, {}


@dataclass(frozen=True, slots=True)
class Posed(Problem):
    """A problem whose inputs are as in use, where what is drawn for checks is not."""

    def inputs(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        drawn = Problem.inputs(self, dtype, device, seed)
        if self.kernel.name == "global_window":
            drawn["everywhere"] = torch.arange(self.extents["t"], device=device) < 16
        if self.kernel.name == "spacetime":
            frames = self.extents["f"]
            drawn["video"] = (torch.arange(frames, device=device) < 4 * frames // 5).expand(self.extents["b"], frames)
        return drawn


def posed(kernel: Kernel, length: int, heads: int = 8, head_dim: int = 64, batch: int = 1, name: str = "") -> Problem:
    """A kernel's problem at the shapes of ``name``, its own name if none is given."""
    made = pose(kernel.graph, *shape(name or kernel.name, length, head_dim), Usual(length, head_dim, heads, batch))
    return Posed(made.kernel, made.sizes, made.extents, made.params)


def _root(number: int, degree: int) -> int:
    """The largest power of two that is at most that root."""
    return 1 << (number.bit_length() - 1) // degree
