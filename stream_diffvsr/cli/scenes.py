"""List a video's scenes; the model starts each of them afresh."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import VideoError
from ..jobs.ahead import find_scenes
from ..jobs.job import VideoJob
from ..jobs.prepare import Prepared, open_job_source
from ..jobs.scenes import parse, write_list
from ..media.read import check_readable
from ..media.write import check_folder
from ..options import add_flag, given_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="Video file or folder of images.")
    for name in ("scene_cut", "start", "end", "stream", "rate", "pre_scale", "cuts_out"):
        add_flag(parser, VideoJob, name)


def run(args: argparse.Namespace) -> int:
    check_readable(args.input)
    asked = given_options(args, VideoJob)
    job = VideoJob(source=args.input, output=args.input, **asked)
    if job.cuts_out is not None:
        check_folder(job.cuts_out)
    prepared = Prepared(job, open_job_source(job), parse(job.scene_cut))
    found = []
    for scene in find_scenes(prepared):
        found.append(scene)
        end = scene.first + 1 if scene.end is None else scene.end
        count = end - scene.first
        print(f"{scene.first} to {end - 1}: {count} frame{'' if count == 1 else 's'}", flush=True)
    if not found:
        raise VideoError(f"{job.source} has no frames between --start and --end.")
    if job.cuts_out is not None and found[-1].end is not None:
        write_list(job.cuts_out, found[0].first, found[-1].end - 1, [scene.first for scene in found[1:]])
    return 0
