"""An optional loss on VGG-16 features, which encourages texture where a loss on pixels encourages blur.

It compares the features after the third convolution of the third block, as in Johnson et al. 2016,
"Perceptual Losses for Real-Time Style Transfer and Super-Resolution".
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..quality.vgg import vgg_features

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation, by channel, of the pictures on which VGG-16 was trained, in [0, 1]."""


class Perceptual(nn.Module):
    """The distance between the VGG-16 features of two pictures."""

    mean: Tensor
    spread: Tensor

    def __init__(self, path: Path) -> None:
        """Read torchvision's weights from the file `path`; raise `CheckpointError` for any other weights."""
        super().__init__()
        self.features = vgg_features(path)[:16]
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("spread", torch.tensor(SPREAD).view(1, 3, 1, 1))

    def forward(self, result: Tensor, truth: Tensor) -> Tensor:
        """Return the mean absolute feature difference between two (N, 3, H, W) pictures in model range."""
        seen = [self.features((x / 2 + 0.5 - self.mean) / self.spread) for x in (result, truth)]
        return (seen[0] - seen[1]).abs().mean()
