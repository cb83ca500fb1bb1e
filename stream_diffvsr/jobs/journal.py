"""The work folder of an unfinished job: `<output>.parts/` with a lock, a journal, segments and a state.

Everything in it appears by fsync and rename. The journal holds the job's settings; each finished segment has
a record beside it, which is written last: what it names is whole. Records may come in any order, and from
several processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import VideoError
from ..files import atomic, sync_folder
from ..media.join import SegmentFile
from ..media.seek import Place

log = logging.getLogger(__name__)

FORMAT = 2
LOCK, OWNER = "lock", "owner"
RECORDS = "segment-*.json"
OWN_FILES = re.compile(r"journal\.json|(main|compare|joined|state|segment|side)-[-\w]+\.\w+|\..*\.part")
"""Names of the files that are written here, and may be deleted."""
PIECE = 1 << 20


@dataclass(frozen=True)
class Segment:
    """A finished run of frames of one scene: whole on the disk, and never written again."""

    start: int
    """Index of its first frame in the source."""
    scene: int
    """Index of the first frame of its scene."""
    part: SegmentFile
    closed: bool
    """Whether its scene ends with it, so that the next frame needs nothing of this one."""
    digests: Mapping[str, str]
    """Of its files, by their names."""
    state: str = ""
    """File of the state after it; empty where there is none: then its scene is done again from its start."""
    place: Place | None = None
    """The source's last frame that is in it, by which reading goes on; None: read from the start."""
    changed: str = ""
    """How the frames of its scene were made otherwise than the job settled, as after memory ran out."""

    @property
    def end(self) -> int:
        """Index of the frame that follows it."""
        return self.start + self.part.frames

    @property
    def record(self) -> str:
        """Name of its record file."""
        return f"segment-{self.start:06}.json"


@dataclass(frozen=True)
class Journal:
    """What is done, and under which settings."""

    source: Mapping[str, Any]
    """Identity of the source."""
    settings: Mapping[str, Any]
    """All that changes what comes out."""
    versions: Mapping[str, str]
    provenance: Mapping[str, str] = field(default_factory=dict)
    """How the frames of all scenes are made, memory plan included."""
    first: int = -1
    """The source's index of the first frame of the job; -1: not known yet."""
    segment_frames: int = 0
    """Frames of a segment where the job does not say; 0: not known yet."""
    scenes: Sequence[Mapping[str, Any]] = ()
    """All scenes of the job, where they were found before they were rendered; see `scenes.Scene`."""
    partial: int = -1
    """Size of an output file that holds a part of the frames, left by an interrupted run; -1: none."""
    finished: int = -1
    """Size of the finished output, set before it gets its name; -1: not finished."""
    segments: tuple[Segment, ...] = ()
    """A set: they were finished in any order. Here by their frames."""

    @property
    def frames(self) -> int:
        """Frames done."""
        return sum(segment.part.frames for segment in self.segments)

    @property
    def segment_files(self) -> tuple[SegmentFile, ...]:
        """The segments' files and times, in the order of their frames."""
        return tuple(segment.part for segment in self.segments)

    @property
    def first_index(self) -> int:
        """The source's index of the first frame of the job, 0 while it is not known."""
        return max(0, self.first)

    @property
    def cuts(self) -> list[int]:
        """First frames of the scenes begun so far, except the job's own first frame."""
        if self.scenes:
            return [scene["first"] for scene in self.scenes[1:] if not scene["warm_up"]]
        return sorted({segment.scene for segment in self.segments} - {self.first})

    def with_segment(self, segment: Segment) -> Journal:
        """The journal with one more segment, which replaces one of the same frames."""
        others = [each for each in self.segments if each.start != segment.start]
        return replace(self, segments=tuple(sorted([*others, segment], key=lambda each: each.start)))

    def gaps(self) -> list[tuple[Segment | None, Segment | None]]:
        """Neighbours between which frames are missing; None where the job begins or ends."""
        pairs = itertools.pairwise([None, *self.segments, None])
        ends = [(self.first if a is None else a.end, a, b) for a, b in pairs]
        return [(a, b) for end, a, b in ends if b is None or end != b.start]


def read_segment(content: Mapping[str, Any]) -> Segment:
    """The segment that a record tells of; raises `ValueError`, `TypeError` or `KeyError` for none."""
    place, part = content["place"], SegmentFile(**content["part"])
    values: dict[str, Any] = {**content, "part": part, "place": None if place is None else Place(**place)}
    segment = Segment(**values)
    named = [name for name in (part.name, part.compare, segment.state, *segment.digests) if name]
    if not all(OWN_FILES.fullmatch(name) for name in named):
        raise ValueError("it names other files")
    if not all(isinstance(number, int) for number in (segment.start, segment.scene, part.frames)):
        raise ValueError("it does not say which frames it has")
    return segment


def resumable(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """The segments from which work can resume, by their frames.

    Of each scene, those from its first frame on without a gap, up to its end or the last one with a state.
    """
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda each: each.start):
        if segment.start == segment.scene or (kept and kept[-1].end == segment.start):
            kept.append(segment)
    follows: Segment | None = None
    found: list[Segment] = []
    for segment in reversed(kept):
        goes_on = follows is not None and follows.scene == segment.scene
        if segment.closed or segment.state or goes_on:
            found.append(segment)
            follows = segment
    return tuple(reversed(found))


def digest(path: Path) -> str:
    """Of a file's bytes."""
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            total.update(piece)
    return total.hexdigest()


class WorkFolder:
    """The work folder of one output, locked against a second run.

    Nothing in it is deleted or replaced while it is open: some systems refuse that.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(output.name + ".parts")

    @property
    def journal_file(self) -> Path:
        return self.folder / "journal.json"

    @contextmanager
    def locked(self) -> Generator[WorkFolder, None, None]:
        """Hold the lock, which ends with the process. Raises `VideoError`.

        Afterwards the folder is removed where nothing is left in it.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise VideoError(
                f"{self.folder} cannot be made ({error.strerror}): choose another output."
            ) from error
        lock, owner = FileLock(self.folder / LOCK, timeout=0), self.folder / OWNER
        try:
            lock.acquire()
        except Timeout:
            raise VideoError(
                f"another run (process {self.token() or 'unknown'}) is writing this output: wait for it, or "
                f"choose another output; its work is in {self.folder}."
            ) from None
        try:
            owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
            yield self
        finally:
            # While it is still ours: what another run writes after it must stay.
            if not self.journal_file.is_file():
                with contextlib.suppress(OSError):
                    self.clear()
            lock.release()
            self._remove_if_done()

    def _remove_if_done(self) -> None:
        if self.journal_file.is_file():
            return
        # A run that began in this moment holds the lock anew, and keeps the folder.
        with contextlib.suppress(OSError):
            for name in (OWNER, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            if left := sorted(file.name for file in self.folder.iterdir()):
                log.warning(
                    "%s was not removed, because it contains other files: %s",
                    self.folder,
                    ", ".join(left[:3]),
                )
            else:
                self.folder.rmdir()

    def load(self, first: int = 0, end: int | None = None) -> Journal | None:
        """The journal of an earlier run, with its segments from frame `first` up to `end`, which is excluded.

        Raises `VideoError` where it cannot be read.
        """
        file = self.journal_file
        if not file.is_file():
            return None
        try:
            content = _object(file)
            if content.pop("format", None) != FORMAT:
                raise ValueError("it is of another version")
            segments = []
            for file in sorted(self.folder.glob(RECORDS)):
                number = int(file.stem.rpartition("-")[2])
                if number >= first and (end is None or number < end):
                    segments.append(self._there(read_segment(_object(file))))
            return Journal(**content, segments=tuple(sorted(segments, key=lambda each: each.start)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise VideoError(f"{file} cannot be read ({error}): start over with --restart.") from error

    def _there(self, segment: Segment) -> Segment:
        """A segment as it is now: the state of one that was followed by another is gone."""
        there = segment.state and (self.folder / segment.state).is_file()
        return segment if there else replace(segment, state="")

    def token(self) -> str:
        """Identifies the lock's holder, so another machine recognises the folder; '' if nobody holds it."""
        owner = self.folder / OWNER
        return owner.read_text(encoding="utf-8").strip() if owner.is_file() else ""

    def save(self, journal: Journal) -> None:
        """Write the journal without its segments, which are saved as separate records."""
        facts = {key: value for key, value in vars(journal).items() if key != "segments"}
        self._write(self.journal_file.name, {"format": FORMAT, **facts})

    def add(self, segment: Segment) -> None:
        """Write a segment's record; from then on it is treated as done."""
        self._write(segment.record, asdict(segment))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with atomic(self.folder / name) as file:
            file.write(json.dumps(content, indent=1).encode())
        sync_folder(self.folder)

    def _files(self) -> list[Path]:
        """What is ours in the folder, without the lock."""
        return [file for file in self.folder.iterdir() if OWN_FILES.fullmatch(file.name)]

    def clear(self) -> None:
        """Forget an earlier run."""
        for file in self._files():
            file.unlink()

    def remove_leftovers(self, journal: Journal) -> None:
        """Delete what a killed run left half done."""
        known = {self.journal_file.name}
        for segment in journal.segments:
            known |= {segment.record, segment.state, *segment.digests}
        joined = journal.finished >= 0
        for file in self._files():
            whole = file.name.startswith("side-") or (joined and file.name.startswith("joined-"))
            if file.name not in known and not whole:
                file.unlink()

    def check(self, segments: Iterable[Segment]) -> None:
        """Raise `VideoError` where a file of a finished segment is not as it was written."""
        for segment in segments:
            for name, wanted in segment.digests.items():
                file = self.folder / name
                if not file.is_file() or digest(file) != wanted:
                    raise VideoError(f"{file} is not as the journal says: start over with --restart.")


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content


def work_state(folder: Path) -> str | None:
    """Describes a leftover work folder; None for any other folder."""
    work = WorkFolder(folder.with_suffix(""))
    if not work.journal_file.is_file() and not (folder / LOCK).is_file():
        return None
    if (folder / LOCK).is_file():
        try:
            with FileLock(folder / LOCK, timeout=0):
                pass
        except Timeout:
            return "in use by a run"
        except OSError as error:
            return f"cannot be read ({error.strerror}): check its permissions"
    try:
        journal = work.load()
    except VideoError as error:
        return str(error)
    frames = 0 if journal is None else journal.frames
    return f"{frames} frames done: the same command continues from there, or delete the folder"


def changed_settings(before: Journal, now: Journal) -> list[str]:
    """What prevents continuing, such as 'seed was 0, is 1'."""
    pairs = {
        "source": (before.source, now.source),
        "": (before.settings, now.settings),
    }
    found = []
    for kind, (old, new) in pairs.items():
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                found.append(f"{kind} {key} was {old.get(key)}, is {new.get(key)}".strip())
    return found


def continue_from(before: Journal, now: Journal, folder: Path) -> Journal:
    """The journal to continue from; raises `VideoError` where source or settings are not the same."""
    now = replace(
        now, settings=json.loads(json.dumps(now.settings)), source=json.loads(json.dumps(now.source))
    )
    if changed := changed_settings(before, now):
        raise VideoError(
            f"the unfinished work in {folder} was begun differently ({'; '.join(changed)}): run it with the "
            "same source and settings, or start over with --restart."
        )
    if before.versions != now.versions:
        log.warning("not an exact continuation: versions were %s, are %s", before.versions, now.versions)
    return before
