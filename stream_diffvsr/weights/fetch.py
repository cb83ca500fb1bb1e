"""Resumable downloads of released weights: only the files that are needed, and either all of them or none.

huggingface_hub runs in a separate process, which can be stopped immediately. With any version of the library,
the size of the partial file shows how far the download has got and where to resume it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import ModelNotFoundError, StreamDiffVSRError
from .find import PARTIAL, VARIABLE, registered
from .folders import user_models
from .released import REVISION_VARIABLE, Release

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes), or with (0, 1) while the total is unknown.

An exception from it ends the download; the next download resumes at that point.
"""

Needed = Callable[[Collection[str], Path], Collection[str]]
"""Selects, from the names of all published files, those that a folder needs to be complete."""

COMMIT = ".commit"
"""Name of the file in a partial download's folder that records the revision of the other files."""

SPARE = 1 << 26
"""Bytes to leave free on the disk."""

INTERVAL = 0.1
"""Seconds between calls of `on_progress`."""

LIFELINE = """
import json, os, sys, threading
sys.path = [path for path in sys.path if path]
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(3)), daemon=True).start()
"""
"""Ends a child process when its parent ends, for whatever reason."""

LIST = """
from huggingface_hub import HfApi
info = HfApi().model_info(sys.argv[1], revision=sys.argv[2], files_metadata=True, timeout=30)
json.dump([info.sha, {file.rfilename: file.size for file in info.siblings}], sys.stdout)
"""

CHUNK = 1 << 16
"""Bytes per write; cancelling loses at most one write. The library's 10 MB take minutes on a slow link."""

BRING = f"""
from pathlib import Path
from urllib.parse import urlsplit
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
repository, revision, folder, names = sys.argv[1:]
for name in json.loads(names):
    target, url = Path(folder, name), hf_hub_url(repository, name, revision=revision)
    part = target.with_name(target.name + ".part")
    if target.is_file():
        continue
    target.parent.mkdir(parents=True, exist_ok=True)
    known, headers = get_hf_file_metadata(url), build_hf_headers()
    if urlsplit(known.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token must go only to the hub
    with part.open("ab") as file:
        if known.size is None or file.tell() < known.size:
            http_get(known.location, file, resume_size=file.tell(), headers=headers, expected_size=known.size)
    part.replace(target)
"""
"""Downloads one file after another, because newer versions of `snapshot_download` start each file over."""


class FetchError(StreamDiffVSRError):
    """The hub refused a request, or could not be reached."""


def offline() -> bool:
    """Whether the user has forbidden network traffic with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def endpoint() -> str:
    """Return the hub's address, which HF_ENDPOINT can override."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def fetch(
    release: Release,
    targets: Sequence[Path],
    needed: Needed,
    whole: Callable[[Path], bool],
    *,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download a release to the first writable folder in `targets`; return that folder.

    Existing files of the published size are kept. Raises `ModelNotFoundError` with instructions for copying
    the files manually; bytes downloaded so far stay next to the folder, and the next call resumes from there.
    """
    target = next((target for target in targets if _can_bring_to(target)), None)
    if target is None:
        hint = f"No models folder is writable; name a writable one in {VARIABLE}."
        raise ModelNotFoundError(f"weights of {release.name}", targets[-1], hint)
    tell = on_progress or (lambda done, total: None)
    log.info("downloading %s to %s", release.repository, target)
    try:
        with _exclusive(target, tell):
            if not whole(target):
                _download_missing(
                    release, target, needed, revision or os.environ.get(REVISION_VARIABLE) or "main", tell
                )
    except FetchError as error:
        raise by_hand(release, target, str(error)) from error
    except OSError as error:
        raise by_hand(release, target, f"{error.strerror or error} ({error.filename or target})") from error
    return target


def by_hand(release: Release, target: Path, reason: str) -> ModelNotFoundError:
    """Return an error that explains how to copy the files manually."""
    return ModelNotFoundError(
        f"weights of {release.name}",
        target,
        f"They could not be downloaded: {reason}; try again later, or copy the files from "
        f"{endpoint()}/{release.repository} into {target} by other means.",
    )


def usual_targets(release: Release, extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """Return folders for a download, best first: the registered folders, then the user's own folder.

    Links are resolved because the partial download must be on the same disk as the final folder.
    """
    return [(root / release.name).resolve() for root in [*registered(extra_folders), user_models()]]


def _can_bring_to(target: Path) -> bool:
    return _can_write(target.parent) and (not target.exists() or _can_write(target))


def _can_write(folder: Path) -> bool:
    """Whether a file can be created in a folder; on shared disks, the reported permissions may be wrong."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


@contextmanager
def _exclusive(target: Path, tell: OnProgress) -> Generator[None, None, None]:
    """Let only one process at a time download to a folder; `tell` may raise an exception to stop waiting."""
    from filelock import FileLock, Timeout

    lock = FileLock(target.parent / f".{target.name}.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=INTERVAL)
        except Timeout:
            tell(0, 1)
    try:
        yield
    finally:
        lock.release()


def _download_missing(
    release: Release, target: Path, needed: Needed, revision: str, tell: OnProgress
) -> None:
    """Download missing files next to the folder, and move them into it when all have the right size."""
    if offline():
        raise FetchError("HF_HUB_OFFLINE is set, which forbids downloads; unset it")
    commit, sizes = _listed(release.repository, revision, tell)
    wanted = needed(list(sizes), target)
    missing = [name for name in wanted if sizes[name] == 0 or _size(target / name) != sizes[name]]
    work = target.with_name(target.name + PARTIAL)
    mark = work / COMMIT
    if work.exists() and not (mark.is_file() and mark.read_text() == commit):
        shutil.rmtree(work)  # from another revision, whose bytes must not be mixed with this one's
    work.mkdir(exist_ok=True)
    mark.write_text(commit)
    _check_space(work, sum(sizes[name] for name in missing))
    total = sum(sizes[name] for name in wanted)
    there = total - sum(sizes[name] for name in missing)
    arguments = [release.repository, commit, str(work), json.dumps(missing)]
    while missing:
        before = _bytes_in(work)
        try:
            _child(BRING, arguments, lambda: tell(min(there + _bytes_in(work), total), total))
            break
        except FetchError as error:
            if _bytes_in(work) <= before:
                raise
            log.info("%s; continuing", error)
    for name in missing:
        if _size(work / name) != sizes[name] > 0:
            raise FetchError(f"{name} is incomplete: {_size(work / name)} of {sizes[name]} bytes arrived")
    mark.unlink()
    if missing and not target.exists():
        work.replace(target)
    else:
        for name in missing:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).replace(target / name)
        shutil.rmtree(work, ignore_errors=True)
    tell(total, total)


def _listed(repository: str, revision: str, tell: OnProgress) -> tuple[str, dict[str, int]]:
    """Return a revision's commit, and its files' sizes by name; a size that is not reported is 0."""
    try:
        answer = json.loads(_child(LIST, [repository, revision], lambda: tell(0, 1)))
    except FetchError as error:
        raise FetchError(f"{repository} at revision {revision!r}: {error}") from error
    commit, sizes = answer
    if not (commit and sizes):
        raise FetchError(_ANOTHER_ANSWERS.format(endpoint()))
    return commit, {name: size or 0 for name, size in sizes.items()}


_ANOTHER_ANSWERS = (
    "{} did not return a list of files; something else is probably answering in its place "
    "(the network's login page, or a wrong HF_ENDPOINT)"
)


def _child(program: str, arguments: list[str], look: Callable[[], None]) -> str:
    """Run a program and return its output; meanwhile, call `look`, which may raise an error to end it."""
    settings = {
        "HF_ENDPOINT": endpoint(),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", LIFELINE + program, *arguments]
    with TemporaryFile() as out, TemporaryFile() as err:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, env={**os.environ, **settings}
        )
        try:
            while child.poll() is None:
                look()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(INTERVAL)
        finally:
            child.kill()
            child.communicate()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if child.returncode:
        raise FetchError(_reason(texts[1]))
    return texts[0]


def _reason(trace: str) -> str:
    """Describe the last error of a child process for the user."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()] or ["it ended without a message"]
    last = next((line for line in reversed(lines) if "Error" in line or "Exception" in line), lines[-1])
    kinds = {
        ("401 ", "403 ", "GatedRepo"): f"{endpoint()} refuses access: the repository does "
        "not exist, or needs a login (set HF_TOKEN, or run 'hf auth login')",
        ("404 ", "NotFoundError"): f"the repository, revision or file does not exist on {endpoint()}",
        ("No space left", "[Errno 28]"): "No space left on the disk",
        ("JSONDecodeError", "KeyError", "TypeError"): _ANOTHER_ANSWERS.format(endpoint()),
        ("Connect", "Timeout", "resolve host", "Protocol"): f"the connection to {endpoint()} failed",
    }
    told = next((text for signs, text in kinds.items() if any(sign in trace for sign in signs)), "")
    return f"{told} ({last[:200]})" if told else last[:300]


def _size(path: Path) -> int:
    """Return the size of a file in bytes; -1 if it does not exist."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:  # renamed in the meantime
        return -1


def _bytes_in(folder: Path) -> int:
    """Return the number of bytes downloaded so far."""
    return sum(max(0, _size(path)) for path in folder.rglob("*"))


def _check_space(work: Path, needed: int) -> None:
    lacking = needed - _bytes_in(work) + SPARE
    free = shutil.disk_usage(work.parent).free
    if needed and free < lacking:
        raise FetchError(
            f"the disk that holds {work.parent} has {free / 1e9:.2f} GB free, but "
            f"{lacking / 1e9:.2f} GB is needed; make room, or name a folder on another disk in {VARIABLE}"
        )
