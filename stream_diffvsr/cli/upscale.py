"""Upscale videos, pictures, or folders of them."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..devices import resolve_device, resolve_dtype
from ..errors import IncompatibleInputError, VideoError
from ..families.diffvsr.options import PRESET_HELP, UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..families.diffvsr.released import released_planner
from ..jobs.job import SIZE, settle_job
from ..jobs.prepare import Prepared, prepare
from ..jobs.report import cost_lines, output_bytes, report_time
from ..jobs.run import VideoJob
from ..jobs.run import run as run_job
from ..load import FAMILIES, family_named, resolve
from ..media import pictures
from ..media.codecs import CONTAINERS, check_opens
from ..media.read import check_readable
from ..options import add_flags, given_options, rules, with_preset
from ..tensors import from_pixels
from ..upscaler import Info, State
from . import many
from .allocator import keep_freed_memory
from .model import add_model_arguments, open_model
from .output import run_to_end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        type=Path,
        nargs="+",
        help="Video file, picture, folder of pictures, or folder of videos; several may be given.",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="Output file or folder; a folder if there are several inputs. Default: <name>_4x next to "
        "the input, with any requested size in place of 4x.",
    )
    add_model_arguments(parser)
    parser.add_argument("--state-in", type=Path, metavar="FILE", help="Continue from a saved state.")
    families = [family.options for family in FAMILIES.values()]
    titles = ("speed", "memory", "input", SIZE, "output", *(family.title for family in FAMILIES.values()))
    groups = add_flags(parser, UpscaleOptions, VideoJob, *families, titles=titles)
    groups["speed"].add_argument(
        "--threads",
        type=many.positive,
        metavar="N",
        help="CPU threads per worker. Default: the worker's share of the cores.",
    )
    groups["speed"].add_argument(
        "--preset",
        choices=("exact", "balanced", "fast"),
        default="exact",
        help=f"For Stream-DiffVSR. {PRESET_HELP} Default: exact.",
    )
    groups["memory"].add_argument(
        "--plan", action="store_true", help="Estimate memory, disk space and time, then exit."
    )
    many.add_arguments(parser)
    groups["output"].add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="Write a side-by-side picture of the bicubic upscale and the result every N frames, but at most "
        "once a second.",
    )


def run(args: argparse.Namespace) -> int:
    keep_freed_memory()
    if len(args.input) == 1:
        check_readable(args.input[0])
    found, devices = many.sources(args.input), many.workers_from_flags(args)
    single = found == args.input and len(found) == 1
    default = partial(default_output, args)
    named = [args.output or default(found[0])] if single else many.outputs(found, args, default)
    results = many.Results(args, single)
    pairs = zip(found, named, strict=True)
    attempts = [results.attempt(to, partial(make_job, args, source, to)) for source, to in pairs]
    jobs = [job for job in attempts if job is not None]
    if jobs and jobs[0].codec:
        # Check this before opening the model, which may take minutes.
        check_opens(jobs[0].codec)
    if devices is not None and len(devices.names) == 1 and args.ray is None:
        args.device, devices = devices.names[0], None
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if single and (devices is None or args.plan):
        return run_one(args, prepare(jobs[0]))
    if jobs and devices is not None:
        many.by_workers(args, devices, jobs, results)
    elif jobs:
        many.one_after_another(open_model(args), jobs, results)
    return results.code(len(found))


def run_one(args: argparse.Namespace, prepared: Prepared) -> int:
    """Upscale one input in this process, or print its plan; the job has already been checked."""
    if args.plan:
        for line in plan_lines(args, prepared):
            print(line, flush=True)
        return 0
    output = prepared.job.output
    preview = output.absolute().with_name(f"{output.stem}_preview.jpg") if args.preview else None
    with contextlib.closing(run_job(open_model(args), prepared)) as steps:
        run_to_end(steps, args.progress, preview, args.preview or 0)
    print(json.dumps({"output": str(output)}) if args.progress == "json" else output)
    return 0


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Describe a job with one input, without opening a model. Raises the same errors as `run`.

    Sizes are (width, height) in pixels; `seconds` and `frames` are None if the file does not state them.
    """
    (source,) = args.input
    check_readable(source)
    prepared = prepare(make_job(args, source, args.output or default_output(args, source)))
    job, info = prepared.job, prepared.source.info
    if job.codec:
        check_opens(job.codec)
    resolve_device(args.device)
    family = FAMILIES[family_named(args.model)].options
    if "scale" in rules(family):
        prepared = replace(
            prepared, job=settle_job(job, Info("", "", "", scales=None), family, *prepared.size)
        )
    height, width = prepared.job.sizes.output(*prepared.size)
    job.sizes.model(*prepared.size)
    codec = next((encoding.codec for _, encoding in prepared.videos.values()), None)
    frames = prepared.total
    return {
        "size": (info.width, info.height),
        "output_size": (width, height),
        "frames": frames,
        "rate": float(info.rate),
        "seconds": None if info.frames is None else float(info.frames / info.rate),
        "codec": codec,
        "bytes": round((frames or 1) * output_bytes(codec or "png", width, height)),
    }


def plan_lines(args: argparse.Namespace, prepared: Prepared) -> Iterator[str]:
    """Yield lines that state what the job would need; the time is estimated by upscaling a few frames.

    Released weights are not downloaded for this; without them, the time is not estimated.
    """
    job, frames, size = prepared.job, prepared.total, prepared.size
    first = next(prepared.source.frames(job.span), None)
    if first is None:
        raise VideoError(f"{job.source} has no frames between --start and --end.")
    if resolve(args.model) is None:
        yield from plan_without_weights(args, job, size, frames)
        return
    pipe = open_model(args)
    job = settle_job(job, pipe.info, pipe.Options, *size)
    lq = from_pixels(job.sizes.to_model(first.rgb))
    shape = (lq.shape[-2], lq.shape[-1])
    made = pipe.provenance(shape, job.options)
    chosen, needs = "", {"peak": pipe.bytes_needed(shape, job.options)}
    if isinstance(pipe, StreamDiffVSRPipeline):
        plan = pipe.planner.plan(shape, made.details, job.options)
        chosen, needs = str(plan), pipe.planner.needs(shape, job.options, plan)
    yield from cost_lines(job, size, frames, plan=chosen, needs=needs, device=pipe.device)
    yield report_time(pipe, lq, job.options, State(provenance=made), frames)


def plan_without_weights(
    args: argparse.Namespace, job: VideoJob, size: tuple[int, int], frames: int | None
) -> Iterator[str]:
    """Yield lines like those of `plan_lines`, using only the networks' configurations, not their weights."""
    if family_named(args.model) != "diffvsr":
        raise IncompatibleInputError(
            f"--plan needs the weights of {args.model}: run 'stream-diffvsr download {args.model}' first"
        )
    device = resolve_device(args.device)
    planner = released_planner(args.flow, resolve_dtype(args.dtype, device), device)
    job = settle_job(job, Info("diffvsr", "", ""), UpscaleOptions, *size)
    shape = job.sizes.model(*size)
    chosen = planner.plan(shape, {} if job.state is None else job.state.provenance.details, job.options)
    needs = planner.needs(shape, job.options, chosen)
    yield from cost_lines(job, size, frames, plan=str(chosen), needs=needs, device=device)
    yield (
        f"time: cannot be estimated without the weights of {args.model}; run 'stream-diffvsr download "
        f"{args.model}' first"
    )


def make_job(args: argparse.Namespace, source: Path, output: Path) -> VideoJob:
    """Return the job that the options describe."""
    name = family_named(args.model)
    family, asked = FAMILIES[name], given_options(args, VideoJob)
    table = {key: rule for each in FAMILIES.values() for key, rule in rules(each.options).items()}
    known = table.keys() - rules(VideoJob).keys()
    own = {key: value for key, value in vars(args).items() if key in known}
    if foreign := sorted(own.keys() - rules(family.options).keys()):
        flags = ", ".join(f"--{(table[key].flag or key).replace('_', '-')}" for key in foreign)
        raise IncompatibleInputError(f"{args.model} ({family.title}) does not support {flags}")
    options = family.options(**with_preset(family.presets, args.preset, own))
    state = None if args.state_in is None else State.load(args.state_in)
    return VideoJob(source=source, output=output, options=options, state=state, **asked)


def default_output(args: argparse.Namespace, source: Path) -> Path:
    """Return the default output, next to the input: `<stem>_4x`, with any requested size in place of 4x.

    The output has the format of the input if that format can be written.
    """
    asked, source = given_options(args, VideoJob), source.absolute()
    if asked.get("target"):
        size = "{}x{}".format(*asked["target"])
    elif asked.get("short_edge"):
        size = f"{asked['short_edge']}p"
    else:
        size = f"{asked.get('scale') or 4:g}x"
    if source.is_dir():
        return source.with_name(f"{source.name}_{size}")
    if pictures.is_picture(source):
        return source.with_name(pictures.writable_name(f"{source.stem}_{size}{source.suffix}"))
    suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mp4"
    return source.with_name(f"{source.stem}_{size}{suffix}")
