"""Files in S3, through obstore (extra `s3`); endpoint and credentials come from the environment."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

from .problems import ProblemError

log = logging.getLogger(__name__)

URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>[^\x00-\x1f]{1,1024})")
TRIES, PAUSE = 3, 2.0
"""How many times to try a transfer, and the first pause in seconds; the pause doubles each time."""
CHUNK = 8 * 2**20


def is_url(text: str) -> bool:
    """Whether a source or target is an S3 address."""
    return text.startswith("s3://")


def check_url(url: str) -> None:
    """Raise `ProblemError` for an invalid S3 address, or if obstore is not installed."""
    if not URL.fullmatch(url):
        raise ProblemError(422, f"{url[:200]!r} is not of the form s3://bucket/key.")
    if importlib.util.find_spec("obstore") is None:
        raise ProblemError(
            501, "S3 needs the obstore package on the server: pip install 'stream-diffvsr[s3]'."
        )


async def exists(url: str) -> int:
    """Return the size of an object in bytes; raise `ProblemError` if it cannot be read."""
    import obstore

    store, key = _place(url)
    try:
        return (await obstore.head_async(store, key))["size"]
    except Exception as error:
        raise ProblemError(422, f"{url} cannot be read ({_reason(error)}).") from error


async def fetch(url: str, target: Path, max_bytes: int) -> None:
    """Download an object to a file that appears only when complete; raise `ProblemError` on failure."""
    import obstore

    from ..files import atomic

    async def once() -> None:
        store, key = _place(url)
        got = await obstore.get_async(store, key)
        size, done = got.meta["size"], 0
        if size > max_bytes:
            raise ProblemError(413, f"{url} exceeds the limit of {max_bytes / 1e9:g} GB.")
        with atomic(target) as file:
            async for chunk in got.stream(min_chunk_size=CHUNK):
                done += await asyncio.to_thread(file.write, chunk)
            if done != size:
                raise OSError(f"only {done} of {size} bytes were received")

    target.parent.mkdir(exist_ok=True)
    await _again(once, f"{url} cannot be read")


async def deliver(source: Path, url: str) -> None:
    """Upload a file, in parts if it is large; the object appears only when complete."""
    import obstore

    async def once() -> None:
        store, key = _place(url)
        await obstore.put_async(store, key, source, chunk_size=CHUNK)
        stored, size = (await obstore.head_async(store, key))["size"], source.stat().st_size
        if stored != size:
            raise OSError(f"only {stored} of {size} bytes were stored")

    await _again(once, f"{url} cannot be written")


async def _again(once: Any, failed: str) -> None:
    """Run a transfer, starting again from the beginning if it fails."""
    for attempt in range(TRIES):
        try:
            return await once()
        except ProblemError:
            raise
        except Exception as error:
            log.warning("a transfer failed (attempt %d of %d): %s", attempt + 1, TRIES, _reason(error))
            if attempt == TRIES - 1:
                raise ProblemError(502, f"{failed} ({_reason(error)}).") from error
            await asyncio.sleep(PAUSE * 2**attempt)
    return None


def _place(url: str) -> tuple[Any, str]:
    """Return obstore's store for the bucket in an address, and the key."""
    from obstore.store import S3Store

    found = URL.fullmatch(url)
    assert found is not None
    return S3Store(found["bucket"]), found["key"]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
