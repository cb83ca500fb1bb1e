"""The tiny autoencoder with its Temporal Processor Module (TPM).

Parameter names are those of the released weights. The networks keep no state between frames: features of
the previous frame are passed to `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOL = 4
"""Side of the squares over which the TPM averages; the sides of padded frames are multiples of it."""

TPM_STRENGTH = 0.1
"""Share of the temporal mixture that a block adds to its own result, fixed in the reference."""


class TemporalBlock(nn.Module):
    """Residual block of three 3x3 convolutions, which can also use features of the previous frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.temporal_processor = nn.Sequential(
            nn.Conv1d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, previous: Tensor | None = None, trust: Tensor | None = None) -> Tensor:
        """Transform (1, C, H, W), keeping its shape.

        `previous` is a pooled feature (1, C, H/4, W/4); `trust` (1, 1, H, W) is its weight at each pixel.
        """
        update = self.conv(x)
        if previous is None:
            return F.relu(update + x)
        mixed = upsample_like(self.mix(F.avg_pool2d(update, POOL), previous), update)
        return self.finish(x, update, mixed if trust is None else mixed * trust)

    def finish(self, x: Tensor, update: Tensor, mixed: Tensor) -> Tensor:
        """Add the block's own update and the TPM's, enlarged to the same size, to the block's input."""
        return F.relu(update + TPM_STRENGTH * mixed + x)

    def mix(self, current: Tensor, previous: Tensor) -> Tensor:
        """Apply the TPM to two pooled features of the same shape.

        Both are read in raster order as one sequence, with `current` first, so that values leak across the
        ends of rows and from one feature to the other, as in the reference.
        """
        sequence = torch.cat([current.flatten(2), previous.flatten(2)], dim=2)
        mixed, half = self.temporal_processor(sequence), current.shape[-2] * current.shape[-1]
        now, before = mixed[..., :half], mixed[..., half:]
        return (self.alpha * now + (1 - self.alpha) * before).reshape(current.shape)


def upsample_like(x: Tensor, target: Tensor) -> Tensor:
    """Resize bilinearly to the height and width of `target`, with `align_corners=False`."""
    return F.interpolate(x, size=target.shape[-2:], mode="bilinear", align_corners=False)


def reduce_like(trust: Tensor | None, target: Tensor) -> Tensor | None:
    """Shrink a map (1, 1, H, W) by averaging to the height, width and number format of `target`."""
    return (
        None
        if trust is None
        else F.adaptive_avg_pool2d(trust, (target.shape[-2], target.shape[-1])).to(target)
    )


class Encoder(nn.Module):
    """Encoder from (1, 3, 4h, 4w) to (1, 4, h, w)."""

    def __init__(
        self, image_channels: int, latent_channels: int, widths: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage == 0:
                layers.append(nn.Conv2d(image_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [TemporalBlock(width) for _ in range(depth)]
        layers.append(nn.Conv2d(widths[-1], latent_channels, 3, padding=1))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Decoder from (1, 4, h, w) to (1, 3, 4h, 4w), before conversion to model range."""

    def __init__(
        self, latent_channels: int, image_channels: int, widths: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            last = stage == len(widths) - 1
            layers += [TemporalBlock(width) for _ in range(depth)]
            if not last:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(nn.Conv2d(width, image_channels if last else width, 3, padding=1, bias=last))
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, features: Sequence[Tensor] | None = None, trust: Tensor | None = None
    ) -> Tensor:
        remaining = iter(features or ())
        for layer in self.layers:
            if isinstance(layer, TemporalBlock):
                x = layer(x, next(remaining, None), reduce_like(trust, x))
            else:
                x = layer(x)
        return x


class TemporalAutoencoderTiny(nn.Module):
    """Autoencoder that converts pictures in model range to latents a quarter as wide and high, and back.

    It is built from the checkpoint's own configuration. Keys for variants that this network does not
    implement must have the value that the reference always uses.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        image, latent = config.get("in_channels", 3), config["latent_channels"]
        encoder_widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
        decoder_widths = config.get("decoder_block_out_channels") or config["block_out_channels"]
        self.encoder = Encoder(image, latent, encoder_widths, config["num_encoder_blocks"])
        self.decoder = Decoder(
            latent, config.get("out_channels", 3), decoder_widths, config["num_decoder_blocks"]
        )
        self.latent_channels = int(latent)
        self.scaling_factor = float(config.get("scaling_factor", 1.0))
        self.latent_magnitude = float(config.get("latent_magnitude", 3))

    def encode(self, image: Tensor) -> Tensor:
        """Encode (1, 3, 4h, 4w) in [-1, 1] to latents (1, 4, h, w)."""
        return self.encoder((image + 1) / 2)

    def features(self, warped: Tensor) -> list[Tensor]:
        """Return features of the warped previous frame for the decoder's blocks, coarse to fine.

        `warped` is (1, 3, 4h, 4w) in model range; unlike in `encode`, it is not mapped to [0, 1], because the
        reference omits that step. Each feature is pooled to (1, C, H/4, W/4), since only the pooled form is
        used; layers after the last block are not computed.
        """
        pooled: list[Tensor] = []
        depth = sum(isinstance(layer, TemporalBlock) for layer in self.encoder.layers)
        for layer in self.encoder.layers:
            warped = layer(warped)
            if isinstance(layer, TemporalBlock):
                pooled.append(F.avg_pool2d(warped, POOL))
            if len(pooled) == depth:
                break
        return pooled[::-1]

    def decode(
        self, latents: Tensor, features: Sequence[Tensor] | None = None, trust: Tensor | None = None
    ) -> Tensor:
        """Decode latents (1, C, h, w) to (1, 3, 4h, 4w) in model range but not clamped.

        `trust` (1, 1, 4h, 4w) in [0, 1] scales the contribution of `features`; None means 1 everywhere.
        """
        return self.decoder(self.bound(latents), features, trust) * 2 - 1

    def bound(self, latents: Tensor) -> Tensor:
        """Prepare latents for the decoder's layers: unscale them, and softly limit their magnitude."""
        latents = latents / self.scaling_factor
        return torch.tanh(latents / self.latent_magnitude) * self.latent_magnitude
