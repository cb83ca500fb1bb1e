"""The user's own folders, following the conventions of each operating system."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAME = "stream-diffvsr"

NANO = Path(__file__).parent.parent / "nano"
"""The bundled checkpoint."""


def user_models() -> Path:
    """Return the folder to which weights are downloaded if no other folder is registered."""
    return _folder("XDG_DATA_HOME", "Library/Application Support", ".local/share") / NAME / "models"


def user_cache() -> Path:
    """Return the folder for small derived files, used if a checkpoint's own folder is read-only."""
    cache = _folder("XDG_CACHE_HOME", "Library/Caches", ".cache") / NAME
    return cache / "cache" if sys.platform == "win32" else cache


def _folder(variable: str, mac: str, other: str) -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / mac
    # The XDG specification requires ignoring relative paths.
    given = Path(os.environ.get(variable, ""))
    return given if given.is_absolute() else Path.home() / other
