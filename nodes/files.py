"""The files that nodes read, and the folders where nodes may write."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from pathlib import Path, PurePath

from ..stream_diffvsr.errors import IncompatibleInputError
from ..stream_diffvsr.upscaler import FORMATS
from . import host

ANY_OUTPUT = "STREAM_DIFFVSR_ALLOW_ANY_OUTPUT"
"""If this environment variable is 1, nodes may write outside ComfyUI's output and temp folders."""

STATE_SUFFIX = ".safetensors"
HEADER = 1 << 16
"""A saved state's file contains the name of its format within this many bytes of the start."""


def file_stamp(path: Path) -> str:
    """Return a stamp that changes when a file, or any file directly in a folder, is edited or replaced."""
    try:
        inside = sorted(map(_stamp, path.iterdir())) if path.is_dir() else []
        digest = hashlib.sha256("\n".join(inside).encode()).hexdigest()[:16] if inside else ""
        return f"{_stamp(path)} {digest}".rstrip()
    except OSError:
        return f"{path} missing"


def _stamp(path: Path) -> str:
    """Return a file's path, size and modification time as text."""
    status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def writable(path: str | Path) -> Path:
    """Return `path` as an absolute path; a relative path is resolved against the output folder.

    Raise `IncompatibleInputError` if nodes may not write there; links are resolved first.
    """
    target = host.folder("output") / path
    allowed = [host.folder(kind) for kind in ("output", "temp")]
    inside = any(target.resolve().is_relative_to(root.resolve()) for root in allowed)
    if not inside and os.environ.get(ANY_OUTPUT) != "1":
        places = " or ".join(map(str, allowed))
        raise IncompatibleInputError(
            f"outputs must be inside {places}, but {target} is not: choose another path or set {ANY_OUTPUT}=1"
        )
    return target.resolve()


_made: dict[str | None, Path] = {}
_lost: Counter[str | None] = Counter()
"""The last file that each node made, and how often it was missing when the node was queued again."""


def remember_made(node_id: str | None, path: Path) -> None:
    """Record the file that a node made."""
    _made[node_id] = path


def lost_stamp(node_id: str | None) -> str:
    """Return a string for IS_CHANGED that changes when a node's file disappears, so that the node reruns."""
    path = _made.get(node_id)
    if path is not None and not path.exists():
        del _made[node_id]
        _lost[node_id] += 1
    return f" lost {_lost[node_id]}" if _lost[node_id] else ""


def numbered(prefix: str, suffix: str) -> Path:
    """Return the next free path `<prefix>_00001_<suffix>` in the output folder; create its parent folder."""
    path = writable(fill_in(prefix))
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = [_number(file.name, path.name) for file in path.parent.glob("*" + suffix)]
    return path.with_name(f"{path.name}_{max(taken, default=0) + 1:05}_{suffix}")


def _number(file: str, stem: str) -> int:
    """Return the number in `<stem>_00012_...`, or 0 for any other name."""
    digits = file.removeprefix(stem + "_").partition("_")[0] if file.startswith(stem + "_") else ""
    return int(digits) if digits.isdecimal() else 0


def fill_in(prefix: str) -> str:
    """Replace %year%, %month%, %day%, %hour%, %minute% and %second%, as ComfyUI's own nodes do."""
    for name, value in zip(
        ("year", "month", "day", "hour", "minute", "second"), time.localtime(), strict=False
    ):
        prefix = prefix.replace(f"%{name}%", f"{value:02}")
    return prefix


def saved_states() -> list[str]:
    """List saved states in the output and input folders as '<relative path> [output]', newest first."""
    found = []
    for kind in ("output", "input"):
        root = host.folder(kind)
        files = [file for file in root.rglob("*" + STATE_SUFFIX) if is_state(file)]
        found += [(file.stat().st_mtime, listed_name(file, root, kind)) for file in files]
    return [name for _, name in sorted(found, reverse=True)]


def listed_name(file: PurePath, root: PurePath, kind: str) -> str:
    """Return a file's name as it appears in lists and workflows, with / as the separator on every system."""
    return f"{file.relative_to(root).as_posix()} [{kind}]"


def is_state(file: Path) -> bool:
    """Whether the header of a safetensors file identifies it as a saved state."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEADER)
            return any(form.encode() in head for form in FORMATS)
    except OSError:
        return False


def state_path(name: str) -> Path:
    """Return the path for an entry of `saved_states`; any other text is treated as a path."""
    for kind in ("output", "input"):
        if name.endswith(f" [{kind}]"):
            return host.folder(kind) / name.removesuffix(f" [{kind}]")
    return Path(name)
