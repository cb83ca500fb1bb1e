"""The folders that are searched for checkpoints, their order, and the names of the checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .folders import user_models
from .released import RELEASED, RELEASES, release_named

VARIABLE = "STREAM_DIFFVSR_MODELS"
"""Environment variable that lists models folders, separated as in PATH."""

PARTIAL = ".partial"
"""Suffix of a folder that contains a partial download."""

Recognise = Callable[[Path], "str | None"]
"""Returns the family of a folder's files; None if the folder does not look like a checkpoint."""


class Candidate(NamedTuple):
    """A folder that looks like a checkpoint, complete or not."""

    name: str
    path: Path
    family: str


def candidates(extra_folders: Iterable[str | Path], recognise: Recognise) -> list[Candidate]:
    """Return folders that look like checkpoints, in search order and without duplicates."""
    found = [each for folder in models_folders(extra_folders) for each in _inside(folder, recognise)]
    for release in RELEASES.values():
        found += [Candidate(release.name, path, release.family) for path in hub_snapshots(release.repository)]
    seen: dict[Path, Candidate] = {}
    for each in found:
        seen.setdefault(each.path.resolve(), each)
    return list(seen.values())


def inside(folder: Path, recognise: Recognise) -> list[Path]:
    """Return the checkpoints inside a folder; none if the folder itself is a checkpoint."""
    if recognise(folder):
        return []
    return [each.path for each in _inside(folder, recognise)]


def _inside(folder: Path, recognise: Recognise) -> Iterator[Candidate]:
    """Yield the folder if it looks like a checkpoint, then each subfolder that does, sorted by name."""
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
    """Return the folders that may be checkpoints or contain checkpoints and flow weights."""
    folders = [*registered(extra_folders), user_models(), *_around(Path(__file__))]
    return list(dict.fromkeys(folders))


def registered(extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """Return the registered folders: the given folders, then those that the environment variable lists."""
    named = [text for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    # os.path leaves the ~ of an unknown user unchanged: such a folder does not exist, but raises no error.
    return [Path(os.path.expanduser(folder)) for folder in [*extra_folders, *named]]  # noqa: PTH111


def _around(start: Path) -> Iterator[Path]:
    """Yield models folders of the ComfyUI to which `start` belongs, for example in custom_nodes/<pack>."""
    for parent in start.parents:
        if (parent / "models").is_dir() and (parent / "custom_nodes").is_dir():
            yield from (path for path in subfolders(parent / "models") if release_named(path.name))
            yield parent / "models" / "diffusers" / "Stream-DiffVSR"


def hub_snapshots(repository: str) -> list[Path]:
    """Return a repository's snapshots in huggingface_hub's cache: 'main', then the others, newest first."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        commit = ""
    snapshots = subfolders(folder / "snapshots")
    return sorted(snapshots, key=lambda path: (path.name != commit, -path.stat().st_mtime))


def subfolders(parent: Path) -> list[Path]:
    """Return a folder's subfolders, sorted by name; none if it cannot be read."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
