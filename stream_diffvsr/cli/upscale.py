"""Upscale a video, an image or a folder of images by 4."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ..options import UpscaleOptions
from ..state import StreamDiffVSRState
from ..video import pictures
from ..video.codecs import CODECS, CONTAINERS
from ..video.job import VideoJob
from ..video.job import run as run_job
from ..video.read import check_readable
from .model import add_model_arguments, open_model
from .progress import follow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="video file, image, or folder of images")
    parser.add_argument("-o", "--output", type=Path, help="default: <name>_4x beside the input")
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state-in", type=Path, help="continue from a saved state")
    parser.add_argument("--state-out", type=Path, help="save the state after the last frame")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")
    parser.add_argument("--restart", action="store_true", help="throw away unfinished work of an earlier run")
    parser.add_argument("--start", default="0", help="first frame: 120, 12.5s or hh:mm:ss")
    parser.add_argument("--end", help="last frame, included")
    parser.add_argument("--codec", choices=CODECS, help="default: h264, in WebM av1")
    parser.add_argument("--crf", type=int, help="quality, lower is better (h264: 18)")


def run(args: argparse.Namespace) -> int:
    check_readable(args.input)
    output = args.output or default_output(args.input)
    job = VideoJob(
        source=args.input,
        output=output,
        options=UpscaleOptions(num_inference_steps=args.steps, seed=args.seed),
        state=None if args.state_in is None else StreamDiffVSRState.load(args.state_in),
        state_out=args.state_out,
        start=args.start,
        end=args.end,
        codec=args.codec,
        crf=args.crf,
        overwrite=args.overwrite,
        restart=args.restart,
    )
    with contextlib.closing(run_job(open_model(args), job)) as steps:
        follow(steps)
    print(output)
    return 0


def default_output(source: Path) -> Path:
    """`<stem>_4x` beside the input, in a format that can be written."""
    source = source.absolute()
    if source.is_dir():
        return source.with_name(f"{source.name}_4x")
    if pictures.is_picture(source):
        return source.with_name(pictures.writable_name(f"{source.stem}_4x{source.suffix}"))
    suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mp4"
    return source.with_name(f"{source.stem}_4x{suffix}")
