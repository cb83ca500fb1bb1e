"""Splitting pictures into bands of rows, which keeps results exact, or into overlapping, blended tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """Rows of a picture, and the rows around them that a stack of convolutions needs as context."""

    rows: slice
    """The band's own rows."""
    seen: slice
    """The band with the rows around it, cut off at the edge of the picture."""

    def scaled(self, factor: int) -> Band:
        """Return the corresponding band of a picture that is `factor` times as high."""
        rows, seen = self.rows, self.seen
        return Band(
            slice(rows.start * factor, rows.stop * factor), slice(seen.start * factor, seen.stop * factor)
        )

    def see(self, x: Tensor) -> Tensor:
        """Return the band and its context rows, cut from a (1, C, H, W) tensor."""
        return x[..., self.seen, :]

    def crop(self, x: Tensor) -> Tensor:
        """Crop a (1, C, seen, W) tensor to the band's own rows."""
        return x[..., self.rows.start - self.seen.start : self.rows.stop - self.seen.start, :]


def bands(height: int, rows: int, halo: int) -> list[Band]:
    """Split `height` rows into bands of `rows`, each with `halo` rows of context above and below."""
    return [
        Band(
            slice(start, min(start + rows, height)),
            slice(max(start - halo, 0), min(start + rows + halo, height)),
        )
        for start in range(0, height, rows)
    ]


@dataclass(frozen=True, eq=False)
class Tile:
    """A rectangle of a picture, and its weight in the blend."""

    rows: slice
    columns: slice
    weight: Tensor
    """(height, width) float32; each pixel's weights sum to 1 over all tiles."""

    def cut(self, x: Tensor) -> Tensor:
        """Return this tile's part of a (B, C, H, W) tensor."""
        return x[..., self.rows, self.columns]

    def add(self, part: Tensor, whole: Tensor) -> None:
        """Add this tile's share of the blend to `whole`, in place."""
        if self.weight.shape == whole.shape[-2:]:
            whole.add_(part)  # a single tile needs no weights, so none are copied to the device
        else:
            self.cut(whole).add_(part * self.weight.to(part.device))


def tiles(height: int, width: int, size: int, overlap: int, multiple: int = 1) -> list[Tile]:
    """Cover a picture with tiles of at most `size`, row by row.

    Neighbours overlap by at least `overlap`. Tiles start at multiples of `multiple`, and `size` must be a
    multiple of it too. Weights grow with the squared distance from the tile's edges; they are never 0, even
    at the edge of the picture.
    """
    rows, columns = (spans(length, size, overlap, multiple) for length in (height, width))
    return [
        Tile(down, across, down_weight[:, None] * across_weight)
        for down, down_weight in zip(rows, feather(rows, height), strict=True)
        for across, across_weight in zip(columns, feather(columns, width), strict=True)
    ]


def spans(length: int, size: int, overlap: int, multiple: int = 1) -> list[slice]:
    """Cover 0..length with overlapping spans of at most `size`, starting at multiples of `multiple`."""
    step = max((size - overlap) // multiple * multiple, multiple)
    starts = [0]
    while starts[-1] + size < length:
        last = -(-(length - size) // multiple) * multiple
        starts.append(min(starts[-1] + step, last))
    return [slice(start, min(start + size, length)) for start in starts]


def feather(parts: list[slice], length: int) -> list[Tensor]:
    """Return the weight of each position in each span; weights are positive and sum to 1 per position."""
    position = torch.arange(length) + 0.5
    far = torch.full_like(position, length)
    weights = torch.zeros(len(parts), length)
    for index, part in enumerate(parts):
        # Only edges inside the picture fade; in an overlap, weights depend on the distances to span ends.
        before = position - part.start if index else far
        behind = part.stop - position if index + 1 < len(parts) else far
        # Squared, since a tile has little context near its edge and should have little weight there.
        weights[index, part] = torch.minimum(before, behind)[part].square()
    weights = weights / weights.sum(0)
    return [weight[part] for weight, part in zip(weights, parts, strict=True)]
