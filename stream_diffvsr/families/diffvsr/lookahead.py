"""The next frame's flow, estimated on a stream of its own beside the current frame: the same numbers, sooner.

It needs nothing of the current result. On a CPU, which has no such streams, only the order changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

END: Any = object()


@dataclass(frozen=True, eq=False)
class Begun:
    """A flow that the device is at."""

    flow: Tensor
    method: str
    """How it is estimated, one of the estimator's `methods`."""
    done: torch.cuda.Event | None = None

    def join(self) -> Tensor:
        """The flow, in order with whatever the device is given from here on; this thread does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.flow.device)
            stream.wait_event(self.done)
            self.flow.record_stream(stream)  # else its memory could be used again too early
        return self.flow


def begin(estimate: Callable[..., Tensor], *frames: Tensor, method: str) -> Begun:
    """Have the device estimate a flow from `frames`, after what it was given before, beside what follows."""
    device = frames[0].device
    if device.type != "cuda":
        return Begun(estimate(*frames), method)
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        flow = estimate(*frames)
        done = torch.cuda.Event()
        done.record()
    for frame in frames:
        frame.record_stream(stream)
    return Begun(flow, method, done)


def with_next(items: Iterable[Item], look_ahead: bool) -> Iterator[tuple[Item, Item | None]]:
    """Each item with the one after it; with None, and nothing asked for in advance, unless `look_ahead`."""
    if not look_ahead:
        yield from ((item, None) for item in items)
        return
    following = iter(items)
    item = next(following, END)
    while item is not END:
        try:
            after = next(following, END)
        except Exception:
            yield item, None  # it is whole, whatever is wrong with the next one
            raise
        yield item, None if after is END else after
        item = after


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all frames: torch keeps freed memory by stream.
    return torch.cuda.Stream(device)
