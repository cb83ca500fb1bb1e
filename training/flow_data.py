"""Pairs of frames with known motion, for the flow network: layers that move independently.

The flow is chosen first: a layer's previous frame is sampled from a picture, and its current frame from the
same picture at p + flow(p), so that the flow is exact for any motion, even a non-rigid one. Frames are drawn
at twice the LQ size.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import FONTS, LETTERS, PHOTOGRAPHS, Pictures, recolour, spoil, to_model
from training.sequences import h264

OVERSAMPLE = 2
MARGIN = 48
"""Distance, in oversampled pixels, outside the frame at which foreground objects may begin."""

FASTEST = 24.0
"""Maximum pan between two frames, in LQ pixels."""


UNSEEN = ("chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs reserved for evaluation."""


class Pool:
    """The pictures from which layers are made: generated scenes and photographs, each also at half size."""

    def __init__(self, pictures: Pictures, *, measuring: bool = False) -> None:
        named = zip(PHOTOGRAPHS, pictures.photographs, strict=True)
        photographs = [picture for name, picture in named if (name in UNSEEN) == measuring]
        self.kinds = [with_halves(pictures.scenes), with_halves(photographs)]

    def pick(self, rng: np.random.Generator) -> np.ndarray:
        kind = self.kinds[rng.integers(2)]
        return kind[rng.integers(len(kind))]


def with_halves(pictures: list[np.ndarray]) -> list[np.ndarray]:
    return [*pictures, *(cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for p in pictures)]


@dataclass(frozen=True)
class Layer:
    """One layer of a pair, before others cover it: its frames (H, W, 3), its masks and its motion."""

    current: np.ndarray
    previous: np.ndarray
    here: np.ndarray
    """The mask in the current frame, (H, W) in 0..1."""
    there: np.ndarray
    """The mask in the previous frame, (H, W) in 0..1."""
    flow: np.ndarray
    """The backward flow, (H, W, 2) in oversampled pixels."""


def grid(height: int, width: int) -> np.ndarray:
    """Return each pixel's position, (H, W, 2), x first."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)


def pan(rng: np.random.Generator, slowest: float = 0.03) -> np.ndarray:
    """Return a random pan in oversampled pixels; the logarithm of its speed is uniformly distributed."""
    speed = np.exp(rng.uniform(np.log(slowest), np.log(FASTEST))) * OVERSAMPLE
    heading = rng.choice(4) * np.pi / 2 if rng.random() < 0.3 else rng.uniform(0, 2 * np.pi)
    return speed * np.array([np.cos(heading), np.sin(heading)])


def motion(rng: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """Return the camera's flow: a pan, often with a turn and zoom, often bent; in a fifth of cases, zero."""
    height, width = places.shape[:2]
    if rng.random() < 0.2:
        return np.zeros_like(places)
    flow = np.broadcast_to(pan(rng), places.shape).copy()
    if rng.random() < 0.5:
        turn, zoom = rng.normal(0, 0.025, 2) * rng.random()
        offset = places - rng.uniform(0.2, 0.8, 2) * (width, height)
        flow += offset @ np.array([[zoom, turn], [-turn, zoom]])
    if rng.random() < 0.5:
        flow += bend(rng, height, width) * np.exp(rng.uniform(np.log(0.05), np.log(3)))
    return flow.astype(np.float32)


def bend(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a smooth random field with a standard deviation of about 1."""
    coarse = rng.standard_normal((*rng.integers(3, 13, 2), 2)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def own_motion(rng: np.random.Generator, camera: np.ndarray) -> np.ndarray:
    """Return a foreground object's flow: the camera's plus a small pan, an independent one, or zero."""
    kind = rng.random()
    if kind < 0.15:
        return np.zeros_like(camera)
    if kind < 0.6:
        return (camera + pan(rng, 0.2) * rng.random()).astype(np.float32)
    return motion(rng, grid(*camera.shape[:2]))


def sample(picture: np.ndarray, places: np.ndarray, border: int = cv2.BORDER_REFLECT_101) -> np.ndarray:
    return cv2.remap(
        picture, np.ascontiguousarray(places, np.float32), None, cv2.INTER_CUBIC, borderMode=border
    )


def surface(
    pool: Pool, rng: np.random.Generator, flow: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the current and previous view of a picture: turned, scaled and sometimes out of focus."""
    picture = pool.pick(rng)
    scale, turn = rng.uniform(0.5, 1.3), rng.choice(4) * np.pi / 2 + rng.normal(0, 0.3)
    linear = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]], np.float32)
    offset = rng.random(2) * picture.shape[1::-1]
    middle = np.array(places.shape[1::-1], np.float32) / 2
    seen = [(at - middle) @ linear + offset for at in (places + flow, places)]
    current, previous = (sample(picture, at) for at in seen)
    if rng.random() < 0.15:
        blur = rng.uniform(0.5, 4)
        current, previous = (cv2.GaussianBlur(view, (0, 0), blur) for view in (current, previous))
    return current, previous


def outline(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return the mask of a foreground object in the previous frame, with MARGIN around it, in 0..1."""
    mask = np.zeros((height + 2 * MARGIN, width + 2 * MARGIN), np.uint8)
    centre = rng.uniform(0, 1, 2) * (width + MARGIN, height + MARGIN) + MARGIN / 2
    size = min(height, width) * np.exp(rng.uniform(np.log(0.06), np.log(0.6)))
    kind = rng.random()
    if kind < 0.5:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 14)))
        reach = size * rng.uniform(0.4, 1, len(angles))
        points = centre + np.stack([np.cos(angles) * reach, np.sin(angles) * reach], 1)
        cv2.fillPoly(mask, [points.astype(np.int32)], (255,), cv2.LINE_AA)
    elif kind < 0.8:
        axes = (int(size * rng.uniform(0.2, 1)) + 2, int(size) + 2)
        cv2.ellipse(
            mask, (int(centre[0]), int(centre[1])), axes, rng.uniform(0, 180), 0, 360, (255,), -1, cv2.LINE_AA
        )
    elif kind < 0.9:
        points = centre + np.cumsum(rng.normal(0, size, (rng.integers(2, 5), 2)), 0)
        cv2.polylines(mask, [points.astype(np.int32)], False, (255,), int(rng.integers(3, 14)), cv2.LINE_AA)
    else:
        word = "".join(rng.choice(LETTERS, rng.integers(3, 14)))
        cv2.putText(mask, word, (int(centre[0] * 0.5), int(centre[1])), FONTS[rng.integers(len(FONTS))],
                    rng.uniform(0.6, 2.5), (255,), int(rng.integers(1, 6)), cv2.LINE_AA)  # fmt: skip
    return mask.astype(np.float32) / 255


def front(pool: Pool, rng: np.random.Generator, camera: np.ndarray) -> Layer:
    """Return the layer of a foreground object."""
    places = grid(*camera.shape[:2])
    flow = own_motion(rng, camera)
    mask = outline(rng, *camera.shape[:2])
    here, there = (
        sample(mask, at + MARGIN, cv2.BORDER_CONSTANT).clip(0, 1) for at in (places + flow, places)
    )
    if rng.random() < 0.15:
        shade = np.float32(rng.uniform(0, 255, 3)) * np.ones_like(here)[..., None]
        return Layer(shade, shade, here, there, flow)
    return Layer(*surface(pool, rng, flow, places), here, there, flow)


def layers(pool: Pool, rng: np.random.Generator, height: int, width: int) -> list[Layer]:
    """Return the layers of a pair, from the background to the nearest."""
    places = grid(height, width)
    camera = motion(rng, places)
    full = np.ones((height, width), np.float32)
    back = Layer(*surface(pool, rng, camera, places), full, full, camera)
    count = int(rng.choice(6, p=[0.3, 0.25, 0.2, 0.1, 0.1, 0.05]))
    return [back, *(front(pool, rng, camera) for _ in range(count))]


def composed(shown: list[Layer]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compose layers into a pair of frames.

    Returns the frames (2, H, W, 3) in 0..255, current first, the flow (H, W, 2), and a mask (H, W) of the
    pixels visible in both.
    """
    height, width = shown[0].here.shape
    frames = np.zeros((2, height, width, 3), np.float32)
    nearest = np.zeros((2, height, width), np.int32)
    flow = shown[0].flow
    for index, layer in enumerate(shown):
        for frame, picture, mask in ((0, layer.current, layer.here), (1, layer.previous, layer.there)):
            frames[frame] += (picture - frames[frame]) * mask[..., None]
            nearest[frame][mask > 0.5] = index
        flow = np.where((layer.here > 0.5)[..., None], layer.flow, flow)
    source = np.rint(grid(height, width) + flow).astype(np.int32)
    inside = ((source >= 0) & (source < (width, height))).all(-1)
    x, y = source[..., 0].clip(0, width - 1), source[..., 1].clip(0, height - 1)
    return frames, flow, inside & (nearest[1][y, x] == nearest[0])


def lighting(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Recolour both frames alike; in a fifth of the cases, also change the light between them."""
    values = recolour(rng, frames.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        values[0] = values[0] * np.float32(rng.normal(1, 0.05)) + np.float32(rng.normal(0, 0.02))
    return values.clip(0, 1)


def spoiled(lq: Tensor, rng: np.random.Generator) -> Tensor:
    """Return 8-bit frames, mostly clean; some get grain, JPEG, or H.264 if that preserves the motion."""
    kind = rng.random()
    if kind < 0.15:
        lq = lq + torch.from_numpy(rng.normal(0, rng.uniform(0.002, 0.03), lq.shape).astype(np.float32))
    elif kind < 0.27:
        coded = h264(lq.flip(0), int(rng.integers(18, 31))).flip(0)
        if change(coded) >= 0.5 * change(lq):
            return coded
    return spoil(lq, rng, 0.1)


def change(frames: Tensor) -> float:
    return float((frames[0] - frames[1]).abs().mean())


def pair(pool: Pool, rng: np.random.Generator, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pair of LQ frames (2, 3, h, w) in 0..1, current first, its flow and its mask.

    The flow (2, h, w) is in LQ pixels; the mask (1, h, w) marks pixels visible in both frames.
    """
    frames, flow, seen = composed(layers(pool, rng, OVERSAMPLE * height, OVERSAMPLE * width))
    fine = torch.from_numpy(lighting(rng, frames)).permute(0, 3, 1, 2)
    lq = F.interpolate(fine, size=(height, width), mode="bicubic", antialias=True)
    small = F.avg_pool2d(torch.from_numpy(flow).permute(2, 0, 1), OVERSAMPLE) / OVERSAMPLE
    both = F.avg_pool2d(torch.from_numpy(seen.astype(np.float32))[None], OVERSAMPLE)
    return spoiled(lq, rng), small, both


def pair_batch(
    pool: Pool, rng: np.random.Generator, count: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a batch of pairs: current and previous frames (N, 3, h, w) in model range, flow and masks.

    The flow (N, 2, h, w) is in LQ pixels; the masks (N, 1, h, w) mark pixels visible in both frames.
    """
    frames, flows, seen = (
        torch.stack(values)
        for values in zip(*(pair(pool, rng, height, width) for _ in range(count)), strict=True)
    )
    return to_model(frames[:, 0]), to_model(frames[:, 1]), flows, seen
