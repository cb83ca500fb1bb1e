"""Reading weight and JSON files with clear errors, and writing files atomically."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tarfile
import zipfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError

log = logging.getLogger(__name__)

HEADER_LENGTH = 8
"""The number of bytes at the start of a safetensors file that store the length of its header."""

SAMPLE = 1 << 14
SAMPLES = 32
"""A fingerprint reads about SAMPLES pieces of SAMPLE bytes from each file."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise `CheckpointError` if it contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again.")
    return content


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors and the metadata of a safetensors file; raise `CheckpointError` if it is damaged.

    On a CPU, the file is memory-mapped: data is read only when it is used, and is kept in the system's file
    cache, not in this process's memory.
    """
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; raise `CheckpointError` if it is damaged."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a weight file without running any code from it.

    The file's format is safetensors or torch's own. A single unnamed tensor in a file gets the name ''.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    return _read_torch(path, "cpu")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors' names and shapes without reading the weights; check that the file is complete."""
    if path.suffix != ".safetensors":
        return {key: tuple(value.shape) for key, value in _read_torch(path, "meta").items()}
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Generator[Any, None, None]:
    """Open a safetensors file; raise `CheckpointError` if its header is invalid or it is incomplete."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(
            path, _what_instead(path) or f"is not a complete safetensors file ({error})"
        ) from error


def _what_instead(path: Path) -> str:
    """Identify a file that is not safetensors by its first bytes; return '' if they do not identify it."""
    try:
        with path.open("rb") as file:
            start = file.read(SAMPLE)
    except OSError:
        return ""
    if start.lstrip().startswith((b"<", b"\xef\xbb\xbf<")):
        return "is a web page saved under this name"
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the weights themselves"
    return "" if start else "is empty"


def _read_torch(path: Path, device: str) -> dict[str, Tensor]:
    """Read a state dict saved by torch."""
    state = read_pickled(path, device)
    state = {"": state} if isinstance(state, Tensor) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _damaged(path, "contains something other than named weights")
    return state


def read_pickled(path: Path, device: str = "cpu") -> Any:
    """Load a file saved by torch, without running any code in it; raise `CheckpointError` on failure."""
    try:
        zipped = zipfile.is_zipfile(path)
        names = zipfile.ZipFile(path).namelist() if zipped else []
        # Before 2.6, torch runs programs in these two kinds of archive even with weights_only.
        if tarfile.is_tarfile(path) or any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("this is a TorchScript program or torch's oldest format: save only the weights")
        return torch.load(path, map_location=device, mmap=zipped, weights_only=True)
    except Exception as error:  # damaged content can raise any error in the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, f"is incomplete or contains more than weights ({reason})") from error


def _damaged(path: Path, how: str) -> CheckpointError:
    size = path.stat().st_size if path.exists() else 0
    return CheckpointError(f"{path} ({size} bytes) {how}; copy or download it again.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, which appears under its name only once it is complete and on disk."""
    from safetensors.torch import save

    with atomic(path) as file:
        file.write(save(dict(tensors), dict(metadata)))


@contextmanager
def atomic(path: Path) -> Generator[BinaryIO, None, None]:
    """Yield a binary file that is renamed to `path` if the block succeeds, and deleted otherwise."""
    # Processes on several machines, or threads of one process, may write the same file.
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def keep_json(path: Path, value: object) -> None:
    """Cache a value in a small JSON file; a failure is only logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(json.dumps(value).encode())
    except OSError as error:
        log.info("%s could not be saved: %s", path, error)


def fingerprint(paths: Iterable[Path]) -> str:
    """Identify the content of weight files by 32 hex digits, computed from headers and sampled bytes.

    This reads the header and about half a megabyte of each file, so it is fast even for gigabytes. The
    result does not depend on the location, name or date of the files.
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


def sync_folder(folder: Path) -> None:
    """Flush renames in a folder to disk, so that they survive a power loss, if the system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        log.debug("%s cannot be synced: %s", folder, error)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's content to disk, so that it survives a power loss."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
