"""Sound and subtitles are made ready before the first frame: what fails costs itself, never the file."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest

from stream_diffvsr import UpscaleOptions
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media import ways
from stream_diffvsr.media.texts import translate

ONE_STEP = UpscaleOptions(num_inference_steps=1)
SIZE = (16, 16)


def upscale(pipe, source: Path, output: Path, **settings: Any) -> Path:
    for _ in run(pipe, VideoJob(source=source, output=output, options=ONE_STEP, **settings)):
        pass
    assert not list(output.parent.glob("*.parts"))
    return output


def write(
    path: Path, *, sound: str | None = None, layout: str = "stereo", rate: int = 48000, **others: Any
) -> Path:
    """Five frames of 10 a second, and half a second of sound."""
    codec = others.pop("codec", "mpeg4")
    with av.open(str(path), "w", **others) as out:
        video = out.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = *SIZE, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        audio = None if sound is None else out.add_stream(sound, rate=rate, layout=layout)
        if audio is not None:
            audio.bit_rate = 64000
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(clips.picture(index, *SIZE), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            channels = av.AudioLayout(layout).nb_channels
            wave = np.tile(np.sin(np.arange(rate // 2) / 20).astype(np.float32) / 3, (channels, 1))
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            for even in av.AudioResampler(audio.format, layout, rate, audio.frame_size or None).resample(
                frame
            ):
                out.mux(audio.encode(even))
            out.mux(audio.encode(None))
    return path


def seen(path: Path) -> list[tuple[str, str]]:
    """Type and codec of each stream."""
    with av.open(str(path)) as container:
        return [(stream.type, stream.codec_context.name) for stream in container.streams]


def heard(path: Path) -> tuple[str, float, float]:
    """Layout of the sound, seconds of it, and when it begins."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    length = sum(frame.samples / frame.sample_rate for frame in frames)
    return frames[0].layout.name, length, float(frames[0].pts * frames[0].time_base)


@pytest.mark.parametrize(
    ("name", "sound", "layout", "codec"),
    [
        ("a.avi", "pcm_s16le", "stereo", "pcm_s16le"),
        ("a.mkv", "pcm_s24le", "5.1", "pcm_s24le"),
        ("a.avi", "pcm_u8", "stereo", "aac"),
        ("a.avi", "adpcm_ima_wav", "mono", "aac"),
        ("a.wmv", "wmav2", "stereo", "aac"),
        ("a.mkv", "pcm_s16le", "2.1", "pcm_s16le"),
    ],
)
def test_sound_without_a_layout_reaches_mp4(name, sound, layout, codec, pipe, tmp_path: Path) -> None:
    source = write(tmp_path / name, sound=sound, layout=layout, rate=8000 if "adpcm" in sound else 48000)
    output = upscale(pipe, source, tmp_path / "out.mp4")
    assert seen(output)[1] == ("audio", codec)
    got, length, begin = heard(output)
    assert got == layout
    assert length == pytest.approx(heard(source)[1], abs=0.13) and abs(begin) < 0.13
    times, wanted = ([float(time) for time, _ in clips.frames_of(file)] for file in (output, source))
    assert times == pytest.approx(wanted)


@pytest.mark.parametrize("output", ["out.mp4", "out.mkv"])
def test_sound_that_is_declared_and_never_comes_is_left_out(output, pipe, tmp_path: Path, caplog) -> None:
    with av.open(str(tmp_path / "a.ts"), "w") as out:
        video = out.add_stream("mpeg2video", rate=25)
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        out.add_stream("aac", rate=48000, layout="stereo")
        for index in range(5):
            out.mux(video.encode(av.VideoFrame.from_ndarray(clips.picture(index, *SIZE), format="rgb24")))
        out.mux(video.encode(None))
    assert [kind for kind, _ in seen(tmp_path / "a.ts")] == ["video", "audio"]
    assert [kind for kind, _ in seen(upscale(pipe, tmp_path / "a.ts", tmp_path / output))] == ["video"]
    assert "audio stream 1 (aac) is left out: it contains nothing" in caplog.text


def test_a_sound_that_changes_its_layout_is_followed(pipe, tmp_path: Path) -> None:
    """Two broadcasts one after the other, the second in stereo, to a container that needs another codec."""
    parts = [
        write(tmp_path / f"{layout}.ts", sound="aac", layout=layout, codec="mpeg2video").read_bytes()
        for layout in ("mono", "stereo")
    ]
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    output = upscale(pipe, tmp_path / "a.ts", tmp_path / "out.webm")
    assert seen(output)[1] == ("audio", "opus")
    layout, length, _ = heard(output)
    assert layout == "mono" and length == pytest.approx(1.0, abs=0.1)


def test_what_is_refused_costs_itself_and_never_the_frames(pipe, tmp_path: Path, caplog, monkeypatch) -> None:
    """Each way of writing the sound is refused, at the header, or at the last packet."""

    def refuse(self) -> None:
        raise ValueError("this container takes no more")

    source = write(tmp_path / "a.avi", sound="pcm_s16le")
    monkeypatch.setattr(ways.Copied, "drain", refuse)
    output = upscale(pipe, source, tmp_path / "a.mp4")
    assert seen(output)[1] == ("audio", "aac")
    assert "is converted to aac: mp4 cannot store it (this container takes no more)" in caplog.text
    monkeypatch.setattr(ways.Encoded, "drain", refuse)
    output = upscale(pipe, source, tmp_path / "b.mp4")
    assert [kind for kind, _ in seen(output)] == ["video"]
    assert "mp4 cannot store it (this container takes no more); use an .mkv output" in caplog.text
    assert len(clips.frames_of(output)) == 5


def with_text(path: Path, srt: str) -> Path:
    """A Matroska file with these subtitles as they are."""
    source = write(path.with_suffix(".avi"))
    with (
        av.open(str(source)) as picture,
        av.open(io.BytesIO(srt.encode()), format="srt") as text,
        av.open(str(path), "w") as out,
    ):
        streams = [out.add_stream_from_template(c.streams[0], opaque=True) for c in (picture, text)]
        for container, stream in zip((picture, text), streams, strict=True):
            for packet in container.demux():
                if packet.size:
                    packet.pts = packet.dts if packet.pts is None else packet.pts
                    packet.stream = stream
                    out.mux(packet)
    return path


SRT = "1\n00:00:00,100 --> 00:00:00,450\n{\\an8}<i>one</i> <font color='red'>two</font>\n\n"


@pytest.mark.parametrize(
    ("suffix", "codec", "wanted"),
    [("mp4", "mov_text", b"\0\x07one two"), ("webm", "webvtt", b"<i>one</i> two"), ("mkv", "srt", None)],
)
def test_a_cue_that_shows_at_the_start_is_kept_in_its_containers_words(
    suffix, codec, wanted, pipe, tmp_path: Path
) -> None:
    source = with_text(tmp_path / "a.mkv", SRT)
    output = upscale(pipe, source, tmp_path / f"out.{suffix}", start=3)
    assert seen(output)[1] == ("subtitle", codec)
    with av.open(str(output)) as container:
        cues = [p for p in container.demux(subtitles=0) if p.size and bytes(p) != ways.NO_TEXT]
        assert [bytes(p) for p in cues] == [wanted or SRT.split("\n")[2].encode()]
        assert [float(p.pts * p.time_base) for p in cues] == [0]
        assert float(cues[0].duration * cues[0].time_base) == pytest.approx(0.15, abs=2e-3)


@pytest.mark.parametrize(
    ("before", "text", "after", "wanted"),
    [
        ("subrip", "<b>a</b>\r\n<c.x>b", "mov_text", "a\nb"),
        ("subrip", "1 < 2 & <u>3</u>", "webvtt", "1 &lt; 2 &amp; <u>3</u>"),
        ("webvtt", "<v Ann>x &lt;y&gt;</v> <00:01.000>z", "subrip", "x <y> z"),
        ("webvtt", "<b.loud>x</b>", "mov_text", "x"),
        ("ass", r"0,0,Default,,0,0,0,,{\an8\i1}a, b{\i0}\Nc", "subrip", "<i>a, b</i>\nc"),
        ("ass", r"0,0,Default,,0,0,0,,{\p1}m 0 0 l 9 9{\p0}", "mov_text", ""),
        ("ass", r"0,0,Default,,0,0,0,,{\bord2\blur3}a\hb", "webvtt", "a\u00a0b"),
        ("text", "a <b> c", "webvtt", "a &lt;b&gt; c"),
        ("subrip", "<i></i>", "mov_text", ""),
    ],
)
def test_markup_is_translated_or_taken_off(before: str, text: str, after: str, wanted: str) -> None:
    got = translate(text.encode(), before, after)
    if after == "mov_text" and got:
        assert int.from_bytes(got[:2], "big") == len(got) - 2
        got = got[2:]
    assert got.decode() == wanted


def test_texts_without_an_end_are_shown(pipe, tmp_path: Path) -> None:
    """Each up to the next, the last one for some seconds: in MP4 one of no length would be gone."""
    from test_video_faults import remux, texts, unended

    words = "\n\n".join(f"{n}\n00:00:00,{n}00 --> 00:00:00,{n}50\n{word}" for n, word in ((1, "a"), (3, "b")))
    source = remux(texts("first.mkv", "srt", words)(tmp_path), tmp_path / "a.mkv", unended)
    for name in ("b.mp4", "b.webm"):
        with av.open(str(upscale(pipe, source, tmp_path / name))) as container:
            packets = [p for p in container.demux(subtitles=0) if p.size and bytes(p) != ways.NO_TEXT]
        ends = [(float(p.pts * p.time_base), float(p.duration * p.time_base)) for p in packets]
        assert ends == [(0.1, pytest.approx(0.2)), (0.3, pytest.approx(ways.UNENDED))]


def test_sound_of_several_frames_in_a_packet_keeps_its_time(pipe, tmp_path: Path) -> None:
    """Decoders give a time to the first of them alone."""
    source = tmp_path / "b.mkv"
    with (
        av.open(str(write(tmp_path / "a.mkv", sound="aac"))) as before,
        av.open(str(source), "w") as out,
    ):
        streams = [out.add_stream_from_template(stream, opaque=True) for stream in before.streams]
        pairs: list[Any] = []
        for packet in before.demux():
            if packet.size and packet.stream.type == "audio":
                pairs.append(packet)
            if len(pairs) == 2:
                both = av.Packet(bytes(pairs[0]) + bytes(pairs[1]))
                both.pts, both.dts, both.time_base = pairs[0].pts, pairs[0].dts, pairs[0].time_base
                both.stream, pairs = streams[1], []
                out.mux(both)
            elif packet.size and packet.stream.type == "video":
                packet.stream = streams[0]
                out.mux(packet)
    kept, converted = (
        heard(upscale(pipe, tmp_path / name, tmp_path / f"{name}.webm", codec="av1"))
        for name in ("a.mkv", "b.mkv")
    )
    assert converted[1:] == pytest.approx(kept[1:], abs=0.03)  # a frame of 1024 samples
