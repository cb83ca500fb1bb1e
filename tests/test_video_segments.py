"""Segments of every codec and length, even and uneven in time, join to a file with the exact timestamps."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from stream_diffvsr.jobs.journal import SegmentFile
from stream_diffvsr.media.codecs import choose_encoding
from stream_diffvsr.media.colour import Colour, rgb_to_planes
from stream_diffvsr.media.join import join
from stream_diffvsr.media.streams import SourceInfo
from stream_diffvsr.media.tracks import Window
from stream_diffvsr.media.write import SegmentWriter, container_of

TICKS = Fraction(1, 12800)
SIDE = 64


@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 2), (3, 1), (20, 7)])
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("h264", "mp4"), ("h265", "mp4"), ("av1", "mp4"), ("prores", "mov"), ("ffv1", "mkv"), ("png", "mov")],
)
def test_timestamps_survive_joining(
    codec: str, suffix: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """x265 names random decoding times for one or two frames; an edit list may round a late start."""
    info = SourceInfo(16, 16, 8, TICKS, Fraction(25), None, Colour(6, False, 6, 6))
    encoding = choose_encoding(codec, None, None, info, (SIDE, SIDE))
    chance = np.random.default_rng(1)
    time, parts, wanted = 3000, [], []
    for number, length in enumerate(lengths):
        segment = SegmentWriter(tmp_path / f"{number}.{encoding.segment_format}", encoding)
        first = time
        for _ in range(length):
            planes = rgb_to_planes(torch.rand(1, 3, SIDE, SIDE), encoding.pix_fmt, encoding.colour)
            segment.add(planes, time)
            wanted.append(time)
            time += int(chance.integers(1, 3000))
        parts.append(SegmentFile(segment.path.name, length, segment.finish(), first, time, segment.depth))
    output = tmp_path / f"joined.{suffix}"
    files = [tmp_path / part.name for part in parts]
    join(
        output, container_of(output) or "", files, parts, encoding, source=None, metadata={}, window=Window()
    )
    with av.open(str(output)) as container:
        times = [float(frame.pts * frame.time_base / TICKS) for frame in container.decode(video=0)]
    # Matroska counts in milliseconds.
    assert times == pytest.approx(wanted, abs=7 if suffix == "mkv" else 1e-6)
