"""A whole job: file in, file out, in segments that survive a crash. Used by the command line and the node.

    with contextlib.closing(run(pipe, VideoJob(source="in.mp4", output="out.mp4"))) as progress:
        for step in progress:
            show(step.done, step.total, step.fps)

Frames are decoded ahead and encoded behind in threads; the loop between them is `upscaler.stream`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..errors import VideoError
from ..files import sync_folder
from ..media.join import Part, join
from ..media.pictures import Picture
from ..media.read import FolderSource, Source, SourceFrame, VideoSource
from ..media.sides import RefusedError, Side, make_sides
from ..media.sizes import enlarge, split_screen
from ..media.tracks import Window
from ..media.write import container_of
from ..tensors import SCALE, from_pixels
from ..upscaler import OnStep, Provenance, State, Upscaler, stream
from . import scenes
from .job import FrameTime, JobProgress, Speed, VideoJob, fitted
from .journal import Journal, WorkFolder, continue_from
from .overlap import Background, prefetch
from .prepare import (
    check_paths,
    check_space,
    identity,
    open_job_source,
    open_sinks,
    settings,
    versions,
    video_outputs,
)

__all__ = ["JobProgress", "VideoJob", "run"]

log = logging.getLogger(__name__)

WRITE_DEPTH = 4
"""Frames that may wait for the encoder."""
REHEARSAL = 999_999
"""Number of the segment that is made to try, and thrown away."""


LAST = "last_lq"
"""In a work folder's state where the model's own keeps no frame: the last one that was done, (1, 3, h, w)."""

LONGEST, SEGMENT_SECONDS, MEASURED = 120, 60.0, 3
"""Most frames of a segment, the work that it is to hold, and the frames whose time tells how many that is."""


def run(pipe: Upscaler, job: VideoJob, on_step: OnStep | None = None) -> Generator[JobProgress, None, None]:
    """Do a job, yielding after each frame; the output is there when it ends.

    Closing the generator, or an exception from `on_step`, cancels: what is done is left as a playable
    file, and the same job again continues. Raises `VideoError` for what cannot be read or written as
    asked, `OSError` where reading or writing fails on the way (finished segments are kept).
    """
    check_paths(job)
    source = open_job_source(job)
    job = fitted(job, pipe.info, pipe.Options, source.info.height, source.info.width)
    yield from _Run(pipe, job, source, on_step).steps()


class _Run:
    """One run of a job: what was opened for it, and how far it is."""

    def __init__(self, pipe: Upscaler, job: VideoJob, source: Source, on_step: OnStep | None) -> None:
        self.pipe, self.job, self.source, self.on_step = pipe, job, source, on_step
        self.sizes = job.sizes
        self.cut_rule = scenes.parse(job.scene_cut)
        self.work = WorkFolder(job.output)
        self.videos = video_outputs(job, source.info)
        self.sinks = open_sinks(job, source, self.videos, self.work.folder)
        self.step = max(1, round(1 / (source.info.rate * source.info.time_base)))
        self.cancelled = False
        self.segment: list[FrameTime] = []
        self.last: SourceFrame | None = None
        self.last_lq: Tensor | None = None
        self.cuts: list[int] = []
        self.before: Tensor | None = None
        self.clock = Speed()
        self.sides: list[Side] = []

    @property
    def writes_folder(self) -> bool:
        """Whether the output is a folder of pictures."""
        single = isinstance(self.source, FolderSource) and self.job.source.is_file()
        return "main" not in self.videos and not single

    def steps(self) -> Iterator[JobProgress]:
        """Upscale what is not yet done, then put the output together."""
        with self.work.locked():
            self.journal = self._begin()
            if not self._finished():
                yield from self._upscale()
                self._join(self.journal.parts, "finished")
            self._complete()

    def _finished(self) -> bool:
        """Whether an earlier run did everything but the naming and cleaning up."""
        if self.journal.finished < 0:
            return False
        places = [(path, self._joined(name)) for name, (path, _) in self.videos.items()]
        return all(joined.is_file() or path.is_file() for path, joined in places)

    def _begin(self) -> Journal:
        """The journal to go on with, or a new one. Raises `VideoError` where that is refused."""
        if self.job.restart:
            self.work.clear()
        before = self.work.load()
        self._check_free(before)
        if self.writes_folder:
            self.job.output.mkdir(exist_ok=True)
        now = Journal(
            identity(self.job.source),
            settings(self.pipe, self.job, self.cut_rule, self.videos),
            versions(),
        )
        if before is None:
            self.work.clear()
            return now
        journal = continue_from(before, now, self.work.folder)
        self.work.check(journal)
        self.work.remove_leftovers(journal)
        if journal.parts:
            log.info("continuing after %d frames done earlier", journal.frames)
        return journal

    def _check_free(self, before: Journal | None) -> None:
        """Refuse to replace what an earlier run of this job has not written; raises `VideoError`."""
        output = self.job.output
        taken = any(output.iterdir()) if output.is_dir() else output.exists()
        if taken and before is not None:
            pictures_begun = "main" not in self.videos
            taken = not (pictures_begun or output.stat().st_size in (before.partial, before.finished))
        if taken and not self.job.overwrite:
            raise VideoError(f"{output} exists: choose another with -o, or give --overwrite.")

    def _rehearse(self) -> None:
        """Put a black frame together with all that goes beside the picture, as the output will be.

        What a container refuses shows here and not after hours of work. Raises `VideoError` where it
        refuses the picture itself.
        """
        if "main" in self.videos and self.job.audio and isinstance(self.source, VideoSource):
            form = container_of(self.job.output) or ""
            self.sides = make_sides(self.job.source, form, self.work.folder)
        for name, (_, encoding) in self.videos.items():
            sink = self.sinks[name]
            sink.begin(REHEARSAL)
            try:
                black = sink.prepare(Picture(torch.zeros(1, 3, encoding.height, encoding.width)))
                sink.add(black, 0, 0)
                file, size, depth = sink.finish()
            finally:
                sink.abort()
            part = Part(file, 1, size, 0, self.step, depth, file, depth)
            self._join_one(name, (part,), "rehearsed")
            (self.work.folder / file).unlink()
            self._joined(name).unlink()

    def _upscale(self) -> Iterator[JobProgress]:
        """Upscale the frames that are left."""
        self._rehearse()
        done = self.journal.frames
        span = self.job.span if not done else replace(self.job.span, start=self.journal.first_index + done)
        frames = prefetch(self.source.frames(span, self.journal.place), self.job.read_ahead)
        with contextlib.closing(frames), Background(WRITE_DEPTH) as writer:
            try:
                here = (replace(frame, device=self.pipe.device) for frame in frames)
                yield from self._scenes(((frame, self._lq(frame)) for frame in here), writer)
            except BaseException as error:
                stops = (GeneratorExit, KeyboardInterrupt, VideoError)
                self._stop(writer, self.cancelled or isinstance(error, stops))
                raise
        if not self.journal.parts:
            raise VideoError(f"{self.job.source} has no frame in the span asked for.")

    def _scenes(
        self, frames: Iterator[tuple[SourceFrame, Tensor]], writer: Background
    ) -> Iterator[JobProgress]:
        """Scene by scene, each in a session of its own; segments end where the model's state allows it.

        Cuts are found while reading straight on. A scene inherits nothing of the one before it, but for how
        all frames of the job are made.
        """
        state = self._first_state()
        for cut, scene in scenes.in_scenes(frames, self._begins_scene):
            waiting: deque[tuple[SourceFrame, Tensor]] = deque()
            seen = self._seen(scene, waiting)
            first = next(seen)
            if state is None or cut or not (state.has_previous or state.provenance.model):
                index = waiting[0][0].index if state is None else state.index
                state = State(index=index, provenance=self._fixed(first))
            session = self.pipe.session(self.job.options, state, self._guarded)
            for result in stream(session, itertools.chain([first], seen)):
                yield self._frame(*waiting.popleft(), result.hq, cut, writer)
                cut, border = False, session.state()
                if border is None or border.index != result.index + 1:
                    state = State(index=result.index + 1)
                    continue
                state = border
                if len(self.segment) >= self._segment_frames():
                    self._finish_segment(writer, state)
        if self.segment and state is not None:
            self._finish_segment(writer, state)

    @staticmethod
    def _seen(
        scene: Iterator[tuple[SourceFrame, Tensor]], waiting: deque[tuple[SourceFrame, Tensor]]
    ) -> Iterator[Tensor]:
        """What the model sees of a scene; its frames wait until their results come."""
        for frame, lq in scene:
            waiting.append((frame, lq))
            yield from_pixels(lq)

    def _first_state(self) -> State | None:
        """What the job goes on from; the frame before it is kept, so that a cut between them is found."""
        state = self.job.state
        if self.journal.parts:
            state = State.load(self.work.folder / self.journal.state)
        if state is not None:
            tensors = dict(state.tensors)
            last = tensors.pop(LAST, None)
            self.before = tensors.get("previous_lq", last)
            state = replace(state, tensors=tensors)
        return state

    def _segment_frames(self) -> int:
        """Frames of a segment: as asked for, else about a minute's work, told by the first frames' speed.

        Fixed once for a job, and recorded.
        """
        if not self.journal.segment_frames and len(self.segment) >= MEASURED:
            frames = round(SEGMENT_SECONDS * self.clock.fps)
            self.journal = replace(self.journal, segment_frames=max(1, min(LONGEST, frames)))
        return self.job.segment_frames or self.journal.segment_frames or LONGEST

    def _fixed(self, lq: Tensor) -> Provenance:
        """How all frames of the job are made, memory plan included: chosen once, and recorded."""
        if not self.journal.provenance:
            size = lq.shape[-2], lq.shape[-1]
            made = self.pipe.provenance(size, self.job.options)
            self.journal = replace(self.journal, provenance=made.to_texts())
        return Provenance.from_texts(self.journal.provenance)

    def _lq(self, frame: SourceFrame) -> Tensor:
        """What the model sees of a frame, (1, 3, h, w) in [0, 1]."""
        return self.sizes.to_model(frame.rgb)

    def _frame(
        self, frame: SourceFrame, lq: Tensor, hq: Tensor, cut: bool, writer: Background
    ) -> JobProgress:
        """Hand an upscaled frame to the writing thread."""
        if not self.segment:
            self._begin_segment(frame, writer)
        hq = self.sizes.to_output(hq, frame.size)
        self._write(frame, lq, hq, writer)
        self.segment.append(FrameTime(frame.index, frame.time, frame.time + (frame.duration or self.step)))
        self.last, self.last_lq = frame, lq
        self.clock.tick()
        return JobProgress(
            done=self.journal.frames + len(self.segment),
            total=self.job.span.count(self.source.info.frames, self.source.info.rate),
            fps=self.clock.fps,
            segment=len(self.journal.parts),
            index=frame.index,
            lq=lq,
            hq=hq,
            cut=cut,
        )

    def _begin_segment(self, frame: SourceFrame, writer: Background) -> None:
        """Start the files of a segment while there is room for it, for its state and for the joined file."""
        state = 2 * 4 * 3 * frame.size[0] * frame.size[1] * (SCALE**2 + 1)
        done = [part.size for part in self.journal.parts]
        check_space(self.work.folder, state + sum(done) + 2 * max(done, default=0) + self._sound_bytes())
        for sink in self.sinks.values():
            writer.add(sink.begin, len(self.journal.parts))

    def _begins_scene(
        self, now: tuple[SourceFrame, Tensor] | None, following: tuple[SourceFrame, Tensor]
    ) -> bool:
        """Whether a scene begins with the frame that follows `now`, or what was done earlier."""
        previous = self.before if now is None else from_pixels(now[1])
        if previous is None:
            return False
        frame, lq = following[0], from_pixels(following[1])
        if previous.shape != lq.shape:
            # Pictures of a folder may change their size; a frame of another size is the model's to refuse.
            cut = isinstance(self.source, FolderSource)
        else:
            cut = self.cut_rule.between(frame.index, previous, lq)
        if cut:
            self.cuts.append(frame.index)
            log.info("a new scene begins at frame %d", frame.index)
        return cut

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
        prepared = {}
        for name, sink in self.sinks.items():
            shown = replace(picture, rgb=split_screen(lq, hq)) if name == "compare" else picture
            prepared[name] = sink.prepare(shown)
        for name, sink in self.sinks.items():
            writer.add(sink.add, prepared[name], frame.index, frame.time)

    def _finish_segment(self, writer: Background, state: State) -> None:
        """Close the segment and save the state; only then the journal says that both are there."""
        part = self._close_part(writer)
        state_file = f"state-{len(self.journal.parts):06}.safetensors"
        tensors = dict(state.tensors)
        if "previous_lq" not in tensors and self.last_lq is not None:
            tensors[LAST] = from_pixels(self.last_lq)
        replace(state, tensors=tensors).save(self.work.folder / state_file)
        old = self.journal.state
        self.journal = replace(
            self.journal,
            parts=(*self.journal.parts, part),
            state=state_file,
            cuts=tuple(sorted({*self.journal.cuts, *self.cuts})),  # one may be ahead of its scene
            place=None if self.last is None else self.source.place(self.last),
            first_index=self.journal.first_index if self.journal.parts else self.segment[0].index,
        )
        self.work.save(self.journal)
        if old:
            (self.work.folder / old).unlink(missing_ok=True)
        self.segment, self.cuts = [], []

    def _close_part(self, writer: Background) -> Part:
        """Finish the files of the segment."""
        writer.wait()
        finished = {name: sink.finish() for name, sink in self.sinks.items()}
        name, size, depth = finished["main"]
        compare, _, compare_depth = finished.get("compare", ("", 0, 0))
        start, end = self.segment[0].start, self.segment[-1].end
        return Part(name, len(self.segment), size, start, end, depth, compare, compare_depth)

    def _stop(self, writer: Background, cancelled: bool) -> None:
        """Leave what is done as a file after a cancel, and nothing half written in any case."""
        try:
            if cancelled:
                self._leave_playable(writer)
        finally:
            writer.drop()
            for sink in self.sinks.values():
                sink.abort()

    def _leave_playable(self, writer: Background) -> None:
        """After a cancel: a file of what is done so far; the open segment is done again next time."""
        if not self.segment and not self.journal.parts:
            return
        parts = self.journal.parts
        if self.segment:
            parts = (*parts, self._close_part(writer))
        if "main" not in self.videos:
            return
        self._join(parts, "partial")
        self._give_names()
        log.info("%s holds the %d frames done so far", self.job.output, sum(part.frames for part in parts))

    def _joined(self, name: str) -> Path:
        return self.work.folder / f"joined-{name}{self.videos[name][0].suffix.lower()}"

    def _join(self, parts: tuple[Part, ...], kind: str) -> None:
        """Put the segments together and note in the journal how large the output is."""
        check_space(self.work.folder, sum(part.size for part in parts) + self._sound_bytes())
        for name in self.videos:
            self._join_one(name, parts, kind)
        size = self._joined("main").stat().st_size if "main" in self.videos else 0
        self.journal = replace(self.journal, **{kind: size})
        self.work.save(self.journal)

    def _join_one(self, name: str, parts: tuple[Part, ...], kind: str) -> None:
        """Write one joined file; what the container does not take of the other streams is left out."""
        path, encoding = self.videos[name]
        main = name == "main"
        if not main:
            parts = tuple(replace(part, name=part.compare, depth=part.compare_depth) for part in parts)
        copies = main and self.job.audio and isinstance(self.source, VideoSource)
        sides = self.sides if main else []
        while True:
            try:
                return join(
                    self._joined(name),
                    container_of(path) or "",
                    [self.work.folder / part.name for part in parts],
                    parts,
                    encoding,
                    source=self.job.source if copies else None,
                    stream=self.source.stream_index if isinstance(self.source, VideoSource) else None,
                    sides=sides,
                    metadata=self.job.metadata if main else {},
                    window=self._window(parts, kind),
                )
            except RefusedError as refused:
                if sides:
                    # Each was taken by itself: it is the last that is one too many.
                    *sides, last = sides
                    self.sides = sides
                    log.warning("stream %d is left out: %s (an output .mkv keeps it)", last.index, refused)
                elif copies:
                    copies = False
                    log.warning("chapters, words and attached files are left out: %s", refused)
                else:
                    raise VideoError(
                        f"{path.name} cannot be written ({refused}): choose another --codec or suffix."
                    ) from refused

    def _sound_bytes(self) -> int:
        """The most that the source's other streams can take."""
        return self.job.source.stat().st_size if self.job.audio and self.job.source.is_file() else 0

    def _window(self, parts: tuple[Part, ...], kind: str) -> Window:
        """The time of the source that the parts cover; a job that starts later has its start at 0.

        So has a source whose times begin anywhere, or before 0, where players would hide it.
        """
        base = self.source.info.time_base
        low, high = parts[0].first * base, float(parts[-1].end * base)
        if kind == "rehearsed" or (kind == "finished" and self.job.end is None):
            high = float("inf")
        if self.job.start != 0 and kind != "rehearsed":
            return Window(float(low), high, low)
        earliest = min([low, *(side.first for side in self.sides)])
        return Window(
            high=high, shift=earliest if self.source.info.free_start else min(earliest, Fraction(0))
        )

    def _give_names(self) -> None:
        """The joined files become the outputs."""
        for name, (path, _) in self.videos.items():
            if self._joined(name).is_file():
                self._joined(name).replace(path)
                sync_folder(path.parent)

    def _complete(self) -> None:
        """Everything is done: give the output its name and the side files their content, then clean up."""
        last = self.journal.first_index + self.journal.frames - 1
        if self.job.state_out is not None:
            self._save_state(self.job.state_out)
        if self.job.cuts_out is not None:
            scenes.write_list(self.job.cuts_out, self.journal.first_index, last, self.journal.cuts)
        self._give_names()
        self._clean_up()

    def _save_state(self, path: Path) -> None:
        """The state after the last frame, as the model made it."""
        state = State.load(self.work.folder / self.journal.state)
        state = replace(state, tensors={name: x for name, x in state.tensors.items() if name != LAST})
        if not (state.has_previous or self.pipe.info.frame_by_frame):
            log.warning(
                "%s starts a new sequence at frame %d: %s cannot be continued from the end of a video",
                path,
                state.index,
                self.pipe.info.family,
            )
        state.save(path)

    def _clean_up(self) -> None:
        """Remove the work folder, and say what was repaired on the way."""
        self.work.clear()
        for what, count in self.source.notes.items():
            if count:
                log.warning("%s: %d %s", self.job.source, count, what)
