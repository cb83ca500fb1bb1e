"""nano's own flow estimator: a small coarse-to-fine network that needs only torch.

The input frames have been upscaled 4x (bicubic), so shrinking them to a quarter of their size loses no
detail. Frames are therefore first shrunk by averaging 4x4 pixels, and the flow found at that size is enlarged
at the end.

At every level of a pyramid, the same weights process the frame, the previous frame moved along the current
flow estimate, and two inputs that need no learning: how well windows match at each shift of a few pixels, and
the step that least squares proposes (Lucas and Kanade). The network decides how far to follow these proposals
and what to add to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REDUCTION = 4
"""The factor by which input frames were enlarged."""

REACH = 2
"""Number of neighbouring pixels on each side that bicubic enlargement and averaging mix into a pixel."""

COARSEST = 5
"""Minimum shorter side of the coarsest level, in pixels; with enough levels, it is less than twice this."""

MOST_LEVELS = 6

QUIET = 32
"""Distance from any change, in pixels, beyond which the picture is assumed not to move."""

WINDOW = 5
"""Side of the least-squares window, in pixels of a level; the second, wider window averages over it twice."""

WINDOWS = 2

NOISE = 3e-4
"""Squared differences (in model range) up to about this size are treated as noise."""

DAMPING = 2e-4
"""Added to squared gradients (in model range, per channel) so that flat windows propose no step."""

SMOOTHED = 7
"""Side of the window within which reliable flow spreads to unreliable pixels, in pixels of a level."""

ROUNDS = 2
"""Number of passes over each level, except the most expensive one, at half size, which gets only one pass."""

LONGEST_STEP = 1.5
"""Longest least-squares step, in pixels of a level; for longer steps, linearising the frame is inaccurate."""


def levels_for(height: int, width: int) -> int:
    """Return the number of levels for a picture of the given size; the finest level has half that size."""
    count = 1
    while count < MOST_LEVELS and min(height, width) >= COARSEST * 2 ** (count + 1):
        count += 1
    return count


def sample_with_inside(picture: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Sample `picture` bilinearly at p + flow(p); also return whether each position is inside the picture.

    The second result, (N, 1, h, w), is 1 inside the picture and 0 outside. Positions are exact: zero flow
    changes nothing, whereas the reference's warp of the previous result shifts it slightly even then.
    """
    height, width = picture.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    inside = (grid.abs().amax(-1) <= 1).to(flow.dtype)[:, None]
    return F.grid_sample(picture, grid, padding_mode="border", align_corners=False), inside


def enlarged_and_reduced(lq: Tensor) -> Tensor:
    """Blur slightly: enlarge (N, 3, h, w) by REDUCTION (bicubic) and shrink it by averaging, in one step."""
    height, width = lq.shape[-2:]
    around = F.pad(lq, (REACH,) * 4, mode="replicate")
    # Use slices rather than a convolution, which would run in TF32 on some GPUs.
    down = [weight * around[..., y : y + height, :] for y, weight in enumerate(_blur())]
    tall = torch.stack(down).sum(0)
    return torch.stack([weight * tall[..., x : x + width] for x, weight in enumerate(_blur())]).sum(0)


@lru_cache
def _blur() -> list[float]:
    """Return the weights of the blur along one axis, measured by blurring a single bright column."""
    line = torch.zeros(1, 1, 1, 4 * REACH + 1, device="cpu")
    line[..., 2 * REACH] = 1
    wide = F.interpolate(line, scale_factor=REDUCTION, mode="bicubic", align_corners=False)
    return F.avg_pool2d(wide, REDUCTION)[0, 0, 0, REACH : 3 * REACH + 1].tolist()


def near_change(current: Tensor, previous: Tensor) -> Tensor:
    """Return (N, 1, h, w), which is 1 near any change and falls to 0 about QUIET pixels away from it."""
    changed = (current != previous).any(1, keepdim=True).to(current.dtype)
    blocks = F.max_pool2d(changed, QUIET // 4, ceil_mode=True)
    near = F.max_pool2d(blocks, 7, 1, 3)
    near = F.interpolate(near, scale_factor=QUIET // 4, mode="bilinear", align_corners=False)
    return near[..., : current.shape[-2], : current.shape[-1]]


def window_differences(current: Tensor, moved: Tensor, radius: int) -> Tensor:
    """Return mean squared differences of windows, (N, (2 radius + 1)^2, h, w), at shifts within `radius`."""
    height, width = current.shape[-2:]
    around = F.pad(moved, (radius,) * 4, mode="replicate")
    shifts = product(range(2 * radius + 1), repeat=2)
    squares = [(current - around[..., y : y + height, x : x + width]).square().mean(1) for y, x in shifts]
    return F.avg_pool2d(torch.stack(squares, 1), WINDOW, 1, WINDOW // 2, count_include_pad=False)


def with_detail(picture: Tensor) -> Tensor:
    """Stack `picture / 2` and `picture` minus its local mean; the latter does not depend on lighting."""
    mean = F.avg_pool2d(picture, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    return torch.cat([picture / 2, picture - mean], 1)


class Matcher(nn.Module):
    """Estimates how likely each shift is, based on the differences between windows."""

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius = radius
        sides = torch.arange(-radius, radius + 1.0)
        y, x = torch.meshgrid(sides, sides, indexing="ij")
        self.register_buffer("shifts", torch.stack([x, y]).flatten(1), persistent=False)
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        self.liking = nn.Parameter(-0.05 * (x * x + y * y).flatten())

    def forward(self, current: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's inputs, (2 radius + 1)^2 + 1 channels, and the mean shift, (N, 2, h, w)."""
        cost = window_differences(with_detail(current), with_detail(moved), self.radius)
        scale = cost.mean(1, True) + NOISE
        likely = torch.softmax(self.liking[:, None, None] - self.sharpness.exp() * cost / scale, 1)
        shift = torch.einsum("nshw,cs->nchw", likely, self.shifts)
        return torch.cat([likely, cost.amin(1, True) / scale], 1), shift


def least_squares(current: Tensor, moved: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps (N, 4, h, w), in pixels, that would align `moved` with `current`, one per window size.

    Also return how well the wider window determines the motion, (N, 1, h, w), from 0 (flat, or just one edge)
    to 1.
    """
    mean = F.pad((current + moved) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (mean[:, :, 1:-1, 2:] - mean[:, :, 1:-1, :-2]) * (inside / 2)
    dy = (mean[:, :, 2:, 1:-1] - mean[:, :, :-2, 1:-1]) * (inside / 2)
    change = moved - current
    products = torch.cat([(a * b).mean(1, True) for a, b in
                          ((dx, dx), (dx, dy), (dy, dy), (dx, change), (dy, change))], 1)  # fmt: skip
    narrow = F.avg_pool2d(products, WINDOW, 1, WINDOW // 2)
    (small, _), (wide, firm) = (
        window_steps(narrow),
        window_steps(F.avg_pool2d(narrow, WINDOW, 1, WINDOW // 2)),
    )
    return torch.cat([small, wide], 1).clamp(-LONGEST_STEP, LONGEST_STEP), firm


def window_steps(products: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each window's step and its reliability from the mean products of gradients and differences."""
    xx, xy, yy, xt, yt = products.split(1, 1)
    xx, yy = xx + DAMPING, yy + DAMPING
    determinant = xx * yy - xy * xy
    least = (determinant / (xx + yy) - DAMPING / 2).clamp(min=0)
    step = torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], 1) / determinant
    return step, least / (least + 10 * DAMPING)


class Decoder(nn.Module):
    """Computes a refined flow, and features for the next level, from a level's inputs."""

    def __init__(self, inputs: int, widths: Sequence[int], proposals: int, hidden: int) -> None:
        super().__init__()
        self.split = [2, proposals, 1, 1, hidden]
        sides = (inputs, *widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sides, widths, strict=False)
        )
        self.head = nn.Conv2d(sides[-1], sum(self.split), 3, padding=1)

    def forward(self, seen: Tensor, flow: Tensor, steps: Tensor, firm: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            seen = F.leaky_relu(layer(seen), 0.1)
        step, trust, weight, smooth, hidden = self.head(seen).split(self.split, 1)
        followed = torch.sigmoid(trust).unsqueeze(2) * steps.unflatten(1, (-1, 2))
        flow = flow + step + followed.sum(1)
        weight = (firm + 0.01) * weight.clamp(-6, 6).exp()
        around = blurred(weight * flow) / blurred(weight)
        return flow + torch.sigmoid(smooth) * (around - flow), torch.tanh(hidden)


def blurred(picture: Tensor) -> Tensor:
    return F.avg_pool2d(picture, SMOOTHED, 1, SMOOTHED // 2, count_include_pad=False)


class FlowNetwork(nn.Module):
    """Estimates backward flow between pictures that have already been shrunk by `REDUCTION`."""

    def __init__(
        self, features: int, radius: int, widths: Sequence[int], refinement: Sequence[int], hidden: int
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.unshuffle = nn.PixelUnshuffle(2)
        self.encoder = nn.ModuleList(
            [nn.Conv2d(12, features, 3, padding=1), nn.Conv2d(features, features, 3, padding=1)]
        )
        self.matcher = Matcher(radius)
        common = 2 * WINDOWS + 1 + 2 + 3 + 1 + hidden  # steps, firmness, flow, change, inside
        matches = (2 * radius + 1) ** 2 + 1 + 2
        self.decoder = Decoder(matches + features + common, widths, WINDOWS + 1, hidden)
        self.refine = Decoder(3 + common, refinement, WINDOWS, 0)
        for decoder in (self.decoder, self.refine):
            nn.init.normal_(decoder.head.weight, std=0.01)
            if decoder.head.bias is not None:
                nn.init.zeros_(decoder.head.bias)

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        """Return the flow (N, 2, h, w), in pixels, of frames (N, 3, h, w) in model range, 1x1 or larger.

        The flow is exactly 0 wherever the frames are identical within a distance of about QUIET pixels.
        """
        height, width = current.shape[-2:]
        flow = self.flows(current, previous)[-1][..., :height, :width]
        return flow * near_change(current, previous)

    def flows(self, current: Tensor, previous: Tensor) -> list[Tensor]:
        """Return each pass's flow, coarsest level first, at the padded size and in pixels of its level."""
        levels = levels_for(*current.shape[-2:])
        pairs = [self._padded(current, levels), self._padded(previous, levels)]
        pyramid = [torch.cat(pairs)]
        for _ in range(levels):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        smallest = pyramid[-1].chunk(2)[0]
        flow, hidden = smallest[:, :2] * 0, smallest[:, :1].expand(-1, self.hidden, -1, -1) * 0
        flows = []
        for level in range(levels, 0, -1):
            context = self._context(pyramid[level - 1].chunk(2)[0])
            for _ in range(ROUNDS if level > 1 else 1):
                flow, hidden = self._level(pyramid[level], context, flow.detach(), hidden)
                flows.append(flow)
            flow, hidden = 2 * _twice(flow.detach()), _twice(hidden)
        for _ in range(ROUNDS):
            flow = self._finest(pyramid[0], flow.detach(), hidden)
            flows.append(flow)
        return flows

    def _context(self, picture: Tensor) -> Tensor:
        """Return features of the picture, at half its size."""
        features = self.unshuffle(picture)
        for layer in self.encoder:
            features = F.leaky_relu(layer(features), 0.1)
        return features

    def _level(self, pair: Tensor, context: Tensor, flow: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        current, previous = pair.chunk(2)
        moved, inside = sample_with_inside(previous, flow)
        likely, shift = self.matcher(current, moved)
        steps, firm = least_squares(current, moved, inside)
        steps = torch.cat([steps, shift], 1)
        seen = torch.cat([likely, context, steps, firm, flow / 8, moved - current, inside, hidden], 1)
        return self.decoder(seen, flow, steps, firm)

    def _finest(self, pair: Tensor, flow: Tensor, hidden: Tensor) -> Tensor:
        current, previous = pair.chunk(2)
        moved, inside = sample_with_inside(previous, flow)
        steps, firm = least_squares(current, moved, inside)
        seen = torch.cat([current, steps, firm, flow / 8, moved - current, inside, hidden], 1)
        return self.refine(seen, flow, steps, firm)[0]

    @staticmethod
    def _padded(picture: Tensor, levels: int) -> Tensor:
        height, width = picture.shape[-2:]
        size = 2**levels
        return F.pad(picture, (0, -width % size, 0, -height % size), mode="replicate")


def _twice(picture: Tensor) -> Tensor:
    return F.interpolate(picture, scale_factor=2, mode="bilinear", align_corners=False)
