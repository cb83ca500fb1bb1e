"""What is asked of the Hugging Face hub, in huggingface_hub's own session.

Endpoint, token and proxies are thus its own. Files come as one plain stream each, instead of through its
downloaders, which differ between its versions: so resuming, progress and cancelling are the same with all
of them, with or without hf_xet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import StreamDiffVSRError

CHUNK = 1 << 16
"""At most so many bytes come between two looks at whether the download is to go on."""

TIMEOUT = 30.0
"""Seconds for the list of files."""

PARTIAL_CONTENT = 206

NETWORK_MODULES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "ssl", "socket", "http")
"""Where errors of a connection come from: the hub's client changed its HTTP library twice."""


class HubError(StreamDiffVSRError):
    """The hub said no, or could not be reached."""

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository."""

    path: str
    size: int
    digest: str
    """SHA-256 (64 digits) of large files, git's SHA-1 (40 digits) of others; empty where there is none."""
    url: str


def offline() -> bool:
    """Whether the user forbids traffic, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def endpoint() -> str:
    """The hub's address, as HF_ENDPOINT says."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def list_files(repository: str, revision: str) -> list[RemoteFile]:
    """All files of a repository at a branch, tag or commit; raises `HubError`."""
    from huggingface_hub import HfApi, hf_hub_url

    try:
        with asking(f"{repository} at revision {revision!r}"):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise HubError(
            f"{endpoint()} answered with something else than a list of files: another server answers in its "
            "place (a login page of the network, or a wrong HF_ENDPOINT)"
        ) from error
    files = []
    for entry in info.siblings or ():
        url = hf_hub_url(repository, entry.rfilename, revision=info.sha or revision)
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        files.append(RemoteFile(entry.rfilename, -1 if entry.size is None else entry.size, digest or "", url))
    return files


def with_size(file: RemoteFile) -> RemoteFile:
    """The file with its size and digest, asked for one by one where the listing had none."""
    from huggingface_hub import get_hf_file_metadata

    if file.size >= 0 and file.digest:
        return file
    with asking(file.path):
        metadata = get_hf_file_metadata(file.url)
    digest = metadata.etag or ""
    known = digest if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest) else ""
    return RemoteFile(file.path, metadata.size or 0, known, file.url)


@contextmanager
def open_stream(file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Bytes of a file from `start` on, with where they really begin; raises `HubError`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    session: Any = get_session()
    asked = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    with ExitStack() as stack:
        # Only the asking is inside: an error of whoever takes the bytes is not one of the connection.
        with asking(file.path):
            opened: Any
            if callable(session.stream):  # hub 1 and later; of requests it is a flag
                opened = session.stream("GET", file.url, follow_redirects=True, **asked)
            else:
                opened = session.get(file.url, stream=True, **asked)
            response = stack.enter_context(opened)
            _refuse(response.status_code, file.path)
        yield start if response.status_code == PARTIAL_CONTENT else 0, _chunks(response, file.path)


def _chunks(response: Any, what: str) -> Iterator[bytes]:
    # httpx hands over what has come; requests fills a chunk first, and loses it when the connection breaks.
    read = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(CHUNK)
    with asking(what):
        yield from read


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn what goes wrong with a request into `HubError`, with whether it is worth trying again."""
    from huggingface_hub.utils import HfHubHTTPError

    try:
        yield
    except json.JSONDecodeError:  # in some versions one of the network's errors too
        raise
    except HfHubHTTPError as error:
        _refuse(getattr(error.response, "status_code", 0), what)
        raise HubError(f"{endpoint()} did not give {what} ({_line(error)})") from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and library not in NETWORK_MODULES:
            raise
        raise HubError(f"the connection to {endpoint()} failed ({_line(error)})", transient=True) from error


def _refuse(status: int, what: str) -> None:
    """Raise `HubError` for an answer that is no content."""
    if status in (401, 403):
        raise HubError(
            f"{endpoint()} refuses {what} (status {status}): it does not exist there, or needs a login "
            "(set HF_TOKEN, or run 'hf auth login')"
        )
    if status == 404:
        raise HubError(f"{endpoint()} has no {what} (status 404)")
    if status >= 400:
        transient = status >= 500 or status in (408, 429)
        raise HubError(f"{endpoint()} did not give {what} (status {status})", transient)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
