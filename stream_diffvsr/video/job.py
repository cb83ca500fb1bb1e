"""A whole job: file in, file out, in segments that survive a crash. Used by the command line and the node.

    with contextlib.closing(run(pipe, VideoJob(source="in.mp4", output="out.mp4"))) as progress:
        for step in progress:
            print(step.done, step.total, step.fps)

Frames are decoded ahead and encoded behind in threads; the loop between them is the pipeline's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from ..denoise import OnStep
from ..errors import VideoError
from ..files import fingerprint
from ..options import UpscaleOptions
from ..pipeline import StreamDiffVSRPipeline
from ..state import StreamDiffVSRState
from ..tensors import from_pixels
from . import pictures, scenes
from .codecs import Encoding, choose_encoding
from .join import join
from .journal import Journal, Part, Workplace, continue_from, sync_folder
from .overlap import Background, prefetch
from .pictures import Picture
from .read import (
    FolderSource,
    Source,
    SourceFrame,
    SourceInfo,
    Span,
    VideoSource,
    check_readable,
    open_source,
    parse_position,
)
from .sizes import Sizes, enlarge, split_screen
from .tracks import Window
from .write import PictureSink, Sink, VideoSink, check_output, container_of

log = logging.getLogger(__name__)

WRITE_DEPTH = 4
"""Frames that may wait for the encoder."""


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """What to upscale, where to, and how. Frozen; paths are checked when the job runs."""

    source: Path
    """A video, an animated GIF, WebP or PNG, a picture, or a folder of pictures."""
    output: Path
    """A file (.mp4 .mov .mkv .webm, or a picture's suffix for one picture), else a folder of pictures."""
    options: UpscaleOptions = field(default_factory=UpscaleOptions)
    state: StreamDiffVSRState | None = None
    """To continue from; None starts a sequence, at the source's own frame index."""
    state_out: Path | None = None
    """Where to save the state after the last frame."""
    start: int | Fraction | str = 0
    """First frame: an index, seconds as a Fraction, or text as the command line takes."""
    end: int | Fraction | str | None = None
    """Last frame, included; None: to the end."""
    stream: int | None = None
    """Index of the video stream in the file; None: the largest."""
    rate: Fraction | None = None
    """Frames per second of a folder of pictures; None: 25."""
    pre_scale: float = 1.0
    """The source is scaled by this before the model."""
    target: tuple[int, int] | None = None
    """Width and height of the output; at most one of target, short_edge and scale."""
    short_edge: int | None = None
    scale: float | None = None
    """Size of the output as a multiple of the source."""
    codec: str | None = None
    """A key of `codecs.CODECS`; None: h264, in WebM av1."""
    crf: int | None = None
    pix_fmt: str | None = None
    scene_cut: str = "auto"
    """auto, off, a threshold of 255, or a CSV file of first frames."""
    cuts_out: Path | None = None
    """Where to write the scenes that were found, as CSV."""
    segment_frames: int = 120
    """Frames of a segment: what a crash costs at most."""
    read_ahead: int = 4
    """Frames decoded ahead; never changes pixels."""
    audio: bool = True
    """Whether sound and subtitles are copied."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Written into the output beside the source's own."""
    overwrite: bool = False
    """Whether a finished output may be replaced."""
    restart: bool = False
    """Whether to throw away the unfinished work of an earlier run."""
    compare: Path | None = None
    """A split-screen video to write: bicubic on the left, the result on the right."""

    def __post_init__(self) -> None:
        if self.segment_frames < 1:
            raise VideoError(f"a segment has at least 1 frame, got {self.segment_frames}.")
        for name in ("source", "output", "state_out", "cuts_out", "compare"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_position(value))

    @property
    def sizes(self) -> Sizes:
        """The sizes that were asked for."""
        return Sizes(self.pre_scale, self.target, self.short_edge, self.scale)

    @property
    def span(self) -> Span:
        """The frames that are wanted."""
        return Span(self.start, self.end)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class JobProgress:
    """Given after every frame."""

    done: int
    """Frames done, with those of earlier runs."""
    total: int | None
    """Frames of the job, as far as the file says."""
    fps: float
    """Frames per second of this run, the last few of them."""
    segment: int
    """Number of the segment, from 0."""
    index: int
    """The frame's index in the source."""
    lq: Tensor
    """(1, 3, h, w) in [0, 1]: what the model saw."""
    hq: Tensor
    """(1, 3, H, W) in [0, 1]: the result, at its final size."""
    cut: bool
    """Whether a new scene begins here."""

    @property
    def seconds_left(self) -> float | None:
        """By the present speed; None where the length or the speed is not known."""
        if self.total is None or self.fps <= 0:
            return None
        return max(0, self.total - self.done) / self.fps


def run(
    pipe: StreamDiffVSRPipeline, job: VideoJob, on_step: OnStep | None = None
) -> Generator[JobProgress, None, None]:
    """Do a job, yielding after each frame; the output is there when it ends.

    Closing the generator, or an exception from `on_step`, cancels: what is done is left as a playable
    file, and the same job again continues. Raises `VideoError` for what cannot be read or written as
    asked, `OSError` where reading or writing fails on the way (finished segments are kept).
    """
    check_output(job.output)
    check_readable(job.source)
    yield from _Run(pipe, job, open_job_source(job), on_step).steps()


def open_job_source(job: VideoJob) -> Source:
    """The source of a job; a single picture is a folder of one."""
    if job.source.is_file() and pictures.is_picture(job.source):
        return FolderSource(job.source, job.rate or Fraction(1))
    return open_source(job.source, job.stream, job.rate)


class _Run:
    """One run of a job: what was opened for it, and how far it is."""

    def __init__(
        self, pipe: StreamDiffVSRPipeline, job: VideoJob, source: Source, on_step: OnStep | None
    ) -> None:
        self.pipe, self.job, self.source, self.on_step = pipe, job, source, on_step
        self.sizes = job.sizes
        self.cut_rule = scenes.parse(job.scene_cut)
        self.work = Workplace(job.output)
        self.encoding = encoding_of(job, source.info)
        self.sinks = open_sinks(job, source, self.encoding, self.work.folder)
        self.step = max(1, round(1 / (source.info.rate * source.info.time_base)))
        self.cancelled = False
        self.segment: list[SourceFrame] = []
        self.cuts: list[int] = []
        self.clock = Speed()

    def steps(self) -> Iterator[JobProgress]:
        """Upscale what is not yet done, then put the output together."""
        with self.work.locked():
            self.journal = self._begin()
            if self.journal.finished < 0:
                yield from self._upscale()
                self._join(self.journal.parts, "finished")
            self._complete()

    def _begin(self) -> Journal:
        """The journal to go on with, or a new one. Raises `VideoError` where that is refused."""
        job = self.job
        if job.restart:
            self.work.clear()
        before = self.work.load()
        now = Journal(
            identity(job.source), settings(self.pipe, job, self.cut_rule, self.encoding), versions()
        )
        ours = (
            before is not None
            and job.output.is_file()
            and job.output.stat().st_size
            in (
                before.partial,
                before.finished,
            )
        )
        pictures_begun = before is not None and self.encoding is None
        if job.output.exists() and not (job.overwrite or ours or pictures_begun):
            raise VideoError(f"{job.output} exists: choose another with -o, or give --overwrite.")
        if before is None:
            self.work.clear()
            return now
        journal = continue_from(before, now, self.work.folder)
        self.work.check(journal)
        self.work.tidy(journal)
        if journal.parts:
            log.info("continuing after %d frames done earlier", journal.frames)
        return journal

    def _upscale(self) -> Iterator[JobProgress]:
        """Upscale the frames that are left, segment by segment."""
        done = self.journal.frames
        span = self.job.span if not done else Span(self.journal.first_index + done, self.job.end)
        frames = prefetch(self.source.frames(span), self.job.read_ahead)
        state = self._first_state()
        with contextlib.closing(frames), Background(WRITE_DEPTH) as writer:
            try:
                for frame in frames:
                    if state is None:
                        state = StreamDiffVSRState(frame_index=frame.index)
                    state, progress = self._frame(frame, state, writer)
                    yield progress
                    if len(self.segment) == self.job.segment_frames:
                        self._finish_segment(writer, state)
                if self.segment and state is not None:
                    self._finish_segment(writer, state)
            except BaseException as error:
                if self.cancelled or isinstance(error, (GeneratorExit, KeyboardInterrupt)):
                    self._leave_playable(writer)
                for sink in self.sinks.values():
                    writer.add(sink.abort)
                raise
        if not self.journal.parts:
            raise VideoError(f"{self.job.source} has no frame in the span asked for.")

    def _first_state(self) -> StreamDiffVSRState | None:
        if self.journal.parts:
            return StreamDiffVSRState.load(self.work.folder / self.journal.state)
        return self.job.state

    def _frame(
        self, frame: SourceFrame, state: StreamDiffVSRState, writer: Background
    ) -> tuple[StreamDiffVSRState, JobProgress]:
        """Upscale one frame and hand it to the writing thread."""
        if not self.segment:
            for sink in self.sinks.values():
                writer.add(sink.begin, len(self.journal.parts))
        lq = self.sizes.to_model(frame.rgb.to(self.pipe.device))
        before = state
        state = self._state_for(frame, state, from_pixels(lq))
        result = self.pipe.process_frame(from_pixels(lq), state, self.job.options, on_step=self._guarded)
        hq = self.sizes.to_output(result.hq, (frame.rgb.shape[-2], frame.rgb.shape[-1]))
        self._write(frame, lq, hq, writer)
        self.segment.append(frame)
        self.clock.tick()
        progress = JobProgress(
            done=self.journal.frames + len(self.segment),
            total=self.job.span.count(self.source.info.frames, self.source.info.rate),
            fps=self.clock.fps,
            segment=len(self.journal.parts),
            index=frame.index,
            lq=lq,
            hq=hq,
            cut=state is not before,
        )
        return result.state, progress

    def _state_for(self, frame: SourceFrame, state: StreamDiffVSRState, lq: Tensor) -> StreamDiffVSRState:
        """The state that a frame continues from: an empty one where a scene begins."""
        previous = state.previous_lq
        resized = (
            previous is not None and previous.shape != lq.shape and isinstance(self.source, FolderSource)
        )
        if not resized and not self.cut_rule.between(frame.index, previous, lq):
            return state
        if previous is None:
            return state
        self.cuts.append(frame.index)
        log.info("a new scene begins at frame %d", frame.index)
        return StreamDiffVSRState(frame_index=state.frame_index, metadata=state.metadata)

    def _guarded(self, stage: str, index: int, total: int) -> None:
        """The caller's `on_step`; an exception from it means cancel."""
        if self.on_step is None:
            return
        try:
            self.on_step(stage, index, total)
        except BaseException:
            self.cancelled = True
            raise

    def _write(self, frame: SourceFrame, lq: Tensor, hq: Tensor, writer: Background) -> None:
        alpha = None
        if frame.alpha is not None:
            alpha = enlarge(frame.alpha.to(hq.device), (hq.shape[-2], hq.shape[-1]))
        picture = Picture(hq, alpha, frame.bits, frame.profile)
        for name, sink in self.sinks.items():
            shown = replace(picture, rgb=split_screen(lq, hq)) if name == "compare" else picture
            writer.add(sink.add, sink.prepare(shown), frame.index, frame.time)

    def _finish_segment(self, writer: Background, state: StreamDiffVSRState) -> None:
        """Close the segment and save the state; only then the journal says that both are there."""
        part = self._close_part(writer)
        state_file = f"state-{len(self.journal.parts):06}.safetensors"
        state.save(self.work.folder / state_file)
        old = self.journal.state
        self.journal = replace(
            self.journal,
            parts=(*self.journal.parts, part),
            state=state_file,
            cuts=(*self.journal.cuts, *self.cuts),
            first_index=self.journal.first_index if self.journal.parts else self.segment[0].index,
        )
        self.work.save(self.journal)
        if old:
            (self.work.folder / old).unlink(missing_ok=True)
        self.segment, self.cuts = [], []

    def _close_part(self, writer: Background) -> Part:
        """Finish the files of the segment."""
        writer.wait()
        (name, size, depth), *others = [sink.finish() for sink in self.sinks.values()]
        first, last = self.segment[0], self.segment[-1]
        extras = {} if not others else {"compare": others[0][0]}
        end = last.time + (last.duration or self.step)
        return Part(name, len(self.segment), size, first.time, end, depth, extras)

    def _leave_playable(self, writer: Background) -> None:
        """After a cancel: a file of what is done so far; the open segment is done again next time."""
        if not self.segment and not self.journal.parts:
            return
        parts = self.journal.parts
        if self.segment:
            parts = (*parts, self._close_part(writer))
        if self.encoding is None:
            self.work.save(self.journal)
            return
        self._join(parts, "partial")
        self._give_name()
        log.info("%s holds the %d frames done so far", self.job.output, sum(part.frames for part in parts))

    @property
    def _joined(self) -> Path:
        return self.work.folder / f"joined{self.job.output.suffix.lower()}"

    def _join(self, parts: tuple[Part, ...], kind: str) -> None:
        """Put the segments together and note in the journal how large the file is."""
        size = 0
        if self.encoding is not None:
            join(
                self._joined,
                container_of(self.job.output) or "",
                [self.work.folder / part.name for part in parts],
                parts,
                self.encoding,
                source=self.job.source if self.job.audio and isinstance(self.source, VideoSource) else None,
                metadata=self.job.metadata,
                window=self._window(parts, kind),
            )
            size = self._joined.stat().st_size
        self.journal = replace(self.journal, **{kind: size})
        self.work.save(self.journal)

    def _window(self, parts: tuple[Part, ...], kind: str) -> Window:
        """The time of the source that the parts cover; a job that starts later has its start at 0."""
        base = self.source.info.time_base
        low, high = parts[0].first * base, parts[-1].end * base
        if kind == "finished" and self.job.end is None:
            high = float("inf")
        if self.job.start == 0:
            return Window(high=float(high))
        return Window(float(low), float(high), low)

    def _give_name(self) -> None:
        """The joined file becomes the output."""
        if self._joined.is_file():
            self._joined.replace(self.job.output)
            sync_folder(self.job.output.parent)

    def _complete(self) -> None:
        """Everything is done: give the output its name and the side files their content, then clean up."""
        last = self.journal.first_index + self.journal.frames - 1
        if self.job.state_out is not None:
            StreamDiffVSRState.load(self.work.folder / self.journal.state).save(self.job.state_out)
        if self.job.cuts_out is not None:
            scenes.write_list(self.job.cuts_out, self.journal.first_index, last, self.journal.cuts)
        self._give_name()
        self.work.remove()
        for what, count in self.source.notes.items():
            if count:
                log.warning("%s: %d %s", self.job.source, count, what)


class Speed:
    """Frames per second over the last few frames."""

    def __init__(self) -> None:
        self.times = deque([time.monotonic()], maxlen=20)

    def tick(self) -> None:
        """A frame is done."""
        self.times.append(time.monotonic())

    @property
    def fps(self) -> float:
        return (len(self.times) - 1) / max(1e-9, self.times[-1] - self.times[0])


def encoding_of(job: VideoJob, info: SourceInfo) -> Encoding | None:
    """How the output is encoded; None where pictures are written."""
    container = container_of(job.output)
    size = job.sizes.output(info.height, info.width)
    if container is None:
        return None
    codec = job.codec or ("av1" if container == "webm" else "h264")
    return choose_encoding(codec, job.pix_fmt, job.crf, info, size)


def open_sinks(job: VideoJob, source: Source, encoding: Encoding | None, folder: Path) -> dict[str, Sink]:
    """The writers of a job, by what they write; the output itself comes first."""
    sinks: dict[str, Sink] = {}
    if encoding is not None:
        sinks["main"] = VideoSink(folder, "main", encoding)
    elif isinstance(source, FolderSource):
        sinks["main"] = PictureSink(picture_names(job, source))
    else:
        sinks["main"] = PictureSink({}, job.output)
    return sinks


def picture_names(job: VideoJob, source: FolderSource) -> dict[int, Path]:
    """Where each picture goes: one picture to the output itself, more to files of the same names in it."""
    if job.source.is_file():
        return {0: job.output}
    names = [pictures.writable_name(file.name) for file in source.files]
    return {index: job.output / name for index, name in enumerate(names)}


def identity(source: Path) -> dict[str, Any]:
    """What a source is, wherever it lies: its size and a fingerprint of its bytes."""
    files = pictures.list_folder(source) if source.is_dir() else [source]
    return {
        "files": len(files),
        "size": sum(file.stat().st_size for file in files),
        "content": fingerprint(files),
    }


def settings(
    pipe: StreamDiffVSRPipeline, job: VideoJob, cuts: scenes.SceneCut, encoding: Encoding | None
) -> dict[str, Any]:
    """All that changes the frames of the output, as plain JSON."""
    return {
        **asdict(job.options),
        "model": pipe.model,
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "flow": pipe.flow.name,
        "start": str(job.start),
        "end": str(job.end),
        "stream": job.stream,
        "state": None if job.state is None else state_key(job.state),
        "sizes": str(job.sizes),
        "scene cuts": f"{cuts.threshold} {sorted(cuts.listed or ())}",
        "segment": job.segment_frames,
        "encoding": str(encoding),
        "compare": job.compare is not None,
    }


def state_key(state: StreamDiffVSRState) -> str:
    """Tells states apart."""
    digest = hashlib.sha256(str(state.frame_index).encode())
    if state.previous_hq is not None:
        digest.update(state.previous_hq.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """What computed and encoded the frames."""
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "av")}
