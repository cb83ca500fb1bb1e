"""The convolutional part of VGG-16, whose features are used by learned measures and losses."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import CheckpointError
from ..files import read_weights
from ..weights.networks import empty, shapes_of


def vgg_features(path: Path) -> nn.Sequential:
    """Return the convolutional part with torchvision's weights from the file `path`, without gradients.

    It expects pictures (N, 3, H, W), normalised with ImageNet's mean and standard deviation.
    Raises `CheckpointError` if the file contains anything else.
    """
    from torchvision.models import vgg16

    features = empty(lambda: nn.Sequential(*vgg16(weights=None, init_weights=False).features.children()))
    start = "features."
    given = {name.removeprefix(start): x for name, x in read_weights(path).items() if name.startswith(start)}
    if {name: tuple(x.shape) for name, x in given.items()} != shapes_of(features):
        raise CheckpointError(
            f"{path} does not contain the weights of VGG-16 as torchvision publishes them "
            "(vgg16-397923af.pth)"
        )
    features.load_state_dict(given, assign=True)
    return features.requires_grad_(False)
