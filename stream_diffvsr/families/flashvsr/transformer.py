"""The transformer's part in one chunk: from noise to clean latents in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..wan.transformer import THETA, TIMESTEP, conditioning, cos_sin, rotation_angles, run
from .attention import Pair, Reach, Selection, SparseAttention, from_windows, to_windows

Pairs = tuple[tuple[Pair, ...], ...]
"""By block, oldest first."""


def prepare(transformer: Any) -> Any:
    """Give a `WanTransformer3DModel` the self-attention of this family."""
    for block in transformer.blocks:
        block.attn1.set_processor(SparseAttention())
    return transformer


def denoise(
    transformer: Any,
    noise: Tensor,
    tokens: Tensor,
    prompt: Tensor,
    *,
    position: int,
    selection: Selection,
    past: Pairs,
    kept: int,
    offload: bool,
    on_block: Callable[[int, int], None],
) -> tuple[Tensor, Pairs]:
    """Clean latents of a chunk, and the pairs that the next one attends to.

    `noise`: (1, 16, f, h, w) float32, f even; `tokens`: (f, h/2, w/2, width) of the low-quality frames;
    `prompt`: (1, tokens, text width); `position`: of the first latent in the scene; `past`: empty at its
    start; `kept`: pairs that may stay; `offload`: whether they wait in system memory.
    """
    x = transformer.patch_embedding(noise.to(tokens.dtype))
    rows, columns = x.shape[-2:]
    x = to_windows(rearrange(x, "1 c f h w -> f h w c") + tokens)[None]
    angles = rotation_angles(
        len(x[0]) // (rows * columns), rows, columns, position, transformer.config.attention_head_dim
    )
    cos, sin = cos_sin(to_windows(angles), x.device)
    reaches = [Reach(cos, sin, selection, each, offload) for each in past or ((),) * len(transformer.blocks)]
    x = run(transformer, x, _conditions(transformer, prompt), reaches, on_block)
    together = [(*reach.past, *reach.own) for reach in reaches]
    pairs = tuple(each[1:] if len(each) > kept else each for each in together)
    x = from_windows(x, rows, columns)
    return noise - rearrange(x, "f h w (a b c) -> 1 c f (h a) (w b)", a=2, b=2).float(), pairs


def _conditions(transformer: Any, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half = transformer.config.freq_dim // 2
    # In float64: in float32 the angles of 1000 are off by more than anything else here.
    angle = TIMESTEP * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    return conditioning(transformer, prompt, torch.cat([angle.cos(), angle.sin()])[None])
