"""The ControlNet, with its image embedding moved out of the denoising loop: it is the same in every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

Residuals = tuple[list[Tensor], Tensor]
"""What the ControlNet adds to the U-Net: to each skip connection, and after the middle block."""


class Control(nn.Module):
    """diffusers' ControlNet as it is, but for where its picture is embedded.

    The embedding of the warped frame is the same in every denoising step, so it is computed once:
    the embedding network stands beside the ControlNet, which has an identity in its place and thus
    takes the ready embedding as its picture.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.embedding: nn.Module = controlnet.controlnet_cond_embedding
        controlnet.controlnet_cond_embedding = nn.Identity()
        self.body = controlnet

    def embed(self, warped: Tensor) -> Tensor:
        """Warped frame (1, 3, 4h, 4w), model range -> (1, C, h, w)."""
        return self.embedding(warped)

    def forward(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, embedding: Tensor, scale: float
    ) -> Residuals:
        """(B, 7, h, w), the U-Net's own input -> its residuals, times `scale`."""
        return self.body(
            x,
            timestep,
            encoder_hidden_states=prompt,
            controlnet_cond=embedding,
            conditioning_scale=scale,
            return_dict=False,
        )
