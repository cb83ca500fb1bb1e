"""The ControlNet, whose image embedding is computed only once, as it is the same in all denoising steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

Residuals = tuple[list[Tensor], Tensor]
"""The ControlNet's additions to the U-Net: one for each skip connection, and one after the middle block."""


class Control(nn.Module):
    """diffusers' ControlNet, unchanged except that its embedding network is a separate module.

    The embedding of the warped frame is the same in every denoising step, so it is computed once. Inside the
    ControlNet, an `nn.Identity` replaces the embedding network, so the finished embedding is passed in place
    of the picture.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.embedding: nn.Module = controlnet.controlnet_cond_embedding
        controlnet.controlnet_cond_embedding = nn.Identity()
        self.body = controlnet

    def embed(self, warped: Tensor) -> Tensor:
        """Embed the warped frame (1, 3, 4h, 4w) in model range as (1, C, h, w)."""
        return self.embedding(warped)

    def forward(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, embedding: Tensor, scale: float
    ) -> Residuals:
        """Return the residuals, multiplied by `scale`, for the U-Net's input (B, 7, h, w)."""
        return self.body(
            x,
            timestep,
            encoder_hidden_states=prompt,
            controlnet_cond=embedding,
            conditioning_scale=scale,
            return_dict=False,
        )
