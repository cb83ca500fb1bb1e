"""What lies beside the picture in a source: words, chapters, attached files; and the window of its time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

log = logging.getLogger(__name__)

CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time", "duration"}
"""Metadata that belongs to the file it stood in."""


@dataclass(frozen=True)
class Window:
    """The time of the source that goes into the output, in seconds, and what is taken off it."""

    low: float = float("-inf")
    high: float = float("inf")
    shift: Fraction = Fraction(0)

    def holds(self, seconds: float) -> bool:
        return self.low <= seconds < self.high

    def ticks(self, time_base: Fraction) -> int:
        """The shift in ticks."""
        return round(self.shift / time_base)


def kept_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata that still holds in another container."""
    return {key: value for key, value in metadata.items() if key.lower() not in CONTAINER_KEYS}


def copy_chapters(out: Any, original: Any, window: Window) -> None:
    """The chapters, cut to the window; older PyAV cannot, which is logged."""
    if not hasattr(original, "chapters") or not hasattr(out, "set_chapters"):
        log.info("chapters, if there are any, are not copied: this PyAV cannot; update the package av")
        return
    if chapters := cut_chapters(original.chapters(), window):
        out.set_chapters(chapters)


def cut_chapters(chapters: Sequence[Mapping[str, Any]], window: Window) -> list[dict[str, Any]]:
    """Chapters that overlap the window, shifted as it is."""
    kept = []
    for chapter in chapters:
        base = chapter["time_base"]
        low, high = (bound / float(base) for bound in (window.low, window.high))
        start, end = max(chapter["start"], low), min(chapter["end"], high)
        if start < end:
            shift = window.ticks(base)
            kept.append({**chapter, "start": round(start) - shift, "end": round(end) - shift})
    return kept


def copy_attachments(out: Any, original: Any) -> None:
    """Fonts and the like, which Matroska holds."""
    if out.format.name == "matroska" and hasattr(out, "add_attachment"):
        for stream in original.streams:
            if stream.type == "attachment":
                out.add_attachment(stream.metadata.get("filename", stream.name), stream.mimetype, stream.data)
