"""Store files that a runtime has built, keyed by everything they depend on, for use in later runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from ..files import fingerprint

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@contextmanager
def built_once(
    root: Path, key: Mapping[str, str], size: int, make: Callable[[Path], None]
) -> Generator[Path, None, None]:
    """Yield a folder in `root` with the files that `make(folder)` writes; `make` runs at most once per `key`.

    The folder's name begins with `key["graph"]`. `size` is the size of the weights in bytes, from which the
    logged duration is estimated. Files that are incomplete or were built for another key are rebuilt. If two
    processes need the same folder, the second one waits. If `root` is read-only, the folder exists only
    inside the context.
    """
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]
    folder = root / f"{key['graph']}-{name}"

    def make_and_tell(to: Path) -> None:
        log.info(
            "converting %s once for %s (about %.0f s); the result is stored in %s",
            key["graph"],
            root.name,
            expected_seconds(root, size),
            root,
        )
        make(to)

    if _is_whole(folder, key) or _make_once(folder, key, size, make_and_tell):
        yield folder
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        make_and_tell(Path(temporary))
        yield Path(temporary)


def expected_seconds(root: Path, size: int) -> float:
    """Estimate from earlier conversions in `root` how long converting `size` bytes of weights will take.

    If there are no earlier conversions, assume the speed of two cores of a 2024 server.
    """
    ratios = []
    for path in root.glob(f"*/{MANIFEST}"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            ratios.append(content["seconds"] / _usual_seconds(content["bytes"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return statistics.median(ratios or [1.0]) * _usual_seconds(size)


def _usual_seconds(size: int) -> float:
    return 8 + 30 * size / 1e9


def _make_once(folder: Path, key: Mapping[str, str], size: int, make: Callable[[Path], None]) -> bool:
    """Make the folder unless it is complete; if it cannot be written, log this and return False."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _is_whole(folder, key):
                return True
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            start = time.perf_counter()
            make(part)
            took = {"bytes": size, "seconds": round(time.perf_counter() - start, 1)}
            files = sorted(part.iterdir())
            content = {"key": dict(key), "files": _sizes(files), "fingerprint": fingerprint(files), **took}
            (part / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            return True
    except OSError as error:
        log.warning("%s cannot be stored (%s), so it is built for this run only", folder, error)
        return False
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_whole(folder: Path, key: Mapping[str, str]) -> bool:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
        return (content["key"], content["files"], content["fingerprint"]) == (
            dict(key),
            _sizes(files),
            fingerprint(files),
        )
    except (OSError, ValueError, KeyError, TypeError):  # missing or incomplete
        return False


def _sizes(files: list[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in files}
