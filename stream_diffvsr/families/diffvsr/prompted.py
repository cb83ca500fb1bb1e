"""Keys and values of the prompt, computed once for a run: no step, frame or tile changes them.

A network prepared here takes, in the place of the prompt, what all its attentions would make of it
(`keys_and_values`), side by side in the last axis; each transformer block hands its own part on. The
layers stay where they were, so that the network holds its weights and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ELSEWHERE = ("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type")
"""Settings of a network that takes the prompt for more than keys and values."""


def take_out(network: nn.Module) -> None:
    """Let a network of diffusers take keys and values for the prompt, in place, where it can."""
    if not _needs_only_keys_and_values(network):
        return
    start = 0
    for parent, name, block in _children(network, "BasicTransformerBlock"):
        attentions = [attention for attention in (block.attn1, block.attn2) if _crosses(attention)]
        layers = [(attention, layer) for attention in attentions for layer in ("to_k", "to_v")]
        for index, (attention, layer) in enumerate(layers):
            setattr(attention, layer, Ready(getattr(attention, layer), index, len(layers)))
        stop = start + sum(getattr(attention, layer).linear.out_features for attention, layer in layers)
        setattr(parent, name, PromptedBlock(block, start, stop))
        start = stop


def put_back(network: nn.Module) -> None:
    """Take back what `take_out` did."""
    for parent, name, block in _children(network, PromptedBlock.__name__):
        setattr(parent, name, block.block)
    for parent, name, layer in _children(network, Ready.__name__):
        setattr(parent, name, layer.linear)


def keys_and_values(network: nn.Module, prompt: Tensor) -> Tensor:
    """Prompt embeddings (B, 77, D) -> what the network takes for them, (B, 77, .)."""
    products = [layer.linear(prompt) for layer in network.modules() if isinstance(layer, Ready)]
    return torch.cat(products, dim=-1) if products else prompt


class PromptedBlock(nn.Module):
    """A transformer block, which gets its own part of the network's keys and values."""

    def __init__(self, block: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.block = block
        self.part = slice(start, stop)

    def forward(self, x: Tensor, *, encoder_hidden_states: Tensor, **others: Any) -> Tensor:
        """As the block, with the keys and values of all blocks in place of the prompt."""
        # Cut here and not where they are used, so that blocks differ in nothing that is compiled.
        return self.block(x, encoder_hidden_states=encoder_hidden_states[..., self.part], **others)


class Ready(nn.Module):
    """In place of a linear layer: picks that layer's product from those of its block."""

    def __init__(self, linear: nn.Linear, index: int, count: int) -> None:
        super().__init__()
        self.linear = linear
        self.index = index
        self.count = count

    def forward(self, products: Tensor) -> Tensor:
        """(B, 77, count * C) -> (B, 77, C)."""
        return products.chunk(self.count, dim=-1)[self.index]


def _needs_only_keys_and_values(network: Any) -> bool:
    blocks = [block for _, _, block in _children(network, "BasicTransformerBlock")]
    crossing = {module for module in network.modules() if _crosses(module)}
    return (
        not any(network.config.get(key) for key in ELSEWHERE)
        and crossing <= {attention for block in blocks for attention in (block.attn1, block.attn2)}
        and all(attention.norm_cross is None for attention in crossing)
    )


def _crosses(module: Any) -> bool:
    """Whether it is an attention to the prompt."""
    return bool(getattr(module, "is_cross_attention", False))


def _children(network: nn.Module, kind: str) -> list[tuple[nn.Module, str, Any]]:
    """All modules of a class, each with its parent and its name there, in the order of the network."""
    return [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == kind
    ]
