"""Weight and JSON files, read with clear errors and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError

HEADER_LENGTH = 8
"""A safetensors file begins with the length of its header, in so many bytes."""

SAMPLE = 1 << 14
SAMPLES = 32
"""A fingerprint reads so many pieces of so many bytes of each file."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `CheckpointError` where the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch the file again.")
    return content


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata; raises `CheckpointError`.

    On a CPU the tensors are the file itself, mapped: nothing is read before it is used, and what is read
    is the system's file cache and not memory of this process.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"is no whole safetensors file ({error})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file, mapped: safetensors, or torch's own format without any code in it."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    return _read_torch(path, "cpu")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a weight file holds, without reading the weights; the file is whole then."""
    if path.suffix == ".safetensors":
        return {key: tuple(entry["shape"]) for key, entry in read_header(path).items()}
    return {key: tuple(value.shape) for key, value in _read_torch(path, "meta").items()}


def read_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file, compared with the file's length; raises `CheckpointError`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(HEADER_LENGTH)
            length = int.from_bytes(start, "little")
            if size < HEADER_LENGTH or length > size - HEADER_LENGTH:
                raise _damaged(path, _what_instead(start, size))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        needed = HEADER_LENGTH + length + max((e["data_offsets"][1] for e in header.values()), default=0)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, f"has no safetensors header that can be read ({error})") from error
    if size != needed:
        raise _damaged(path, f"is cut short or damaged: its header describes {needed} bytes")
    return header


def _what_instead(start: bytes, size: int) -> str:
    """What a file is whose first bytes do not begin a safetensors file that could be as long as it is."""
    if start.lstrip().startswith((b"<", b"\xef\xbb\xbf<")):
        return "is a web page saved under this name"
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the weights themselves"
    return "is empty" if not size else "is cut short: not even its header is whole"


def _read_torch(path: Path, device: str) -> dict[str, Tensor]:
    """A state dict saved by torch, opened without running anything that it may hold."""
    try:
        state = torch.load(path, map_location=device, mmap=zipfile.is_zipfile(path), weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, f"is no whole file of weights alone ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _damaged(path, "holds something else than named weights")
    return state


def _damaged(path: Path, how: str) -> CheckpointError:
    size = path.stat().st_size if path.exists() else 0
    return CheckpointError(f"{path} ({size} bytes) {how}; copy or download it again.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears under its name only when it is whole and on the disk."""
    from safetensors.torch import save

    with atomic(path) as file:
        file.write(save(dict(tensors), dict(metadata)))


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that is renamed to `path` when the block ends well, and else vanishes."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def fingerprint(paths: Iterable[Path]) -> str:
    """Name the content of weight files: 32 hex digits from their headers and sampled bytes.

    Reads about half a megabyte and the header of each file, so it is fast for gigabytes, and it does not
    depend on where the files lie, what they are called or when they were written.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            header = _header_end(file, size) if path.suffix == ".safetensors" else 0
            file.seek(0)
            digest.update(file.read(header))
            for offset in range(header, size, max(SAMPLE, (size - header) // SAMPLES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE))
        digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()[:32]


def _header_end(file: BinaryIO, size: int) -> int:
    file.seek(0)
    return min(HEADER_LENGTH + int.from_bytes(file.read(HEADER_LENGTH), "little"), size)
