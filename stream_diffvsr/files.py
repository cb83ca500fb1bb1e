"""Safetensors and JSON files, read with clear errors and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .errors import CheckpointError

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
    """All tensors of a safetensors file, and its metadata; raises `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is no whole safetensors file ({error}); copy or download it again."
        ) from error


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
    """Name the content of safetensors files: 32 hex digits from their headers and sampled bytes.

    Reads less than a megabyte per file, so it is fast for gigabytes, and it does not depend on where
    the files lie or when they were written.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for offset in [0, *range(SAMPLE, size, max(SAMPLE, size // SAMPLES))]:
                file.seek(offset)
                digest.update(file.read(SAMPLE))
        digest.update(str(size).encode())
    return digest.hexdigest()[:32]
