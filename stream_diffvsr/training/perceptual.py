"""An optional loss on the features of VGG-16, which rewards texture where a loss on pixels rewards blur.

It compares the features after the third convolution of the third block, as in Johnson et al. 2016,
"Perceptual Losses for Real-Time Style Transfer and Super-Resolution".
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_weights

WIDTHS = 64, 64, "M", 128, 128, "M", 256, 256, 256
"""Channels of the convolutions up to the one compared; M is a pooling layer that halves width and height."""

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation, by channel, of the pictures on which VGG-16 was trained, in [0, 1]."""


class Perceptual(nn.Module):
    """The distance between the VGG-16 features of two pictures."""

    mean: Tensor
    spread: Tensor

    def __init__(self, path: Path) -> None:
        """Read torchvision's weights from the file `path`; raise `CheckpointError` for any other weights."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        own = self.state_dict()
        given = {name: value for name, value in read_weights(path).items() if name in own}
        if {name: x.shape for name, x in given.items()} != {name: x.shape for name, x in own.items()}:
            raise CheckpointError(
                f"{path} does not contain the weights of VGG-16 as torchvision publishes them "
                "(vgg16-397923af.pth)"
            )
        self.load_state_dict(given)
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("spread", torch.tensor(SPREAD).view(1, 3, 1, 1))

    def forward(self, result: Tensor, truth: Tensor) -> Tensor:
        """Return the mean absolute feature difference between two (N, 3, H, W) pictures in model range."""
        seen = [self.features((x / 2 + 0.5 - self.mean) / self.spread) for x in (result, truth)]
        return (seen[0] - seen[1]).abs().mean()
