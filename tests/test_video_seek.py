"""Reading from the middle of a file gives what reading from its start gives, whatever the file is."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from test_video_damage import DAMAGES, damage

from stream_diffvsr import UpscaleOptions, VideoError
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media.read import SourceFrame, VideoSource
from stream_diffvsr.media.seek import Place
from stream_diffvsr.media.span import Span

FRAMES = 40
GOP = "keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"
UNEVEN = [1800 + 700 * i + (i * i * 37) % 500 for i in range(FRAMES)]


@dataclass(frozen=True)
class Case:
    """A file, and from where on its frames can be found without those before them."""

    name: str = "in.mp4"
    make: dict[str, Any] = field(default_factory=dict)
    resumes: bool = True
    """Whether reading goes on from the middle after a frame that is known."""
    starts: bool = True
    """Whether a frame can be found by counting."""


X264, X265 = {"x264-params": GOP}, {"x265-params": f"{GOP}:log-level=error"}
CASES = {
    "h264": Case(make={"options": X264}),
    "h264 mkv": Case("in.mkv", {"options": X264}),
    "h264 open": Case(make={"options": {"x264-params": f"{GOP}:open-gop=1:b-pyramid=normal"}}),
    "h264 one key frame": Case(resumes=False, starts=False),
    "h264 refreshed": Case(
        make={"options": {"x264-params": "keyint=8:intra-refresh=1"}}, resumes=False, starts=False
    ),
    "h264 interlaced": Case(make={"options": {"x264-params": f"{GOP}:tff=1"}}, starts=False),
    "vfr": Case(make={"options": X264, "times": UNEVEN}),
    "vfr mkv": Case("in.mkv", {"options": X264, "times": UNEVEN}),
    "late start": Case(make={"options": X264, "times": [64000 + 512 * i for i in range(FRAMES)]}),
    "rotated": Case(make={"options": X264, "rotation": 90}),
    "h265": Case(make={"codec": "libx265", "options": X265, "size": (64, 48)}),
    "h265 open": Case(
        "in.mkv",
        {
            "codec": "libx265",
            "options": {"x265-params": f"{GOP}:open-gop=1:log-level=error"},
            "size": (64, 48),
        },
    ),
    # In a stream without an index, seeking goes back by seconds.
    "ts": Case("in.ts", {"frames": 120, "options": X264}, starts=False),
    "mpeg2 open ts": Case(
        "in.ts",
        {"frames": 120, "codec": "mpeg2video", "ticks": Fraction(1, 25), "options": {"g": "8", "bf": "2"}},
        starts=False,
    ),
    "without index": Case("in.h264", {"options": X264}, resumes=False, starts=False),
    "avi": Case("in.avi", {"codec": "mpeg4", "options": {"g": "8", "bf": "2"}}, resumes=False, starts=False),
    "vp9": Case("in.webm", {"codec": "libvpx-vp9", "options": {"g": "8", "lag-in-frames": "10"}}),
    "vp8": Case("in.webm", {"codec": "libvpx", "options": {"g": "8", "auto-alt-ref": "1"}}, starts=False),
    "av1": Case("in.mkv", {"codec": "libsvtav1", "options": {"g": "8", "preset": "10"}, "size": (64, 64)}),
    "ffv1": Case("in.mkv", {"codec": "ffv1", "options": {"level": "3"}}),
    "prores": Case("in.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
}


def make(folder: Path, case: Case) -> Path:
    return clips.write_video(folder / case.name, **{"frames": FRAMES, **case.make})


def same(got: Iterator[SourceFrame], wanted: list[SourceFrame]) -> None:
    found = list(got)
    assert [(f.index, f.time, f.duration) for f in found] == [(f.index, f.time, f.duration) for f in wanted]
    assert all(torch.equal(a.rgb, b.rgb) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_from_the_middle_as_from_the_start(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = make(tmp_path, case)
    source = VideoSource(path)
    wanted, places = [], []
    for frame in source.frames(Span()):
        wanted.append(frame)
        places.append(source.place(frame))
    last = len(wanted) - 1
    assert last == case.make.get("frames", FRAMES) - 1
    everything = source.packets - 1
    for done in (0, 1, 6, 7, 8, 9, 17, 24, last - 1):
        again = VideoSource(path)
        same(again.frames(Span(done + 1), places[done]), wanted[done + 1 :])
    assert (again.packets < everything / 2) == case.resumes
    for start in (1, 7, 8, 9, 10, 23, 24, 25, last):
        again = VideoSource(path)
        same(again.frames(Span(start)), wanted[start:])
    assert (again.packets < everything / 2) == case.starts
    for index in (3, 16, 33):
        seconds = (wanted[index].time - wanted[0].time) * source.info.time_base
        same(VideoSource(path).frames(Span(seconds)), wanted[index:])
        same(VideoSource(path).frames(Span(seconds + Fraction(1, 10**6))), wanted[index + 1 :])


def test_from_the_middle_of_damaged_files(tmp_path: Path) -> None:
    """The same frames at the same times.

    Not always the same pictures: what FFmpeg paints where one is damaged depends on what lay in its memory.
    """
    chance = random.Random(5)
    names = ["h264 mkv", "h264 open", "h265 open", "ts", "vp9", "av1", "ffv1"]
    files = {name: make(tmp_path, CASES[name]).read_bytes() for name in names}
    compared = 0
    for number in range(DAMAGES):
        name = names[number % len(names)]
        path = tmp_path / f"damaged-{CASES[name].name}"
        path.write_bytes(damage(files[name], chance))
        try:
            source = VideoSource(path)
            read = [(frame, source.place(frame)) for frame in source.frames(Span())]
        except VideoError:
            continue
        done = chance.randrange(len(read))
        again = list(VideoSource(path).frames(Span(done + 1), read[done][1]))
        wanted = [frame for frame, _ in read[done + 1 :]]
        assert [(f.index, f.time) for f in again] == [(f.index, f.time) for f in wanted]
        compared += bool(wanted)
    assert compared


def test_a_resumed_job_decodes_only_what_it_needs(pipe, tmp_path: Path, monkeypatch) -> None:
    """And its result is that of a run without a stop."""
    source = make(tmp_path, CASES["h264 open"])
    opened: list[VideoSource] = []
    begin = VideoSource.__init__

    def remember(self: VideoSource, *arguments: Any) -> None:
        opened.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(VideoSource, "__init__", remember)

    def task(name: str) -> VideoJob:
        options = UpscaleOptions(num_inference_steps=1)
        return VideoJob(
            source=source, output=tmp_path / name, options=options, codec="ffv1", segment_frames=7
        )

    list(run(pipe, task("whole.mkv")))
    with contextlib.closing(run(pipe, task("stopped.mkv"))) as steps:
        for _ in range(30):
            next(steps)
    assert [step.index for step in run(pipe, task("stopped.mkv"))] == list(range(28, FRAMES))
    assert opened[-1].packets < 0.6 * opened[0].packets
    whole, stopped = (clips.frames_of(tmp_path / name) for name in ("whole.mkv", "stopped.mkv"))
    assert [time for time, _ in whole] == [time for time, _ in stopped]
    assert all((one == other).all() for (_, one), (_, other) in zip(whole, stopped, strict=True))


def test_reading_from_the_start_is_said_once(tmp_path: Path, caplog) -> None:
    source = VideoSource(make(tmp_path, CASES["h264 interlaced"]))
    with caplog.at_level("INFO"):
        source.look_at(Span(30))
        assert [frame.index for frame in source.frames(Span(30))] == list(range(30, FRAMES))
    assert caplog.text.count("from the beginning: ") == 1


def test_a_picture_that_changed_is_noticed(tmp_path: Path, caplog) -> None:
    """A place of another file is not gone on from."""
    source = VideoSource(make(tmp_path, CASES["h264"]))
    with caplog.at_level("INFO"):
        frames = list(source.frames(Span(21), Place(20, 20 * clips.STEP, 12345)))
    assert [frame.index for frame in frames] == list(range(21, FRAMES))
    assert "from the beginning: the frame to resume from was decoded differently" in caplog.text
