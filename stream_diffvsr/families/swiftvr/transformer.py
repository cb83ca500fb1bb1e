"""Restoration of one chunk's latents by the transformer, with self-attention in shifted windows.

A window covers 16 x 16 tokens (512 x 512 pixels) across all of the chunk's latents. Windows at the
edges keep their full size and overlap their neighbours; they do not wrap around, and no masks are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..wan.attention import Attend, attention
from ..wan.transformer import TIMESTEP, conditioning, cos_sin, queries_keys_values, rotation_angles, run

WINDOW = 16, 16
"""(height, width) of a window in tokens, unless the configuration specifies another."""


@dataclass(frozen=True)
class Grid:
    """The layout of a chunk's tokens, passed in place of the rotary embedding."""

    cos: Tensor
    sin: Tensor
    """`cos` and `sin` are (tokens, 1, half of the head size), float32."""
    rows: int
    columns: int


def window_starts(count: int, side: int, shift: int) -> list[int]:
    """Return the positions where windows begin along an axis of `count` tokens."""
    if side >= count:
        return [0]
    wanted = range(-shift, count + 2 * side, side)
    clamped = sorted({min(max(start, 0), count - side) for start in wanted})
    kept = clamped[:1]
    for start, following in zip(clamped[1:], [*clamped[2:], None], strict=True):
        # Skip a window whose neighbours touch: they already cover all of it.
        if following is None or kept[-1] + side < following:
            kept.append(start)
    return kept


def prepare(transformer: Any, window: tuple[int, int]) -> Any:
    """Replace the self-attention of a `WanTransformer3DModel` with this family's own."""
    for index, block in enumerate(transformer.blocks):
        block.attn1.set_processor(WindowAttention(window, shifted=bool(index % 2)))
    return transformer


class WindowAttention:
    """Replacement for a Wan block's self-attention."""

    def __init__(self, window: tuple[int, int], shifted: bool) -> None:
        self.window, self.shifted = window, shifted
        self.attend: Attend = attention("auto")

    def corners(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return the windows' corners in writing order; where windows overlap, the last one written wins.

        The order is from bottom right to top left or, in shifted layers, from top left to bottom right.
        """
        height, width = self.window
        down, across = (height // 2, width // 2) if self.shifted else (0, 0)
        found = list(product(window_starts(rows, height, down), window_starts(columns, width, across)))
        return found if self.shifted else found[::-1]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Grid | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        grid = rotary_emb
        q, k, v = (
            rearrange(each, "(t r c) h d -> t r c h d", r=grid.rows, c=grid.columns)
            for each in queries_keys_values(attn, hidden_states[0], grid.cos, grid.sin)
        )
        height, width = min(self.window[0], grid.rows), min(self.window[1], grid.columns)
        found = torch.empty_like(v)
        for row, column in self.corners(grid.rows, grid.columns):
            area = slice(None), slice(row, row + height), slice(column, column + width)
            own = [rearrange(each[area], "t r c h d -> 1 h (t r c) d") for each in (q, k, v)]
            one = self.attend(own[0], own[1], own[2])
            found[area] = rearrange(one, "1 h (t r c) d -> t r c h d", r=height, c=width)
        found = rearrange(found, "t r c h d -> 1 (t r c) (h d)")
        return attn.to_out[1](attn.to_out[0](found))


def denoise(
    transformer: Any,
    latents: Tensor,
    prompt: Tensor,
    on_block: Callable[[int, int], None],
) -> Tensor:
    """Restore low-quality latents, (1, C, f, h, w), and return them in float32; h and w are even.

    Positions in time start at 0 wherever the chunk is in the scene, since attention depends only on
    differences between positions within the chunk.
    """
    x = transformer.patch_embedding(latents)
    count, rows, columns = x.shape[-3:]
    angles = rotation_angles(count, rows, columns, 0, transformer.config.attention_head_dim)
    grid = Grid(*cos_sin(angles.flatten(0, 2), x.device), rows, columns)
    time = transformer.condition_embedder.timesteps_proj(torch.tensor([TIMESTEP], device=x.device))
    x = rearrange(x, "1 c f h w -> 1 (f h w) c")
    x = run(
        transformer, x, conditioning(transformer, prompt, time), [grid] * len(transformer.blocks), on_block
    )
    x = rearrange(x, "(f h w) (a b c) -> 1 c f (h a) (w b)", f=count, h=rows, a=2, b=2)
    return latents.float() - x.float()
