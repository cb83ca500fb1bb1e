"""Diffusers' `WanTransformer3DModel`, run block by block with the family's own self-attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import StreamDiffVSRError

TIMESTEP = 1000.0
"""The timestep of the single denoising step."""

THETA = 10_000.0

DIFFUSERS = "0.33"
"""The oldest version of diffusers that has `WanTransformer3DModel`."""


def transformer(config: Mapping[str, Any]) -> nn.Module:
    """Build a `WanTransformer3DModel` without its position table, which has a limited length.

    Unknown settings are ignored. Raises `StreamDiffVSRError` if diffusers is too old.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise StreamDiffVSRError(
            f"this model needs diffusers {DIFFUSERS} or newer, but an older version is installed: "
            "run pip install -U diffusers."
        ) from error
    known = inspect.signature(WanTransformer3DModel.__init__).parameters
    network = WanTransformer3DModel(**{name: value for name, value in config.items() if name in known})
    del network.rope
    return network


def conditioning(transformer: Any, prompt: Tensor, sinusoid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return two embeddings of the timestep and one of the prompt.

    The timestep embeddings are (1, width) and, for the blocks, (1, 6, width). `sinusoid` is the timestep's
    sinusoidal encoding, (1, frequencies), with the cosines first.
    """
    embed = transformer.condition_embedder
    time = embed.time_embedder(sinusoid.to(prompt.device, prompt.dtype))
    modulation = embed.time_proj(embed.act_fn(time)).unflatten(1, (6, -1))
    return time, modulation, embed.text_embedder(prompt)


def run(
    transformer: Any,
    x: Tensor,
    conditions: tuple[Tensor, Tensor, Tensor],
    attention: Sequence[Any],
    on_block: Callable[[int, int], None],
) -> Tensor:
    """Run tokens (1, tokens, width) through all blocks; return (tokens, channels of a patch).

    `conditions` is the result of `conditioning`; `attention` contains one object per block, which is
    passed to that block's self-attention in place of the rotary embedding.
    """
    time, modulation, prompt = conditions
    for index, (block, own) in enumerate(zip(transformer.blocks, attention, strict=True), 1):
        x = block(x, prompt, modulation, own)
        on_block(index, len(transformer.blocks))
    shift, scale = (transformer.scale_shift_table.to(x.device) + time[:, None]).chunk(2, 1)
    return transformer.proj_out((transformer.norm_out(x.float()) * (1 + scale) + shift).type_as(x))[0]


def rotation_angles(latents: int, rows: int, columns: int, position: int, head: int) -> Tensor:
    """Return (latents, rows, columns, head / 2) angles in float64; the first latent is at `position`."""
    across = 2 * (head // 6)
    axes = (latents, position, head - 2 * across), (rows, 0, across), (columns, 0, across)
    parts = []
    for axis, (count, start, channels) in enumerate(axes):
        speed = THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angle = torch.outer(torch.arange(start, start + count, dtype=torch.float64), speed)
        shape = [count if i == axis else 1 for i in range(3)]
        parts.append(angle.view(*shape, -1).expand(latents, rows, columns, -1))
    return torch.cat(parts, -1)


def cos_sin(angles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of angles (tokens, head / 2), each (tokens, 1, head / 2) float32."""
    cos, sin = (each.to(device, torch.float32)[:, None] for each in (angles.cos(), angles.sin()))
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of consecutive channels of (tokens, heads, head size), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


def queries_keys_values(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values, each (tokens, heads, head size), from (tokens, width).

    Queries and keys are rotated.
    """
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
    q, k, v = (each.unflatten(-1, (attn.heads, -1)) for each in (q, k, v))
    return rotate(q, cos, sin), rotate(k, cos, sin), v
