"""A Hugging Face hub on loopback, serving one folder as one repository, with faults on demand.

It speaks what huggingface_hub speaks: model information, the tree, and files by 'resolve' with etag, commit,
ranges, and a redirect to another host name for the large ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    start: int
    """First byte that a range asks for."""
    authorized: bool


@dataclass
class StandInHub:
    """The server's side of a test."""

    folder: Path
    repository: str
    url: str = ""
    cdn: str = ""
    requests: list[Request] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """By the ending of a path: what happens to the next answers, one after the other."""
    token: str = ""
    """Where it is set, only requests with it are answered."""
    sparse: bool = False
    """Whether model information lists names alone, as some mirrors do."""

    def fail(self, ending: str, *faults: Fault) -> None:
        self.faults[ending] += faults

    def gets(self, ending: str = "") -> list[Request]:
        """The requests for content, to files with that ending; large ones come from the other host."""
        return [
            r
            for r in self.requests
            if r.method == "GET"
            and r.path.endswith(ending)
            and ("/cdn/" in r.path if r.path.endswith(LARGE) else "/resolve/" in r.path)
        ]

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def digest(self, name: str) -> str:
        content = (self.folder / name).read_bytes()
        if name.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


Fault = Callable[["Handler", bytes], None]
"""What is done instead of answering with these bytes."""


def status(code: int) -> Fault:
    return lambda handler, content: handler.answer(code, b"no", {})


def cut_after(count: int) -> Fault:
    """Promise all of it, send so many bytes, hang up."""

    def fault(handler: Handler, content: bytes) -> None:
        handler.head(200 if not handler.first_byte else 206, len(content), handler.range_headers(content))
        handler.wfile.write(content[:count])
        handler.wfile.flush()
        handler.close_connection = True

    return fault


def stalled_after(count: int, over: threading.Event) -> Fault:
    """Send so many bytes, then nothing until the event."""

    def fault(handler: Handler, content: bytes) -> None:
        cut_after(count)(handler, content)
        over.wait(60)

    return fault


def one_bit(handler: Handler, content: bytes) -> None:
    """Everything, but for one bit in the middle."""
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    handler.answer(200, bytes(damaged), {})


def ignoring_range(handler: Handler, content: bytes) -> None:
    """The whole file, whatever was asked for."""
    handler.answer(200, handler.whole, {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub
    whole = b""
    first_byte = 0

    def do_GET(self) -> None:
        self.serve()

    def do_HEAD(self) -> None:
        self.serve()

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.first_byte = int(match[1]) if match else 0
        authorized = "Authorization" in self.headers
        self.hub.requests.append(Request(self.command, path, self.first_byte, authorized))
        refused = self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        if refused and not path.startswith("/cdn/"):
            return self.answer(401, b"no", {"X-Error-Code": "GatedRepo"})
        fault = self.next_fault(path)
        if fault:
            return self.content(path.removeprefix("/cdn"), fault)
        return self.route(path)

    def next_fault(self, path: str) -> Fault | None:
        """Large files fail where their content comes from, which is behind the redirect."""
        redirected = path.endswith(LARGE) and not path.startswith("/cdn/")
        if self.command != "GET" or redirected:
            return None
        waiting = (faults for ending, faults in self.hub.faults.items() if faults and path.endswith(ending))
        return next((faults.pop(0) for faults in waiting), None)

    def route(self, path: str) -> None:
        api = f"/api/models/{self.hub.repository}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return self.json(self.information())
        if path.startswith(f"{api}/tree/"):
            return self.json(self.tree())
        if path.startswith("/cdn/"):
            return self.content(path.removeprefix("/cdn"))
        match = re.fullmatch(f"/{self.hub.repository}/resolve/(main|{COMMIT})/(.+)", path)
        if match and match[2] in self.hub.files():
            return self.resolve(match[2])
        code = (
            "EntryNotFound"
            if match
            else "RevisionNotFound"
            if self.hub.repository in path
            else "RepoNotFound"
        )
        return self.answer(404, b"no", {"X-Error-Code": code})

    def resolve(self, name: str) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.hub.digest(name)}"', "Accept-Ranges": "bytes"}
        if not name.endswith(LARGE):
            return self.content(f"/{name}", headers=headers)
        size = str((self.hub.folder / name).stat().st_size)
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": size}
        return self.answer(302, b"", headers | {"Location": f"{self.hub.cdn}/cdn/{name}"})

    def content(self, path: str, fault: Fault | None = None, headers: dict[str, str] | None = None) -> None:
        name = path.rpartition(f"/resolve/{COMMIT}/")[2].lstrip("/")
        file = self.hub.folder / name
        self.whole = file.read_bytes() if file.is_file() else b""
        content = self.whole[self.first_byte :]
        if fault:
            return fault(self, content)
        code = 206 if self.first_byte else 200
        return self.answer(code, content, {**(headers or {}), **self.range_headers(content)})

    def range_headers(self, content: bytes) -> dict[str, str]:
        if not self.first_byte:
            return {}
        size = len(self.whole)
        return {"Content-Range": f"bytes {self.first_byte}-{size - 1}/{size}"}

    def information(self) -> dict[str, Any]:
        blobs = "blobs=" in self.path and not self.hub.sparse
        siblings = [self.sibling(name) if blobs else {"rfilename": name} for name in self.hub.files()]
        name = self.hub.repository
        return {
            "_id": "0", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False,
            "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
        }  # fmt: skip

    def sibling(self, name: str) -> dict[str, Any]:
        size, digest = (self.hub.folder / name).stat().st_size, self.hub.digest(name)
        if not name.endswith(LARGE):
            return {"rfilename": name, "size": size, "blobId": digest}
        lfs = {"sha256": digest, "size": size, "pointerSize": 130}
        return {"rfilename": name, "size": size, "blobId": "0" * 40, "lfs": lfs}

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name in self.hub.files():
            size, digest = (self.hub.folder / name).stat().st_size, self.hub.digest(name)
            entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": digest}
            if name.endswith(LARGE):
                entry |= {"oid": "0" * 40, "lfs": {"oid": digest, "size": size, "pointerSize": 130}}
            entries.append(entry)
        return entries

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.head(code, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def head(self, code: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, repository: str) -> Iterator[StandInHub]:
    """The hub, until the block ends."""
    hub = StandInHub(folder, repository)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url, hub.cdn = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
