"""One continuous timeline for all streams of a file whose timestamps restart, jump or wrap midway.

Such timestamps occur in broadcasts, in recordings made in several pieces and in concatenated files; FFmpeg
flags the formats that allow them. As in FFmpeg's command-line tool, a break is a step back in decoding order,
or a step forward of more than ten seconds in one stream only. The code that reads the picture and the code
that reads the sound both process all packets in file order, so both apply the same offsets.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .av_types import Container, Packet

MAY_JUMP, UNTIMED = 0x0200, 0x0080
"""FFmpeg's format flags AVFMT_TS_DISCONT and AVFMT_NOTIMESTAMPS."""
BACK, FORWARD = 0.02, 10.0
"""The largest steps back and forward, in seconds, that are not breaks."""


@dataclass
class _Track:
    offset: Fraction
    last: float | None = None
    after: Fraction = Fraction(0)
    """When the next packet of the stream is due."""


class Timeline:
    """Removes breaks from a file's timestamps in a single pass."""

    def __init__(self, container: Container) -> None:
        self.jumps = bool(container.format.flags & MAY_JUMP)
        """Whether this format may have breaks; if not, nothing is changed."""
        self._offset, self._now = Fraction(0), float("-inf")
        self._tracks: dict[int, _Track] = {}

    def streams(self, container: Container, *wanted: Any) -> list[Any]:
        """Return the streams to demux: `wanted`, plus all sound and video streams if breaks are possible."""
        others = [*container.streams.video, *container.streams.audio] if self.jumps else []
        return sorted({stream.index: stream for stream in [*wanted, *others]}.values(), key=lambda s: s.index)

    def straighten(self, packet: Packet) -> bool:
        """Convert the packet's timestamps to the continuous timeline; packets must be passed in file order.

        Return whether a new break was found.
        """
        found = False
        moment = packet.dts if packet.dts is not None else packet.pts
        if not self.jumps or moment is None:
            return False
        time = moment * packet.time_base
        track = self._tracks.setdefault(packet.stream.index, _Track(self._offset))
        if packet.stream.type in ("audio", "video"):
            if self._is_break(time + track.offset, track):
                if self._is_break(time + self._offset, track):
                    found = True
                    self._offset = (track.after if track.last is not None else Fraction(self._now)) - time
                track.offset = self._offset
            now = time + track.offset
            track.last, track.after = float(now), now + (packet.duration or 0) * packet.time_base
            self._now = max(self._now, track.last)
        else:
            track.offset = min(track.offset, self._offset, key=lambda o: abs(float(time + o) - self._now))
        shift = round(track.offset / packet.time_base)
        if shift:
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.dts = None if packet.dts is None else packet.dts + shift
        return found

    def _is_break(self, time: Fraction, track: _Track) -> bool:
        now = float(time)
        if track.last is not None:
            return now < track.last - BACK or now > self._now + FORWARD
        # Compare a stream's first packet with the other streams.
        return math.isfinite(self._now) and abs(now - self._now) > FORWARD


class ShownTimes:
    """Assigns times to frames in display order.

    Frames keep their own times as long as these increase. Some files store only decoding times, or store them
    as presentation times; in these files, each frame gets the earliest packet time that is still unused.
    """

    def __init__(self, by_order: bool) -> None:
        self.by_order = by_order
        """Whether frames get the times of packets; set as soon as a frame's own time does not increase."""
        self._waiting: list[int] = []
        self._last: int | None = None

    def read(self, time: int | None) -> None:
        """Record the time of a packet that is sent to the decoder."""
        if time is not None:
            heapq.heappush(self._waiting, time)

    def lose(self, time: int | None) -> None:
        """Remove the time of a packet that could not be decoded."""
        if time in self._waiting:
            self._waiting.remove(time)
            heapq.heapify(self._waiting)

    def show(self, time: int | None) -> int | None:
        """Return the time to assign to the next frame, given its own time (None if unknown)."""
        rises = time is not None and (self._last is None or time > self._last)
        if not self.by_order and (time is None or rises):
            self._last = self._last if time is None else time
            self._drop()
            return time
        self.by_order = True
        self._drop()
        if not self._waiting:
            return None
        self._last = heapq.heappop(self._waiting)
        return self._last

    def _drop(self) -> None:
        while self._last is not None and self._waiting and self._waiting[0] <= self._last:
            heapq.heappop(self._waiting)
