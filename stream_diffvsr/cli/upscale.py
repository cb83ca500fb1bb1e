"""Upscale a video, an image or a folder of images by 4."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ..devices import resolve_device, resolve_dtype
from ..errors import VideoError
from ..families.diffvsr.find import resolve
from ..families.diffvsr.options import PRESET_HELP, PRESETS, UpscaleOptions, with_preset
from ..families.diffvsr.plan import Planner
from ..families.diffvsr.released import released_planner
from ..families.diffvsr.state import StreamDiffVSRState
from ..jobs.job import SIZE
from ..jobs.prepare import check_paths, open_job_source
from ..jobs.report import report, report_time
from ..jobs.run import VideoJob
from ..jobs.run import run as run_job
from ..media import pictures
from ..media.codecs import CONTAINERS, check_opens
from ..media.read import check_readable
from ..options import add_flags, given
from ..tensors import from_pixels
from .allocator import keep_freed_memory
from .model import add_model_arguments, open_model
from .output import follow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="Video file, image, or folder of images.")
    parser.add_argument(
        "-o", "--output", type=Path, help="File or folder to write. Default: <name>_4x beside the input."
    )
    add_model_arguments(parser)
    parser.add_argument("--state-in", type=Path, metavar="FILE", help="Continue from a saved state.")
    groups = add_flags(parser, UpscaleOptions, VideoJob, titles=("speed", "memory", "input", SIZE, "output"))
    groups["speed"].add_argument(
        "--preset", choices=PRESETS, default="exact", help=f"{PRESET_HELP} Default: exact."
    )
    groups["memory"].add_argument(
        "--plan", action="store_true", help="Estimate memory, disk space and time, then exit."
    )
    groups["output"].add_argument(
        "--preview", type=int, metavar="N", help="Write a picture every N frames: bicubic and the result."
    )


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
        follow(steps, args.progress, preview, args.preview or 0)
    print(json.dumps({"output": str(output)}) if args.progress == "json" else output)
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
    options = UpscaleOptions(**with_preset(args.preset, given(args, UpscaleOptions)))
    state = None if args.state_in is None else StreamDiffVSRState.load(args.state_in)
    return VideoJob(source=args.input, output=output, options=options, state=state, **given(args, VideoJob))


def default_output(source: Path) -> Path:
    """`<stem>_4x` beside the input, in a format that can be written."""
    source = source.absolute()
    if source.is_dir():
        return source.with_name(f"{source.name}_4x")
    if pictures.is_picture(source):
        return source.with_name(pictures.writable_name(f"{source.stem}_4x{source.suffix}"))
    suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mp4"
    return source.with_name(f"{source.stem}_4x{suffix}")
