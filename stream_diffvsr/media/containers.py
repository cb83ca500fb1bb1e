"""Opens media files; a file that cannot be read raises one clear sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import VideoError
from .av_types import Container

PLAYLISTS = {"concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest"}
"""Formats that open other files, or the network: whoever sends such a file would choose what is read."""


def check_readable(path: Path) -> None:
    """Say plainly why a path cannot be read."""
    if not path.exists():
        raise VideoError(f"{path} does not exist: check the path.")
    try:
        if path.is_dir():
            next(path.iterdir(), None)
            return
        if not path.is_file():
            raise VideoError(
                f"{path} is a pipe or a device, which is read only once: save it as a file first."
            )
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if empty:
        raise VideoError(f"{path} is empty: copy or download it again.")


def open_container(path: Path, form: str | None = None) -> Container:
    """An open `av` container for reading, of a format if it is known; raises `VideoError` with the reason."""
    import av

    try:
        # Absolute: what stands before a colon would be taken for a protocol.
        formats = {"format_whitelist": ",".join(sorted(av.formats_available - PLAYLISTS))}
        opened: Any = av.open(str(path.absolute()), format=form, options=formats, metadata_errors="ignore")
        return opened
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(
            f"{path} cannot be opened as a video or picture ({reason}): it is damaged, incomplete, or "
            "something else."
        ) from error
