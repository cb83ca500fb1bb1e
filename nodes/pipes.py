"""Records of how each pipe was opened and of the settings that later nodes added to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Provenance, Upscaler


@dataclass(frozen=True)
class Known:
    """Records how a pipe was opened, and the settings that later nodes added to it."""

    source: str = ""
    """The model's name as selected in the Loader."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `load_pipeline`, as JSON values, that open the same model in another process."""
    base: Upscaler | None = None
    """The pipe from which a Runtime node made this pipe, or None if no Runtime node made it."""
    compile_mode: str | None = None
    """Compile mode that overrides the one in Settings, or None to keep that one."""
    devices: str = ""
    """Devices among which Upscale Video distributes scenes, or '' for the Loader's device alone."""


_known: WeakKeyDictionary[Upscaler, Known] = WeakKeyDictionary()


def how_made(pipe: Upscaler) -> Known:
    """Return the record of a pipe, or an empty record if no node made the pipe."""
    return _known.get(pipe, Known())


def memory_plan(how: Provenance | None) -> str:
    """Return a line to show on the node, naming what is computed in parts, or '' if nothing is."""
    return f"memory plan: {how.parts}" if how and how.parts else ""


def remember(pipe: Upscaler, about: Known) -> None:
    """Keep the record of a pipe for as long as the pipe exists."""
    _known[pipe] = about
