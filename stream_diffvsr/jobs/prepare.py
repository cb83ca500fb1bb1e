"""Preparing a job: paths, source, encoders, writers, and the values that identify it to a later run."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import VideoError
from ..files import fingerprint
from ..media import pictures
from ..media.codecs import CONTAINERS, Encoding, check_encoder, choose_encoding
from ..media.read import FolderSource, Source, VideoSource, check_readable, open_source
from ..media.span import Span
from ..media.streams import SourceInfo
from ..media.write import PictureSink, Sink, VideoSink, check_folder, container_of
from ..upscaler import Info, Provenance, State
from . import scenes
from .job import VideoJob, settle_job
from .journal import WorkFolder

MEDIA_FORMATS = ("avi", "asf", "flv", "gif", "mp4", "mov", "mpeg", "mpegts", "ogg", "webm", "matroska", "3gp")
"""FFmpeg's names for containers whose suffixes are unlikely to end the name of a folder of pictures."""
SPARE_BYTES = 32 << 20
"""Bytes to leave free on a disk."""


class Model(Protocol):
    """What a job needs to know about a model before the first frame; the model may be in another process."""

    Options: type

    @property
    def info(self) -> Info: ...

    @property
    def device(self) -> torch.device: ...

    def provenance(self, size: tuple[int, int], options: Any = None) -> Provenance: ...


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job whose paths have been checked and whose source is open."""

    job: VideoJob
    source: Source
    cut_rule: scenes.SceneCut

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the source."""
        return self.source.info.height, self.source.info.width

    @property
    def total(self) -> int | None:
        """Number of frames in the job, estimated from the file; None if unknown."""
        return self.job.span.count(self.source.info.frames, self.source.info.rate)

    @property
    def step(self) -> int:
        """Ticks from one frame to the next, for frames without a duration."""
        return max(1, round(1 / (self.source.info.rate * self.source.info.time_base)))

    def fitted(self, model: Model) -> Prepared:
        """Return a copy of the job with the values that depend on the model filled in."""
        return Prepared(
            settle_job(self.job, model.info, model.Options, *self.size), self.source, self.cut_rule
        )

    @cached_property
    def videos(self) -> dict[str, tuple[Path, Encoding]]:
        """The video files to write and their encodings, keyed by 'main' or 'compare'; see `video_outputs`."""
        return video_outputs(self.job, self.source.info)

    @property
    def writes_folder(self) -> bool:
        """Whether the output is a folder of pictures."""
        single = isinstance(self.source, FolderSource) and self.job.source.is_file()
        return "main" not in self.videos and not single

    @property
    def side_bytes(self) -> int:
        """Upper limit on the number of bytes that the source's other streams need."""
        return self.job.source.stat().st_size if self.job.audio and self.job.source.is_file() else 0

    def between(self, first: int, end: int | None) -> Span:
        """Return the span from `first` to just before `end`; None extends it to the end of the job."""
        return Span(first, self.job.span.end if end is None else end - 1)

    def offset(self, first: int) -> int:
        """Return a state's frame number minus the source's, for a job that begins at frame `first`."""
        return 0 if self.job.state is None else self.job.state.index - first


def prepare(job: VideoJob) -> Prepared:
    """Check a job before its model is opened. Raises `VideoError` if files cannot be read or written."""
    check_paths(job)
    return Prepared(job, open_job_source(job), scenes.parse(job.scene_cut))


def check_paths(job: VideoJob) -> None:
    """Raise `VideoError` if the source cannot be read or an output cannot be written."""
    check_readable(job.source)
    paths = [path for path in (job.output, job.compare, job.state_out, job.cuts_out) if path is not None]
    begun = WorkFolder(job.output).journal_file.is_file()
    for number, path in enumerate(paths):
        check_folder(path)
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise VideoError(f"{path} is given for two outputs: choose a different name for each.")
        if path.is_dir() and (number or container_of(path) is not None or one_picture(job.source)):
            raise VideoError(f"{path} is a folder: name a file in it.")
        if number and path.exists() and not (begun or job.overwrite):
            raise VideoError(f"{path} exists: choose another name, or set --overwrite.")
        if path.resolve() == job.source.resolve():
            raise VideoError(f"{path} is the source itself: choose another output.")
    if job.compare is not None and container_of(job.compare) is None:
        raise VideoError(
            f"{job.compare.name} is not a video file: its name must end in {', '.join(CONTAINERS)}."
        )
    # A folder's name may contain a dot, but must not look like a file in an unsupported format.
    folder = job.output.is_dir() or (job.source.is_dir() and not known_suffix(job.output.suffix))
    if job.output.suffix and container_of(job.output) is None and not folder:
        single = one_picture(job.source)
        known = pictures.WRITABLE if single else CONTAINERS
        if job.output.suffix.lower() not in known:
            raise VideoError(
                f"{job.output.name} does not have a supported extension: use {', '.join(known)}"
                f"{'' if single else ', or a folder name for pictures'}."
            )


def one_picture(source: Path) -> bool:
    """Whether a source is a single picture file."""
    return source.is_file() and pictures.is_picture(source)


def known_suffix(suffix: str) -> bool:
    """Whether a suffix belongs to a picture or a video."""
    import av

    lower = suffix.lower().removeprefix(".")
    return f".{lower}" in pictures.SUFFIXES or any(
        lower in av.ContainerFormat(name).extensions for name in MEDIA_FORMATS
    )


def open_job_source(job: VideoJob) -> Source:
    """Open the source of a job; a single picture is treated as a folder of one."""
    if one_picture(job.source):
        return FolderSource(job.source, job.rate or Fraction(1))
    source = open_source(job.source, job.stream, job.rate)
    if isinstance(source, VideoSource) and job.start != 0:
        source.look_at(job.span)
    return source


def video_outputs(job: VideoJob, info: SourceInfo) -> dict[str, tuple[Path, Encoding]]:
    """Return the video files that a job writes and their encodings, keyed by 'main' or 'compare'.

    Raises `VideoError` if an encoding is not possible.
    """
    paths = {"main": job.output, "compare": job.compare}
    return {
        name: (path, encoding_of(job, path, info))
        for name, path in paths.items()
        if path is not None and container_of(path) is not None
    }


def encoding_of(job: VideoJob, path: Path, info: SourceInfo) -> Encoding:
    """Choose and check the encoding of one video file."""
    container = container_of(path) or ""
    codec = job.codec or ("av1" if container == "webm" else "h264")
    size = job.sizes.output(info.height, info.width)
    encoding = choose_encoding(codec, job.pix_fmt, job.crf, info, size)
    check_encoder(encoding, container)
    return encoding


def open_sinks(prepared: Prepared, folder: Path) -> dict[str, Sink]:
    """Open the writers of a job, keyed by 'main' (the output itself, which comes first) or 'compare'."""
    job, source, videos = prepared.job, prepared.source, prepared.videos
    sinks: dict[str, Sink] = {}
    if videos and isinstance(source, FolderSource):
        check_sizes(job, source)
    if "main" not in videos:
        named = isinstance(source, FolderSource)
        sinks["main"] = PictureSink(picture_names(job, source)) if named else PictureSink({}, job.output)
    for name, (_, encoding) in videos.items():
        sinks[name] = VideoSink(folder, name, encoding)
    return sinks


def picture_names(job: VideoJob, source: FolderSource) -> dict[int, Path]:
    """Return the output path of each picture, by index.

    A single picture is written to the output path. The pictures of a folder are written into the output
    folder, under the same names.
    """
    if job.source.is_file():
        return {0: job.output}
    names = [pictures.writable_name(file.name) for file in source.files]
    times = Counter(name.lower() for name in names)
    for index, file in enumerate(source.files):
        if times[names[index].lower()] > 1 and names[index] != file.name:
            names[index] = f"{file.name}.png"
    twice = [name for name, count in Counter(name.lower() for name in names).items() if count > 1]
    if twice:
        raise VideoError(f"two pictures would both become {twice[0]}: rename one of them.")
    return {index: job.output / name for index, name in enumerate(names)}


def check_sizes(job: VideoJob, source: FolderSource) -> None:
    """Raise `VideoError` if the pictures of a video differ in size and no target size was requested."""
    first = (source.info.width, source.info.height)
    for file in source.files if job.target is None else ():
        if (size := pictures.size_of(file)) != first:
            raise VideoError(
                f"{file.name} is {size[0]}x{size[1]}, but {source.files[0].name} is {first[0]}x{first[1]}. "
                "All frames of a video must have the same size: write to a folder, or set --target."
            )


def source_fingerprint(source: Path) -> dict[str, Any]:
    """Return values that identify a source, wherever it is stored: its file count, size and fingerprint."""
    files = source_files(source)
    return {"files": len(files), "size": size_of(source), "content": fingerprint(files)}


def source_files(source: Path) -> list[Path]:
    """Return the pictures of a folder, or the file itself."""
    return pictures.list_folder(source) if source.is_dir() else [source]


def size_of(source: Path) -> int:
    """Return the size of a source in bytes."""
    return sum(file.stat().st_size for file in source_files(source))


def frame_settings(model: Model, prepared: Prepared) -> dict[str, Any]:
    """Return all settings that affect the frames of the output, as JSON values."""
    job, cuts = prepared.job, prepared.cut_rule
    made = model.provenance((model.info.minimum, model.info.minimum), job.options)
    return {
        **asdict(job.options),
        **{key: text for key, text in made.to_texts().items() if key not in ("options", "plan", "size")},
        "family": model.info.family,
        "device": model.device.type,
        "start": str(job.start),
        "end": str(job.end),
        "stream": job.stream,
        "state": None if job.state is None else state_key(job.state),
        "sizes": str(job.sizes),
        "colours": f"{job.colour_fix} {job.strength}",
        "scene cuts": f"{cuts.threshold} {sorted(cuts.listed or ())}",
        "segment": job.segment_frames,
        **{f"{name} encoding": str(encoding) for name, (_, encoding) in prepared.videos.items()},
    }


def state_key(state: State) -> str:
    """Return a short digest that identifies a state."""
    digest = hashlib.sha256(str(state.index).encode())
    for _, tensor in sorted(state.tensors.items()):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions(device: torch.device, threads: int) -> dict[str, str]:
    """Return the libraries' versions; on a CPU, also the number of threads, which affects rounding."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "av")}
    return {**found, "threads": str(threads)} if device.type == "cpu" else found


def check_space(folder: Path, needed: int) -> None:
    """Raise `OSError` if the disk lacks space for `needed` bytes plus a reserve for stopping cleanly."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{free >> 20} MB are free, but about {(needed + SPARE_BYTES >> 20) + 1} MB are needed; make "
            "room and run the same command again to continue",
            str(folder),
        )
