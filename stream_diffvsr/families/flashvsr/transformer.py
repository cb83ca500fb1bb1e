"""Denoise one chunk with the transformer in a single step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..wan.transformer import THETA, TIMESTEP, conditioning, cos_sin, rotation_angles, run
from .attention import Pair, Reach, Selection, SparseAttention, from_windows, to_windows

Pairs = tuple[tuple[Pair, ...], ...]
"""The pairs of each block, oldest first."""


def prepare(transformer: Any) -> Any:
    """Replace the self-attention of a `WanTransformer3DModel` with this family's own."""
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
    """Return the clean latents of a chunk, and the pairs that the next chunk attends to.

    `noise` is (1, 16, f, h, w) float32 with an even f; `tokens` is (f, h/2, w/2, width), made from the
    low-quality frames; `prompt` is (1, tokens, text width); `position` is the index of the first latent in
    the scene; `past` contains the pairs of earlier chunks and is empty at the scene's start; `kept` is the
    maximum number of pairs to keep (then the oldest is dropped); `offload` says whether pairs are kept in
    system memory between uses.
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
    # In float64, because float32 errors in the angles of timestep 1000 would exceed all other errors here.
    angle = TIMESTEP * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    return conditioning(transformer, prompt, torch.cat([angle.cos(), angle.sin()])[None])
