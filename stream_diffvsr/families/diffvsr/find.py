"""Where checkpoints may lie, in which order, and which of them are whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ...errors import ModelNotFoundError
from ...weights.folders import NANO, user_models
from ...weights.released import RELEASED, RELEASED_NAMES, REPOSITORY
from .check import problem
from .parts import INDEX, NETWORKS

log = logging.getLogger(__name__)

VARIABLE = "STREAM_DIFFVSR_MODELS"
"""Environment variable that names models folders, separated as in PATH."""

PARTIAL = ".partial"
"""Ending of the folder that a download grows in."""


class Found(NamedTuple):
    """A folder that is meant to be a checkpoint."""

    name: str
    path: Path
    problem: str | None
    """Why it is ignored; None where it is complete."""


def find_checkpoints(extra_folders: Iterable[str | Path] = ()) -> list[Found]:
    """Every checkpoint folder of this machine as (name, path, problem or None), in the order of search.

    Searched are `extra_folders` (ComfyUI's, where there is one), those that the environment variable
    STREAM_DIFFVSR_MODELS names, the user's data folder, a ComfyUI around this package, and the cache of
    huggingface_hub; each may hold a checkpoint itself or checkpoints in folders. The name 'v1' means the
    first complete folder so named. Nothing is loaded, and nothing is raised for damaged folders.
    """
    return [Found(name, folder, why_not(folder)) for name, folder in candidates(extra_folders)]


def why_not(folder: Path) -> str | None:
    """Why a folder is ignored, in words; also where packages that tell are missing or broken."""
    try:
        error = problem(folder)
    except ImportError as missing:
        error = missing
    return str(error) if error else None


def candidates(extra_folders: Iterable[str | Path] = ()) -> list[tuple[str, Path]]:
    """Folders that look like checkpoints, whole or not, each once."""
    pairs = [pair for folder in models_folders(extra_folders) for pair in _inside(folder)]
    seen: dict[Path, tuple[str, Path]] = {}
    for name, folder in [*pairs, *((RELEASED, folder) for folder in hub_snapshots())]:
        seen.setdefault(folder.resolve(), (name, folder))
    return list(seen.values())


def models_folders(extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """Folders that may be checkpoints, or hold checkpoints and flow weights."""
    folders = [*registered(extra_folders), user_models(), *around(Path(__file__).parent.parent)]
    return list(dict.fromkeys(folders))


def registered(extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """The folders that somebody named: the given ones, then the environment variable's."""
    named = [text for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    # Of os.path, which leaves the ~ of a user that does not exist as it is: no such folder, and no error.
    return [Path(os.path.expanduser(folder)) for folder in [*extra_folders, *named]]  # noqa: PTH111


def around(start: Path) -> Iterator[Path]:
    """Models folders of a ComfyUI that `start` lies in, as custom_nodes/<pack> does."""
    for parent in start.parents:
        if (parent / "models").is_dir() and (parent / "custom_nodes").is_dir():
            yield from (path for path in _folders(parent / "models") if is_released(path.name))
            yield parent / "models" / "diffusers" / "Stream-DiffVSR"


def hub_snapshots() -> list[Path]:
    """The released repository in huggingface_hub's cache: what 'main' is there, then the newest first."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE, f"models--{REPOSITORY.replace('/', '--')}")
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except OSError:
        commit = ""
    snapshots = _folders(repository / "snapshots")
    return sorted(snapshots, key=lambda path: (path.name != commit, -path.stat().st_mtime))


def is_released(name: str) -> bool:
    """Whether a folder's name says that it holds the released weights."""
    return name.lower().replace("-", "").replace("_", "") in RELEASED_NAMES


def released(extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """Folders that are meant to hold the released weights, whole or not."""
    return [path for name, path in candidates(extra_folders) if name == RELEASED]


def resolve(source: str | Path, extra_folders: Iterable[str | Path] = ()) -> Path | None:
    """The folder of a source; None where the released weights are not there, and so are to be downloaded.

    Raises `ModelNotFoundError` for a name that nothing has, and for a folder of checkpoints.
    """
    if source == "nano":
        return NANO
    if source == RELEASED:
        return next((path for path in released(extra_folders) if not _say(path)), None)
    if Path(source).is_dir():
        return _explicit(Path(source))
    named = candidates(extra_folders)
    path = next((path for name, path in named if name == str(source)), None)
    if path is None:
        names = ", ".join(dict.fromkeys(["nano", RELEASED, *(name for name, _ in named)]))
        raise ModelNotFoundError(
            f"checkpoint {str(source)!r}", Path(source).absolute(), f"Name a folder, or one of {names}."
        )
    return path


def _explicit(folder: Path) -> Path:
    """The folder; one that only holds checkpoints is refused, with their names."""
    inside = [] if _looks_like_one(folder) else [path for _, path in _inside(folder)]
    if inside:
        raise ModelNotFoundError(
            "checkpoint", folder, f"That is a folder of checkpoints: name {' or '.join(map(str, inside))}."
        )
    return folder


def _say(folder: Path) -> bool:
    """Whether a folder has a problem; it is logged, since the search goes on without it."""
    error = problem(folder)
    if error:
        log.info("%s is ignored as %s: %s", folder, RELEASED, error)
    return error is not None


def _inside(folder: Path) -> Iterator[tuple[str, Path]]:
    """The folder itself if it looks like a checkpoint, then those in it that do, by name."""
    if _looks_like_one(folder):
        yield RELEASED, folder
    for path in _folders(folder):
        if path.name.startswith(".") or path.name.endswith(PARTIAL):
            continue
        if is_released(path.name):
            yield RELEASED, path
        elif _looks_like_one(path):
            yield path.name, path


def _looks_like_one(folder: Path) -> bool:
    """By what is in it; a folder that may not be looked into, as lost+found, does not."""
    try:
        return (folder / INDEX).is_file() or any((folder / name).is_dir() for name in NETWORKS)
    except OSError:
        return False


def _folders(parent: Path) -> list[Path]:
    """Folders in a folder, by name; none where it cannot be read."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
