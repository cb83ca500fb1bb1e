"""The node that upscales a video file by file: any length, in constant memory."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..stream_diffvsr.errors import IncompatibleInputError, VideoError
from . import files, host
from .settings import SettingsValue
from .sockets import CATEGORY, PIPE_IN, SEED, SETTINGS_IN, STEPS

if TYPE_CHECKING:
    from fractions import Fraction

    from ..stream_diffvsr.jobs.run import JobProgress, VideoJob
    from ..stream_diffvsr.upscaler import Upscaler

READ_AHEAD = 4
"""Frames decoded ahead where the node says 0."""
SUFFIXES = {"prores": ".mov", "ffv1": ".mkv", "png": ".mkv"}
"""Containers of the codecs that MP4 does not hold well."""
CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
"""Endings that make an output_path a file's name and not the beginning of one."""
WITH_QUALITY = ("h264", "h265", "av1")
"""Codecs that take a crf."""
LAST = -1
INSTANTS = 1_000_000
"""Parts of a second that are shorter than any frame."""


class UpscaleVideo:
    """Upscales a file to a file."""

    DESCRIPTION = (
        "Upscales a whole video by 4, from file to file: any length in constant memory, with sound, timing "
        "and colours kept. A cancelled run leaves what is done as a playable file, and queueing it again "
        "goes on from there."
    )
    SEARCH_ALIASES: ClassVar = [
        "upscale long video",
        "video file upscale",
        "video super resolution",
        "vsr video",
    ]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "VIDEO")
    RETURN_NAMES = ("output_path", "video")
    OUTPUT_TOOLTIPS = ("Path of the finished file.", "The finished file as a video, not loaded into memory.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"pipe": PIPE_IN},
            "optional": {
                "video_path": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "A video file or a folder of pictures, anywhere; a relative path starts "
                        "in the input folder. Leave it empty where video is linked.",
                    },
                ),
                "video": ("VIDEO", {"tooltip": "A video from Load Video, instead of video_path."}),
                "output_path": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "File to write, below the output folder; a number is added where it "
                        "exists. Empty: numbered files in its folder stream_diffvsr, named after the video.",
                    },
                ),
                "frames_per_batch": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 256,
                        "tooltip": "Frames decoded ahead, 0 for automatic. Never changes pixels.",
                    },
                ),
                "start_frame": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**31 - 1, "tooltip": "First frame to upscale, from 0."},
                ),
                "end_frame": (
                    "INT",
                    {
                        "default": LAST,
                        "min": LAST,
                        "max": 2**31 - 1,
                        "tooltip": "Last frame to upscale, included; -1: the last one of the video.",
                    },
                ),
                "num_inference_steps": STEPS,
                "seed": SEED,
                "settings": SETTINGS_IN,
            },
            "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, video_path: str | None = "", **_: Any) -> str:
        return files.identity(source_path(video_path)) if video_path else ""

    @classmethod
    def VALIDATE_INPUTS(cls, video_path: str | None = "", output_path: str | None = "") -> bool | str:
        if video_path and not source_path(video_path).exists():
            return f"No file {source_path(video_path)}: check video_path, or link video instead."
        try:
            files.writable(clean(output_path))
        except IncompatibleInputError as error:
            return str(error)
        return True

    def execute(
        self,
        pipe: Upscaler,
        video_path: str = "",
        video: Any = None,
        output_path: str = "",
        unique_id: str | None = None,
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
        settings: SettingsValue | None = None,
        **widgets: Any,
    ) -> dict[str, Any]:
        with host.install_line():
            job = plan(pipe, choose_source(video_path, video), settings or SettingsValue(), **widgets)
            job = replace(job, metadata=host.workflow_metadata(prompt, extra_pnginfo))
            host.make_room(pipe, frame_size(job), job.options)
            names = outputs(job.source, clean(output_path), job.output.name)
            path = do(pipe, (replace(job, output=name) for name in names), unique_id)
        return {"ui": host.shown_video(path), "result": (str(path), host.video_file(path))}


def clean(text: str | None) -> str:
    """A path as people paste it: without quotes and blanks around."""
    return (text or "").strip().strip("\"'").strip()


def source_path(video_path: str) -> Path:
    """A path as given; a relative one starts in the input folder."""
    return host.folder("input") / Path(clean(video_path)).expanduser()


def choose_source(video_path: str, video: Any) -> tuple[Path, Fraction, Fraction | None]:
    """The file to read, and the seconds from and to which it is trimmed (None: to its end)."""
    from fractions import Fraction

    given = bool(clean(video_path))
    if given == (video is not None):
        raise IncompatibleInputError("either video_path or video", "both" if given else "neither")
    if given:
        return source_path(video_path), Fraction(0), None
    start, length = (Fraction(value) for value in host.trim_window(video))
    end = start + length - Fraction(1, INSTANTS) if length else None
    return video_source(video), start, end


def video_source(video: Any) -> Path:
    """The file behind a VIDEO; one that lies in memory is written to the temp folder, as it is."""
    if not host.is_file_video(video):
        raise IncompatibleInputError(
            "a video from a file, without edits but trimming",
            f"{type(video).__name__} with frames in memory; link those to Stream-DiffVSR Upscale instead",
        )
    source = video.get_stream_source()
    if isinstance(source, (str, Path)):
        return Path(source)
    content = source.getvalue()
    path = host.folder("temp") / f"stream_diffvsr_{hashlib.sha256(content).hexdigest()[:16]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its name says its content: what is there is it, unless writing was cut short.
    if not path.exists() or path.stat().st_size != len(content):
        path.write_bytes(content)
    return path


def plan(
    pipe: Upscaler,
    source: tuple[Path, Fraction, Fraction | None],
    settings: SettingsValue,
    frames_per_batch: int = 0,
    start_frame: int = 0,
    end_frame: int = LAST,
    num_inference_steps: int = 0,
    seed: int = 0,
) -> VideoJob:
    """What to do, without where to."""
    from ..stream_diffvsr.jobs.run import VideoJob

    path, start, end = source
    trimmed = bool(start) or end is not None
    if trimmed and (start_frame or end_frame != LAST):
        raise IncompatibleInputError("a trimmed video or start_frame and end_frame", "both")
    codec = settings.file.get("codec", "h264")
    pix_fmt = settings.file.get("pix_fmt", "auto")
    cut = settings.file.get("scene_cut", "auto")
    return VideoJob(
        source=path,
        output=Path(SUFFIXES.get(codec, ".mp4")),
        options=settings.options(pipe, num_inference_steps=num_inference_steps, seed=seed),
        start=start if trimmed else start_frame,
        end=end if trimmed or end_frame == LAST else end_frame,
        codec=codec,
        crf=settings.file.get("crf", 18) if codec in WITH_QUALITY else None,
        pix_fmt=None if pix_fmt == "auto" else pix_fmt,
        scene_cut=str(settings.file.get("scene_cut_threshold", 27.0)) if cut == "auto" else cut,
        read_ahead=frames_per_batch or READ_AHEAD,
    )


def frame_size(job: VideoJob) -> tuple[int, int]:
    """Height and width of the frames before upscaling; raises `VideoError` for what cannot be read."""
    from ..stream_diffvsr.jobs.prepare import open_job_source

    info = open_job_source(job).info
    return job.sizes.model(info.height, info.width)


def outputs(source: Path, output: str, suffix: str) -> Iterator[Path]:
    """Names to try: the given file and then numbered ones, or numbered ones from the start."""
    base = files.writable(files.fill_in(output or f"stream_diffvsr/{source.stem}_4x"))
    base.parent.mkdir(parents=True, exist_ok=True)
    if base.suffix in CONTAINERS:
        yield base
        base, suffix = base.with_suffix(""), base.suffix
    for number in itertools.count(1):
        yield base.with_name(f"{base.name}_{number:05}_{suffix}")


def do(pipe: Upscaler, jobs: Iterable[VideoJob], node_id: str | None) -> Path:
    """Do the job under the first name that is free, or that it was cancelled under; returns the file."""
    for job in jobs:
        begun = job.output.with_name(job.output.name + ".parts").exists()
        if (begun or not job.output.exists()) and finish(pipe, job, begun, node_id):
            return job.output
    raise AssertionError("names never end")


def finish(pipe: Upscaler, job: VideoJob, begun: bool, node_id: str | None) -> bool:
    """Run a job with bar, picture and cancel button; False if what was `begun` there is another job."""
    from ..stream_diffvsr.jobs.run import run

    with contextlib.closing(run(pipe, job, on_step=host.check_interrupt)) as steps:
        try:
            first = next(steps, None)
        except VideoError:
            if begun:
                return False
            raise
        progress = host.Progress(first.total or 0 if first else 0, node_id)
        for step in itertools.chain([first] if first else [], steps):
            progress.show(step.done, step.hq[0].movedim(0, -1))
            progress.say(describe(step), last=step.done == step.total)
    return True


def describe(step: JobProgress) -> str:
    """'120 of 300 frames, 2.5 per second, 1:12 left'."""
    total = f" of {step.total}" if step.total else ""
    left = step.seconds_left
    time = "" if left is None else f", {int(left) // 60}:{int(left) % 60:02} left"
    return f"{step.done}{total} frames, {step.fps:.2f} per second{time}"
