"""The user's own folders, as each system wants them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAME = "stream-diffvsr"

NANO = Path(__file__).parent.parent / "nano"
"""The bundled checkpoint."""


def user_models() -> Path:
    """Where weights are downloaded to when no other folder is registered."""
    return _folder("XDG_DATA_HOME", "Library/Application Support", ".local/share") / NAME / "models"


def user_cache() -> Path:
    """Where small derived files go when a checkpoint's own folder is read-only."""
    cache = _folder("XDG_CACHE_HOME", "Library/Caches", ".cache") / NAME
    return cache / "cache" if sys.platform == "win32" else cache


def _folder(variable: str, mac: str, other: str) -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / mac
    # The specification says to ignore a relative path.
    given = Path(os.environ.get(variable, ""))
    return given if given.is_absolute() else Path.home() / other
