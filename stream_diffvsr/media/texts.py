"""Translate text subtitles from one codec's format to another's.

SubRip and WebVTT use tags for styles, and ASS uses braces; MP4's timed text is plain, and its styles are
stored separately. Bold, italic and underline are kept if the new format has tags for them; all other markup
is removed.
"""

from __future__ import annotations

import html
import re

KNOWN = ("mov_text", "subrip", "srt", "webvtt", "text", "ass", "ssa")
"""FFmpeg's names for the text subtitle codecs that can be converted."""
TAG = re.compile(r"</?(?:[ibuscv]|ruby|rt|lang|font|\d+:\d+)(?:[ .:][^<>\n]*)?>", re.IGNORECASE)
STYLE = re.compile(r"</?[ibu]>", re.IGNORECASE)
OPEN, CLOSE = "\1", "\2"
"""Placeholders for the brackets of tags to keep, used while all other brackets are escaped."""
STAYING = re.compile(f"{OPEN}/?[ibu]{CLOSE}")
BRACES = re.compile(r"\{[^{}]*\\[^{}]*\}")
DRAWING = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}.*?(?:\{[^{}]*\\p0[^{}]*\}|$)", re.DOTALL)
ASS_STYLE = re.compile(r"\\([ibu])([01])(?!\d)")


def translate(data: bytes, before: str, after: str) -> bytes:
    """Convert a subtitle packet's content to another codec's format, or return b"" if it shows no text."""
    if before == "mov_text":
        data = data[2 : 2 + int.from_bytes(data[:2], "big")]
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").strip("\n\0")
    if before in ("ass", "ssa"):
        text = _from_ass(text)
    if before in ("subrip", "srt"):
        text = BRACES.sub("", text)
    if before in ("subrip", "srt", "webvtt"):
        text = TAG.sub(_staying, text)
    if before == "webvtt":
        text = html.unescape(text)
    if after == "webvtt":
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if after == "mov_text":
        encoded = STAYING.sub("", text).encode()[:65535].decode(errors="ignore").encode()
        return len(encoded).to_bytes(2, "big") + encoded if encoded.strip() else b""
    return text.replace(OPEN, "<").replace(CLOSE, ">").encode() if STAYING.sub("", text).strip() else b""


def _staying(tag: re.Match[str]) -> str:
    return f"{OPEN}{tag[0][1:-1].lower()}{CLOSE}" if STYLE.fullmatch(tag[0]) else ""


def _from_ass(text: str) -> str:
    """Return the text of an ASS event, which Matroska stores as eight fields followed by the text."""

    def styles(braces: re.Match[str]) -> str:
        found = ASS_STYLE.findall(braces[0])
        return "".join(f"{OPEN}{'' if on == '1' else '/'}{name}{CLOSE}" for name, on in found)

    text = re.sub(r"\{[^{}]*\}", styles, DRAWING.sub("", text.split(",", 8)[-1]))
    return text.replace(r"\N", "\n").replace(r"\n", "\n").replace(r"\h", "\u00a0")
