"""The released weights, onto this machine: only what is needed, resumed, verified, and whole or not there."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ...errors import ModelNotFoundError
from ...weights.folders import user_cache, user_models
from ...weights.hub import HubError, RemoteFile, endpoint, list_files, offline, open_stream, with_size
from ...weights.released import RELEASED, REPOSITORY, REVISION, REVISION_VARIABLE
from .check import check, problem
from .find import PARTIAL, VARIABLE, hub_snapshots, registered, released
from .parts import (
    CONFIG,
    INDEX,
    NETWORKS,
    SCHEDULER_CONFIG,
    TEXT_ENCODER,
    TOKENIZER,
    choose,
    shards,
)
from .prompt import PromptEmbeddings

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""(done_bytes, total_bytes); (0, 1) while the total is not known yet.

An exception from it ends the download, which resumes from there next time.
"""

PART = ".part"
"""Ending of a file that is not whole yet."""

GIT_DIGEST = 40
"""Digits of git's SHA-1."""

SPARE = 1 << 26
"""Bytes to leave free on the disk."""

ATTEMPTS = 4
"""Tries in a row without a new byte before it is given up."""

PAUSE = 0.25
"""Seconds before trying again, doubled with each failure."""

INTERVAL = 0.1
"""Seconds between two calls of `on_progress`, and between two looks at whether another process is done."""

TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.json",
)  # fmt: skip


def download(
    extra_folders: Iterable[str | Path] = (),
    *,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Bring the released weights to the first registered folder, else the user's data folder; return theirs.

    Whatever is already there and right is kept, of whichever `revision` it is. Raises `ModelNotFoundError`
    with what to do by hand, and leaves what has come so far in a folder where the next call continues.
    """
    target, progress = target_folder(extra_folders), Progress(on_progress)
    log.info("downloading %s to %s", REPOSITORY, target)
    try:
        with _alone(target, progress):
            if problem(target):
                _bring(target, revision or os.environ.get(REVISION_VARIABLE) or REVISION, progress)
        check(target)
    except HubError as error:
        raise by_hand(target, str(error)) from error
    except OSError as error:
        raise by_hand(target, f"{error.strerror or error} ({error.filename or target})") from error
    return target


def by_hand(target: Path, reason: str) -> ModelNotFoundError:
    """One sentence for those who have to do it themselves."""
    return ModelNotFoundError(
        "released weights (v1)",
        target,
        f"They could not be downloaded: {reason}; try again later, or get the folders "
        f"{', '.join([*NETWORKS, 'scheduler', TEXT_ENCODER, TOKENIZER])} of {endpoint()}/{REPOSITORY} "
        f"in another way and put them into {target}.",
    )


def target_folder(extra_folders: Iterable[str | Path] = ()) -> Path:
    """The first of the `targets` that can be written; raises `ModelNotFoundError`."""
    folders = targets(extra_folders)
    target = next((target for target in folders if _can_bring_to(target)), None)
    if target is None:
        raise ModelNotFoundError(
            "released weights (v1)", folders[-1], f"No models folder can be written; name one in {VARIABLE}."
        )
    return target


def targets(extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """Where the released weights are to go, best first.

    A folder that lacks only the text encoder or tokenizer is completed where it is, but for the hub's
    cache, in which nobody else may put files. Links are followed: what comes must lie on the same disk.
    """
    folders, cached = list(extra_folders), hub_snapshots()
    nearly = [path for path in released(folders) if path not in cached and _lacks_text_only(path)]
    usual = (root / RELEASED for root in [*registered(folders), user_models()])
    return [target.resolve() for target in [*nearly, *usual]]


def _lacks_text_only(folder: Path) -> bool:
    error = problem(folder)
    return isinstance(error, ModelNotFoundError) and error.component.startswith((TEXT_ENCODER, TOKENIZER))


def _can_bring_to(target: Path) -> bool:
    return _can_write(target.parent) and (not target.exists() or _can_write(target))


def _can_write(folder: Path) -> bool:
    """Tried, not asked: what the system says about permissions is not the whole truth on shared disks."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


@contextmanager
def _alone(target: Path, progress: Progress) -> Iterator[None]:
    """Only one process downloads to a folder; others wait, and may be cancelled while they do."""
    from filelock import FileLock, Timeout

    lock = FileLock(target.parent / f".{target.name}.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=INTERVAL)
        except Timeout:
            progress.tell()
    try:
        yield
    finally:
        lock.release()


def _bring(target: Path, revision: str, progress: Progress) -> None:
    """Fetch what the folder lacks beside it, and put it there when all of it is right."""
    if offline():
        raise HubError("HF_HUB_OFFLINE is set")
    listed = _patiently(lambda: list_files(REPOSITORY, revision), progress)
    files = [_patiently(lambda file=file: with_size(file), progress) for file in needed(listed, target)]
    work = target.with_name(target.name + PARTIAL)
    progress.total = sum(file.size for file in files)
    missing = [file for file in files if not _right(target / file.path, file, progress)]
    _check_space(work, missing)
    for file in missing:
        _fetch(file, work / file.path, progress)
    _install(work, target, missing)


def needed(listed: list[RemoteFile], target: Path) -> list[RemoteFile]:
    """Of all published files those that run the model: each part once, in its best form."""
    names = [file.path for file in listed]
    text = not PromptEmbeddings(target, user_cache()).has("")
    wanted = {INDEX, SCHEDULER_CONFIG.as_posix()}
    for part in [*NETWORKS, *([TEXT_ENCODER] if text else [])]:
        wanted |= {f"{part}/{name}" for name in _best_form(names, part)}
    if text:
        wanted |= {f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES}
    return [file for file in listed if file.path in wanted]


def _best_form(names: list[str], part: str) -> list[str]:
    """A part's configuration and weights, in one format only."""
    inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
    chosen = choose(inside, part)
    if chosen is None:
        raise HubError(f"{REPOSITORY} holds no weights of {part}")
    return [CONFIG, chosen, *(shards(inside, chosen) if chosen.endswith(".json") else [])]


def _check_space(work: Path, missing: list[RemoteFile]) -> None:
    parts = [work / f"{file.path}{ending}" for file in missing for ending in ("", PART)]
    there = sum(path.stat().st_size for path in parts if path.is_file())
    lacking = sum(file.size for file in missing) - there + SPARE
    free = shutil.disk_usage(work.parent).free
    if missing and free < lacking:
        raise HubError(
            f"the disk of {work.parent} has {free / 1e9:.2f} GB free, {lacking / 1e9:.2f} GB are needed; "
            f"make room, or name a folder on another disk in {VARIABLE}"
        )


def _fetch(file: RemoteFile, path: Path, progress: Progress) -> None:
    """One file, resumed from what is there, and renamed when it is what was published."""
    if _right(path, file, progress):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    for _ in range(2):
        _receive(file, part, progress)
        if _is(part, file, progress):
            part.replace(path)
            return
        log.warning("%s arrived damaged", file.path)
        progress.add(-part.stat().st_size)
        part.unlink()
    raise HubError(f"{file.path} arrived damaged twice (its digest is not the published one)")


def _receive(file: RemoteFile, part: Path, progress: Progress) -> None:
    """Append to the file what it lacks, over as many connections as that takes."""
    part.touch()
    start, failures = part.stat().st_size, 0
    progress.add(start)
    while start < file.size:
        error = _append(file, part, start, progress)
        before, start = start, part.stat().st_size
        failures = 0 if start > before else failures + 1
        if failures >= ATTEMPTS or (error and not error.transient):
            raise error or HubError(f"only {start} of {file.size} bytes of {file.path} are sent")
        if start < file.size:
            log.info("%s: connection lost at byte %d (%s)", file.path, start, error or "no more data")
            progress.wait(PAUSE * 2**failures)


def _append(file: RemoteFile, part: Path, start: int, progress: Progress) -> HubError | None:
    """Write what one connection gives; the error that ended it, if one did."""
    try:
        with open_stream(file, start) as (begins, chunks), part.open("ab" if begins else "wb") as out:
            progress.add(begins - start)
            for chunk in chunks:
                out.write(chunk)
                progress.add(len(chunk))
                if out.tell() > file.size:
                    break
            out.flush()
            os.fsync(out.fileno())
    except HubError as error:
        return error
    return None


def _install(work: Path, target: Path, missing: list[RemoteFile]) -> None:
    """The verified folder gets its name; into a folder that was there, the files that it lacked move."""
    wanted = {work / file.path for file in missing}
    for path in work.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()
    if not target.exists():
        check(work)
        work.replace(target)
        return
    for file in missing:
        (target / file.path).parent.mkdir(parents=True, exist_ok=True)
        (work / file.path).replace(target / file.path)
    shutil.rmtree(work, ignore_errors=True)


def _right(path: Path, file: RemoteFile, progress: Progress) -> bool:
    """Whether a file is there as published; its bytes then count as done."""
    right = path.is_file() and _is(path, file, progress)
    progress.add(file.size if right else 0)
    return right


def _is(path: Path, file: RemoteFile, progress: Progress) -> bool:
    """Whether a file has the published size and digest; the size alone where no digest is published."""
    if path.stat().st_size != file.size:
        return False
    return not file.digest or _digest(path, file, progress) == file.digest


def _digest(path: Path, file: RemoteFile, progress: Progress) -> str:
    """SHA-256, or the SHA-1 by which git names a file, as the published digest is."""
    digest = hashlib.sha256()
    if len(file.digest) == GIT_DIGEST:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
            progress.add(0)
    return digest.hexdigest()


Answer = TypeVar("Answer")


def _patiently(ask: Callable[[], Answer], progress: Progress) -> Answer:
    """Ask again after a while where that may help."""
    for failures in range(1, ATTEMPTS):
        try:
            return ask()
        except HubError as error:
            if not error.transient:
                raise
            log.info("%s; trying again", error)
            progress.wait(PAUSE * 2**failures)
    return ask()


class Progress:
    """Bytes done of all files, told at most every `INTERVAL`; whoever is told may end it by raising."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.total, self.done = 1, 0
        self._on_progress, self._told = on_progress, 0.0

    def add(self, count: int) -> None:
        self.done += count
        if self.done >= self.total or time.monotonic() - self._told >= INTERVAL:
            self.tell()

    def tell(self) -> None:
        self._told = time.monotonic()
        if self._on_progress:
            self._on_progress(self.done, self.total)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.tell()
            time.sleep(INTERVAL)
