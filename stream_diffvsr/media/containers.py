"""Opens media files; a file that cannot be read raises one clear sentence."""

from __future__ import annotations

import mmap
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


def is_joined(path: Path, form: str) -> bool:
    """Whether a file is several behind one another, of which FFmpeg reads the first alone: MP4, FLV, WMV."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if form == "flv":
            again = data.find(b"FLV\x01", 9)
            return again >= 0 and data[again + 5 : again + 9] == b"\0\0\0\x09"
        if form == "asf":
            return data.find(data[:16], 16) >= 0
        start = 0
        while "mp4" in form and start + 16 <= len(data):  # from box to box
            kind = data[start + 4 : start + 8]
            if kind == b"moof":  # fragments are read through to the end
                return False
            if start and kind == b"ftyp":
                return True
            size = int.from_bytes(data[start : start + 4], "big")
            size = int.from_bytes(data[start + 8 : start + 16], "big") if size == 1 else size
            if size < 8:  # 0: to the end
                break
            start += size
    return False
