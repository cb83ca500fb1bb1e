"""Open media files, or state in one clear sentence why a file cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from ..errors import VideoError
from .av_types import Container

PLAYLISTS = {"concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest"}
"""Formats that refer to other files or to the network; a file's sender could thus choose what is read."""
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
"""The bytes with which a WMV or WMA file begins."""


def check_readable(path: Path) -> None:
    """Raise `VideoError` with a clear reason if a path cannot be read."""
    if not path.exists():
        raise VideoError(f"{path} does not exist: check the path.")
    try:
        if path.is_dir():
            next(path.iterdir(), None)
            return
        if not path.is_file():
            raise VideoError(
                f"{path} is a pipe or a device, which can only be read once: save it as a file first."
            )
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if empty:
        raise VideoError(f"{path} is empty: copy or download it again.")


def open_container(path: Path, form: str | None = None) -> Container:
    """Open a file for reading with PyAV, as format `form` if given; raises `VideoError` with the reason."""
    import av

    try:
        # Use an absolute path, because FFmpeg would mistake text before a colon for a protocol.
        formats = {"format_whitelist": ",".join(sorted(av.formats_available - PLAYLISTS))}
        opened: Any = av.open(str(path.absolute()), format=form, options=formats, metadata_errors="ignore")
        return opened
    except (av.FFmpegError, OSError, ValueError) as error:
        check_readable(path)
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(
            f"{path} cannot be opened as a video or picture ({reason}): it may be damaged, incomplete, or a "
            "file of another kind."
        ) from error


def is_joined(path: Path, form: str) -> bool:
    """Whether an MP4, FLV or WMV file consists of several joined files, of which FFmpeg reads only the first.

    This reads only the headers of the file's boxes, tags or objects.
    """
    if form not in ("asf", "flv") and "mp4" not in form.split(","):
        return False
    start = 13 if form == "flv" else 0
    with path.open("rb") as file:
        while len(head := _at(file, start)) == 24:
            if form == "flv":
                again, step = head[:3] == b"FLV", 15 + int.from_bytes(head[1:4], "big")
            elif form == "asf":
                again, step = head[:16] == ASF, int.from_bytes(head[16:], "little")
            else:
                if head[4:8] == b"moof":  # FFmpeg reads fragments to the end
                    return False
                again, step = head[4:8] == b"ftyp", int.from_bytes(head[:4], "big")
                step = int.from_bytes(head[8:16], "big") if step == 1 else step
            if again and start:
                return True
            if step < 8:  # damaged, or a box without a size, which extends to the end of the file
                return False
            start += step
    return False


def _at(file: BinaryIO, start: int) -> bytes:
    try:
        file.seek(start)
    except (OSError, OverflowError, ValueError):  # beyond the largest possible file
        return b""
    return file.read(24)
