"""Distances between a result and the truth, both in model range."""

from __future__ import annotations

from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def charbonnier(difference: Tensor) -> Tensor:
    return (difference.square() + 1e-6).sqrt().mean()


def fidelity(result: Tensor, truth: Tensor) -> Tensor:
    """Charbonnier distance of colours and, once more, of luminance, which the eye weighs most."""
    difference = result - truth
    luma = (difference * difference.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)
    return charbonnier(difference) + charbonnier(luma)
