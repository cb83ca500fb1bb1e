"""Convolutions behind an enlargement by 2, computed on the small picture.

Each result of a 3x3 convolution sees only 2x2 different pixels of a picture that was enlarged by repeating
them. With the weights of equal pixels summed, 16 products give the four results of a pixel where there were
36, and there is no enlarged picture. The numbers are the same but for rounding.

Few channels run fastest as one transposed convolution, many as four convolutions of 2x2 (one core of a Xeon
with AVX-512: 24 channels at 320x180 9 and 18 ms, 26 unchanged; 1024 at 16x16 116 and 71, 129 unchanged).
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
"""Size of the summed weights, relative to the stored ones."""

NARROW = 256
"""Channels up to which a transposed convolution is faster."""

SUMS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
"""By parity of a result's row (or column) and small pixel: which of the 3 taps see it."""

SPREAD = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
"""By row (or column) of the 4 results that see a small pixel: through which of the 3 taps."""


@contextmanager
def folded(networks: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Run float32 convolutions behind enlargements on a CPU this way while the context lasts.

    The summed weights are kept as long as the layer lives; everybody else sees the layers as they were.
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
    """Bytes of the summed weights that are kept, and of those that the next frame will make."""
    return _kept.bytes_beside((layer for network in networks for _, layer in _pairs(network)), SHARE)


def summed(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (in, out, 4, 4), transposed; with many channels (4 out, in, 2, 2).

    The latter are those of even and odd rows and columns, one after the other.
    """
    if weight.shape[1] <= NARROW:
        parts = torch.einsum("ay,bx,oiyx->ioab", SPREAD, SPREAD, weight)
    else:
        parts = torch.einsum("oiyx,pay,qbx->pqoiab", weight, SUMS, SUMS).flatten(0, 2)
    # The order that the network's other convolutions have.
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return parts.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the layer makes of `x` (1, C, h, w) enlarged twice: (1, out, 2h, 2w)."""
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
            out = torch.empty(size, memory_format=form)
        out[..., row::2, column::2] = part
    return out


def _unchanged(input: Tensor) -> Tensor:
    return input


def _enlarged(block: Any, layer: nn.Conv2d, x: Tensor, output_size: Any = None, *rest: Any) -> Tensor:
    """In place of the forward of diffusers' `Upsample2D`, which may be told another size than the double."""
    if output_size is None or tuple(output_size) == (2 * x.shape[-2], 2 * x.shape[-1]):
        return convolved(layer, x)
    return type(block).forward(block, x, output_size, *rest)


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Conv2d]]:
    """Enlargements and the convolutions behind them: diffusers' own blocks, and neighbours in a list."""
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
    """The pair, where that layer can be computed so."""
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
