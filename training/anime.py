"""Generate clips that resemble drawn animation: flat colours, dark lines, soft backgrounds.

python -m training.anime FOLDER [--scenes 24] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import cv2
import numpy as np

SIDE, FRAMES, OVERSAMPLE = 256, 12, 2


def colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return a palette around one hue, in RGB."""
    hue = rng.uniform(0, 180)
    hsv = np.stack(
        [(hue + rng.normal(0, 30, count)) % 180, rng.uniform(40, 200, count), rng.uniform(70, 250, count)], 1
    )
    return cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0]


def outline(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Return a smooth closed curve or a polygon around the origin, as points (N, 2)."""
    if rng.random() < 0.3:
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        return np.stack([np.cos(angle), np.sin(angle)], 1) * radius * rng.uniform(0.5, 1.2, (len(angle), 1))
    angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    reach = 1 + sum(rng.normal(0, 0.35 / k) * np.cos(k * angle + rng.uniform(0, 6)) for k in range(1, 5))
    return np.stack([np.cos(angle) * rng.uniform(0.5, 1), np.sin(angle)], 1) * radius * reach[:, None]


class Figure:
    """A shape that moves as one piece with its shading, its outline and the strokes inside it."""

    def __init__(self, rng: np.random.Generator, palette: np.ndarray, side: int) -> None:
        self.points = outline(rng, side * rng.uniform(0.04, 0.3))
        self.colour = [int(x) for x in palette[rng.integers(len(palette))]]
        self.line = [int(x) for x in rng.integers(0, 50, 3)]
        self.width = int(rng.integers(1, 6))
        self.strokes = [self.points[rng.integers(len(self.points), size=2)] * rng.uniform(0.1, 0.8)
                        for _ in range(rng.integers(0, 6))]  # fmt: skip
        self.place = rng.uniform(0, side, 2)
        self.speed = rng.normal(0, 2.5, 2) if rng.random() < 0.6 else np.zeros(2)
        self.turn = rng.normal(0, 0.02) if rng.random() < 0.4 else 0.0

    def draw(self, canvas: np.ndarray, camera: np.ndarray, time: int) -> None:
        cos, sin = np.cos(self.turn * time), np.sin(self.turn * time)
        turn = np.array([[cos, sin], [-sin, cos]])
        at = self.place + self.speed * time + camera

        def placed(points: np.ndarray) -> np.ndarray:
            return np.round((points @ turn + at) * 16).astype(np.int32)

        cv2.fillPoly(canvas, [placed(self.points)], self.colour, cv2.LINE_AA, shift=4)
        shade = [int(x * 0.75) for x in self.colour]
        cv2.fillPoly(
            canvas, [placed(self.points * 0.55 + [0, 0.2 * np.abs(self.points).max()])], shade, cv2.LINE_AA, 4
        )
        cv2.polylines(canvas, [placed(self.points)], True, self.line, self.width, cv2.LINE_AA, shift=4)
        for stroke in self.strokes:
            cv2.polylines(
                canvas, [placed(stroke)], False, self.line, max(1, self.width - 1), cv2.LINE_AA, shift=4
            )


def scene(rng: np.random.Generator) -> np.ndarray:
    """Return the frames of a random scene, (T, SIDE, SIDE, 3) uint8."""
    side, palette = SIDE * OVERSAMPLE, colours(rng, 9)
    slope = np.linspace(0, 1, side)[:, None, None]
    sky = np.broadcast_to(palette[0] * (1 - slope) + palette[1] * slope, (side, side, 3))
    soft = cv2.GaussianBlur(rng.normal(0, 1, (side, side)).astype(np.float32), (0, 0), 24)
    background = np.clip(sky + (soft / soft.std() * 10)[..., None], 0, 255).astype(np.uint8)
    figures = [Figure(rng, palette, side) for _ in range(rng.integers(8, 26))]
    pan = rng.normal(0, 1.5, 2) if rng.random() < 0.7 else np.zeros(2)
    frames = []
    for time in range(FRAMES):
        canvas = background.copy()
        for figure in figures:
            figure.draw(canvas, pan * time, time)
        frames.append(cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
    return np.stack(frames)


def write(path: Path, frames: np.ndarray) -> None:
    """Write the frames losslessly, as FFV1."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0"))
            )
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for index in range(args.scenes):
        write(args.folder / f"scene_{index:03}.mkv", scene(np.random.default_rng((args.seed, index))))


if __name__ == "__main__":
    main()
