"""A worker on another device or machine, which keeps a model open and renders scenes into a job's folder.

This module does not depend on Ray. Arguments and results are JSON values: paths, frame ranges, settings and
messages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import StreamDiffVSRError, VRAMError
from ..load import FAMILIES, load_pipeline
from ..upscaler import Provenance, State, Upscaler
from .job import VideoJob
from .journal import WorkFolder, resumable
from .overlap import Background, prefetch
from .prepare import Prepared, prepare, source_fingerprint
from .render import Renderer, load_state
from .scenes import Scene

log = logging.getLogger(__name__)

WRITE_DEPTH = 4


class StoppedError(Exception):
    """The driver cancelled this scene."""


def to_json(job: VideoJob) -> dict[str, Any]:
    """Return a job as JSON values, without the state it continues from, which stays with the driver."""
    found: dict[str, Any] = {}
    for field in fields(job):
        value = getattr(job, field.name)
        if field.name == "options":
            value = None if value is None else asdict(value)
        elif isinstance(value, Path):
            value = str(value.absolute())
        elif isinstance(value, Fraction):
            value = ["/", value.numerator, value.denominator]
        elif isinstance(value, Mapping):
            value = dict(value)
        found[field.name] = value
    return {**found, "state": None}


def from_json(content: Mapping[str, Any], options: type) -> VideoJob:
    """Recreate a job from the output of `to_json`; `options` is the class of its family's options."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        fraction = isinstance(value, list) and value[:1] == ["/"]
        found[key] = Fraction(*value[1:]) if fraction else tuple(value) if isinstance(value, list) else value
    own = {field.name for field in fields(options)}
    given = {key: value for key, value in (content["options"] or {}).items() if key in own}
    return VideoJob(**{**found, "options": options(**given)})


def place_of_work() -> str:
    """Return this machine's name, for use in messages."""
    return platform.node() or "an unnamed machine"


class Lines(logging.Handler):
    """Keeps log messages until the driver asks for them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[tuple[int, str]] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))

    def take(self) -> list[tuple[int, str]]:
        found = []
        while self.lines:
            found.append(self.lines.popleft())
        return found


class Worker:
    """A model on one device. One thread calls `render`; another may call the other methods at any time."""

    def __init__(self, model: Mapping[str, Any], threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.model = model
        self.pipe: Upscaler | None = None
        self.lines = Lines()
        self.done, self.scene, self.stopped = 0, "", ""
        self.prepared: tuple[Any, Prepared] | None = None

    def keep_lines(self) -> None:
        """Keep log messages for the driver, instead of writing them where nobody would see them."""
        logger = logging.getLogger("stream_diffvsr")
        logger.setLevel(logging.INFO)
        logger.addHandler(self.lines)
        logger.propagate = False

    def describe(self) -> dict[str, Any]:
        """Open the model; return details of the model, machine and process, or an error."""
        facts = {
            "version": __version__,
            "torch": torch.__version__,
            "machine": place_of_work(),
            "process": os.getpid(),
            "threads": torch.get_num_threads(),
        }
        if (told := _call_result(self._open)) and "error" in told:
            return {**facts, **told}
        pipe = self._open()
        return {**facts, "info": asdict(pipe.info), "device": pipe.device.type}

    def _open(self) -> Upscaler:
        if self.pipe is None:
            self.pipe = load_pipeline(**self.model)
        return self.pipe

    def provenance(self, size: tuple[int, int], options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the provenance of frames made from an LQ input of this size (height, width)."""

        def made() -> dict[str, Any]:
            pipe = self._open()
            own = None if options is None else FAMILIES[pipe.info.family].options(**options)
            return {"made": pipe.provenance(size, own).to_texts()}

        return _call_result(made)

    def check_access(self, job: Mapping[str, Any], source: Mapping[str, Any], token: str) -> dict[str, Any]:
        """Check that this machine sees the driver's source and work folder; return an error if not."""

        def seen() -> dict[str, Any]:
            path, work = Path(job["source"]), WorkFolder(Path(job["output"]))
            where = place_of_work()
            if not path.exists():
                raise FileNotFoundError(
                    f"{where} cannot see {path}: put it in a folder that all machines share."
                )
            if source_fingerprint(path) != dict(source):
                raise FileNotFoundError(
                    f"{path} is a different file on {where}: all machines must see the same folder."
                )
            if work.token() != token:
                raise FileNotFoundError(
                    f"{where} cannot see {work.folder}: choose an output in a folder that all machines share."
                )
            if not os.access(work.folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{where} cannot write to {work.folder}: check its permissions.")
            return {}

        return _call_result(seen)

    def render(self, name: str, job: Mapping[str, Any], scene: Mapping[str, Any]) -> dict[str, Any]:
        """Render a scene, or its remaining frames; return the records of its segments, or an error.

        A worker that takes over a scene continues from the last segment with a saved state.
        """
        self.done, self.scene = 0, name

        def rendered() -> dict[str, Any]:
            return self._render(job, Scene.from_json(scene))

        try:
            return {"scene": name, **_call_result(rendered)}
        finally:
            self.scene, self.stopped = "", ""

    def _render(self, job: Mapping[str, Any], scene: Scene) -> dict[str, Any]:
        pipe = self._open()
        prepared = self._prepare(job, pipe)
        work = WorkFolder(prepared.job.output)
        journal = work.load(scene.first, scene.end)
        if journal is None:
            raise OSError(f"{work.folder} no longer contains a journal")
        journal = replace(journal, segments=resumable(journal.segments))
        self.done = journal.frames
        with Background(WRITE_DEPTH) as writer:
            renderer = Renderer(pipe, prepared, work, journal, writer, self._check, alone=False)
            try:
                self._go_on(renderer, scene)
            finally:
                renderer.abort()
        segments = [asdict(segment) for segment in renderer.journal.segments]
        notes = {key: count for key, count in prepared.source.notes.items() if count}
        return {"segments": segments, "segment_frames": renderer.journal.segment_frames, "notes": notes}

    def _prepare(self, job: Mapping[str, Any], pipe: Upscaler) -> Prepared:
        """Return the prepared job, which is opened once for all its scenes."""
        if self.prepared is None or self.prepared[0] != job:
            options = FAMILIES[pipe.info.family].options
            self.prepared = job, prepare(from_json(job, options)).fitted(pipe)
        return self.prepared[1]

    def _go_on(self, renderer: Renderer, scene: Scene) -> None:
        """Render the frames of a scene that are not yet in a segment."""
        done = renderer.journal.segments
        if done and (done[-1].closed or done[-1].end == scene.end):
            return
        made = Provenance.from_texts(renderer.journal.provenance)
        start, place = scene.first - scene.warm_up, scene.place
        state = State(index=start + scene.offset, provenance=made)
        if done:
            start, place = done[-1].end, done[-1].place
            state, _ = load_state(renderer.work.folder / done[-1].state)
        elif scene.state:
            state, _ = load_state(renderer.work.folder / scene.state)
        frames = prefetch(
            renderer.prepared.source.frames(renderer.prepared.between(start, scene.end), place),
            renderer.prepared.job.read_ahead,
        )
        with contextlib.closing(frames):
            here = (replace(frame, device=renderer.pipe.device) for frame in frames)
            pairs = ((frame, renderer.lq(frame)) for frame in here)
            for _ in renderer.render(pairs, state, scene.first, cut=False):
                self.done += 1

    def _check(self, stage: str, done: int, total: int) -> None:
        if self.stopped and self.stopped == self.scene:
            raise StoppedError("stopped")

    def stop(self, name: str) -> None:
        """Stop rendering a scene before its next step."""
        self.stopped = name

    def progress(self) -> tuple[str, int, list[tuple[int, str]]]:
        """Return the current scene, how many of its frames are done, and the messages since the last call."""
        return self.scene, self.done, self.lines.take()


def _call_result(call: Any) -> dict[str, Any]:
    """Return a call's result, or its error as text, so that exceptions need not be sent to the driver."""
    try:
        found = call()
    except StoppedError:
        return {"error": "stopped", "kind": "stopped"}
    except (StreamDiffVSRError, OSError) as error:
        kind = (
            "input" if isinstance(error, StreamDiffVSRError) and not isinstance(error, VRAMError) else "work"
        )
        return {"error": _sentence(error), "kind": kind}
    except Exception as error:
        log.exception("a scene failed")
        return {"error": f"{type(error).__name__}: {error}", "kind": "work"}
    return found if isinstance(found, dict) else {}


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
