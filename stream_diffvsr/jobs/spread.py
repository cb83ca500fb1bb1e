"""Running jobs on several workers: one pass reads ahead to find the scenes; the longest are rendered first.

The driver never handles the resulting pictures: workers write segments into the job's folder and return
records, which the driver checks against the files before accepting them. A `Pool` manages the workers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import StreamDiffVSRError, VideoError
from .ahead import Split, find_scenes
from .job import VideoJob
from .journal import read_segment, resumable
from .prepare import Model, Prepared, prepare
from .run import Run
from .scenes import Scene
from .worker import to_json

log = logging.getLogger(__name__)

POLL = 0.5
"""Seconds between polls of the workers."""
LOSSES = 3
"""A job fails once this many workers have been lost while rendering the same scene."""
OPEN = 4
"""Number of jobs to keep open beyond one per worker, so that even short files keep all workers busy."""
PATIENCE = 10.0
"""Seconds that workers may take to stop."""


class Pool(Protocol):
    """Workers that each render one scene at a time; see `worker.Worker` for what they send back."""

    threads: int

    @property
    def model(self) -> Model: ...

    @property
    def workers(self) -> Sequence[str]:
        """Names of the workers that have not been lost."""
        ...

    def check_access(self, job: Mapping[str, Any], source: Mapping[str, Any], token: str) -> list[str]:
        """Return the errors of workers that cannot access the job's files."""
        ...

    def give(self, worker: str, name: str, job: Mapping[str, Any], scene: Mapping[str, Any]) -> None:
        """Have a worker render a scene, identified by `name`."""
        ...

    def answers(self, seconds: float) -> list[tuple[str, Mapping[str, Any] | None]]:
        """Wait up to `seconds` for answers; return each with its scene's name, or None for a lost worker."""
        ...

    def progress(self) -> Mapping[str, int]:
        """Return how many frames are done in each scene being rendered, keyed by the scene's name."""
        ...

    def stop(self, name: str) -> None:
        """Cancel a scene; `answers` still returns its answer."""
        ...


@dataclass(frozen=True)
class SpreadProgress:
    """Progress of all jobs, reported every half second."""

    done: int
    total: int | None
    """Number of frames in all jobs; None until all jobs are open, or if the length of any is unknown."""
    fps: float
    files: int
    """Number of jobs that have ended."""
    scenes: Mapping[str, str]
    """The scene that each worker is rendering."""

    @property
    def seconds_left(self) -> float | None:
        if self.total is None or self.fps <= 0:
            return None
        return max(0, self.total - self.done) / self.fps


class SpreadRun(Run):
    """A run whose scenes the driver distributes among workers."""

    def __init__(self, prepared: Prepared, pool: Pool, split: Split) -> None:
        super().__init__(pool.model, prepared, pool.threads)
        self.pool, self.split, self.json = pool, split, to_json(prepared.job)
        self.found: list[Scene] = []
        self.ready: list[Scene] = []
        self.busy: dict[str, Scene] = {}
        self.losses: dict[int, int] = {}
        self.error: Exception | None = None
        self.taken, self.recorded, self.ended = 0, False, False
        self.story = self.steps()

    def frame_settings(self) -> dict[str, Any]:
        parts = {"split": f"{self.split.frames} {self.split.warm_up}"} if self.split.frames else {}
        return {**super().frame_settings(), **parts}

    def _upscale(self) -> Iterator[Any]:
        """Yield until all scenes are rendered."""
        self._note()
        if wrong := self.pool.check_access(self.json, self.journal.source, self.work.token()):
            raise VideoError(wrong[0])
        with ThreadPoolExecutor(1, "stream-diffvsr scenes") as thread:
            finding = thread.submit(self._find)
            try:
                while self.busy or not (self.error or (self.recorded and not self.ready)):
                    if self.error is None:
                        self._take_found(finding)
                    yield None
                if self.error is not None:
                    raise self.error
            except (GeneratorExit, KeyboardInterrupt, VideoError):
                self._leave_playable()
                raise
            finally:
                self.ended = True

    def _find(self) -> None:
        """Find the scenes, unless an earlier run has recorded them all; this runs in a thread."""
        state = ""
        if self.job.state is not None:
            state = "state-given.safetensors"
            self.job.state.save(self.work.folder / state)
        known = [Scene.from_json(scene) for scene in self.journal.scenes]
        for scene in known or find_scenes(self.prepared, self.split, state, told=True):
            if self.ended:
                return
            self.found.append(scene)

    def _take_found(self, finding: Future[None]) -> None:
        """Take the scenes found since the last call; record them once all are found."""
        over, count = finding.done(), len(self.found)
        for scene in self.found[self.taken : count]:
            if self.journal.first < 0:
                self._note(first=scene.first)
            if not self._is_done(scene):
                self.ready.append(scene)
        self.taken = count
        if over and not self.recorded:
            finding.result()
            self.recorded = True
            self._note(scenes=tuple(scene.to_json() for scene in self.found))

    def _is_done(self, scene: Scene) -> bool:
        """Whether finished segments cover the scene to its end."""
        within = [s for s in self.journal.segments if s.scene == scene.first]
        return bool(within) and (within[-1].closed or within[-1].end == scene.end)

    def take(self, name: str, answer: Mapping[str, Any] | None) -> None:
        """Process a worker's answer for a scene; fail the job if segment files are missing or changed."""
        scene = self.busy.pop(name)
        if answer is None:
            self.losses[scene.first] = self.losses.get(scene.first, 0) + 1
            if self.losses[scene.first] >= LOSSES:
                self.fail(
                    OSError(
                        f"{LOSSES} workers were lost while rendering the scene that starts at frame "
                        f"{scene.first}"
                    )
                )
            elif self.error is None:
                self.ready.append(scene)
            return
        if "error" in answer:
            wrong = answer["error"]
            if answer["kind"] != "stopped":
                self.fail(VideoError(wrong) if answer["kind"] == "input" else OSError(wrong))
            return
        segments = [read_segment(record) for record in answer["segments"]]
        try:
            self.work.check(segments)
        except VideoError as error:
            self.fail(error)
            return
        for segment in segments:
            self.journal = self.journal.with_segment(segment)
        if not self.journal.segment_frames and answer["segment_frames"]:
            self._note(segment_frames=answer["segment_frames"])
        self.prepared.source.notes.update(answer["notes"])

    def fail(self, error: Exception) -> None:
        """Fail the job; it ends once its workers have stopped."""
        self.error = self.error or error
        self.ready.clear()
        for name in self.busy:
            self.pool.stop(name)

    def _leave_playable(self) -> None:
        """Write a file with all complete segments, including those of unfinished scenes."""
        found = self.work.load()
        for segment in () if found is None else found.segments:
            with contextlib.suppress(VideoError):
                self.work.check([segment])
                self.journal = self.journal.with_segment(segment)
        self.journal = replace(self.journal, segments=resumable(self.journal.segments))
        if self.journal.segments and "main" in self.output.videos:
            self._note(partial=self.output.join(self.journal.segment_files, finished=False))
            self._give_names()
            log.info("%s contains the %d frames done so far", self.job.output, self.journal.frames)


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: VideoJob
    error: Exception | None = None
    """The error that made it fail; None if its output is complete."""


class Spread:
    """Many jobs on one pool: `steps` runs them, and `outcomes` lists how each ended."""

    def __init__(self, jobs: Sequence[VideoJob], pool: Pool, split: Split | None = None) -> None:
        self.waiting, self.pool, self.split = deque(jobs), pool, split or Split()
        self.runs: list[SpreadRun] = []
        self.outcomes: list[Outcome] = []
        self.names: dict[str, tuple[SpreadRun, str]] = {}
        self.over, self.all_told = 0, True
        self.total = 0
        self.times = deque([(time.monotonic(), 0)], maxlen=40)

    def steps(self) -> Generator[SpreadProgress, None, None]:
        """Run all jobs; a job that fails does not stop the others. Closing the generator stops all workers.

        Raises `OSError` when no worker is left; finished segments are kept.
        """
        try:
            while self.waiting or self.runs:
                self._open()
                self._advance()
                self._hand_out()
                for name, answer in self.pool.answers(POLL):
                    run, _ = self.names.pop(name)
                    run.take(name, answer)
                if not self.pool.workers:
                    raise OSError("all workers have been lost; run the same command again to resume")
                yield self._progress()
        finally:
            self._stop()

    def _open(self) -> None:
        """Open the next jobs until enough are open to keep all workers busy."""
        while self.waiting and len(self.runs) < len(self.pool.workers) + OPEN:
            job = self.waiting.popleft()
            try:
                run = SpreadRun(prepare(job).fitted(self.pool.model), self.pool, self.split)
                next(run.story, None)
            except (StreamDiffVSRError, OSError) as error:
                self.outcomes.append(Outcome(job, error))
                continue
            self.runs.append(run)
            self.all_told = self.all_told and run.prepared.total is not None
            self.total += run.prepared.total or 0

    def _advance(self) -> None:
        """Advance each job: take newly found scenes, and join the output once all scenes are rendered."""
        for run in list(self.runs):
            try:
                next(run.story)
                continue
            except StopIteration:
                self.outcomes.append(Outcome(run.job))
            except (StreamDiffVSRError, OSError) as error:
                self.outcomes.append(Outcome(run.job, error))
            self.over += run.journal.frames
            self.runs.remove(run)

    def _hand_out(self) -> None:
        """Give one scene to each idle worker, starting with the longest scene."""
        busy = {worker for _, worker in self.names.values()}
        for worker in self.pool.workers:
            ready = [(run, scene) for run in self.runs for scene in run.ready]
            if worker in busy or not ready:
                continue
            run, scene = max(ready, key=lambda each: _length(*each))
            name = f"{run.job.output}#{scene.first}"
            run.ready.remove(scene)
            run.busy[name] = scene
            self.names[name] = run, worker
            self.pool.give(worker, name, run.json, scene.to_json())

    def _progress(self) -> SpreadProgress:
        at_work = self.pool.progress()
        done = self.over + sum(run.journal.frames for run in self.runs)
        done += sum(frames for name, frames in at_work.items() if name in self.names)
        self.times.append((time.monotonic(), done))
        seconds = self.times[-1][0] - self.times[0][0]
        return SpreadProgress(
            done=done,
            total=self.total if self.all_told and not self.waiting else None,
            fps=max(0, done - self.times[0][1]) / max(1e-9, seconds),
            files=len(self.outcomes),
            scenes={worker: name for name, (_, worker) in self.names.items()},
        )

    def _stop(self) -> None:
        """Stop all workers between two steps of a frame, and end all jobs; finished segments are kept."""
        for name in self.names:
            self.pool.stop(name)
        end = time.monotonic() + PATIENCE
        while self.names and self.pool.workers and time.monotonic() < end:
            for name, answer in self.pool.answers(POLL):
                run, _ = self.names.pop(name)
                run.take(name, answer)
        for run in self.runs:
            run.story.close()


def _length(run: SpreadRun, scene: Scene) -> float:
    """Return a scene's number of frames, or infinity if its end is unknown, because it may be long."""
    return math.inf if scene.end is None else scene.end - scene.first
