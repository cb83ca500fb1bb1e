"""Run a whole job, from file to file, for the command line or nodes, in segments that survive a crash.

    with contextlib.closing(run(pipe, VideoJob(source="in.mp4", output="out.mp4"))) as progress:
        for step in progress:
            show(step.done, step.total, step.fps)

Threads decode frames in advance and encode the results; the loop between them is `upscaler.stream`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import VideoError
from ..media.read import FolderSource, SourceFrame
from ..tensors import from_pixels
from ..upscaler import OnStep, State, Upscaler
from . import scenes
from .job import JobProgress, VideoJob
from .journal import Journal, Segment, WorkFolder, continue_from, resumable
from .output import Output
from .overlap import Background, prefetch
from .prepare import (
    Model,
    Prepared,
    frame_settings,
    open_sinks,
    prepare,
    size_of,
    source_fingerprint,
    versions,
)
from .render import Made, Renderer, load_state

__all__ = ["JobProgress", "VideoJob", "prepare", "run"]

log = logging.getLogger(__name__)

WRITE_DEPTH = 4
"""Maximum number of frames that may wait for the encoder."""


def run(
    pipe: Upscaler, job: VideoJob | Prepared, on_step: OnStep | None = None
) -> Generator[JobProgress, None, None]:
    """Run a job, yielding its progress after each frame; the output is complete when the generator ends.

    Closing the generator, or an exception from `on_step`, cancels the job: a playable file with the finished
    part remains, and running the same job again resumes it. Raises `VideoError` if files cannot be read or
    written as requested, and `OSError` if reading or writing fails midway (finished segments are kept).
    """
    prepared = prepare(job) if isinstance(job, VideoJob) else job
    yield from _OneProcess(pipe, prepared.fitted(pipe), on_step).steps()


class Run:
    """One run of a job; subclasses define how its scenes are rendered."""

    def __init__(self, model: Model, prepared: Prepared, threads: int = 0) -> None:
        self.model, self.prepared, self.job = model, prepared, prepared.job
        self.threads = threads or torch.get_num_threads()
        self.work = WorkFolder(self.job.output)
        self.output = Output(prepared, self.work.folder)
        self.sinks = open_sinks(prepared, self.work.folder)

    def steps(self) -> Generator[Any, None, None]:
        """Upscale the remaining frames, then join the segments into the output."""
        with self.work.locked():
            self.journal = self._begin()
            if not self._finished():
                self.output.rehearse(self.sinks, functools.partial(self._guarded, "sound and subtitles"))
                if self.output.sides:
                    # So that a later run finds the side streams, even if this one finishes no segment.
                    self.work.save(self.journal)
                yield from self._upscale()
                self._join()
            self._complete()

    def _upscale(self) -> Iterator[JobProgress]:
        """Upscale the remaining frames; afterwards, `journal` contains all segments."""
        raise NotImplementedError

    def _guarded(self, stage: str, index: int, total: int) -> None:
        """Report a stage's progress to the caller, which may raise an exception to cancel."""

    def frame_settings(self) -> dict[str, Any]:
        """Return all settings that affect the frames of the output."""
        return frame_settings(self.model, self.prepared)

    def _begin(self) -> Journal:
        """Return the journal to continue, or a new one. Raises `VideoError` if the run must not start."""
        if self.job.restart:
            self.work.clear()
        before = self.work.load()
        self._check_free(before)
        if self.prepared.writes_folder:
            self.job.output.mkdir(exist_ok=True)
        made_with = versions(self.model.device, self.threads)
        now = Journal(source_fingerprint(self.job.source), self.frame_settings(), made_with)
        # Settings may still change if the earlier run left neither a segment nor a partial output.
        if before is None or (not before.segments and before.partial < 0):
            if before is None or before.source != now.source:
                self.work.clear()
            self.work.remove_leftovers(now)
            size = self.job.sizes.model(*self.prepared.size)
            return replace(now, provenance=self.model.provenance(size, self.job.options).to_texts())
        journal = continue_from(before, now, self.work.folder)
        self.work.check(journal.segments)
        journal = replace(journal, segments=resumable(journal.segments))
        self.work.remove_leftovers(journal)
        if journal.segments:
            log.info("resuming after the %d frames already done", journal.frames)
        return journal

    def _check_free(self, before: Journal | None) -> None:
        """Raise `VideoError` rather than overwrite an output that no earlier run of this job wrote."""
        output = self.job.output
        taken = any(output.iterdir()) if output.is_dir() else output.exists()
        if taken and before is not None:
            pictures_begun = "main" not in self.output.videos
            taken = not (pictures_begun or output.stat().st_size in (before.partial, before.finished))
        if taken and not self.job.overwrite:
            raise VideoError(f"{output} exists: choose another output with -o, or set --overwrite.")

    def _finished(self) -> bool:
        """Whether an earlier run did everything except naming the outputs and cleaning up."""
        places = [(path, self.output.joined(name)) for name, path in self.output.videos.items()]
        return self.journal.finished >= 0 and all(a.is_file() or b.is_file() for a, b in places)

    def _note(self, **facts: Any) -> None:
        """Record new facts about the job in the journal."""
        self.journal = replace(self.journal, **facts)
        self.work.save(self.journal)

    def _join(self) -> None:
        """Join the segments and record the size of the output."""
        if not self.journal.segments:
            raise VideoError(f"{self.job.source} has no frames in the requested span.")
        self._note(finished=self.output.join(self.journal.segment_files, finished=True))

    def _complete(self) -> None:
        """Write the requested state and list of scenes, give the outputs their final names, and clean up."""
        last = self.journal.segments[-1]
        if self.job.state_out is not None:
            self._save_state(last)
        if self.job.cuts_out is not None:
            scenes.write_list(self.job.cuts_out, self.journal.first, last.end - 1, self.journal.cuts)
        self._give_names()
        self._clean_up()

    def _save_state(self, last: Segment) -> None:
        """Save the model's state after the last frame, if requested."""
        path = self.job.state_out
        if path is None:
            return
        if last.state:
            state, _ = load_state(self.work.folder / last.state)
        else:  # the state was too large to keep
            state = State(index=last.end + self.prepared.offset(self.journal.first))
        if not (state.has_previous or self.model.info.frame_by_frame):
            log.warning(
                "%s starts a new sequence at frame %d: %s models cannot continue from the end of a video",
                path,
                state.index,
                self.model.info.family,
            )
        state.save(path)

    def _give_names(self) -> None:
        self.output.give_names()

    def _clean_up(self) -> None:
        """Clear the work folder, and log what was repaired while reading the source."""
        self.work.clear()
        for what, count in self.prepared.source.notes.items():
            if count:
                log.warning("%s: %d %s", self.job.source, count, what)
        with contextlib.suppress(OSError, VideoError):
            if (now := size_of(self.job.source)) != (before := self.journal.source["size"]):
                log.warning(
                    "%s had %d bytes at the start and has %d now: it was still being written, so the end may "
                    "be missing; run the job again when the file is complete",
                    *(self.job.source, before, now),
                )


class _OneProcess(Run):
    """A run in this process with one model. Scenes are found as frames are read, so no frame has to wait."""

    def __init__(self, pipe: Upscaler, prepared: Prepared, on_step: OnStep | None) -> None:
        super().__init__(pipe, prepared)
        self.pipe, self.on_step = pipe, on_step
        self.cancelled = False

    def _upscale(self) -> Iterator[JobProgress]:
        """Fill the gaps between the finished segments; a new job is one gap."""
        count = itertools.count(self.journal.frames + 1)
        with Background(WRITE_DEPTH) as writer:
            renderer = Renderer(self.pipe, self.prepared, self.work, self.journal, writer, self._guarded)
            try:
                for after, before in self.journal.gaps():
                    for made in self._fill(renderer, after, before):
                        yield self._progress(renderer, made, next(count))
            except BaseException as error:
                if self.cancelled or isinstance(error, (GeneratorExit, KeyboardInterrupt, VideoError)):
                    self._leave_playable(renderer)
                raise
            finally:
                renderer.abort()
        self.journal = renderer.journal

    def _fill(self, renderer: Renderer, after: Segment | None, before: Segment | None) -> Iterator[Made]:
        """Render the frames between two segments, scene by scene."""
        span, place = self.job.span, None
        state, previous = self.job.state, None
        if state is not None:
            previous = state.tensors.get("previous_lq")
        if after is not None:
            span, place, state = replace(span, start=after.end), after.place, None
            if not after.closed:
                state, previous = load_state(self.work.folder / after.state)
        if before is not None:
            span = replace(span, end=before.start - 1)
        frames = prefetch(self.prepared.source.frames(span, place), self.job.read_ahead)
        with contextlib.closing(frames):
            here = (replace(frame, device=self.pipe.device) for frame in frames)
            pairs = ((frame, renderer.lq(frame)) for frame in here)
            begins = functools.partial(self._begins_scene, after is not None and after.closed, previous)
            scene = after.scene if after is not None else None
            for cut, found in scenes.in_scenes(pairs, begins):
                if cut:
                    state, scene = None, None
                yield from renderer.render(found, state, scene, cut)

    def _begins_scene(
        self,
        first: bool,
        previous: Tensor | None,
        now: tuple[SourceFrame, Tensor] | None,
        following: tuple[SourceFrame, Tensor],
    ) -> bool:
        """Whether a scene begins with the frame `following`, which was read after `now`.

        If no frame was read before it (`now` is None), a scene begins if `first` is set, or if `following`
        differs enough from `previous`.
        """
        if now is not None:
            first, previous = False, from_pixels(now[1])
        frame, lq = following[0], from_pixels(following[1])
        if previous is not None and previous.shape != lq.shape:
            # Pictures in a folder may differ in size; in a video, the model refuses such a frame.
            cut = isinstance(self.prepared.source, FolderSource)
        else:
            rule = self.prepared.cut_rule
            before = None if first or previous is None else rule.summary(previous)
            cut = first or (previous is not None and rule.between(frame.index, before, rule.summary(lq)))
        if cut:
            log.info("a new scene begins at frame %d", frame.index)
        return cut

    def _progress(self, renderer: Renderer, made: Made, done: int) -> JobProgress:
        return JobProgress(
            done=done,
            total=self.prepared.total,
            fps=renderer.clock.fps,
            segment=len(renderer.journal.segments),
            index=made.index,
            lq=made.lq,
            hq=made.hq,
            cut=made.cut,
            how=made.how,
        )

    def _guarded(self, stage: str, index: int, total: int) -> None:
        """Call the caller's `on_step`; an exception from it cancels the job."""
        if self.on_step is None:
            return
        try:
            self.on_step(stage, index, total)
        except BaseException:
            self.cancelled = True
            raise

    def _leave_playable(self, renderer: Renderer) -> None:
        """Write a file with the frames done before a cancellation; the next run redoes the open segment."""
        parts, open_part = renderer.journal.segment_files, None
        try:
            open_part = renderer.close()
        except Exception as error:  # cancelled while the encoder was being closed
            log.info("the last frames could not be added to the file: %r", error)
        if open_part is not None and open_part not in parts:
            parts = (*parts, open_part)
        if not parts or "main" not in self.output.videos:
            return
        parts = sorted(parts, key=lambda part: part.first)
        self.journal = renderer.journal
        self._note(partial=self.output.join(parts, finished=False))
        self._give_names()
        log.info("%s contains the %d frames done so far", self.job.output, sum(part.frames for part in parts))
