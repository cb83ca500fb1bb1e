"""Test whether nano stays stable over a long sequence, although each frame builds on the previous result:

    python -m training.stability [--source nano] [--frames 510] [--repeats 100]

A camera circles over a picture, so that frames 450 to 500 show the same as frames 10 to 60: their error, as a
multiple of bicubic's, must not be more than 3 % higher. In addition, one frame is repeated: its mean colour
must stay within 0.5/255, and the picture must settle. The exit code is 1 if any of these tests fails.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr import StreamDiffVSRPipeline, from_pixels, load_pipeline, to_pixels
from stream_diffvsr.cli.demo import draw
from stream_diffvsr.media.sizes import enlarge, resize

WIDTH, HEIGHT = 256, 192
ROUND = 440
"""Frames until the camera is back at its start."""
EARLY, LATE = slice(10, 60), slice(10 + ROUND, 60 + ROUND)
GROWTH, DRIFT, RESTLESS = 0.03, 0.5, 0.1


def camera(picture: Tensor, index: int) -> Tensor:
    """Return the part of a picture (1, 3, H, W) shown in frame `index`, sampled at subpixel positions."""
    height, width = picture.shape[-2:]
    angle = math.tau * index / ROUND
    left = (width - WIDTH) * (0.5 + 0.45 * math.sin(angle))
    top = (height - HEIGHT) * (0.5 + 0.45 * math.sin(2 * angle))
    x = 2 * (torch.arange(WIDTH) + left + 0.5) / width - 1
    y = 2 * (torch.arange(HEIGHT) + top + 0.5) / height - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    return F.grid_sample(picture, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def reduced(truth: Tensor) -> Tensor:
    """Return the frame at a quarter of its size, rounded to 8 bits."""
    return (resize(truth, (truth.shape[-2] // 4, truth.shape[-1] // 4)).clamp(0, 1) * 255).round() / 255


def relative_errors(pipe: StreamDiffVSRPipeline, frames: int) -> Iterator[float]:
    """Yield the mean squared error of each frame as a multiple of bicubic's."""
    picture = draw(0.0)
    truths = (camera(picture, index) for index in range(frames))
    state = None
    for truth in truths:
        lq = reduced(truth)
        result = pipe.process_frame(from_pixels(lq), state)
        state = result.state
        classic = enlarge(lq, truth.shape[-2:]).clamp(0, 1)
        yield float(F.mse_loss(to_pixels(result.hq), truth) / F.mse_loss(classic, truth))


def growth(errors: list[float]) -> float:
    """Return the relative increase in error from early frames to late ones with the same content."""
    early, late = (sum(errors[part]) / len(errors[part]) for part in (EARLY, LATE))
    return late / early - 1


def standstill(pipe: StreamDiffVSRPipeline, repeats: int) -> tuple[float, float]:
    """Upscale one frame repeatedly; return the largest drift of the mean colour and the last change, x255."""
    lq = from_pixels(reduced(camera(draw(0.0), 0)))
    hqs = [result.hq * 127.5 for result in pipe.stream(lq for _ in range(repeats))]
    colours = torch.cat([hq.mean((2, 3)) for hq in hqs])
    return float((colours - colours[0]).abs().max()), float((hqs[-1] - hqs[-2]).abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="nano", help="checkpoint folder")
    parser.add_argument("--frames", type=int, default=LATE.stop)
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    pipe = load_pipeline(args.source, device="cpu")
    drift, change = standstill(pipe, args.repeats)
    print(f"one frame {args.repeats} times: mean colour off by {drift:.3f}/255, last change {change:.4f}/255")
    errors = list(islice(relative_errors(pipe, args.frames), args.frames))
    for start in range(0, len(errors), 50):
        part = errors[start : start + 50]
        print(f"frames {start}-{start + len(part) - 1}: error {sum(part) / len(part):.4f} of bicubic's")
    if len(errors) < LATE.stop:
        sys.exit(f"growth is told by {LATE.stop} frames")
    more = growth(errors)
    print(f"late frames against early ones of the same content: {more:+.2%}")
    sys.exit(int(more > GROWTH or drift > DRIFT or change > RESTLESS))


if __name__ == "__main__":
    main()
