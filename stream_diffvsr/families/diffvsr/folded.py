"""Linear layers in a row, computed as one convolution: the same numbers but for rounding, for less work.

In a picture doubled by nearest neighbour, taps of a 3x3 convolution meet the same small pixel. Their weights
added beforehand make a transposed convolution of the small picture: 4/9 of the work, and no large picture in
between. Two convolutions with nothing between them are one, too; an autoencoder without blocks at full
size has such pairs there, where they cost most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .vae import TemporalAutoencoderTiny

SPREAD = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
"""Which of a kernel's three taps add up to each of the four values that one pixel gives."""

EDGE = 4
"""Rows or columns of input that suffice for the outermost one of output; even, as strides are."""


def fold(unet: nn.Module, vae: TemporalAutoencoderTiny) -> None:
    """Fold what can be, in place. The layers keep their weights; folded ones stand beside them."""
    from diffusers.models.upsampling import Upsample2D

    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Upsample2D and _doubles_and_convolves(child):
                setattr(parent, name, FoldedUpsampler(child))
    for network in (vae.encoder, vae.decoder):
        network.layers = nn.ModuleList(_fold_runs(list(network.layers)))


def unfold(unet: nn.Module, vae: TemporalAutoencoderTiny) -> None:
    """Take back what `fold` did."""
    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FoldedUpsampler):
                setattr(parent, name, child.original)
    for network in (vae.encoder, vae.decoder):
        network.layers = nn.ModuleList(parts_of(network.layers))


def parts_of(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers as they were before folding."""
    for layer in layers:
        yield from layer.parts if isinstance(layer, FoldedLayers) else (layer,)


class FoldedLayers(nn.Module):
    """Doubling and convolution, or two convolutions with or without it: kept, and folded beside them."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        convolutions = [part for part in parts if isinstance(part, nn.Conv2d)]
        self.folded = (
            _fold_doubling(convolutions) if len(convolutions) < len(parts) else _fold_pair(*convolutions)
        )
        self.pads_between = len(convolutions) > 1

    def forward(self, x: Tensor) -> Tensor:
        """What the parts give one after another."""
        out = self.folded(x)
        return self._mend(out, x) if self.pads_between else out

    def _mend(self, out: Tensor, x: Tensor) -> Tensor:
        # The second convolution sees zeros outside of what the first one gave, the folded one does not.
        down, across = (max(side - EDGE, 0) // 2 * 2 for side in x.shape[-2:])
        out[..., :1, :] = self._unfolded(x[..., :EDGE, :])[..., :1, :]
        out[..., -1:, :] = self._unfolded(x[..., down:, :])[..., -1:, :]
        out[..., :1] = self._unfolded(x[..., :EDGE])[..., :1]
        out[..., -1:] = self._unfolded(x[..., across:])[..., -1:]
        return out

    def _unfolded(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class FoldedUpsampler(nn.Module):
    """diffusers' doubling and 3x3 convolution; as it is where the result is not exactly twice as large."""

    def __init__(self, upsampler: Any) -> None:
        super().__init__()
        self.original = upsampler
        self.folded = _fold_doubling([upsampler.conv])

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w), or of `output_size`."""
        height, width = (2 * side for side in x.shape[-2:])
        # Small maps of many channels cost what it takes to read the weights, and folded there are more.
        worth = height * width >= x.shape[1]
        if worth and (output_size is None or tuple(output_size) == (height, width)):
            return self.folded(x)
        return self.original(x, output_size)


def _doubles_and_convolves(upsampler: Any) -> bool:
    plain = upsampler.interpolate and not upsampler.use_conv_transpose and upsampler.norm is None
    return plain and upsampler.use_conv and _is_3x3(getattr(upsampler, "conv", None))


def _is_3x3(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.padding == (1, 1)


def _fold_runs(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The layers, each foldable run of them as one."""
    while layers:
        run = next(layers[:length] for length in (3, 2, 1) if length == 1 or _is_foldable(layers[:length]))
        layers = layers[len(run) :]
        yield FoldedLayers(run) if len(run) > 1 else run[0]


def _is_foldable(run: Sequence[nn.Module]) -> bool:
    """Whether these layers are one convolution, and that one costs less."""
    doubled = isinstance(run[0], nn.Upsample)
    convolutions = [layer for layer in run[doubled:] if isinstance(layer, nn.Conv2d) and _is_3x3(layer)]
    if len(convolutions) != len(run) - doubled or any(
        c.stride != (1, 1) for c in convolutions[: 1 + doubled]
    ):
        return False
    if len(convolutions) != 2:
        return doubled and len(convolutions) == 1
    first, second = convolutions
    wide = 9 * first.out_channels * (first.in_channels + second.out_channels)
    return 25 * first.in_channels * second.out_channels < wide


def _fold_doubling(convolutions: Sequence[nn.Conv2d]) -> nn.ConvTranspose2d:
    """Doubling and one or two 3x3 convolutions as a transposed convolution."""
    first, *others = convolutions
    kernel = _exact(first.weight)
    spread = torch.tensor(SPREAD, dtype=torch.float64, device=kernel.device)
    # (in, out, 4, 4): the answer to a single pixel, which the second convolution sees as a picture.
    answer = torch.einsum("ay,bx,oiyx->ioab", spread, spread, kernel)
    bias = None if first.bias is None else _exact(first.bias)
    for second in others:
        answer, bias = F.conv2d(answer, _exact(second.weight), padding=2), _bias(bias, second)
    inside, outside, side = *answer.shape[:2], answer.shape[-1]
    folded = nn.ConvTranspose2d(inside, outside, side, 2, side // 2 - 1, bias=bias is not None)
    return _fill(folded, answer, bias, first.weight)


def _fold_pair(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Two 3x3 convolutions, the first of stride 1, as one of 5x5."""
    answer = F.conv2d(_exact(first.weight).flip(2, 3).transpose(0, 1), _exact(second.weight), padding=2)
    bias = _bias(None if first.bias is None else _exact(first.bias), second)
    inside, outside = answer.shape[:2]
    stride: Any = second.stride
    folded = nn.Conv2d(inside, outside, 5, stride, 2, bias=bias is not None)
    return _fill(folded, answer.flip(2, 3).transpose(0, 1), bias, first.weight)


def _bias(before: Tensor | None, convolution: nn.Conv2d) -> Tensor | None:
    """What a convolution makes of a constant before it, and its own constant."""
    through = None if before is None else _exact(convolution.weight).sum((2, 3)) @ before
    own = None if convolution.bias is None else _exact(convolution.bias)
    return own if through is None else through if own is None else through + own


def _exact(weight: Tensor) -> Tensor:
    # Networks without weights are folded, too: what they will need is told from them.
    return weight.detach().to("meta" if weight.is_meta else "cpu", torch.float64)


def _fill(network: Any, weight: Tensor, bias: Tensor | None, like: Tensor) -> Any:
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, value in values.items():
        setattr(network, name, nn.Parameter(value.to(like.dtype).to(like.device), requires_grad=False))
    return network
