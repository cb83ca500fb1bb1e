"""What recursion and noise do to nano:

    python -m training.stability CHECKPOINT.pt CLIP... [--repeats 100]

For each clip: warping error with and without guidance; how far results of two seeds are apart; and, on one
frame repeated, how far colours drift and results keep changing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from training.data import to_model
from training.evaluate import eight_bit, four_steps, load, psnr, read, reduced, warping_error
from training.networks import Nano
from training.rollout import upscale

SIDE = 192


def centre(video: Tensor) -> Tensor:
    """The middle of each frame, small enough for long sequences."""
    height, width = video.shape[-2:]
    side = min(SIDE, height // 4 * 4, width // 4 * 4)
    top, left = (height - side) // 2, (width - side) // 2
    return video[..., top : top + side, left : left + side]


def guidance(model: Nano, truth: Tensor) -> str:
    lq = to_model(reduced(truth))
    guided, plain = (eight_bit(upscale(model, four_steps(), lq, guided=on)) for on in (True, False))
    other = eight_bit(upscale(model, four_steps(), lq, seed=1000))
    apart = (guided - other).abs().mean() * 255
    errors = [f"{warping_error(p, truth):.3f}" for p in (guided, plain)]
    values = [f"{psnr(p, truth):.2f}" for p in (guided, plain)]
    return f"warping error guided/plain {'/'.join(errors)} PSNR {'/'.join(values)} seeds apart {apart:.4f}"


def standstill(model: Nano, truth: Tensor, repeats: int) -> str:
    lq = to_model(reduced(centre(truth[:1])))
    hq = upscale(model, four_steps(), lq.expand(repeats, -1, -1, -1)) * 127.5
    colour = (hq.mean((2, 3)) - hq[0].mean((1, 2))).abs().amax(1)
    change = (hq[1:] - hq[:-1]).abs().mean((1, 2, 3))
    quality = [psnr(eight_bit(hq[i : i + 1] / 127.5), centre(truth[:1])) for i in (0, 1, repeats - 1)]
    return (
        f"standstill of {repeats} frames: mean colour off by {colour[-1]:.3f} (most {colour.max():.3f}), "
        f"last change {change[-1]:.4f}, PSNR of frames 0, 1, last {' '.join(f'{q:.2f}' for q in quality)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    model = load(args.checkpoint)
    for clip in args.clips:
        truth = read(clip, args.frames)
        print(clip.stem, guidance(model, centre(truth)), flush=True)
        print(clip.stem, standstill(model, truth, args.repeats), flush=True)


if __name__ == "__main__":
    main()
