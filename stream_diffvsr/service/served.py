"""File responses with ranges, ETags, and media types that no browser displays as a page."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from .problems import ProblemError

TYPES = {".mkv": "video/x-matroska", ".webp": "image/webp", ".avif": "image/avif", ".m4v": "video/mp4"}
SHOWN = ("video/", "image/")
NOT_SHOWN = ("image/svg+xml",)


def serve(
    request: Request, path: Path, name: str = "", *, download: bool = False, kind: str = ""
) -> Response:
    """Return a file, or the requested part of it, for browsers to save as `name`; `kind` is its media type.

    Raise `ProblemError` if it does not exist. If it is replaced while it is being sent, the old version is
    still sent in full.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ProblemError(404, "The file does not exist (yet).") from error
    etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    wanted = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Accept-Ranges": "bytes"}
    if etag in wanted or "*" in wanted:
        return Response(status_code=304, headers=headers)
    if name:
        how = "attachment" if download else "inline"
        headers["Content-Disposition"] = f"{how}; filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    return FileResponse(path, headers=headers, media_type=kind or media_type(path), stat_result=stat)


def media_type(path: Path) -> str:
    """Return the media type of a picture or video, or the generic binary type for anything else."""
    guessed = TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0] or ""
    return guessed if guessed.startswith(SHOWN) and guessed not in NOT_SHOWN else "application/octet-stream"
