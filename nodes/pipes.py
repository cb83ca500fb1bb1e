"""What the nodes know about a pipe besides the pipe itself: how it was opened, and what wrappers asked
for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Provenance, Upscaler


@dataclass(frozen=True)
class Known:
    """Of one pipe."""

    source: str = ""
    """As the loader node has it."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of `load_pipeline` that open the same model elsewhere, as JSON values."""
    base: Upscaler | None = None
    """The loader's pipe that a Runtime node made it of; None for a loader's own."""
    compile_mode: str | None = None
    """Used instead of what Settings say; None: Settings decide."""
    devices: str = ""
    """Upscale Video spreads its scenes over these; '': it uses the loader's device alone."""


_known: WeakKeyDictionary[Upscaler, Known] = WeakKeyDictionary()


def how_made(pipe: Upscaler) -> Known:
    """What is known about a pipe; empty for one that no node made."""
    return _known.get(pipe, Known())


def memory_plan(how: Provenance | None) -> str:
    """What of a frame is computed in parts, in words for the node; '' where frames are computed whole."""
    return f"memory plan: {how.parts}" if how and how.parts else ""


def remember(pipe: Upscaler, about: Known) -> None:
    """Remember it as long as the pipe exists."""
    _known[pipe] = about
