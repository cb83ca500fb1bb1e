"""Uploads, streamed from the network to disk."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from .problems import ProblemError

FILE = "file"
"""The name of the form field."""
HEADER_BYTES = 16 * 1024
"""The maximum size of the headers of one part."""


class Upload:
    """Writes the first field named 'file' of a multipart form to `target` as it arrives."""

    def __init__(self, target: Path, max_bytes: int) -> None:
        self.target, self.max_bytes = target, max_bytes
        self.name: str | None = None
        """The file name sent by the client; None until it has arrived."""
        self.size = 0
        self._wanted = self._whole = False
        self._key = self._value = b""
        self._headers: dict[bytes, bytes] = {}

    async def receive(self, request: Request) -> None:
        """Read the whole request and save its file; raise `ProblemError` if it is refused or incomplete."""
        kind, parameters = parse_options_header(request.headers.get("content-type"))
        if kind != b"multipart/form-data" or not parameters.get(b"boundary"):
            raise ProblemError(415, f"Send multipart/form-data with the file in a field called '{FILE}'.")
        parser = MultipartParser(
            parameters[b"boundary"],
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
            },
        )
        with self.target.open("xb") as self._file:
            try:
                async for chunk in request.stream():
                    parser.write(chunk)
                parser.finalize()
            except MultipartParseError as error:
                raise ProblemError(400, f"The form cannot be read: {error}.") from error
            except ClientDisconnect as error:
                raise ProblemError(400, "The upload was interrupted.") from error
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise ProblemError(507, "The server's disk is full.") from error
            self._file.flush()
            await asyncio.to_thread(os.fsync, self._file.fileno())
        if self.name is None:
            raise ProblemError(422, f"The form has no field called '{FILE}' with a file name.")
        if not self._whole:
            raise ProblemError(400, "The upload was interrupted before the end of the form.")
        if self.size == 0:
            raise ProblemError(422, "The file is empty.")

    def _part_begin(self) -> None:
        self._headers, self._key, self._value = {}, b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._key += data[start:end]
        self._limit_headers()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._limit_headers()

    def _limit_headers(self) -> None:
        taken = sum(len(key) + len(value) for key, value in self._headers.items())
        if taken + len(self._key) + len(self._value) > HEADER_BYTES:
            raise ProblemError(400, "The form's headers are too long.")

    def _header_end(self) -> None:
        self._headers[self._key.lower()] = self._value
        self._key = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._wanted = self.name is None and options.get(b"name") == FILE.encode() and b"filename" in options
        if self._wanted:
            self.name = options[b"filename"].decode("utf-8", "replace")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._wanted:
            return
        self.size += end - start
        if self.size > self.max_bytes:
            raise ProblemError(413, f"The file exceeds the limit of {self.max_bytes / 1e9:g} GB.")
        self._file.write(data[start:end])

    def _part_end(self) -> None:
        self._whole = self._whole or self._wanted
        self._wanted = False
