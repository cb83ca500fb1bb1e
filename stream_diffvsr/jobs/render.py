"""Render a scene into segments; any process that has the model and the files can do this."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..media.join import SegmentFile
from ..media.pictures import Picture
from ..media.read import SourceFrame
from ..media.sizes import enlarge, split_screen
from ..tensors import SCALE, from_pixels
from ..upscaler import OnStep, Provenance, State, Upscaler, ignore_progress, stream
from .job import FrameTime, Speed
from .journal import Journal, Segment, WorkFolder, digest
from .overlap import Background
from .prepare import Prepared, check_space, open_sinks

log = logging.getLogger(__name__)

LAST = "last_lq"
"""Name under which the last frame, (1, 3, h, w), is added to a saved state that does not contain it."""

LONGEST, SEGMENT_SECONDS, MEASURED = 120, 60.0, 3
"""The maximum frames per segment, the seconds of work to aim for, and the frames timed to choose a length."""

LARGE_STATE = 1 << 30
"""Size in bytes above which a state is not kept; its scene then starts over when the job is resumed."""


@dataclass(frozen=True, eq=False)
class Made:
    """A frame that has been handed to the encoder."""

    index: int
    """Its index in the source."""
    lq: Tensor
    """The model's input, (1, 3, h, w) in [0, 1]."""
    hq: Tensor
    """The result at its final size, (1, 3, H, W) in [0, 1]."""
    cut: bool
    """Whether it begins a scene."""
    how: Provenance | None
    """How it was made; None between borders if the model reports it only at borders."""


class Renderer:
    """Renders scenes of one job into its work folder.

    The result depends only on the model, the job, the journal, and the state from which a scene continues.
    """

    def __init__(
        self,
        pipe: Upscaler,
        prepared: Prepared,
        work: WorkFolder,
        journal: Journal,
        writer: Background,
        on_step: OnStep | None = None,
        alone: bool = True,
    ) -> None:
        """If other processes also render the job (`alone` is False), only the driver writes its journal."""
        self.pipe, self.prepared, self.work, self.writer = pipe, prepared, work, writer
        self.alone = alone
        self.on_step = on_step or ignore_progress
        self.sinks = open_sinks(prepared, work.folder)
        self.journal = journal
        self.saved = journal if work.journal_file.is_file() else None
        self.made = Provenance.from_texts(journal.provenance)
        self.clock = Speed()
        self.open: list[FrameTime] = []
        self.closed: SegmentFile | None = None
        self.last: SourceFrame | None = None
        self.scene, self.state_bytes = 0, self._guessed_state()

    def _guessed_state(self) -> int:
        """Estimate the size in bytes of a Stream-DiffVSR state, for use until the first state is saved."""
        if not self.pipe.info.frame_by_frame:
            return 0
        height, width = self.prepared.job.sizes.model(*self.prepared.size)
        return 4 * 3 * height * width * (SCALE**2 + 1)

    def lq(self, frame: SourceFrame) -> Tensor:
        """Return the model's input for a frame, (1, 3, h, w) in [0, 1]."""
        return self.prepared.job.sizes.to_model(frame.rgb)

    def render(
        self, frames: Iterator[tuple[SourceFrame, Tensor]], state: State | None, scene: int | None, cut: bool
    ) -> Iterator[Made]:
        """Render a scene, or its remaining frames, in a new session.

        `scene` is the index of the scene's first frame; at a scene's beginning, `scene` and `state` may be
        None. A segment ends only where the session can be continued exactly, or at the scene's end. Frames
        before `scene` warm up the model and are discarded.
        """
        first = next(frames, None)
        if first is None:
            return
        index = first[0].index
        if self.journal.first < 0:
            self.journal = replace(self.journal, first=index)
        self.scene = index if scene is None else scene
        if state is None or not (state.has_previous or state.provenance.model):
            state = State(index=index + self.prepared.offset(self.journal.first), provenance=self.made)
        session = self.pipe.session(self.prepared.job.options, state, self.on_step)
        waiting: deque[tuple[SourceFrame, Tensor]] = deque()
        end = state
        for result in stream(session, _seen(itertools.chain([first], frames), waiting)):
            frame, lq = waiting.popleft()
            if frame.index < self.scene:
                continue
            border = session.state()
            made = self._add(frame, lq, result.hq, cut, border and border.provenance)
            yield made
            cut = False
            at_border = border is not None and border.index == result.index + 1
            end = border if border is not None and at_border else State(index=result.index + 1)
            if at_border and len(self.open) >= self._length():
                self._finish(end, made.lq, closed=False)
        self._finish(end, None, closed=True)

    def _length(self) -> int:
        """Return the frames per segment: the requested number, or a minute's work at the first frames' speed.

        The speed is measured once per job, and the number is recorded in the journal.
        """
        if not self.journal.segment_frames and self.clock.count >= MEASURED:
            frames = max(1, min(LONGEST, round(SEGMENT_SECONDS * self.clock.fps)))
            self.journal = replace(self.journal, segment_frames=frames)
        return self.prepared.job.segment_frames or self.journal.segment_frames or LONGEST

    def _add(self, frame: SourceFrame, lq: Tensor, hq: Tensor, cut: bool, how: Provenance | None) -> Made:
        """Hand an upscaled frame to the writing thread."""
        if not self.open:
            self._begin(frame)
        hq = self.prepared.job.finished(hq, lq, frame.size)
        self._write(frame, lq, hq)
        end = frame.time + (frame.duration or self.prepared.step)
        self.open.append(FrameTime(frame.index, frame.time, end))
        self.last = frame
        self.clock.tick()
        return Made(frame.index, lq, hq, cut, how)

    def _begin(self, frame: SourceFrame) -> None:
        """Begin a segment; raise `OSError` if its files, the state and the joined file do not fit on disk."""
        done = [part.size for part in self.journal.segment_files]
        needed = 2 * self.state_bytes + sum(done) + 2 * max(done, default=0) + self.prepared.side_bytes
        check_space(self.work.folder, needed)
        for sink in self.sinks.values():
            self.writer.add(sink.begin, frame.index)

    def _write(self, frame: SourceFrame, lq: Tensor, hq: Tensor) -> None:
        alpha = None
        if frame.alpha is not None:
            alpha = enlarge(frame.alpha.to(hq.device), (hq.shape[-2], hq.shape[-1]))
        picture = Picture(hq, alpha, frame.bits, frame.profile)
        prepared = {}
        for name, sink in self.sinks.items():
            shown = replace(picture, rgb=split_screen(lq, hq)) if name == "compare" else picture
            prepared[name] = sink.prepare(shown)
        for name, sink in self.sinks.items():
            self.writer.add(sink.add, prepared[name], frame.index, frame.time)

    def close(self) -> SegmentFile | None:
        """Finish the open segment's files if not yet done; return them, or None if no segment is open."""
        if not self.open or self.closed is not None:
            return self.closed
        self.writer.wait()
        finished = {name: sink.finish() for name, sink in self.sinks.items()}
        name, size, depth = finished["main"]
        compare, _, compare_depth = finished.get("compare", ("", 0, 0))
        start, end = self.open[0].start, self.open[-1].end
        self.closed = SegmentFile(name, len(self.open), size, start, end, depth, compare, compare_depth)
        return self.closed

    def _finish(self, state: State, lq: Tensor | None, closed: bool) -> None:
        """Close the segment and save the state; only then write the record, which marks both as complete.

        `lq` is the last frame, or None at a scene's end, where the state is kept only if it was requested.
        """
        before = [segment for segment in self.journal.segments if segment.scene == self.scene]
        states = {old.state for old in before}
        part, keeps = self.close(), not closed or self.prepared.job.state_out is not None
        if part is not None and self.last is not None:
            start = self.open[0].index
            segment = Segment(
                start=start,
                scene=self.scene,
                part=part,
                closed=closed,
                digests={name: digest(self.work.folder / name) for name in (part.name, part.compare) if name},
                state=self._save_state(state, lq, start) if keeps else "",
                place=self.prepared.source.place(self.last),
                changed=self.made.differences(state.provenance) if state.provenance.model else "",
            )
        else:  # the scene ended together with its last segment
            segment = before.pop()
            segment = replace(segment, closed=True, state=segment.state if keeps else "")
        if self.alone and self.journal != self.saved:
            self.work.save(self.journal)
            self.saved = self.journal
        self.work.add(segment)
        for name in states - {"", segment.state}:
            (self.work.folder / name).unlink(missing_ok=True)
        self.saved = self.journal = self.journal.with_segment(segment)
        self.open, self.closed = [], None

    def _save_state(self, state: State, lq: Tensor | None, start: int) -> str:
        """Write a state next to its segment; return its file name, or '' if it is too large to keep."""
        tensors = dict(state.tensors)
        if lq is not None and "previous_lq" not in tensors:
            tensors[LAST] = from_pixels(lq)
        kept = replace(state, tensors=tensors)
        if kept.nbytes > LARGE_STATE:
            self.state_bytes = 0
            return ""
        self.state_bytes = kept.nbytes
        check_space(self.work.folder, self.state_bytes)
        name = f"state-{start:06}.safetensors"
        kept.save(self.work.folder / name)
        return name

    def abort(self) -> None:
        """Cancel queued writes, and discard unfinished files."""
        self.writer.drop()
        for sink in self.sinks.values():
            sink.abort()


def _seen(
    scene: Iterator[tuple[SourceFrame, Tensor]], waiting: deque[tuple[SourceFrame, Tensor]]
) -> Iterator[Tensor]:
    """Yield the model's input for each frame of a scene, and add the frame to `waiting`."""
    for frame, lq in scene:
        waiting.append((frame, lq))
        yield from_pixels(lq)


def load_state(path: Path) -> tuple[State, Tensor | None]:
    """Load a state and the frame before it, (1, 3, h, w) in model range, or None if no frame was saved."""
    state = State.load(path)
    tensors = dict(state.tensors)
    last = tensors.pop(LAST, None)
    return replace(state, tensors=tensors), tensors.get("previous_lq", last)
