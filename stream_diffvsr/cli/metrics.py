"""Compare a result with the original: PSNR, SSIM, GMSD, VIF, sharpness, colour, warping error, tOF."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

from torch import Tensor

from ..errors import VideoError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, help="The result: a video, or a folder of pictures.")
    parser.add_argument("truth", type=Path, help="The original at full quality.")
    parser.add_argument(
        "--border", type=int, default=0, help="Ignore this many pixels at each edge. Default: 0."
    )
    parser.add_argument("--frames", type=int, help="Compare at most this many frames.")
    parser.add_argument("--csv", type=Path, help="Write the figures of each frame to this CSV file.")
    parser.add_argument("--plot", type=Path, help="Write a plot of the figures to this PNG file.")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..quality.measures import measure, protocol
    from ..quality.report import summary, write_csv, write_plot

    pairs = measure(islice(matched(args.result, args.truth), args.frames), args.border)
    measured = list(tqdm(pairs, unit="frame", file=sys.stderr, disable=None))
    if not measured:
        raise VideoError(f"{args.result} and {args.truth} have no frames in common.")
    print(summary(measured))
    print(protocol(args.border), file=sys.stderr)
    if args.csv:
        write_csv(args.csv, measured)
    if args.plot:
        write_plot(args.plot, measured)
    return 0


def matched(result: Path, truth: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of frames, (1, 3, H, W) in [0, 1], until one video ends; report which one is longer."""
    from ..media.read import Span, open_source

    sources = [open_source(path).frames(Span()) for path in (result, truth)]
    for one, other in zip_longest(*sources):
        if one is None or other is None:
            longer = truth if one is None else result
            print(f"stream-diffvsr: {longer} has more frames; the extra frames are ignored", file=sys.stderr)
            return
        yield one.rgb, other.rgb
