"""The work folder of an unfinished job: `<output>.parts/`, with a lock, a journal, segments and a state.

Each file is written under a temporary name, synced, and then renamed. The journal contains the job's
settings. Each finished segment has a record, which is written last, so the files that it names are complete.
Several processes may add records, in any order.
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
"""Matches the names of files that jobs write into a work folder, and may therefore delete."""
PIECE = 1 << 20


@dataclass(frozen=True)
class Segment:
    """Finished, consecutive frames of one scene, complete on disk and never rewritten."""

    start: int
    """Index of its first frame in the source."""
    scene: int
    """Index of the first frame of its scene."""
    part: SegmentFile
    closed: bool
    """Whether it ends its scene, so that the next frame does not depend on it."""
    digests: Mapping[str, str]
    """Digests of its files, by file name."""
    state: str = ""
    """File with the state after its last frame; '' if there is none.

    An unfinished scene starts over if its last segment has no state.
    """
    place: Place | None = None
    """Place of its last frame, from which reading continues; None to read the source from its start."""
    changed: str = ""
    """How the frames of its scene deviate from the job's provenance, for example after memory ran out."""

    @property
    def end(self) -> int:
        """Index one past its last frame."""
        return self.start + self.part.frames

    @property
    def record(self) -> str:
        """File name of its record."""
        return f"segment-{self.start:06}.json"


@dataclass(frozen=True)
class Journal:
    """The finished segments of a job, and the settings with which they were made."""

    source: Mapping[str, Any]
    """Identity of the source."""
    settings: Mapping[str, Any]
    """All settings that affect the output."""
    versions: Mapping[str, str]
    provenance: Mapping[str, str] = field(default_factory=dict)
    """How the frames of all scenes are made, including the memory plan."""
    first: int = -1
    """Source index of the job's first frame; -1 if not known yet."""
    segment_frames: int = 0
    """Number of frames per segment, if the job does not set it; 0 if not known yet."""
    scenes: Sequence[Mapping[str, Any]] = ()
    """All scenes of the job, if they were found before rendering; see `scenes.Scene.to_json`."""
    partial: int = -1
    """Size in bytes of the partial output file that an interrupted run left; -1 if there is none."""
    finished: int = -1
    """Size in bytes of the finished output, set before it is renamed into place; -1 if not finished."""
    segments: tuple[Segment, ...] = ()
    """Finished segments, sorted by first frame; as segments may finish in any order, there may be gaps."""

    @property
    def frames(self) -> int:
        """Number of frames done."""
        return sum(segment.part.frames for segment in self.segments)

    @property
    def segment_files(self) -> tuple[SegmentFile, ...]:
        """The segments' files with their times, in frame order."""
        return tuple(segment.part for segment in self.segments)

    @property
    def first_index(self) -> int:
        """Source index of the job's first frame; 0 if not known yet."""
        return max(0, self.first)

    @property
    def cuts(self) -> list[int]:
        """First frames of the scenes that have begun so far, except the job's own first frame."""
        if self.scenes:
            return [scene["first"] for scene in self.scenes[1:] if not scene["warm_up"]]
        return sorted({segment.scene for segment in self.segments} - {self.first})

    def with_segment(self, segment: Segment) -> Journal:
        """Return the journal with one more segment, which replaces any segment with the same first frame."""
        others = [each for each in self.segments if each.start != segment.start]
        return replace(self, segments=tuple(sorted([*others, segment], key=lambda each: each.start)))

    def gaps(self) -> list[tuple[Segment | None, Segment | None]]:
        """Return pairs of segments with missing frames between them; None marks the job's start or end."""
        pairs = itertools.pairwise([None, *self.segments, None])
        ends = [(self.first if a is None else a.end, a, b) for a, b in pairs]
        return [(a, b) for end, a, b in ends if b is None or end != b.start]


def read_segment(content: Mapping[str, Any]) -> Segment:
    """Return the segment that a record describes; raise ValueError, TypeError or KeyError if it is wrong."""
    place, part = content["place"], SegmentFile(**content["part"])
    values: dict[str, Any] = {**content, "part": part, "place": None if place is None else Place(**place)}
    segment = Segment(**values)
    named = [name for name in (part.name, part.compare, segment.state, *segment.digests) if name]
    if not all(OWN_FILES.fullmatch(name) for name in named):
        raise ValueError("it names files that no job would write")
    if not all(isinstance(number, int) for number in (segment.start, segment.scene, part.frames)):
        raise ValueError("it does not state which frames it contains")
    return segment


def resumable(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Return the segments that a resumed job can keep, sorted by their frames.

    In each scene, these segments cover all frames from the first to the scene's end or last saved state.
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
    """Return a digest of a file's bytes."""
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            total.update(piece)
    return total.hexdigest()


class WorkFolder:
    """The work folder of one output, locked against a second run.

    Its files are never deleted or replaced while they are open, because some systems do not allow that.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(output.name + ".parts")

    @property
    def journal_file(self) -> Path:
        return self.folder / "journal.json"

    @contextmanager
    def locked(self) -> Generator[WorkFolder, None, None]:
        """Hold the lock during the block, or until the process dies; then remove the folder if it is empty.

        Raises `VideoError` if another run holds the lock, or if the folder cannot be created.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise VideoError(
                f"{self.folder} cannot be created ({error.strerror}): choose another output."
            ) from error
        lock, owner = FileLock(self.folder / LOCK, timeout=0), self.folder / OWNER
        try:
            lock.acquire()
        except Timeout:
            raise VideoError(
                f"another run (process {self.token() or 'unknown'}) is writing this output: wait for it, or "
                f"choose another output; its work folder is {self.folder}."
            ) from None
        try:
            owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
            yield self
        finally:
            # Clear the folder before the lock is released: files that another run writes later must stay.
            if not self.journal_file.is_file():
                with contextlib.suppress(OSError):
                    self.clear()
            lock.release()
            self._remove_if_done()

    def _remove_if_done(self) -> None:
        if self.journal_file.is_file():
            return
        # A run that has just begun may already hold the lock again; it keeps the folder.
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
        """Return the journal of an earlier run, with its segments from frame `first` up to `end`, exclusive.

        Return None if there is no journal. Raises `VideoError` if it cannot be read.
        """
        file = self.journal_file
        if not file.is_file():
            return None
        try:
            content = _object(file)
            if content.pop("format", None) != FORMAT:
                raise ValueError("it was written by another version")
            segments = []
            for file in sorted(self.folder.glob(RECORDS)):
                number = int(file.stem.rpartition("-")[2])
                if number >= first and (end is None or number < end):
                    segments.append(self._there(read_segment(_object(file))))
            return Journal(**content, segments=tuple(sorted(segments, key=lambda each: each.start)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise VideoError(f"{file} cannot be read ({error}): start over with --restart.") from error

    def _there(self, segment: Segment) -> Segment:
        """Return the segment; omit its state if that file was deleted after the next segment was done."""
        there = segment.state and (self.folder / segment.state).is_file()
        return segment if there else replace(segment, state="")

    def token(self) -> str:
        """Return the lock file's ID ('' if none); machines use it to check that they see the same folder."""
        owner = self.folder / OWNER
        return owner.read_text(encoding="utf-8").strip() if owner.is_file() else ""

    def save(self, journal: Journal) -> None:
        """Write the journal without its segments, which are saved as separate records."""
        facts = {key: value for key, value in vars(journal).items() if key != "segments"}
        self._write(self.journal_file.name, {"format": FORMAT, **facts})

    def add(self, segment: Segment) -> None:
        """Write a segment's record, which marks the segment as done."""
        self._write(segment.record, asdict(segment))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with atomic(self.folder / name) as file:
            file.write(json.dumps(content, indent=1).encode())
        sync_folder(self.folder)

    def _files(self) -> list[Path]:
        """Return the files that jobs wrote into the folder, except the lock."""
        return [file for file in self.folder.iterdir() if OWN_FILES.fullmatch(file.name)]

    def clear(self) -> None:
        """Delete all files of an earlier run, except the lock."""
        for file in self._files():
            file.unlink()

    def remove_leftovers(self, journal: Journal) -> None:
        """Delete the unfinished files that a killed run left behind."""
        known = {self.journal_file.name}
        for segment in journal.segments:
            known |= {segment.record, segment.state, *segment.digests}
        joined = journal.finished >= 0
        for file in self._files():
            whole = file.name.startswith("side-") or (joined and file.name.startswith("joined-"))
            if file.name not in known and not whole:
                file.unlink()

    def check(self, segments: Iterable[Segment]) -> None:
        """Raise `VideoError` if a file of a finished segment is missing or has changed."""
        for segment in segments:
            for name, wanted in segment.digests.items():
                file = self.folder / name
                if not file.is_file() or digest(file) != wanted:
                    raise VideoError(
                        f"{file} is missing, or does not match the journal: start over with --restart."
                    )


def _object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it does not contain a JSON object")
    return content


def work_state(folder: Path) -> str | None:
    """Describe a leftover work folder; return None for any other folder."""
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
    return f"{frames} frames done: run the same command again to continue, or delete the folder"


def changed_settings(before: Journal, now: Journal) -> list[str]:
    """Return the changes that prevent resuming the job, such as 'seed was 0 and is now 1'."""
    pairs = {
        "source": (before.source, now.source),
        "": (before.settings, now.settings),
    }
    found = []
    for kind, (old, new) in pairs.items():
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                found.append(f"{kind} {key} was {old.get(key)} and is now {new.get(key)}".strip())
    return found


def continue_from(before: Journal, now: Journal, folder: Path) -> Journal:
    """Return the journal to continue from. Raises `VideoError` if the source or settings have changed."""
    now = replace(
        now, settings=json.loads(json.dumps(now.settings)), source=json.loads(json.dumps(now.source))
    )
    if changed := changed_settings(before, now):
        raise VideoError(
            f"the unfinished work in {folder} was begun with another source or other settings "
            f"({'; '.join(changed)}): use the original source and settings, or start over with --restart."
        )
    if before.versions != now.versions:
        log.warning(
            "this is not an exact continuation: the versions were %s and are now %s",
            before.versions,
            now.versions,
        )
    return before
