"""Measure the effect of `steady` on single-image models: warping error and PSNR, with and without noise.

    uv run python benchmarks/steady.py TRAIN.mp4 TEST.mp4

This repository contains no weights of such models, so a small Compact network (4x) is first trained for a
minute on frames of the first file; then a moving texture and the second file are upscaled.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import torch
from spandrel.architectures.Compact import Compact
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr.families.image.checkpoint import open_image_model
from stream_diffvsr.families.image.options import ImageOptions
from stream_diffvsr.quality.measures import measure
from stream_diffvsr.tensors import from_pixels, to_pixels, upsample

SIDE, FRAMES, STEPS = 176, 12, 600
NOISES = (0.0, 2 / 255, 6 / 255)
"""Standard deviations, in [0, 1], of the noise added to the low-quality frames."""


def clip(path: Path, count: int, side: int = SIDE) -> Tensor:
    """Return the middle of a file's first frames, (N, 3, side, side) in [0, 1]."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame, _ in zip(file.decode(video=0), range(count))]  # noqa: B905
    whole = torch.stack([torch.from_numpy(frame) for frame in frames]).movedim(3, 1) / 255
    top, left = (max((length - side) // 2, 0) for length in whole.shape[-2:])
    whole = whole[..., top : top + side, left : left + side]
    return whole[..., : whole.shape[-2] // 4 * 4, : whole.shape[-1] // 4 * 4]


def texture(count: int, side: int = SIDE) -> Tensor:
    """Return frames of a still texture and, inside a disc, another one that moves by fractions of a pixel.

    Both have detail of all sizes.
    """
    layers = [
        F.interpolate(torch.rand(2, 3, n, n), size=3 * side, mode="bicubic") for n in (12, 48, 144, 288)
    ]
    still, moves = torch.stack(layers).mean(0).sub(0.5).mul(2).add(0.5).clamp(0, 1).split(1)
    disc = (
        torch.linspace(-1, 1, side).square()[:, None] + torch.linspace(-1, 1, side).square() < 0.5
    ).float()
    frames = []
    for index in range(count):
        x, y = 2.6 * index, 1.3 * index
        theta = torch.tensor([[[1 / 3, 0, x / (1.5 * side)], [0, 1 / 3, y / (1.5 * side)]]])
        grid = F.affine_grid(theta, [1, 3, side, side], align_corners=False)
        frames.append(
            disc * F.grid_sample(moves, grid, align_corners=False) + (1 - disc) * still[..., :side, :side]
        )
    return torch.cat(frames)


def reduced(frames: Tensor, noise: float) -> Tensor:
    """Return the frames at a quarter of their size, with noise, in model range."""
    small = F.interpolate(frames, scale_factor=0.25, mode="bicubic", antialias=True)
    return from_pixels((small + noise * torch.randn_like(small)).clamp(0, 1))


def trained(frames: Tensor) -> Compact:
    """Train a small network that sharpens the picture, and noise along with it, as such models do."""
    network = Compact(num_feat=24, num_conv=6, upscale=4)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    lq = to_pixels(reduced(frames, 0))
    for _ in range(STEPS):
        at = torch.randint(len(frames), (8,))
        y, x = (int(torch.randint(length - 24, ())) for length in lq.shape[-2:])
        made = network(lq[at, :, y : y + 24, x : x + 24])
        loss = (made - frames[at, :, 4 * y : 4 * y + 96, 4 * x : 4 * x + 96]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def row(name: str, results: Iterator[Tensor], truth: Tensor) -> None:
    figures = list(measure(zip(results, truth.split(1), strict=True), border=4))
    psnr = sum(each.psnr_y for each in figures) / len(figures)
    error = sum(each.warping_error for each in figures[1:]) / (len(figures) - 1)
    last = figures[-1].psnr_y
    print(f"  {name:12} PSNR {psnr:6.2f} dB   last {last:6.2f}   warping error {1e4 * error:7.3f}e-4")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--model", type=Path, help="a model file instead of the trained one")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder, "compact.pth")
        if not args.model:
            torch.save(trained(torch.cat([clip(args.train, 24), texture(8)])).state_dict(), path)
        model = open_image_model(path, "cpu", "float32")
    for title, truth in (("texture", texture(FRAMES)), (args.test.name, clip(args.test, FRAMES))):
        for noise in NOISES:
            print(f"{title}, noise {255 * noise:.0f}/255")
            lq = reduced(truth, noise).split(1)
            row("bicubic", (to_pixels(upsample(each)) for each in lq), truth)
            for steady in (0, 0.25, 0.5, 0.75, 1):
                results = model.stream(lq, ImageOptions(steady=steady))
                row(f"steady {steady}", (to_pixels(each.hq) for each in results), truth)


if __name__ == "__main__":
    main()
