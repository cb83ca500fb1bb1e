"""The output files of a job: joining is tested before the first frame; files are renamed when complete."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

from ..errors import VideoError
from ..files import sync_folder
from ..media.containers import open_container
from ..media.join import SegmentFile, join
from ..media.pictures import Picture
from ..media.read import VideoSource
from ..media.sides import OnProgress, Side, make_sides
from ..media.streams import STEREO_WORD
from ..media.tracks import Window
from ..media.ways import RefusedError
from ..media.write import Sink, container_of
from .prepare import Prepared, check_space

log = logging.getLogger(__name__)

REHEARSAL = -1
"""Number of the trial segment, which is discarded."""


class Output:
    """The video files that a job writes; none if it writes pictures."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self.prepared, self.folder = prepared, folder
        self.sides: list[Side] = []
        self.words = True
        """Whether to copy chapters, metadata, covers and attached files; False once they are rejected."""

    @property
    def videos(self) -> Mapping[str, Path]:
        return {name: path for name, (path, _) in self.prepared.videos.items()}

    def joined(self, name: str) -> Path:
        """Return the temporary path of an output file, used until it is complete."""
        return self.folder / f"joined-{name}{self.videos[name].suffix.lower()}"

    def rehearse(self, sinks: Mapping[str, Sink], on_progress: OnProgress | None = None) -> None:
        """Join a black frame with all side streams and metadata, just as the output will be joined.

        This way, anything that the container rejects shows up before hours of work are spent. `on_progress`
        reports how much of the source has been read to extract sound and subtitles. Raises `VideoError` if
        the container rejects the video stream itself.
        """
        job = self.prepared.job
        if "main" in self.videos and job.audio and isinstance(self.prepared.source, VideoSource):
            self.sides = make_sides(job.source, container_of(job.output) or "", self.folder, on_progress)
        for name, (_, encoding) in self.prepared.videos.items():
            sink = sinks[name]
            sink.begin(REHEARSAL)
            try:
                black = sink.prepare(Picture(torch.zeros(1, 3, encoding.height, encoding.width)))
                sink.add(black, 0, 0)
                file, size, depth = sink.finish()
            finally:
                sink.abort()
            part = SegmentFile(file, 1, size, 0, self.prepared.step, depth, file, depth)
            self._join(name, (part,), Window(shift=self._shift(Fraction(0))))
            self._check_shape(name)
            if name == "main":
                self._check_views()
            (self.folder / file).unlink()
            self.joined(name).unlink()

    def _check_shape(self, name: str) -> None:
        """Warn if the joined file does not store the shape of its pixels.

        PyAV cannot write the shape into Matroska, so the encoder's own stream must contain it.
        """
        encoding = self.prepared.videos[name][1]
        width, height = encoding.width, encoding.height
        with open_container(self.joined(name)) as container:
            told = container.streams.video[0].sample_aspect_ratio or 1
        wanted = round(width * (encoding.aspect or 1))
        if abs(wanted - width * told) >= 1:
            log.warning(
                "%s will be displayed as %dx%d instead of %dx%d, because %s cannot store non-square "
                "pixels; --target %dx%d makes them square",
                *(self.videos[name].name, round(width * told), height, wanted, height),
                *(encoding.codec, wanted + wanted % 2, height),
            )

    def _check_views(self) -> None:
        """Warn if the output does not store how a 3D source arranges its two views in the picture."""
        job, source = self.prepared.job, self.prepared.source
        if not isinstance(source, VideoSource):
            return
        with open_container(job.source) as before, open_container(self.joined("main")) as after:
            told = STEREO_WORD in after.streams.video[0].metadata
            if STEREO_WORD in before.streams[source.stream_index].metadata and not told:
                log.warning(
                    "the layout of the 3D views is lost: to keep it, write an .mkv file and do not set "
                    "--no-audio"
                )

    def join(self, parts: Sequence[SegmentFile], finished: bool) -> int:
        """Join the segments; return the size of the main file in bytes, or 0 for pictures."""
        check_space(self.folder, sum(part.size for part in parts) + self.prepared.side_bytes)
        for name in self.videos:
            self._join(name, parts, self._window(parts, finished))
        return self.joined("main").stat().st_size if "main" in self.videos else 0

    def _join(self, name: str, parts: Sequence[SegmentFile], window: Window) -> None:
        """Write one joined file; if chapters, metadata, covers and attached files are refused, omit them."""
        job, source = self.prepared.job, self.prepared.source
        path, encoding = self.prepared.videos[name]
        main = name == "main"
        if not main:
            parts = [replace(part, name=part.compare, depth=part.compare_depth) for part in parts]
        copies = main and job.audio and isinstance(source, VideoSource)
        while True:
            try:
                return join(
                    self.joined(name),
                    container_of(path) or "",
                    [self.folder / part.name for part in parts],
                    parts,
                    encoding,
                    source=job.source if copies else None,
                    stream=source.stream_index if isinstance(source, VideoSource) else None,
                    sides=self.sides if copies else [],
                    words=self.words,
                    metadata=job.metadata if main else {},
                    window=window,
                )
            except RefusedError as refused:
                if not (copies and self.words):
                    raise VideoError(
                        f"{path.name} cannot be written ({refused}): choose another --codec or suffix."
                    ) from refused
                self.words = False
                log.warning("chapters, metadata, cover pictures and attached files are left out: %s", refused)

    def _window(self, parts: Sequence[SegmentFile], finished: bool) -> Window:
        """Return the time span of the source that the parts cover, and the shift to subtract from its times.

        The output starts at 0 if the job starts later than the source, if the source's times may begin
        anywhere, or if they begin before 0, where players would hide the frames.
        """
        job, base = self.prepared.job, self.prepared.source.info.time_base
        low, high = parts[0].first * base, float(parts[-1].end * base)
        if finished and job.end is None:
            high = float("inf")
        if job.start != 0:
            return Window(float(low), high, low)
        return Window(high=high, shift=self._shift(low))

    def _shift(self, low: Fraction) -> Fraction:
        earliest = min([low, *(side.first for side in self.sides)])
        return earliest if self.prepared.source.info.free_start else min(earliest, Fraction(0))

    def give_names(self) -> None:
        """Give the joined files their final names."""
        for name, path in self.videos.items():
            if self.joined(name).is_file():
                self.joined(name).replace(path)
                sync_folder(path.parent)
