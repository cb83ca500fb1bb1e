"""Decoding frames in advance and encoding results afterwards, in threads with bounded queues."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

DONE = object()


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield the items; a thread produces up to `depth` of them in advance.

    Errors in the thread are raised here; closing the generator stops the thread and waits for it to end.
    """
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(1, depth))
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, results, stop), name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is DONE:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _produce(items: Iterable[Any], results: queue.Queue[Any], stop: threading.Event) -> None:
    """Fill the queue until the items end or the consumer stops; the last entry is DONE, plus any error."""
    iterator = iter(items)
    try:
        for item in iterator:
            if not _offer(results, (item, None), stop):
                return
        _offer(results, (DONE, None), stop)
    except BaseException as error:
        _offer(results, (DONE, error), stop)
    finally:
        # Close the decoder in the thread that runs it.
        if isinstance(iterator, Generator):
            iterator.close()


def _offer(results: queue.Queue[Any], entry: Any, stop: threading.Event) -> bool:
    """Put an entry into the queue, waiting for space; return False if the consumer has stopped."""
    while not stop.is_set():
        try:
            results.put(entry, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


class Background:
    """Runs calls one after another in a thread; adding another blocks while `depth` calls are queued.

    An error in a call is raised by the next `add` or `wait`.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._pool = ThreadPoolExecutor(1, "stream-diffvsr write behind")
        self._pending: deque[Future[Any]] = deque()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def add(self, call: Callable[..., Any], *args: Any) -> None:
        """Queue a call."""
        while len(self._pending) >= self.depth or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(call, *args))

    def wait(self) -> None:
        """Wait until all queued calls are done."""
        while self._pending:
            self._pending.popleft().result()

    def drop(self) -> None:
        """Cancel the queued calls and wait for the one that is running. Errors are ignored."""
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            if not future.cancelled():
                future.exception()
        self._pending.clear()
