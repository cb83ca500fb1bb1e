"""nano's own flow: a small coarse-to-fine network, torch only.

Everything that a frame shows lies at a quarter of its size, since it was enlarged by 4 (bicubic). So frames
are averaged down by 4 first, and the flow found there is enlarged at the end.

On every level of a pyramid the same weights look at the frame, at the previous one moved along the flow
so far, at how well they match at each shift of a few pixels, and at the step that least squares over
small windows (Lucas and Kanade) proposes; they decide how far to follow those steps and what to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REDUCTION = 4
"""Frames come enlarged by so much."""

COARSEST = 5
"""Pixels of the coarsest level's shorter side, at least; less than twice as many, if levels suffice."""

MOST_LEVELS = 6

QUIET = 32
"""Pixels without any change around, in which nothing is taken to move."""

WINDOW = 5
"""Side, in pixels of a level, of the windows of least squares; a second one is as wide again."""

WINDOWS = 2
STEPS = 2 * WINDOWS
"""Channels of their proposals."""

DAMPING = 2e-4
"""Added to squared gradients (model range, per channel): flat windows propose no step."""

LONGEST_STEP = 1.5
"""Pixels of a level; where least squares proposes more, its linear picture of the frame does not hold."""


def levels_for(height: int, width: int) -> int:
    """How many levels a picture of that size has, the finest at half of its size."""
    count = 1
    while count < MOST_LEVELS and min(height, width) >= COARSEST * 2 ** (count + 1):
        count += 1
    return count


def pull(picture: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """`picture` at p + flow(p), bilinear, and where that lies inside it, (N, 1, h, w) of 0 and 1.

    Positions are exact: unlike the reference's warp of the previous result, zero flow is the identity.
    """
    height, width = picture.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    inside = (grid.abs().amax(-1) <= 1).to(flow.dtype)[:, None]
    return F.grid_sample(picture, grid, padding_mode="border", align_corners=False), inside


def near_change(current: Tensor, previous: Tensor) -> Tensor:
    """1 near anything that changed, falling to 0 towards QUIET pixels from it, (N, 1, h, w)."""
    changed = (current != previous).any(1, keepdim=True).to(current.dtype)
    blocks = F.max_pool2d(changed, QUIET // 4, ceil_mode=True)
    near = F.max_pool2d(blocks, 7, 1, 3)
    near = F.interpolate(near, scale_factor=QUIET // 4, mode="bilinear", align_corners=False)
    return near[..., : current.shape[-2], : current.shape[-1]]


def matches(current: Tensor, moved: Tensor, radius: int) -> Tensor:
    """Scalar products of unit features at every shift within `radius`, (N, (2 radius + 1)^2, h, w)."""
    height, width = current.shape[-2:]
    around = F.pad(moved, (radius,) * 4)
    shifts = product(range(2 * radius + 1), repeat=2)
    return torch.stack([(current * around[..., y : y + height, x : x + width]).sum(1) for y, x in shifts], 1)


def least_squares(current: Tensor, moved: Tensor, inside: Tensor) -> Tensor:
    """Steps (N, 4, h, w) in pixels that would bring `moved` onto `current`, one per window size."""
    mean = F.pad((current + moved) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (mean[:, :, 1:-1, 2:] - mean[:, :, 1:-1, :-2]) * (inside / 2)
    dy = (mean[:, :, 2:, 1:-1] - mean[:, :, :-2, 1:-1]) * (inside / 2)
    change = moved - current
    products = torch.cat([(a * b).mean(1, True) for a, b in
                          ((dx, dx), (dx, dy), (dy, dy), (dx, change), (dy, change))], 1)  # fmt: skip
    steps = []
    for _ in range(WINDOWS):
        products = F.avg_pool2d(products, WINDOW, 1, WINDOW // 2)
        xx, xy, yy, xt, yt = products.split(1, 1)
        xx, yy = xx + DAMPING, yy + DAMPING
        determinant = xx * yy - xy * xy
        steps += [(xy * yt - yy * xt) / determinant, (xy * xt - xx * yt) / determinant]
    return torch.cat(steps, 1).clamp(-LONGEST_STEP, LONGEST_STEP)


class Decoder(nn.Module):
    """From what is seen on a level to a better flow, and to what the next level should know."""

    def __init__(self, inputs: int, widths: Sequence[int], hidden: int) -> None:
        super().__init__()
        sides = (inputs, *widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sides, widths, strict=False)
        )
        self.head = nn.Conv2d(sides[-1], 2 + WINDOWS + hidden, 3, padding=1)

    def forward(self, seen: Tensor, flow: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            seen = F.leaky_relu(layer(seen), 0.1)
        step, trust, hidden = self.head(seen).split([2, WINDOWS, self.head.out_channels - 4], 1)
        followed = torch.sigmoid(trust).unsqueeze(2) * steps.unflatten(1, (-1, 2))
        return flow + step + followed.sum(1), torch.tanh(hidden)


class FlowNetwork(nn.Module):
    """Backward flow between pictures of the size at which they hold information."""

    def __init__(
        self, features: int, radius: int, widths: Sequence[int], refinement: Sequence[int], hidden: int
    ) -> None:
        super().__init__()
        self.radius, self.hidden = radius, hidden
        self.unshuffle = nn.PixelUnshuffle(2)
        self.encoder = nn.ModuleList(
            [nn.Conv2d(12, features, 3, padding=1), nn.Conv2d(features, features, 3, padding=1)]
        )
        common = STEPS + 2 + 3 + 1 + hidden  # steps, flow, change, inside
        self.decoder = Decoder((2 * radius + 1) ** 2 + features + common, widths, hidden)
        self.refine = Decoder(3 + common, refinement, 0)

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        """(N, 3, h, w) in model range, any size from 1x1 -> (N, 2, h, w) in their pixels.

        Where both are equal for about QUIET pixels around, it is exactly 0.
        """
        height, width = current.shape[-2:]
        flow = self.flows(current, previous)[-1][..., :height, :width]
        return flow * near_change(current, previous)

    def flows(self, current: Tensor, previous: Tensor) -> list[Tensor]:
        """The flow of each level in its own pixels, coarsest first, at sides padded to whole levels."""
        levels = levels_for(*current.shape[-2:])
        pairs = [self._padded(current, levels), self._padded(previous, levels)]
        pyramid = [torch.cat(pairs)]
        for _ in range(levels):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        smallest = pyramid[-1].chunk(2)[0]
        flow, hidden = smallest[:, :2] * 0, smallest[:, :1].expand(-1, self.hidden, -1, -1) * 0
        flows = []
        for level in range(levels, 0, -1):
            now, before = self._features(pyramid[level - 1]).chunk(2)
            flow, hidden = self._level(pyramid[level], now, before, flow, hidden)
            flows.append(flow)
            flow, hidden = 2 * _twice(flow.detach()), _twice(hidden)
        return [*flows, self._finest(pyramid[0], flow, hidden)]

    def _features(self, picture: Tensor) -> Tensor:
        """At half of the picture's size, of unit length."""
        features = self.unshuffle(picture)
        for index, layer in enumerate(self.encoder):
            features = layer(F.leaky_relu(features, 0.1) if index else features)
        return features / (features.square().sum(1, True) + 1e-2).sqrt()

    def _level(
        self, pair: Tensor, now: Tensor, before: Tensor, flow: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        current, previous = pair.chunk(2)
        moved, inside = pull(torch.cat([previous, before], 1), flow)
        steps = least_squares(current, moved[:, :3], inside)
        cost = matches(now, moved[:, 3:], self.radius)
        seen = torch.cat([cost, now, steps, flow / 8, moved[:, :3] - current, inside, hidden], 1)
        return self.decoder(seen, flow, steps)

    def _finest(self, pair: Tensor, flow: Tensor, hidden: Tensor) -> Tensor:
        current, previous = pair.chunk(2)
        moved, inside = pull(previous, flow)
        steps = least_squares(current, moved, inside)
        seen = torch.cat([current, steps, flow / 8, moved - current, inside, hidden], 1)
        return self.refine(seen, flow, steps)[0]

    @staticmethod
    def _padded(picture: Tensor, levels: int) -> Tensor:
        height, width = picture.shape[-2:]
        size = 2**levels
        return F.pad(picture, (0, -width % size, 0, -height % size), mode="replicate")


def _twice(picture: Tensor) -> Tensor:
    return F.interpolate(picture, scale_factor=2, mode="bilinear", align_corners=False)
