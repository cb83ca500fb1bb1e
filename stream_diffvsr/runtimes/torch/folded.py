"""Convolutions that follow an enlargement by 2, computed on the picture before it is enlarged.

If a picture was enlarged by repeating pixels, each result of a 3x3 convolution depends on only 2x2 different
pixels. With the weights of equal pixels summed, the four results for an input pixel need 16 products instead
of 36, and no enlarged picture is needed. The results differ only by rounding.

With few channels, a single transposed convolution is fastest; with many channels, four 2x2 convolutions are.
On one core of a Xeon with AVX-512, 24 channels at 320x180 take 9 ms with one convolution and 18 ms with four
(26 ms when not folded); 1024 channels at 16x16 take 116 and 71 ms, respectively (129 ms when not folded).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .derived import Derived

SHARE = 16 / 9
"""Size of the summed weights, relative to the stored weights."""

NARROW = 256
"""Maximum number of input channels for which a transposed convolution is used, because it is faster."""

SUMS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
"""For even and odd result rows (or columns) and each of 2 small pixels, which of the 3 taps see the pixel."""

SPREAD = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
"""For each of the 4 result rows (or columns) that see a small pixel, which of the 3 taps see it."""


@contextmanager
def folded(networks: Iterable[nn.Module]) -> Generator[None, None, None]:
    """On a CPU, fold the float32 convolutions that follow enlargements, for the duration of the context.

    Summed weights are kept for as long as their layer exists; the layer's own weights are not modified.
    """
    pairs = [pair for network in networks for pair in _pairs(network)]
    changed: list[nn.Module] = []
    try:
        for enlargement, layer in pairs:
            if isinstance(enlargement, nn.Upsample):
                enlargement.forward = _unchanged
                layer.forward = partial(convolved, layer)  # type: ignore[method-assign,assignment]
                changed += [enlargement, layer]
            else:
                enlargement.forward = partial(_enlarged, enlargement, layer)
                changed += [enlargement]
        yield
    finally:
        for each in changed:
            vars(each).pop("forward", None)


def bytes_beside(networks: Iterable[nn.Module]) -> tuple[int, int]:
    """Return how many bytes of summed weights are already kept, and how many the next frame will add."""
    return _kept.bytes_beside((layer for network in networks for _, layer in _pairs(network)), SHARE)


def summed_weights(networks: Iterable[nn.Module]) -> list[Tensor]:
    """Return the summed weights of the networks' convolutions, computing those that are missing."""
    return [_kept(layer) for network in networks for _, layer in _pairs(network)]


def summed(weight: Tensor) -> Tensor:
    """Sum weights (out, in, 3, 3) into (in, out, 4, 4); for many input channels, into (4 out, in, 2, 2).

    The first form is for a transposed convolution. The second form stacks the weights for even and odd rows
    and, within each, for even and odd columns.
    """
    spread, sums = SPREAD.to(weight.device), SUMS.to(weight.device)
    if weight.shape[1] <= NARROW:
        parts = torch.einsum("ay,bx,oiyx->ioab", spread, spread, weight)
    else:
        parts = torch.einsum("oiyx,pay,qbx->pqoiab", weight, sums, sums).flatten(0, 2)
    # Use the memory layout of the network's other convolutions.
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return parts.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the layer's result, (1, out, 2h, 2w), for `x`, (1, C, h, w), enlarged by 2."""
    if layer.in_channels <= NARROW:
        return F.conv_transpose2d(x, _kept(layer), layer.bias, stride=2, padding=1)
    height, width = x.shape[-2:]
    size = len(x), layer.out_channels, 2 * height, 2 * width
    weights, x, out = _kept(layer).chunk(4), F.pad(x, (1, 1, 1, 1)), x
    for (row, column), weight in zip(product((0, 1), repeat=2), weights, strict=True):
        part = F.conv2d(x[..., row : row + height + 1, column : column + width + 1], weight, layer.bias)
        if (row, column) == (0, 0):
            last = part.is_contiguous(memory_format=torch.channels_last)
            form = torch.channels_last if last else torch.contiguous_format
            out = torch.empty(size, memory_format=form, device=x.device)
        out[..., row::2, column::2] = part
    return out


def _unchanged(input: Tensor) -> Tensor:
    return input


def _enlarged(block: Any, layer: nn.Conv2d, x: Tensor, output_size: Any = None, *rest: Any) -> Tensor:
    """Replace the `forward` of diffusers' `Upsample2D`; unless the size doubles, call the original."""
    if output_size is None or tuple(output_size) == (2 * x.shape[-2], 2 * x.shape[-1]):
        return convolved(layer, x)
    return type(block).forward(block, x, output_size, *rest)


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Conv2d]]:
    """Yield each enlargement and the convolution after it, in diffusers' blocks and in lists of modules."""
    for module in network.modules():
        if type(module).__name__ == "Upsample2D":
            layer = getattr(module, "conv", None)
            if getattr(module, "interpolate", False) and getattr(module, "norm", None) is None:
                yield from _folding(module, layer)
        elif isinstance(module, (nn.ModuleList, nn.Sequential)):
            for first, second in pairwise(module):
                if isinstance(first, nn.Upsample) and (first.scale_factor, first.mode) == (2, "nearest"):
                    yield from _folding(first, second)


def _folding(enlargement: nn.Module, layer: object) -> Iterator[tuple[nn.Module, nn.Conv2d]]:
    """Yield the pair if the layer can be folded."""
    if type(layer) is not nn.Conv2d or "forward" in vars(layer) or "forward" in vars(enlargement):
        return
    shape = layer.kernel_size, layer.padding, layer.stride, layer.dilation, layer.groups, layer.padding_mode
    weight = layer.weight
    here = (
        weight.dtype == torch.float32 and weight.device.type in ("cpu", "meta") and not weight.is_inference()
    )
    if here and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        yield enlargement, layer


_kept = Derived(summed)
