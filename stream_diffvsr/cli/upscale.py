"""Upscale a video, an image or a folder of images by 4."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from ..devices import resolve_device, resolve_dtype
from ..errors import VideoError
from ..families.diffvsr.find import resolve
from ..families.diffvsr.options import (
    COMPILE_MODES,
    FLOW_SCALES,
    MEMORY_PLANS,
    PRESETS,
    UpscaleOptions,
    with_preset,
)
from ..families.diffvsr.plan import Planner
from ..families.diffvsr.released import released_planner
from ..families.diffvsr.state import StreamDiffVSRState
from ..jobs.prepare import check_paths, open_job_source
from ..jobs.report import report, report_time
from ..jobs.run import VideoJob
from ..jobs.run import run as run_job
from ..media import pictures
from ..media.codecs import CODECS, CONTAINERS, check_opens
from ..media.read import check_readable
from ..tensors import from_pixels
from .allocator import keep_freed_memory
from .model import add_model_arguments, open_model
from .progress import follow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="video file, image, or folder of images")
    parser.add_argument("-o", "--output", type=Path, help="default: <name>_4x beside the input")
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; with the frame's index (0)")
    parser.add_argument("--state-in", type=Path, help="continue from a saved state")
    parser.add_argument("--state-out", type=Path, help="save the state after the last frame")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")
    parser.add_argument("--restart", action="store_true", help="throw away unfinished work of an earlier run")
    add_speed_arguments(parser.add_argument_group("how fast"))
    add_memory_arguments(parser.add_argument_group("what it takes"))
    add_input_arguments(parser.add_argument_group("what is read"))
    add_size_arguments(parser.add_argument_group("size of the output (4x the input by default)"))
    add_output_arguments(parser.add_argument_group("how it is written"))


def add_memory_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--plan", action="store_true", help="only tell the memory, disk and time it would take"
    )
    group.add_argument(
        "--memory-plan",
        choices=MEMORY_PLANS,
        default="auto",
        help="whole frames, convolutions in bands (the same numbers), or U-Net in tiles; auto: what fits",
    )
    group.add_argument("--tile-size", type=int, help="side of the U-Net's tiles in output pixels (512)")
    group.add_argument("--tile-overlap", type=int, default=64, help="of the tiles, in output pixels (64)")
    group.add_argument(
        "--flow-scale", type=float, choices=FLOW_SCALES, default=1.0, help="flow at a share of the size (1)"
    )


def add_speed_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default="exact",
        help="exact (default): the reference's numbers; balanced, fast: approximations, see the README",
    )
    group.add_argument("--control-every", type=int, default=1, help="ControlNet in one of N steps (1)")
    group.add_argument(
        "--compile-mode",
        choices=COMPILE_MODES,
        default="off",
        help="torch.compile: the first frames take a minute or more, the others less (off)",
    )


def add_input_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--start", default="0", help="first frame: 120, or a time as 12.5s or hh:mm:ss")
    group.add_argument("--end", help="last frame, included")
    group.add_argument("--stream", type=int, help="index of the video stream in the file (the largest)")
    group.add_argument("--fps", type=Fraction, help="frames per second of a folder of images (25)")
    group.add_argument(
        "--scene-cut",
        default="auto",
        help="auto (default), off, a threshold of 255, or a CSV file of first frames",
    )
    group.add_argument("--cuts-out", type=Path, help="write the scenes that were found as CSV")


def add_size_arguments(group: argparse._ArgumentGroup) -> None:
    sizes = group.add_mutually_exclusive_group()
    sizes.add_argument("--target", type=size, metavar="WxH", help="exactly this size")
    sizes.add_argument("--short-edge", type=int, help="this many pixels on the shorter side")
    sizes.add_argument("--scale", type=float, help="this multiple of the input's size")
    group.add_argument(
        "--pre-scale", type=float, default=1.0, help="shrink the input by this before the model (1)"
    )


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--codec", choices=CODECS, help="default: h264, in WebM av1")
    group.add_argument("--crf", type=int, help="quality, lower is better (h264 and h265 18, av1 24)")
    group.add_argument("--pix-fmt", help="such as yuv420p10le; default: the source's depth at 4:2:0")
    group.add_argument("--no-audio", action="store_true", help="leave sound and subtitles away")
    group.add_argument("--segment", type=int, default=120, help="frames that a crash costs at most (120)")
    group.add_argument("--compare", type=Path, help="also write a split-screen video: bicubic | ours")
    group.add_argument("--preview", type=int, metavar="N", help="write a picture to look at every N frames")


def size(text: str) -> tuple[int, int]:
    """`1920x1080` -> width and height."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1920x1080")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    keep_freed_memory()
    check_readable(args.input)
    output = args.output or default_output(args.input)
    job = make_job(args, output)
    check_paths(job)
    if job.codec:
        # Before the model is opened, which may take minutes.
        check_opens(job.codec)
    if args.plan:
        for line in plan(args, job):
            print(line, flush=True)
        return 0
    preview = output.absolute().with_name(f"{output.stem}_preview.jpg") if args.preview else None
    with contextlib.closing(run_job(open_model(args), job)) as steps:
        follow(steps, preview, args.preview or 0)
    print(output)
    return 0


def plan(args: argparse.Namespace, job: VideoJob) -> Iterator[str]:
    """What the job would take, in lines; two frames are made to tell the time.

    Released weights are not downloaded for it: without them the time stays untold.
    """
    source = open_job_source(job)
    first = next(source.frames(job.span), None)
    if first is None:
        raise VideoError(f"{job.source} has no frame between --start and --end.")
    lq = from_pixels(job.sizes.to_model(first.rgb))
    frames, size = job.span.count(source.info.frames, source.info.rate), lq.shape[-2:]
    pipe = None if resolve(args.model) is None else open_model(args)
    planner = planner_without_weights(args) if pipe is None else pipe.planner
    chosen = planner.plan(size, {} if job.state is None else job.state.provenance.details, job.options)
    folder, codec = job.output.absolute().parent, job.codec or "h264"
    yield from report(planner, chosen, size, job.options, frames=frames, folder=folder, codec=codec)
    if pipe is None:
        yield "time: told when the released weights are here ('stream-diffvsr download')"
    else:
        yield report_time(pipe, chosen, lq, job.options, frames)


def planner_without_weights(args: argparse.Namespace) -> Planner:
    """For the released networks."""
    device = resolve_device(args.device)
    return released_planner(args.flow, resolve_dtype(args.dtype, device), device)


def make_job(args: argparse.Namespace, output: Path) -> VideoJob:
    """The job that the options describe."""
    return VideoJob(
        source=args.input,
        output=output,
        options=make_options(args),
        state=None if args.state_in is None else StreamDiffVSRState.load(args.state_in),
        state_out=args.state_out,
        start=args.start,
        end=args.end,
        stream=args.stream,
        rate=args.fps,
        pre_scale=args.pre_scale,
        target=args.target,
        short_edge=args.short_edge,
        scale=args.scale,
        codec=args.codec,
        crf=args.crf,
        pix_fmt=args.pix_fmt,
        scene_cut=args.scene_cut,
        cuts_out=args.cuts_out,
        segment_frames=args.segment,
        audio=not args.no_audio,
        overwrite=args.overwrite,
        restart=args.restart,
        compare=args.compare,
    )


def make_options(args: argparse.Namespace) -> UpscaleOptions:
    own = {
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "memory_plan": args.memory_plan,
        "tile_size": args.tile_size,
        "tile_overlap": args.tile_overlap,
        "flow_scale": args.flow_scale,
        "control_every": args.control_every,
        "compile_mode": args.compile_mode,
    }
    return UpscaleOptions(**with_preset(args.preset, own))


def default_output(source: Path) -> Path:
    """`<stem>_4x` beside the input, in a format that can be written."""
    source = source.absolute()
    if source.is_dir():
        return source.with_name(f"{source.name}_4x")
    if pictures.is_picture(source):
        return source.with_name(pictures.writable_name(f"{source.stem}_4x{source.suffix}"))
    suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mp4"
    return source.with_name(f"{source.stem}_4x{suffix}")
