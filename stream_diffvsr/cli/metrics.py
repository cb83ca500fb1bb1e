"""Compare a result with the original: PSNR, SSIM, sharpness, warping error, LPIPS, ghosting and more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from torch import Tensor

from ..errors import VideoError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, help="The result: a video, or a folder of pictures.")
    parser.add_argument(
        "truth", type=Path, help="The full-quality original: a video, or a folder of pictures."
    )
    parser.add_argument(
        "--border", type=int, default=0, help="Ignore this many pixels at each edge. Default: 0."
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FOLDER",
        help="Also compute LPIPS, DISTS, tLPIPS and tOF (with RAFT), using the network weights in this "
        "folder. If any are missing, a message says where to download them.",
    )
    parser.add_argument(
        "--unguided",
        type=Path,
        metavar="RESULT",
        help="Also count ghosts, by comparison with a result made without guidance from the previous frame "
        "(for Stream-DiffVSR: --controlnet-conditioning-scale 0 --no-use-tpm).",
    )
    parser.add_argument("--frames", type=int, help="Compare at most this many frames.")
    parser.add_argument("--csv", type=Path, help="Write the metrics of each frame to this CSV file.")
    parser.add_argument("--plot", type=Path, help="Save a plot of the metrics as this PNG file.")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..quality.measures import measure, protocol
    from ..quality.networks import open_networks
    from ..quality.report import summary, write_csv, write_plot

    networks = open_networks(args.weights) if args.weights else None
    paths = [args.result, args.truth, *([args.unguided] if args.unguided else [])]
    frames = measure(islice(matched(paths), args.frames), args.border, networks)
    measured = list(tqdm(frames, unit="frame", file=sys.stderr, disable=None))
    if not measured:
        raise VideoError(f"there are no frames to compare in {' and '.join(map(str, paths))}.")
    print(summary(measured, protocol(args.border, networks)))
    if args.csv:
        write_csv(args.csv, measured)
    if args.plot:
        write_plot(args.plot, measured)
    return 0


def matched(paths: Sequence[Path]) -> Iterator[list[Tensor]]:
    """Yield the videos' frames together, (1, 3, H, W) in [0, 1], until one ends; report any longer videos."""
    from ..media.read import Span, open_source

    for frames in zip_longest(*(open_source(path).frames(Span()) for path in paths)):
        if None in frames:
            for path, frame in zip(paths, frames, strict=True):
                if frame is not None:
                    print(
                        f"stream-diffvsr: {path} has more frames; the extra frames are ignored",
                        file=sys.stderr,
                    )
            return
        yield [frame.rgb for frame in frames]
