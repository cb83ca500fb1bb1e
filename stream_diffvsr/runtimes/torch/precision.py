"""Half precision where it is accurate enough, and float32 elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def in_float32(networks: Iterable[nn.Module], dtype: torch.dtype) -> Generator[None, None, None]:
    """Upcast networks loaded as `dtype` to float32 for the duration of the context, then cast them back."""
    networks = list(networks)
    try:
        _cast(networks, torch.float32)
        yield
    finally:
        _cast(networks, dtype)


def _cast(networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    # The weights outlive the caller's inference mode, so they must not become inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        for network in networks:
            nn.Module.to(network, dtype)  # diffusers' own `to` warns about casts


class UpcastAttention:
    """A diffusers attention processor that computes fused attention in float32 for half-precision networks.

    diffusers' own fused processor ignores `upcast_attention`; its older processor respects this setting, but
    keeps the full attention matrix in memory.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        found = found.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[0](found) / attn.rescale_output_factor


def upcast_attention(*networks: nn.Module) -> None:
    """Install the float32 processor in all attention modules whose configuration requests it."""
    for network in networks:
        for module in network.modules():
            # Only attention modules in transformer blocks set this; the block handles norms and residuals.
            if hasattr(module, "set_processor") and getattr(module, "upcast_attention", False):
                module.set_processor(UpcastAttention())  # type: ignore[operator]
