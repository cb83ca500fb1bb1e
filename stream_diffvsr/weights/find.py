"""Where checkpoints are searched for, in which order, and under which names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .folders import user_models
from .released import RELEASED, RELEASES, release_named

VARIABLE = "STREAM_DIFFVSR_MODELS"
"""Environment variable that names models folders, separated as in PATH."""

PARTIAL = ".partial"
"""Ending of the folder that a download grows in."""

Recognise = Callable[[Path], "str | None"]
"""The family that a folder's files are meant for; None where it looks like no checkpoint."""


class Candidate(NamedTuple):
    """A folder that is meant to be a checkpoint, whole or not."""

    name: str
    path: Path
    family: str


def candidates(extra_folders: Iterable[str | Path], recognise: Recognise) -> list[Candidate]:
    """Folders that look like checkpoints, each once, in the order of search."""
    found = [each for folder in models_folders(extra_folders) for each in _inside(folder, recognise)]
    for release in RELEASES.values():
        found += [Candidate(release.name, path, release.family) for path in hub_snapshots(release.repository)]
    seen: dict[Path, Candidate] = {}
    for each in found:
        seen.setdefault(each.path.resolve(), each)
    return list(seen.values())


def inside(folder: Path, recognise: Recognise) -> list[Path]:
    """The checkpoints in a folder that is none itself."""
    if recognise(folder):
        return []
    return [each.path for each in _inside(folder, recognise)]


def _inside(folder: Path, recognise: Recognise) -> Iterator[Candidate]:
    """The folder itself if it looks like a checkpoint, then those in it that do, by name."""
    if family := recognise(folder):
        release, usual = release_named(folder.name), RELEASED if family == "diffvsr" else folder.name
        yield Candidate(release.name if release and release.family == family else usual, folder, family)
    for path in subfolders(folder):
        if path.name.startswith(".") or path.name.endswith(PARTIAL):
            continue
        family, release = recognise(path), release_named(path.name)
        if release and family in (None, release.family):
            yield Candidate(release.name, path, release.family)
        elif family:
            yield Candidate(path.name, path, family)


def models_folders(extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """Folders that may be checkpoints, or hold checkpoints and flow weights."""
    folders = [*registered(extra_folders), user_models(), *_around(Path(__file__))]
    return list(dict.fromkeys(folders))


def registered(extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """The folders that somebody named: the given ones, then the environment variable's."""
    named = [text for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    # Of os.path, which leaves the ~ of a user that does not exist as it is: no such folder, and no error.
    return [Path(os.path.expanduser(folder)) for folder in [*extra_folders, *named]]  # noqa: PTH111


def _around(start: Path) -> Iterator[Path]:
    """Models folders of a ComfyUI that `start` lies in, as custom_nodes/<pack> does."""
    for parent in start.parents:
        if (parent / "models").is_dir() and (parent / "custom_nodes").is_dir():
            yield from (path for path in subfolders(parent / "models") if release_named(path.name))
            yield parent / "models" / "diffusers" / "Stream-DiffVSR"


def hub_snapshots(repository: str) -> list[Path]:
    """A repository in huggingface_hub's cache: what 'main' is there, then the newest first."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        commit = ""
    snapshots = subfolders(folder / "snapshots")
    return sorted(snapshots, key=lambda path: (path.name != commit, -path.stat().st_mtime))


def subfolders(parent: Path) -> list[Path]:
    """Folders in a folder, by name; none where it cannot be read."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
