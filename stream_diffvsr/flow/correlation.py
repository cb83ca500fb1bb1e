"""RAFT's correlations, using memory that grows linearly with the number of pixels instead of quadratically.

For each pixel of the current frame, RAFT looks up how well it matches the pixels around one position in the
previous frame, at four levels of detail. The usual implementation computes in advance how well every pixel
matches every other, which takes 16 GiB for 2560x1440. Since pooling and bilinear sampling are linear, the
same numbers can be computed from pooled features, and only where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 8
"""Side of a square of pixels that shares one window where the flow is smooth; a power of 2."""

SCRATCH = 2**24
"""Maximum number of values in one batch of windows (64 MiB in float32)."""


@dataclass(frozen=True, eq=False)
class Level:
    """The previous frame's features at one level of detail."""

    rows: Tensor
    """(h * w + 1, C): one row per position, then one row of zeros for all positions outside the picture."""
    height: int
    width: int

    def index(self, y: Tensor, x: Tensor) -> Tensor:
        """Return, for each position, the index of its row in `rows`."""
        inside = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        return torch.where(inside, y * self.width + x, self.height * self.width)


class LinearCorrelation:
    """A replacement for torchvision's `CorrBlock` that has the same two methods and returns the same numbers.

    Neighbouring pixels look up nearly the same positions, so all pixels of a square share one window of
    features, and a small matrix product computes their matches. A square whose lookup positions are too
    spread out is split into four, repeatedly if necessary, down to single pixels.
    """

    def __init__(self, levels: int, radius: int) -> None:
        self.levels = levels
        self.side = 2 * radius + 1
        self.radius = radius

    def build_pyramid(self, fmap1: Tensor, fmap2: Tensor) -> None:
        """Prepare the features (1, C, h, w) of the current and the previous frame for lookups."""
        _, channels, height, width = fmap1.shape
        self.order, self.position = block_order(height, width, fmap1.device)
        self.points = (fmap1 / channels**0.5).flatten(2)[0].T[self.order]
        self.pyramid: list[Level] = []
        for level in range(self.levels):
            fmap2 = F.avg_pool2d(fmap2, 2) if level else fmap2
            self.pyramid.append(Level(F.pad(fmap2.flatten(2)[0].T, (0, 0, 0, 1)), *fmap2.shape[-2:]))

    def index_pyramid(self, centroids_coords: Tensor) -> Tensor:
        """Return matches (1, levels * (2r + 1)^2, h, w) at positions (1, 2, h, w) in the previous frame."""
        places = centroids_coords[0].flatten(1).T[self.order]
        found = [self._match(places / 2**number, level) for number, level in enumerate(self.pyramid)]
        matches = torch.cat([level[self.position].T for level in found])
        return matches.view(1, -1, *centroids_coords.shape[-2:])

    def _match(self, places: Tensor, level: Level) -> Tensor:
        """Return the matches (P, (2r + 1)^2) at positions (P, 2), x first, at one level."""
        corner = places.floor()
        fraction = places - corner
        # More than a window's width outside the picture, all is zero; clamping keeps the integers small.
        size = torch.tensor([level.width, level.height], device=places.device)
        corner = corner.clamp(min=-self.side).minimum(size + self.side).long() - self.radius
        out = places.new_empty((len(places), self.side**2))
        for pixels, chosen, window in self._squares(corner):
            out.view(-1, pixels, self.side**2)[chosen] = self._match_squares(
                self.points.view(-1, pixels, self.points.shape[-1])[chosen],
                corner.view(-1, pixels, 2)[chosen],
                fraction.view(-1, pixels, 1, 1, 2)[chosen],
                window,
                level,
            )
        return out

    def _squares(self, corner: Tensor) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
        """Split all pixels into squares that are looked up together.

        Yields batches: pixels per square, indices of the squares, and (width, height) of their windows.
        """
        edge, numbers = BLOCK, torch.arange(len(corner) // BLOCK**2, device=corner.device)
        while len(numbers):
            squares = corner.view(-1, edge**2, 2)[numbers]
            spread = squares.amax(1) - squares.amin(1)
            together = (spread <= 2 * edge).all(1) | (edge == 1)
            if together.any():
                yield from self._batches(edge, numbers[together], spread[together] + self.side + 1)
            cut = numbers[~together]
            numbers = (4 * cut[:, None] + torch.arange(4, device=corner.device)).flatten()
            edge //= 2

    def _batches(
        self, edge: int, numbers: Tensor, windows: Tensor
    ) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
        # Batch squares whose spread is similar, so that few windows are larger than necessary.
        by_size = windows.sum(1).argsort(stable=True)
        largest = (2 * edge + self.side + 1) ** 2
        per_square = largest * (self.points.shape[-1] + edge**2) + 3 * edge**2 * (self.side + 1) ** 2
        for batch in by_size.split(max(1, SCRATCH // per_square)):
            width, height = windows[batch].amax(0).tolist()
            yield edge**2, numbers[batch], (width, height)

    def _match_squares(
        self, points: Tensor, corner: Tensor, fraction: Tensor, window: tuple[int, int], level: Level
    ) -> Tensor:
        """Return the matches (n, k, (2r + 1)^2) of n squares with k pixels each.

        `points` is (n, k, C), and `corner` is (n, k, 2).
        """
        width, height = window
        origin = corner.amin(1)
        x = origin[:, None, None, 0] + torch.arange(width, device=corner.device)
        y = origin[:, None, None, 1] + torch.arange(height, device=corner.device)[:, None]
        rows = level.index(y, x).flatten(1)
        features = level.rows.index_select(0, rows.flatten()).view(*rows.shape, -1)
        products = points @ features.transpose(1, 2)
        steps, shift = torch.arange(self.side + 1, device=corner.device), corner - origin[:, None]
        first = shift[..., 1] * width + shift[..., 0]
        wanted = first[..., None] + (steps[:, None] * width + steps).flatten()
        square = products.gather(2, wanted).unflatten(2, (len(steps), len(steps)))
        # RAFT numbers the samples column by column.
        return bilinear(square, fraction).transpose(2, 3).flatten(2)


def bilinear(square: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate (..., m, m) values to (..., m - 1, m - 1) at an offset of `fraction` (x, y) from each."""
    rows = torch.lerp(square[..., :-1, :], square[..., 1:, :], fraction[..., 1])
    return torch.lerp(rows[..., :-1], rows[..., 1:], fraction[..., 0])


def block_order(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Order a picture's pixels so that each square of side `BLOCK`, and each quarter of it, is contiguous.

    Returns the pixel at each place in this order (repeating the last row and column to complete the squares)
    and the place of each pixel.
    """
    y = torch.arange(-(-height // BLOCK) * BLOCK, device=device)[:, None]
    x = torch.arange(-(-width // BLOCK) * BLOCK, device=device)
    place = ((y // BLOCK) * (len(x) // BLOCK) + x // BLOCK) * BLOCK**2
    for bit in range(BLOCK.bit_length() - 1):
        place = place + (((y >> bit & 1) * 2 + (x >> bit & 1)) << 2 * bit)
    pixel = y.clamp(max=height - 1) * width + x.clamp(max=width - 1)
    order = torch.empty_like(pixel.flatten())
    order[place.flatten()] = pixel.flatten()
    return order, place[:height, :width].flatten()
