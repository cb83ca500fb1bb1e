"""Make a short clip, upscale it, and write the resulting video and a comparison picture."""

from __future__ import annotations

import argparse
import contextlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import VideoError
from ..jobs.run import VideoJob
from ..jobs.run import run as run_job
from ..media import pictures
from ..media.codecs import choose_encoding
from ..media.colour import BT709, Colour, rgb_to_planes
from ..media.pictures import Picture
from ..media.sizes import enlarge, resize
from ..media.streams import SourceInfo
from ..media.write import SegmentWriter
from ..tensors import SCALE
from .model import add_model_arguments, open_model
from .output import run_to_end, side_by_side

WIDTH, HEIGHT = 160, 90
FRAMES = 12
RATE = 12
WORDS = ("Stream-DiffVSR", "Every frame remembers", "the one before it.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo"), help="Folder to write to. Default: demo."
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    folder: Path = args.output
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise VideoError(
            f"{folder} cannot be created ({error.strerror}): choose another folder with -o."
        ) from error
    clip, result = folder / "clip.mov", folder / "clip_4x.mp4"
    write_clip(clip)
    job = VideoJob(source=clip, output=result, overwrite=True, restart=True)
    with contextlib.closing(run_job(open_model(args), job)) as steps:
        last = run_to_end(steps, args.progress)
    compare = folder / "compare.png"
    assert last is not None, "a restarted job always yields frames"
    size = (last.hq.shape[-2], last.hq.shape[-1])
    nearest = F.interpolate(last.lq, size=size, mode="nearest")
    pictures.write(compare, Picture(side_by_side(nearest, enlarge(last.lq, size), last.hq, gap=8)))
    print(f"clip:    {clip} ({WIDTH}x{HEIGHT}, {FRAMES} frames, generated)")
    print(f"result:  {result} ({SCALE * WIDTH}x{SCALE * HEIGHT})")
    print(f"compare: {compare} (nearest, bicubic, ours)")
    return 0


def write_clip(path: Path) -> None:
    """Write the generated clip as a nearly lossless QuickTime file."""
    info = SourceInfo(
        WIDTH, HEIGHT, 8, Fraction(1, RATE), Fraction(RATE), FRAMES, Colour(BT709, False, BT709, BT709)
    )
    encoding = choose_encoding("h264", "yuv444p", 4, info, (HEIGHT, WIDTH))
    segment = SegmentWriter(path, encoding)
    for index in range(FRAMES):
        small = resize(draw(index / FRAMES), (HEIGHT, WIDTH))
        segment.add(rgb_to_planes(small, encoding.pix_fmt, encoding.colour), index)
    segment.finish()


def draw(phase: float) -> Tensor:
    """Draw one frame of the clip at 4x size: texture, shapes and text, each with its own motion."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = SCALE * WIDTH, SCALE * HEIGHT
    image = Image.fromarray((texture(phase) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    centre = (width * 0.78, height * 0.42)
    for spoke in range(24):
        angle = math.tau * (spoke / 24 + phase / 12)
        pen.line(spoke_ends(centre, angle, 25, 95), fill=(250, 240, 215), width=4)
    pen.ellipse([centre[0] - 25, centre[1] - 25, centre[0] + 25, centre[1] + 25], fill=(200, 60, 40))
    left = 30 + 60 * phase
    pen.rectangle([left, 230, left + 330, 345], fill=(24, 28, 40))
    for line, words in enumerate(WORDS):
        pen.text(
            (left + 16, 238 + 34 * line), words, font=ImageFont.load_default(28 - 3 * line), fill="white"
        )
    return torch.from_numpy(np.array(image)).float().movedim(-1, 0)[None] / 255


def spoke_ends(
    centre: tuple[float, float], angle: float, near: float, far: float
) -> list[tuple[float, float]]:
    """Return both ends of a line that radiates from a centre."""
    x, y = math.cos(angle), math.sin(angle)
    return [(centre[0] + x * near, centre[1] + y * near), (centre[0] + x * far, centre[1] + y * far)]


def texture(phase: float) -> np.ndarray:
    """Return a drifting background of waves and smoothed noise, (H, W, 3) in [0, 1]."""
    width, height = SCALE * WIDTH, SCALE * HEIGHT
    noise = torch.rand((1, 1, height // 2, width), generator=torch.Generator().manual_seed(7))
    noise = F.interpolate(noise, size=(height, 2 * width), mode="bicubic", align_corners=False)
    shift = round(48 * phase)
    grain = noise[0, 0, :, shift : shift + width].numpy()
    y, x = np.mgrid[0:height, 0:width]
    waves = 0.5 + 0.5 * np.sin((x + 2 * shift) / 14 + np.sin(y / 23) * 2) * np.cos(y / 19)
    base = 0.35 * waves + 0.25 * grain
    return np.stack([0.15 + base, 0.25 + base * 0.9, 0.4 + base * 0.6], axis=-1).clip(0, 1)
