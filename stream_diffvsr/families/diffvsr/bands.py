"""Run the convolutional parts over bands of rows.

The result is the same as for whole frames, but needs only a fraction of the memory. These networks do not
normalise over the whole picture, so a band needs only a margin of rows around it. Only the TPM looks at the
whole frame, through a pooled map. This map is first computed band by band, then mixed once, and
finally used in a second pass over the bands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...tensors import SCALE
from ...tiling import Band, bands
from .control import Control
from .vae import POOL, Decoder, Encoder, TemporalAutoencoderTiny, TemporalBlock

Layers = Sequence[nn.Module]


def embed(control: Control, warped: Tensor, rows: int | None) -> Tensor:
    """Run `Control.embed` in bands of `rows` rows, or on the whole frame if `rows` is None."""
    if rows is None:
        return control.embed(warped)
    layers = [layer for layer in control.embedding.modules() if isinstance(layer, nn.Conv2d)]
    height, halo = warped.shape[-2] // SCALE, -(-border_rows(layers) // SCALE)
    out = Rows(height)
    for band in bands(height, max(rows // SCALE, 1), halo):
        out.put(control.embed(band.scaled(SCALE).see(warped)), band)
    return out.tensor


def features(vae: TemporalAutoencoderTiny, warped: Tensor, rows: int | None) -> list[Tensor]:
    """Run `TemporalAutoencoderTiny.features` in bands of `rows` rows, or all at once if `rows` is None."""
    if rows is None:
        return vae.features(warped)
    x, pooled = warped, []
    for layers in _encoder_segments(vae.encoder):
        x, maps = _encode_segment(layers, x, rows)
        pooled += maps
    return pooled[::-1]


def decode(
    vae: TemporalAutoencoderTiny,
    latents: Tensor,
    features: Sequence[Tensor] | None,
    trust: Tensor | None,
    rows: int | None,
) -> Tensor:
    """Run `TemporalAutoencoderTiny.decode` in bands of `rows` rows, or all at once if `rows` is None."""
    if rows is None:
        return vae.decode(latents, features, trust)
    x, remaining = vae.bound(latents), iter(features or ())
    for layers in _decoder_segments(vae.decoder):
        x = _decode_segment(layers, x, next(remaining, None), trust, rows)
    return x * 2 - 1


class Rows:
    """A picture that is filled band by band; its size follows from the first band."""

    tensor: Tensor

    def __init__(self, height: int) -> None:
        self.height = height

    def put(self, part: Tensor, band: Band) -> None:
        """Store the band's own rows from `part`, which covers `band.seen` at any integer scale."""
        large = _at_size_of(band, part)
        if not hasattr(self, "tensor"):
            height = self.height * large.rows.stop // band.rows.stop
            self.tensor = part.new_empty((*part.shape[:2], height, part.shape[-1]))
        self.tensor[..., large.rows, :] = large.crop(part)


def border_rows(layers: Iterable[nn.Module]) -> int:
    """Return how many input rows above and below a band influence the band's output."""
    rows = 0
    for layer in reversed(list(layers)):
        if isinstance(layer, nn.Conv2d):
            rows = rows * layer.stride[0] + layer.kernel_size[0] // 2
        elif isinstance(layer, TemporalBlock):
            rows += border_rows(layer.conv)
        elif isinstance(layer, nn.Upsample):
            rows = -(-rows // 2)
    return rows


def scale_of(layers: Iterable[nn.Module]) -> int:
    """Return the number of output rows per input row."""
    return 2 ** sum(isinstance(layer, nn.Upsample) for layer in layers)


def _encoder_segments(encoder: Encoder) -> list[Layers]:
    """Split the layers up to the last block after each halving, so that little is kept between segments."""
    layers = list(encoder.layers)
    last = max(_blocks(layers))
    halvings = [index for index, layer in enumerate(layers) if _halves(layer)]
    return _cut(layers[: last + 1], [i for i in halvings if i < last])


def _decoder_segments(decoder: Decoder) -> list[Layers]:
    """Split the layers after each block except the last.

    Each segment then needs one mix, and only the picture itself is kept at full size.
    """
    layers = list(decoder.layers)
    return _cut(layers, _blocks(layers)[:-1])


def _halves(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.stride[0] == 2


def _blocks(layers: Layers) -> list[int]:
    return [index for index, layer in enumerate(layers) if isinstance(layer, TemporalBlock)]


def _cut(layers: Layers, behind: list[int]) -> list[Layers]:
    ends = [*(index + 1 for index in behind), len(layers)]
    return [layers[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _encode_segment(layers: Layers, x: Tensor, rows: int) -> tuple[Tensor, list[Tensor]]:
    """Return the last layer's result and the pooled result of each block."""
    height = x.shape[-2] // POOL
    out, maps = Rows(height), [Rows(height) for _ in _blocks(layers)]
    for band in bands(height, max(rows // POOL, 1), -(-border_rows(layers) // POOL)):
        y, remaining = band.scaled(POOL).see(x), iter(maps)
        for layer in layers:
            y = layer(y)
            if isinstance(layer, TemporalBlock):
                next(remaining).put(F.avg_pool2d(y, POOL), band)
        out.put(y, band)
    return out.tensor, [pooled.tensor for pooled in maps]


def _decode_segment(
    layers: Layers, x: Tensor, feature: Tensor | None, trust: Tensor | None, rows: int
) -> Tensor:
    """Run a segment of at most one block, whose TPM uses the `feature` of the previous frame."""
    step = max(rows // scale_of(layers) // POOL * POOL, POOL)
    mixed = None if feature is None else _mix(layers, x, feature, step)
    if trust is not None and mixed is not None:
        height, width = (POOL * side for side in mixed.shape[-2:])
        trust = F.adaptive_avg_pool2d(trust, (height, width)).to(x)
    out = Rows(x.shape[-2])
    for band in bands(x.shape[-2], step, border_rows(layers)):
        y = band.see(x)
        for layer in layers:
            if mixed is not None and isinstance(layer, TemporalBlock):
                seen = _at_size_of(band, y).seen
                large = _enlarge(mixed, seen)
                y = layer.finish(y, layer.conv(y), large if trust is None else large * trust[..., seen, :])
            else:
                y = layer(y)
        out.put(y, band)
    return out.tensor


def _mix(layers: Layers, x: Tensor, feature: Tensor, step: int) -> Tensor:
    """Run the first pass: pool the block's update of the whole frame and mix it with `feature`."""
    position = _blocks(layers)[0]
    block = layers[position]
    assert isinstance(block, TemporalBlock)
    pooled = []
    for band in bands(x.shape[-2], step, border_rows(layers[: position + 1])):
        y = band.see(x)
        for layer in layers[:position]:
            y = layer(y)
        pooled.append(F.avg_pool2d(_at_size_of(band, y).crop(block.conv(y)), POOL))
    return block.mix(torch.cat(pooled, dim=2), feature)


def _at_size_of(band: Band, part: Tensor) -> Band:
    """Return the band at the scale of `part`, which covers `band.seen` enlarged by an integer factor."""
    return band.scaled(part.shape[-2] // (band.seen.stop - band.seen.start))


def _enlarge(mixed: Tensor, rows: slice) -> Tensor:
    """Enlarge some rows of the mixed map to the block's size, exactly as enlarging the whole map would."""
    above, below = max(rows.start // POOL - 1, 0), min(-(-rows.stop // POOL) + 1, mixed.shape[-2])
    part = mixed[..., above:below, :]
    size = (part.shape[-2] * POOL, part.shape[-1] * POOL)
    large = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
    return large[..., rows.start - above * POOL : rows.stop - above * POOL, :]
