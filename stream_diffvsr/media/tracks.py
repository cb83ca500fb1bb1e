"""A source's metadata, chapters, attached files and covers, and the time window of the output."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .av_types import Container, Output, Packet, Stream
from .containers import open_container
from .streams import is_cover

log = logging.getLogger(__name__)

CONTAINER_KEYS = re.compile(
    r"major_brand|minor_version|compatible_brands|encoder|creation_time|duration"
    r"|(_statistics_.*|bps|number_of_(frames|bytes)|source_id)(-\w+)?"  # from mkvmerge
    r"|(generation_|product_)?uid|\w+_(ul|umid)|(company|product)_name|(product|toolkit)_version(_num)?"
    r"|application_platform|modification_date",  # from MXF
    re.IGNORECASE,
)
"""Metadata keys that describe only the file in which they are stored."""


COVERS = {"mjpeg": (".jpg", "image/jpeg"), "png": (".png", "image/png"), "bmp": (".bmp", "image/bmp")}
"""Codecs that containers support for cover pictures -> suffix and media type."""


MP4_WORDS = {
    *("title", "artist", "album_artist", "composer", "album", "date", "comment", "genre", "copyright"),
    *("grouping", "lyrics", "description", "synopsis", "show", "episode_id", "network", "keywords"),
    *("episode_sort", "season_number", "media_type", "hd_video", "gapless_playback", "compilation", "track"),
    *("disc", "tmpo", "sort_name", "sort_artist", "sort_album", "sort_album_artist", "sort_composer"),
}
"""Metadata keys for which MP4 has fields; an MP4 file with any other key cannot store a cover."""


@dataclass(frozen=True)
class Window:
    """The part of the source to output, and the shift to subtract from its times, all in seconds."""

    low: float = float("-inf")
    high: float = float("inf")
    shift: Fraction = Fraction(0)

    def holds(self, seconds: float) -> bool:
        return self.low <= seconds < self.high

    def ticks(self, time_base: Fraction) -> int:
        """Return the shift in units of `time_base`."""
        return round(self.shift / time_base)


def kept_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that remains valid in another container."""
    return {key: value for key, value in metadata.items() if not CONTAINER_KEYS.fullmatch(key)}


def with_later_time_code(words: dict[str, str], skipped: Fraction, rate: Fraction) -> dict[str, str]:
    """Return metadata with the time code advanced by `skipped` seconds, or removed if it is unreadable."""
    moved = dict(words)
    for key in [key for key in words if key.lower() == "timecode" and skipped]:
        try:
            moved[key] = later_time_code(words[key], round(skipped * rate), rate)
        except ValueError:
            log.warning(
                "the time code %r is left out: it cannot be adjusted to the output's start", moved.pop(key)
            )
    return moved


TIME_CODE = re.compile(r"\d\d:\d\d:\d\d[:;.]\d\d?")


def time_code(picture: Stream) -> dict[str, str]:
    """Return, as metadata, the time code that a camera stores in a separate stream."""
    codes = [s.metadata.get("timecode", "") for s in picture.container.streams if s.type == "data"]
    known = [code for code in codes if TIME_CODE.fullmatch(code)]
    return {"timecode": known[0]} if known else {}


def later_time_code(code: str, frames: int, rate: Fraction) -> str:
    """Return a time code such as `01:00:00:00`, advanced by `frames` frames.

    Raises `ValueError` if `code` is not a time code.

    A semicolon marks a drop-frame code: at 30 frames per second, two frame numbers are skipped at the
    beginning of each minute except every tenth.
    """
    hours, minutes, seconds, number = (int(text) for text in re.split("[:;.]", code))
    second, minute = round(rate), 60 * hours + minutes
    drop = second // 15 if code[-3:-2] in (";", ".") else 0
    counted = (60 * minute + seconds) * second + number - drop * (minute - minute // 10) + frames
    tens, rest = divmod(counted, 600 * second - 9 * drop)
    named = counted + 9 * drop * tens + drop * max(0, (rest - drop) // (60 * second - drop))
    whole, number = divmod(named, second)
    whole %= 24 * 3600
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{':;'[drop > 0]}{number:02}"


def copy_chapters(out: Output, original: Container, window: Window) -> None:
    """Copy the chapters, cut to the window, or log that PyAV is too old to do so."""
    if not hasattr(original, "chapters") or not hasattr(out, "set_chapters"):
        log.info(
            "any chapters are left out because this version of PyAV cannot copy them: update the av package"
        )
        return
    if chapters := cut_chapters(original.chapters(), window):
        out.set_chapters(chapters)


def cut_chapters(chapters: Sequence[Mapping[str, Any]], window: Window) -> list[dict[str, Any]]:
    """Return the chapters that overlap the window, cut and shifted to match it."""
    kept = []
    for chapter in chapters:
        base = chapter["time_base"]
        low, high = (bound / float(base) for bound in (window.low, window.high))
        start, end = max(chapter["start"], low), min(chapter["end"], high)
        if start < end:
            shift = window.ticks(base)
            kept.append({**chapter, "start": round(start) - shift, "end": round(end) - shift})
    return kept


def copy_attachments(out: Output, original: Container) -> None:
    """Copy attached files, such as fonts, which only Matroska supports."""
    if out.format.name == "matroska" and hasattr(out, "add_attachment"):
        for stream in original.streams:
            if stream.type == "attachment":
                out.add_attachment(stream.metadata.get("filename", stream.name), stream.mimetype, stream.data)


def why_no_cover(stream: Stream, container_format: str) -> str | None:
    """Return the reason for leaving out a cover picture, or None if it is kept."""
    if container_format not in ("mp4", "matroska"):
        return f"{container_format} cannot store a cover picture"
    if not stream.codec_context or stream.codec_context.name not in COVERS:
        return f"a cover picture's codec must be one of {', '.join(COVERS)}"
    return None


def copy_covers(
    out: Output, original: Container, source: Path, others: Sequence[str]
) -> Iterator[tuple[float, Packet]]:
    """Add the cover pictures, each as a stream of one packet or, in Matroska, as an attached file.

    Return the packets with their times. `others` lists the metadata keys for which MP4 has no fields.
    """
    packets = []
    for cover in original.streams.video:
        if not is_cover(cover) or why_no_cover(cover, out.format.name):
            continue
        with open_container(source) as container:
            packet = next((p for p in container.demux(container.streams[cover.index]) if p.size), None)
        if packet is None:
            continue
        suffix, kind = COVERS[cover.codec_context.name]
        if out.format.name == "matroska":
            if hasattr(out, "add_attachment"):
                out.add_attachment(cover.metadata.get("filename") or f"cover{suffix}", kind, bytes(packet))
        elif others:
            log.warning(
                "the cover picture is left out: mp4 cannot store one together with %s, but .mkv can",
                ", ".join(others),
            )
        else:
            stream = out.add_stream_from_template(cover, opaque=True)
            stream.disposition = cover.disposition.value
            packet.stream, packet.pts, packet.dts = stream, 0, 0
            packets.append((float("-inf"), packet))
    return iter(packets)
