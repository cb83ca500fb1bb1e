"""File-to-file upscaling for the video nodes: choosing the source and the output, and running the job."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..stream_diffvsr.errors import IncompatibleInputError, VideoError
from . import files, host
from .pipes import how_made, memory_plan
from .runtime import workers_on
from .settings import SettingsValue
from .sizes import AS_SETTINGS, OWN, size_fields

if TYPE_CHECKING:
    from fractions import Fraction

    from torch import Tensor

    from ..stream_diffvsr.jobs.run import VideoJob
    from ..stream_diffvsr.jobs.spread import Pool
    from ..stream_diffvsr.upscaler import Provenance, Upscaler

READ_AHEAD = 4
"""The number of frames decoded in advance if the node's setting is 0."""
SUFFIXES = {"prores": ".mov", "ffv1": ".mkv", "png": ".mov"}
"""Containers for codecs that MP4 does not support well."""
CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
"""Endings that make an output_path a complete file name rather than the beginning of one."""
ENDING = re.compile(r"\.[a-z]{2,5}|\.(3g[p2]|mp[1-4]|m[12]v|m2ts?|jp2|mj2)")
"""Matches endings that look like those of file formats, unlike the `.v2` in `shot.v2`."""
WITH_QUALITY = ("h264", "h265", "av1")
"""Codecs with a crf setting."""
LAST = -1
INSTANTS = 1_000_000
"""The number of instants in a second; each instant is shorter than any frame."""


class Source(NamedTuple):
    """A video to read, and the range to which it is trimmed."""

    path: Path
    start: Fraction | int = 0
    """The start of the range in seconds."""
    end: Fraction | None = None
    """The end of the range in seconds, or None for the end of the video."""
    drawn: bool = False
    """Whether the frames came from memory, in which case nobody chose their bit depth."""


def unquoted(text: str | None) -> str:
    """Remove the quotes and spaces around a pasted path."""
    return (text or "").strip().strip("\"'").strip()


def source_path(video_path: str) -> Path:
    """Return the path of the source; a relative path is resolved against the input folder."""
    try:
        return host.folder("input") / Path(unquoted(video_path)).expanduser()
    except RuntimeError as error:
        raise IncompatibleInputError(f"the home folder in video_path does not exist: {video_path}") from error


def check_output(output_path: str | None) -> None:
    """Refuse a path to which nodes may not write, or one with an unsupported extension."""
    name = unquoted(output_path)
    files.writable(name)
    ending = Path(name).suffix.lower()
    if ending not in CONTAINERS and ENDING.fullmatch(ending):
        raise IncompatibleInputError(
            f"output_path must end in one of {', '.join(CONTAINERS)}, or have no extension; got {name}"
        )


def choose_source(video_path: str, video: Any) -> Source:
    """Return the source from whichever input is set; raise an error unless exactly one is."""
    given = bool(unquoted(video_path))
    if given == (video is not None):
        raise IncompatibleInputError(f"set either video_path or video; got {'both' if given else 'neither'}")
    return Source(source_path(video_path)) if given else video_source(video)


def video_source(video: Any) -> Source:
    """Return the source for a VIDEO; save it to the temp folder first if it is in memory or was edited."""
    from fractions import Fraction

    from . import temporary

    if not host.is_file_video(video):
        return Source(temporary.from_components(video.get_components()), drawn=True)
    source = video.get_stream_source()
    path = Path(source) if isinstance(source, (str, Path)) else temporary.from_bytes(source.getvalue())
    start, length = (Fraction(value) for value in host.trim_window(video))
    return Source(path, start, start + length - Fraction(1, INSTANTS) if length else None)


def upscale_file(
    pipe: Upscaler,
    choose: Callable[[], Source],
    settings: SettingsValue,
    node_id: str | None,
    metadata: dict[str, str],
    output_path: str = "",
    **widgets: Any,
) -> Path:
    """Run the job that a node requests, and return the finished file; `widgets` are passed to `make_job`."""
    check_output(output_path)
    with host.install_line(), node_words():
        job = replace(make_job(pipe, choose(), settings, output_path, **widgets), metadata=metadata)
        size = frame_size(job)
        if not workers_on(how_made(pipe).devices):
            host.make_room(pipe, size, job.options)
        named = widgets.get("size") or OWN
        names = outputs(job.source, unquoted(output_path), job.output.name, named)
        path = run_under_free_name(pipe, (replace(job, output=name) for name in names), node_id)
    files.remember_made(node_id, path)
    return path


def make_job(
    pipe: Upscaler,
    source: Source,
    settings: SettingsValue,
    output_path: str = "",
    frames_per_batch: int = 0,
    start_frame: int = 0,
    end_frame: int = LAST,
    num_inference_steps: int = 0,
    seed: int = 0,
    preset: str = AS_SETTINGS,
    size: str = "",
    **fidelity: Any,
) -> VideoJob:
    """Return the job; its output is only a suffix until a name is chosen."""
    from ..stream_diffvsr.jobs.run import VideoJob

    path, start, end, drawn = source
    trimmed = bool(start) or end is not None
    if trimmed and (start_frame or end_frame != LAST):
        raise IncompatibleInputError(
            "the video is already trimmed: leave start_frame and end_frame at their defaults"
        )
    codec = settings.file.get("codec", "h264")
    if codec == "h264" and unquoted(output_path).lower().endswith(".webm"):
        codec = "av1"  # the default codec, h264, is not allowed in WebM
    pix_fmt = settings.file.get("pix_fmt", "auto")
    if pix_fmt == "auto" and drawn and codec in WITH_QUALITY:
        pix_fmt = "yuv420p"  # supported by every player
    cut = settings.file.get("scene_cut", "auto")
    return VideoJob(
        source=path,
        output=Path(SUFFIXES.get(codec, ".mp4")),
        options=settings.options(pipe, preset, num_inference_steps=num_inference_steps, seed=seed),
        start=start if trimmed else start_frame,
        end=end if trimmed or end_frame == LAST else end_frame,
        codec=codec,
        crf=settings.file.get("crf", 18) if codec in WITH_QUALITY else None,
        pix_fmt=None if pix_fmt == "auto" else pix_fmt,
        scene_cut=str(settings.file.get("scene_cut_threshold", 27.0)) if cut == "auto" else cut,
        read_ahead=frames_per_batch or READ_AHEAD,
        **(size_fields(size, pipe.info) if size else {}),
        **fidelity,
    )


def frame_size(job: VideoJob) -> tuple[int, int]:
    """Return the height and width before upscaling; raise `VideoError` if the source is unreadable."""
    from ..stream_diffvsr.jobs.prepare import open_job_source

    info = open_job_source(job).info
    return job.sizes.model(info.height, info.width)


def outputs(source: Path, output: str, suffix: str, size: str) -> Iterator[Path]:
    """Yield the paths to try: first the given one, if it is a complete file name, then numbered ones."""
    base = files.writable(files.fill_in(output or f"stream_diffvsr/{source.stem}_{size}"))
    base.parent.mkdir(parents=True, exist_ok=True)
    if base.suffix.lower() in CONTAINERS:
        yield base
        base, suffix = base.with_suffix(""), base.suffix
    for number in itertools.count(1):
        yield base.with_name(f"{base.name}_{number:05}_{suffix}")


def run_under_free_name(pipe: Upscaler, jobs: Iterable[VideoJob], node_id: str | None) -> Path:
    """Run the job under the first name that is free or belongs to its own cancelled run; return the file."""
    with worker_pool(pipe, node_id) as pool:
        for job in jobs:
            begun = job.output.with_name(job.output.name + ".parts").exists()
            if (begun or not job.output.exists()) and run_with_progress(pipe, job, begun, node_id, pool):
                return job.output
    raise AssertionError("unreachable: there is always another numbered name")


@contextlib.contextmanager
def worker_pool(pipe: Upscaler, node_id: str | None) -> Generator[Pool | None, None, None]:
    """Start the workers that a Runtime node asked for; yield None if the pipe itself does the work."""
    from ..stream_diffvsr.jobs.cluster import workers

    about = how_made(pipe)
    devices = workers_on(about.devices)
    if devices is None:
        yield None
        return
    count = len(devices.names)
    host.Progress(1, node_id).say(f"starting {count} workers, which takes up to a minute", last=True)
    host.make_all_room()
    with workers(about.model, devices, on_wait=host.check_interrupt) as pool:
        yield pool


def run_with_progress(
    pipe: Upscaler, job: VideoJob, begun: bool, node_id: str | None, pool: Pool | None = None
) -> bool:
    """Run a job with progress and cancellation; return False if another job has taken its name."""
    from ..stream_diffvsr.jobs.journal import WorkFolder
    from ..stream_diffvsr.jobs.run import run

    progress, told = host.Progress(1, node_id), ""
    doing = run(pipe, job, on_step=progress.step) if pool is None else run_spread(pool, job)
    with contextlib.closing(doing) as steps:
        try:
            before = WorkFolder(job.output).load() if begun else None
            if before is not None and before.frames:
                told = f"continuing at frame {before.first_index + before.frames}: "
                progress.say(told[:-2])
            first = next(steps, None)
        except VideoError:
            if begun:
                return False
            raise
        for step in itertools.chain([first] if first else [], steps):
            total = max(step.done, step.total or 0)  # some files report one frame too few
            progress.count(step.done, total)
            if step.hq is not None:
                progress.live(step.hq[0].movedim(0, -1))
            frames = host.frames_done(step.done, step.total and total, step.fps)
            said = "; ".join(filter(None, (told + frames, memory_plan(step.how))))
            progress.say(said, last=step.done == total)
    return True


class Step(NamedTuple):
    """A job's progress on several workers; `hq` stays None, as workers send no pictures."""

    done: int
    total: int | None
    fps: float
    hq: Tensor | None = None
    how: Provenance | None = None


def run_spread(pool: Pool, job: VideoJob) -> Generator[Step, None, None]:
    """Run the job like `run`, but with several workers; yield progress every half second."""
    from ..stream_diffvsr.jobs.spread import Spread

    driver = Spread([job], pool)
    with contextlib.closing(driver.steps()) as steps:
        for step in steps:
            for outcome in driver.outcomes:
                if outcome.error:
                    raise outcome.error
            host.check_interrupt()
            yield Step(step.done, step.total, step.fps)


WORDS = {
    "--codec": "codec of Settings",
    "--crf": "crf of Settings",
    "--target": "size",
    "--start": "start_frame",
    "--end": "end_frame",
    "-o": "output_path",
    "--restart": "another output_path",
    "write to a folder, or set --target": "give all pictures the same size, or make a separate video of each",
    "or suffix": "or another extension for output_path",
}
"""Command-line terms, each with the nodes' term for the same thing."""


@contextlib.contextmanager
def node_words() -> Generator[None, None, None]:
    """Replace command-line terms in the engine's errors with the nodes' terms."""
    try:
        yield
    except VideoError as error:
        longest_first = "|".join(map(re.escape, sorted(WORDS, key=len, reverse=True)))
        text = re.sub(rf"(?<!\S)({longest_first})(?![\w-])", lambda found: WORDS[found[0]], str(error))
        raise VideoError(text) from error
