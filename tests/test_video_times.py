"""One line of time for picture and sound, whatever the file's timestamps do."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import av
import clips
import pytest
from test_video_sides import SIZE, heard, upscale, write

from stream_diffvsr import VideoError
from stream_diffvsr.media.read import Span, VideoSource


def times(path: Path) -> list[float]:
    return [float(time) for time, _ in clips.frames_of(path)]


def broadcast(path: Path, start: Fraction | float = 0) -> bytes:
    """Half a second of a transport stream that begins at a time."""
    options = {"output_ts_offset": str(float(start)), "muxdelay": "0", "muxpreload": "0"}
    write(path, sound="aac", codec="mpeg2video", container_options=options)
    return path.read_bytes()


@pytest.mark.parametrize("starts", [(10, 10), (10, 5, 20), (10, 4000), (95443.4,), (95443.4, 40), (80000,)])
@pytest.mark.parametrize("output", ["out.mp4", "out.mkv"])
def test_restarts_jumps_and_wraps_become_one_line(starts, output, pipe, tmp_path: Path) -> None:
    source = tmp_path / "a.ts"
    source.write_bytes(b"".join(broadcast(tmp_path / "part.ts", start) for start in starts))
    result = upscale(pipe, source, tmp_path / output)
    shown = times(result)
    steps = [b - a for a, b in itertools.pairwise(shown)]
    assert len(shown) == 5 * len(starts)
    # Half a second each; sound is longer by less than one of its frames.
    assert steps == pytest.approx([0.1] * len(steps), abs=0.03)
    assert 0 <= shown[0] < 0.1
    _, length, begin = heard(result)
    assert length == pytest.approx(0.5 * len(starts), abs=0.05 * len(starts))
    assert 0 <= begin < 0.05


def test_a_gap_of_one_stream_is_no_break(tmp_path: Path) -> None:
    """The picture is away for a minute while the sound goes on: it comes back where it belongs."""
    from stream_diffvsr.media.timeline import Timeline

    class Packet:
        time_base = Fraction(1, 10)

        def __init__(self, stream, time: int) -> None:
            self.stream, self.pts, self.dts, self.duration = stream, time, time, 1

    class Stream:
        def __init__(self, index: int, kind: str) -> None:
            self.index, self.type = index, kind

    with av.open(str(write(tmp_path / "a.ts", codec="mpeg2video"))) as container:
        line = Timeline(container)
    picture, sound = Stream(0, "video"), Stream(1, "audio")
    packets = [Packet(picture, 0), *(Packet(sound, t) for t in range(600)), Packet(picture, 600)]
    assert not any(line.straighten(packet) for packet in packets)
    assert packets[-1].pts == 600


def test_h264_in_avi_is_shown_in_the_order_of_its_frames(pipe, tmp_path: Path, caplog) -> None:
    made = clips.write_video(tmp_path / "a.h264", 12, size=SIZE, options={"bf": "3", "b_strategy": "0"})
    with av.open(str(made)) as before, av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = out.add_stream_from_template(before.streams.video[0], opaque=True)
        stream.time_base = Fraction(1, 50)
        for number, packet in enumerate(p for p in before.demux(video=0) if p.size):
            packet.stream = stream
            packet.pts = packet.dts = 2 * number
            packet.time_base = Fraction(1, 50)
            out.mux(packet)
    result = upscale(pipe, tmp_path / "a.avi", tmp_path / "out.mp4")
    assert times(result) == pytest.approx([i / 25 for i in range(12)])
    with av.open(str(result)) as container:
        video = container.streams.video[0]
        assert video.duration * video.time_base == Fraction(12, 25)
    assert "fewer" not in caplog.text and "out of order" not in caplog.text


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.h264", "libx264", 30),
        ("a.hevc", "libx265", 50),
        ("a.m2v", "mpeg2video", 30),
        ("a.m1v", "mpeg1video", 24),
    ],
)
def test_raw_streams_have_the_rate_that_they_name(name, codec, rate, pipe, tmp_path: Path, caplog) -> None:
    with av.open(str(tmp_path / name), "w") as out:
        video = out.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        for index in range(6):
            out.mux(video.encode(av.VideoFrame.from_ndarray(clips.picture(index, 64, 32), format="rgb24")))
        out.mux(video.encode(None))
    assert VideoSource(tmp_path / name).info.rate == rate
    result = upscale(pipe, tmp_path / name, tmp_path / "out.mp4")
    assert times(result) == pytest.approx([i / rate for i in range(6)], abs=1e-4)
    assert "missing" not in caplog.text


def test_frames_of_a_joined_file_are_the_same_from_any_start(tmp_path: Path) -> None:
    """Reading on after a break counts the same frames at the same times."""
    source = tmp_path / "a.ts"
    source.write_bytes(b"".join(broadcast(tmp_path / "part.ts", start) for start in (10, 10)))
    frames = list(VideoSource(source).frames(Span()))
    later = list(VideoSource(source).frames(Span(start=7)))
    assert [(f.index, f.time) for f in later] == [(f.index, f.time) for f in frames[7:]]


def test_a_size_that_changes_ends_one_file_and_begins_another(pipe, tmp_path: Path) -> None:
    def part(size: tuple[int, int]) -> bytes:
        clips.write_video(tmp_path / "part.ts", 4, size=size, ticks=Fraction(1, 25))
        return (tmp_path / "part.ts").read_bytes()

    source = tmp_path / "a.ts"
    source.write_bytes(part((32, 32)) + part((48, 48)))
    with pytest.raises(VideoError, match="with --start 4 and another output"):
        upscale(pipe, source, tmp_path / "first.mp4")
    assert len(clips.frames_of(tmp_path / "first.mp4")) == 4
    (tmp_path / "rest").mkdir()
    output = upscale(pipe, source, tmp_path / "rest" / "second.mp4", start=4)
    frames = clips.frames_of(output)
    assert [picture.shape[:2] for _, picture in frames] == [(192, 192)] * 4
    assert [float(time) for time, _ in frames] == pytest.approx([0, 0.04, 0.08, 0.12], abs=0.01)
