"""The transformer's part in one chunk: from noise to clean latents in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .attention import Pair, Reach, Selection, SparseAttention, from_windows, to_windows

TIMESTEP = 1000.0
THETA = 10_000.0

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
    on_block: Callable[[int, int], None],
) -> tuple[Tensor, Pairs]:
    """Clean latents of a chunk, and the pairs that the next one attends to.

    `noise`: (1, 16, f, h, w) float32, f even; `tokens`: (f, h/2, w/2, width) of the low-quality frames;
    `prompt`: (1, tokens, text width); `position`: of the first latent in the scene; `past`: empty at its
    start; `kept`: pairs that may stay.
    """
    x = transformer.patch_embedding(noise.to(tokens.dtype))
    rows, columns = x.shape[-2:]
    x = to_windows(rearrange(x, "1 c f h w -> f h w c") + tokens)[None]
    time, modulation, prompt = _conditions(transformer, prompt)
    angles = to_windows(
        rotations(
            x.shape[1] // (rows * columns), rows, columns, position, transformer.config.attention_head_dim
        )
    )
    cos, sin = (each.to(x.device, torch.float32)[:, None] for each in (angles.cos(), angles.sin()))
    pairs = []
    for index, block in enumerate(transformer.blocks):
        reach = Reach(cos, sin, selection, past[index] if past else ())
        x = block(x, prompt, modulation, reach)
        together = (*reach.past, *reach.own)
        pairs.append(together[1:] if len(together) > kept else together)
        on_block(index + 1, len(transformer.blocks))
    shift, scale = (transformer.scale_shift_table.to(x.device) + time[:, None]).chunk(2, 1)
    x = transformer.proj_out((transformer.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
    x = from_windows(x[0], rows, columns)
    return noise - rearrange(x, "f h w (a b c) -> 1 c f (h a) (w b)", a=2, b=2).float(), tuple(pairs)


def _conditions(transformer: Any, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of the time, which is the same in every chunk, and of the prompt."""
    embed = transformer.condition_embedder
    half = transformer.config.freq_dim // 2
    # In float64: in float32 the angles of 1000 are off by more than anything else here.
    angle = TIMESTEP * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    time = embed.time_embedder(torch.cat([angle.cos(), angle.sin()])[None].to(prompt.device, prompt.dtype))
    modulation = embed.time_proj(embed.act_fn(time)).unflatten(1, (6, -1))
    return time, modulation, embed.text_embedder(prompt)


def rotations(latents: int, rows: int, columns: int, position: int, head: int) -> Tensor:
    """(latents, rows, columns, head / 2) angles in float64; latents stand at `position` and on."""
    across = 2 * (head // 6)
    axes = (latents, position, head - 2 * across), (rows, 0, across), (columns, 0, across)
    parts = []
    for axis, (count, start, channels) in enumerate(axes):
        speed = THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angle = torch.outer(torch.arange(start, start + count, dtype=torch.float64), speed)
        shape = [count if i == axis else 1 for i in range(3)]
        parts.append(angle.view(*shape, -1).expand(latents, rows, columns, -1))
    return torch.cat(parts, -1)
