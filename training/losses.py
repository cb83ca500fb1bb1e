"""Distances between a result and the truth, both in model range."""

from __future__ import annotations

from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def charbonnier(difference: Tensor) -> Tensor:
    return (difference.square() + 1e-6).sqrt().mean()


SQUARES = 5.0
"""Weight of squared differences relative to absolute ones; PSNR and warping error use squares."""


def distance(difference: Tensor) -> Tensor:
    """Return a distance in which large differences weigh more than in proportion."""
    return charbonnier(difference) + SQUARES * difference.square().mean()


def fidelity(result: Tensor, truth: Tensor) -> Tensor:
    """Return the distance of colours plus that of luminance, to which the eye is most sensitive."""
    difference = result - truth
    luma = (difference * difference.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)
    return distance(difference) + distance(luma)
