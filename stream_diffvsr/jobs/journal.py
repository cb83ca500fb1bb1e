"""The work folder of an unfinished job: `<output>.parts/` with a lock, a journal, segments and a state.

Everything in it appears by fsync and rename, and the journal is written last: what it names is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import VideoError
from ..files import atomic, sync_folder
from ..media.join import Part
from ..media.seek import Place

log = logging.getLogger(__name__)

FORMAT = 1
LOCK, OWNER = "lock", "owner"
OWN_FILES = re.compile(r"journal\.json|(main|compare|joined|state)-\w+\.\w+|\..*\.part")
"""Names of the files that are written here, and may be deleted."""


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
    provenance: Mapping[str, str] = field(default_factory=dict)
    """How the frames of all scenes are made, memory plan included."""
    segment_frames: int = 0
    """Frames of a segment where the job does not say; 0: not known yet."""
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
    def locked(self) -> Iterator[WorkFolder]:
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
            process = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "unknown"
            raise VideoError(
                f"another run (process {process}) is writing this output: wait for it, or choose another "
                f"output; its work is in {self.folder}."
            ) from None
        try:
            owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
            yield self
        finally:
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
                log.warning("%s stays: it holds %s", self.folder, ", ".join(left[:3]))
            else:
                self.folder.rmdir()

    def load(self) -> Journal | None:
        """The journal of an earlier run; raises `VideoError` where it cannot be read."""
        if not self.journal_file.is_file():
            return None
        try:
            content = json.loads(self.journal_file.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise ValueError("of another version")
            parts = tuple(Part(**part) for part in content.pop("parts"))
            place = content.pop("place", None)
            place = None if place is None else Place(**place)
            names = [content["state"], *(name for part in parts for name in (part.name, part.compare))]
            if any(name and not OWN_FILES.fullmatch(name) for name in names):
                raise ValueError("names of other files")
            return Journal(**{**content, "parts": parts, "cuts": tuple(content["cuts"]), "place": place})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
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
        return [file for file in self.folder.iterdir() if OWN_FILES.fullmatch(file.name)]

    def clear(self) -> None:
        """Forget an earlier run."""
        for file in self._files():
            file.unlink()

    def remove_leftovers(self, journal: Journal) -> None:
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
