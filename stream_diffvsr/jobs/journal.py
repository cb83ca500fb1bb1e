"""The work folder of an unfinished job: `<output>.parts/` with a lock, a journal, segments and a state.

Everything in it appears by fsync and rename, and the journal is written last: what it names is whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from ..errors import VideoError
from ..files import atomic
from ..media.seek import Place

log = logging.getLogger(__name__)

FORMAT = 1
LOCK = "lock"
OURS = re.compile(r"journal\.json|(main|compare|joined|state)-\w+\.\w+|\..*\.part")
"""Names of the files that are written here, and may be deleted."""


@dataclass(frozen=True)
class Part:
    """A finished segment."""

    name: str
    """File in the work folder; empty where the frames are pictures in the output folder."""
    frames: int
    size: int
    first: int
    """Timestamp of its first frame, in ticks of the source."""
    end: int
    """When its last frame ends, in the same ticks."""
    depth: int = 0
    """How many frames the encoder keeps back: decoding order against presentation order."""
    compare: str = ""
    """File of the split-screen video's segment."""
    compare_depth: int = 0


@dataclass(frozen=True)
class Journal:
    """What is done, and under which settings."""

    source: Mapping[str, Any]
    """Identity of the source."""
    settings: Mapping[str, Any]
    """All that changes what comes out."""
    versions: Mapping[str, str]
    first_index: int = 0
    """The source's index of the first frame of the job."""
    parts: tuple[Part, ...] = ()
    state: str = ""
    """File of the state after the last part."""
    cuts: tuple[int, ...] = ()
    """Indices of frames that begin a scene."""
    place: Place | None = None
    """The source's last frame that is done, by which reading goes on; None: read from the start."""
    partial: int = -1
    """Size of an output file that holds a part of the frames, left by an interrupted run; -1: none."""
    finished: int = -1
    """Size of the finished output, set before it gets its name; -1: not finished."""

    @property
    def frames(self) -> int:
        """Frames done."""
        return sum(part.frames for part in self.parts)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power loss, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        log.debug("%s cannot be synced: %s", folder, error)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content last through a power loss."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class Workplace:
    """The work folder of one output, locked against a second run."""

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(output.name + ".parts")
        self._lock: IO[str] | None = None

    @property
    def journal_file(self) -> Path:
        return self.folder / "journal.json"

    @contextmanager
    def locked(self) -> Iterator[Workplace]:
        """Hold the lock; the system lets go of it however the process ends. Raises `VideoError`."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise VideoError(
                f"{self.folder} cannot be made ({error.strerror}): choose another output."
            ) from error
        lock = (self.folder / LOCK).open("a+")
        try:
            if not try_lock(lock):
                lock.seek(0)
                raise VideoError(
                    f"another run (process {lock.read().strip() or 'unknown'}) is writing this output: wait "
                    f"for it, or choose another output; its work is in {self.folder}."
                )
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield self
        finally:
            lock.close()
            self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        """Nothing is kept where nothing was done."""
        if self.folder.is_dir() and [file.name for file in self.folder.iterdir()] == [LOCK]:
            self.remove()

    def load(self) -> Journal | None:
        """The journal of an earlier run; raises `VideoError` where it cannot be read."""
        if not self.journal_file.is_file():
            return None
        try:
            content = json.loads(self.journal_file.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("of another version")
            parts = tuple(Part(**part) for part in content.pop("parts"))
            place = content.pop("place", None)
            place = None if place is None else Place(**place)
            return Journal(**{**content, "parts": parts, "cuts": tuple(content["cuts"]), "place": place})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise VideoError(
                f"{self.journal_file} cannot be read ({error}): start over with --restart."
            ) from error

    def save(self, journal: Journal) -> None:
        """Write the journal: from here on its parts count as done."""
        with atomic(self.journal_file) as file:
            file.write(json.dumps({"format": FORMAT, **asdict(journal)}, indent=1).encode())
        sync_folder(self.folder)

    def _files(self) -> list[Path]:
        """What is ours in the folder, without the lock."""
        return [file for file in self.folder.iterdir() if OURS.fullmatch(file.name)]

    def clear(self) -> None:
        """Forget an earlier run."""
        for file in self._files():
            file.unlink()

    def remove(self) -> None:
        """The work is done and the folder goes, unless something foreign lies in it."""
        self.clear()
        (self.folder / LOCK).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError as error:
            log.warning("%s stays: %s", self.folder, error)

    def tidy(self, journal: Journal) -> None:
        """Delete what a killed run left half done."""
        known = {self.journal_file.name, journal.state}
        for part in journal.parts:
            known |= {part.name, part.compare}
        joined = journal.finished >= 0
        for file in self._files():
            if file.name not in known and not (joined and file.name.startswith("joined-")):
                file.unlink()

    def check(self, journal: Journal) -> None:
        """Raise `VideoError` where a finished segment or the state is not as the journal says."""
        names = {part.name: part.size for part in journal.parts if part.name}
        for name, size in names.items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise VideoError(f"{file} is not as the journal says: start over with --restart.")
        if journal.parts and not (self.folder / journal.state).is_file():
            raise VideoError(f"{self.folder / journal.state} is missing: start over with --restart.")


def differences(before: Journal, now: Journal) -> list[str]:
    """What forbids to continue: 'seed was 0, is 1'."""
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
    """The journal to go on with; raises `VideoError` where source or settings are not the same."""
    now = replace(
        now, settings=json.loads(json.dumps(now.settings)), source=json.loads(json.dumps(now.source))
    )
    if changed := differences(before, now):
        raise VideoError(
            f"the unfinished work in {folder} was begun differently ({'; '.join(changed)}): run it with the "
            "same source and settings, or start over with --restart."
        )
    if before.versions != now.versions:
        log.warning("not an exact continuation: versions were %s, are %s", before.versions, now.versions)
    return before


def try_lock(file: IO[str]) -> bool:
    """Take the file's lock, which ends with the process; False if another holds it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            # One byte far behind the text, which stays readable for others.
            file.seek(1 << 20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
