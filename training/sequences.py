"""Short sequences with known motion: pictures that pan, turn and zoom, with objects passing in front."""

from __future__ import annotations

import io
from itertools import pairwise

import av
import cv2
import numpy as np
import torch
from torch import Tensor

from training.data import Pictures, recolour, reduce, spoil, to_model

OVERSAMPLE = 2


def path(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Return a camera path: shift x and y (output pixels), rotation (radians) and log zoom for each frame."""
    speed = 0.0 if rng.random() < 0.3 else np.exp(rng.uniform(np.log(0.1), np.log(8)))
    heading = rng.uniform(0, 2 * np.pi)
    step = np.array([speed * np.cos(heading), speed * np.sin(heading), 0.0, 0.0])
    if speed and rng.random() < 0.4:
        step[2:] = rng.normal(0, 0.012), rng.normal(0, 0.012)
    bend = rng.normal(0, 0.15, (frames, 4)) * np.array([speed, speed, *np.abs(step[2:])])
    return np.cumsum(step + bend, 0)


def placed(size: int, scale: float, start: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Return the affine map from a pixel of the (oversampled) frame to a pixel of the picture."""
    turn, zoom = start[2] + move[2], scale / OVERSAMPLE * np.exp(move[3])
    linear = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    centre = np.full(2, size * OVERSAMPLE / 2)
    offset = start[:2] + scale * move[:2] - linear @ centre
    return np.concatenate([linear, offset[:, None]], 1)


def layer(
    rng: np.random.Generator, picture: np.ndarray, frames: int, size: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return frames of a picture under a moving camera, and their backward flow (T-1, 2, size, size).

    The frames have OVERSAMPLE times `size`.
    """
    height, width = picture.shape[:2]
    scale = rng.uniform(1.0, max(1.05, min(2.2, min(height, width) / size)))
    margin = min(size * scale * 0.75, min(height, width) / 2 - 1)
    start = np.array([rng.uniform(margin, width - margin), rng.uniform(margin, height - margin),
                      rng.choice(4) * np.pi / 2 + rng.normal(0, 0.2)])  # fmt: skip
    side = (size * OVERSAMPLE, size * OVERSAMPLE)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    maps = [placed(size, scale, start, move) for move in path(rng, frames)]
    shown = [cv2.warpAffine(picture, each, side, flags=flags, borderMode=cv2.BORDER_REFLECT) for each in maps]
    flows = [motion(now, before, size) for before, now in pairwise(maps)]
    return shown, np.stack(flows) if flows else np.zeros((0, 2, size, size), np.float32)


def motion(now: np.ndarray, before: np.ndarray, size: int) -> np.ndarray:
    """Return the backward flow (2, size, size) between two frames of a layer, from their affine maps."""
    inverse = cv2.invertAffineTransform(before)
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    # A pixel of the result is the mean of a square of OVERSAMPLE pixels.
    here = np.stack([x, y, np.ones_like(x)]).astype(np.float64)
    here[:2] = (here[:2] + 0.5) * OVERSAMPLE - 0.5
    picture = np.einsum("ij,jhw->ihw", now, here)
    there = np.einsum("ij,jhw->ihw", inverse[:, :2], picture) + inverse[:, 2, None, None]
    return ((there - here[:2]) / OVERSAMPLE).astype(np.float32)


def stencil(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the mask of an object that passes in front, (2 size, 2 size, 3) in 0..255."""
    mask = np.zeros((2 * size, 2 * size, 3), np.uint8)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
    reach = size * rng.uniform(0.15, 0.6) * rng.uniform(0.5, 1, len(angles))
    points = size + np.stack([np.cos(angles) * reach, np.sin(angles) * reach], 1)
    cv2.fillPoly(mask, [points.astype(np.int32)], (255, 255, 255), cv2.LINE_AA)
    return mask


def clip(pool: Pictures, rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """Return the frames of a random clip, (T, size, size, 3) in 0..1."""
    return moving_clip(pool, rng, frames, size)[0]


def moving_clip(
    pool: Pictures, rng: np.random.Generator, frames: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a clip, (T, size, size, 3) in 0..1, and its backward flow, (T-1, 2, size, size).

    At a cut, the flow is meaningless.
    """
    shown, flows = layer(rng, pool.pick(rng), frames, size)
    if rng.random() < 0.45:
        front, front_flows = layer(rng, pool.pick(rng), frames, size)
        outline = stencil(rng, size)
        start = np.array([rng.uniform(0.6, 1.4) * size, rng.uniform(0.6, 1.4) * size, 0.0])
        side = (size * OVERSAMPLE, size * OVERSAMPLE)
        for index, move in enumerate(path(rng, frames)):
            mask = cv2.warpAffine(outline, placed(size, 1.0, start, move), side,
                                  flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)  # fmt: skip
            mixed = shown[index] + (front[index].astype(np.float32) - shown[index]) * (mask / np.float32(255))
            shown[index] = mixed.astype(np.uint8)
            if index:
                covered = mask[::OVERSAMPLE, ::OVERSAMPLE, 0] > 127
                flows[index - 1] = np.where(covered, front_flows[index - 1], flows[index - 1])
    if rng.random() < 0.06:
        shown[frames // 2 :] = layer(rng, pool.pick(rng), frames, size)[0][frames // 2 :]
    small = [cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA) for picture in shown]
    return recolour(rng, np.stack(small)), flows


def h264(lq: Tensor, crf: int, preset: str = "veryfast") -> Tensor:
    """Return frames (T, 3, h, w) in 0..1, whose sides must be even, after compression with H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(crf), "preset": preset})
        stream.width, stream.height, stream.pix_fmt = lq.shape[-1], lq.shape[-2], "yuv420p"
        stream.thread_count = 1
        for array in (lq.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def sequence_batch(
    pool: Pictures, rng: np.random.Generator, count: int, frames: int, size: int, compressed: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """Return LQ frames (T,N,3,s/4,s/4), true ones (T,N,3,s,s), and true flow (T-1,N,2,s,s).

    All frames are in model range. A share `compressed` of the sequences goes through H.264; some others get
    noise or go through JPEG.
    """
    lqs, truths, flows = [], [], []
    for _ in range(count):
        pictures, flow = moving_clip(pool, rng, frames, size)
        truth = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
        lq, kind = reduce(truth, rng), rng.random()
        lq = h264(lq, int(rng.integers(18, 33))) if kind < compressed else spoil(lq, rng, 0.15)
        lqs.append(lq)
        truths.append(truth)
        flows.append(torch.from_numpy(flow))
    return to_model(torch.stack(lqs, 1)), to_model(torch.stack(truths, 1)), torch.stack(flows, 1)
