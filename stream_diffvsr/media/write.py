"""Write frames as segments of a video file or as pictures; a segment appears only when complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from torch import Tensor

from ..errors import VideoError
from ..files import sync_folder
from . import pictures
from .codecs import CONTAINERS, Encoding, open_encoder
from .colour import planes_to_frame, samples, to_planes
from .pictures import Picture


class SegmentWriter:
    """Writes one segment of a video file with its own encoder, independently of other segments."""

    def __init__(self, path: Path, encoding: Encoding) -> None:
        import av

        self.path = path
        self.encoding = encoding
        self.times: list[int] = []
        self.order: list[int] = []
        self._step = max(1, round(1 / (encoding.rate * encoding.time_base)))
        self._part = path.with_name(f".{path.name}.part")
        self._file: IO[bytes] = self._part.open("wb+")
        self._container = av.open(self._file, "w", format=encoding.segment_format)
        self._stream = open_encoder(self._container, encoding)

    def add(self, planes: list[np.ndarray], time: int) -> None:
        """Encode a frame from `planes` in the encoding's pixel format; `time` is in ticks of the source."""
        frame = planes_to_frame(planes, self.encoding.native_format)
        self.times.append(time)
        frame.pts, frame.time_base = time - self.times[0], self.encoding.time_base
        colour = self.encoding.colour
        frame.colorspace, frame.color_range = colour.matrix, 2 if colour.full_range else 1
        self._mux(self._stream.encode(frame))

    def _mux(self, packets: Sequence[Any]) -> None:
        for packet in packets:
            packet.dts = self._decoding_time(len(self.order))
            self.order.append(packet.pts)
            self._container.mux(packet)

    def _decoding_time(self, number: int) -> int:
        """Return when to decode packet `number`: when frame `number - encoding.reorder` is shown.

        The encoder's own times are not used, because x265 returns random times for segments of one or two
        frames.
        """
        shown = number - self.encoding.reorder
        return self.times[shown] - self.times[0] if shown >= 0 else shown * self._step

    def finish(self) -> int:
        """Finish the file, sync it to disk, rename it to its final name and return its size."""
        self._mux(self._stream.encode(None))
        self._container.close()
        if len(self.order) != len(self.times):
            raise OSError(f"the encoder returned {len(self.order)} packets for {len(self.times)} frames")
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.seek(0, os.SEEK_END)
        self._file.close()
        self._part.replace(self.path)
        sync_folder(self.path.parent)
        return size

    def abort(self) -> None:
        """Close and delete the unfinished file."""
        # Errors during closing do not matter, because the file is discarded.
        with contextlib.suppress(Exception):
            self._container.close()
        self._file.close()
        self._part.unlink(missing_ok=True)

    @property
    def depth(self) -> int:
        """The largest number of frames by which decoding order lags behind presentation order."""
        place = {pts: number for number, pts in enumerate(sorted(self.order))}
        return max((number - place[pts] for number, pts in enumerate(self.order)), default=0)


class Sink(Protocol):
    """Receives upscaled frames, segment by segment."""

    def begin(self, number: int) -> None:
        """Start a segment."""
        ...

    def prepare(self, picture: Picture) -> Any:
        """Convert a picture to a compact form on the CPU for the thread that writes it."""
        ...

    def add(self, prepared: Any, index: int, time: int) -> None:
        """Write a frame, given its index and its time (in ticks) in the source."""
        ...

    def finish(self) -> tuple[str, int, int]:
        """Finish the segment; return its file name in the work folder, its size and its reordering depth."""
        ...

    def abort(self) -> None:
        """Discard an unfinished segment."""
        ...


class VideoSink:
    """Writes segments to the work folder, to be joined later."""

    def __init__(self, folder: Path, name: str, encoding: Encoding) -> None:
        self.folder = folder
        self.name = name
        self.encoding = encoding
        self.segment: SegmentWriter | None = None

    def begin(self, number: int) -> None:
        self.segment = SegmentWriter(
            self.folder / f"{self.name}-{number:06}.{self.encoding.segment_format}", self.encoding
        )

    def prepare(self, picture: Picture) -> list[Tensor]:
        """Return a picture's planes, with transparent areas shown as black."""
        rgb = picture.rgb if picture.alpha is None else picture.rgb * picture.alpha
        return [plane.cpu() for plane in to_planes(rgb, self.encoding.pix_fmt, self.encoding.colour)]

    def add(self, prepared: list[Tensor], index: int, time: int) -> None:
        assert self.segment is not None
        self.segment.add([samples(plane, self.encoding.pix_fmt) for plane in prepared], time)

    def finish(self) -> tuple[str, int, int]:
        assert self.segment is not None
        segment, size = self.segment, self.segment.finish()
        self.segment = None
        return segment.path.name, size, segment.depth

    def abort(self) -> None:
        if self.segment is not None:
            self.segment.abort()
            self.segment = None


class PictureSink:
    """Writes pictures directly under their final names; each appears only when complete."""

    def __init__(self, names: dict[int, Path], numbered: Path | None = None) -> None:
        self.names = names
        self.numbered = numbered
        self.size = 0

    def begin(self, number: int) -> None:
        self.size = 0

    def prepare(self, picture: Picture) -> Picture:
        alpha = None if picture.alpha is None else picture.alpha.cpu()
        return Picture(picture.rgb.cpu(), alpha, picture.bits, picture.profile)

    def add(self, prepared: Picture, index: int, time: int) -> None:
        path = self.names[index] if self.numbered is None else self.numbered / f"{index:08}.png"
        pictures.write(path, prepared)
        self.size += path.stat().st_size

    def finish(self) -> tuple[str, int, int]:
        folder = self.numbered or next(iter(self.names.values())).parent
        sync_folder(folder)
        return "", self.size, 0

    def abort(self) -> None:
        pass


def check_folder(path: Path) -> None:
    """Raise `VideoError` if the folder of the output `path` is missing or read-only."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise VideoError(f"the output folder {folder} does not exist: create it, or choose another.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VideoError(f"the output folder {folder} is read-only: choose another.")


def container_of(output: Path) -> str | None:
    """Return FFmpeg's container format for an output, or None if it is not a video file."""
    return CONTAINERS.get(output.suffix.lower())
