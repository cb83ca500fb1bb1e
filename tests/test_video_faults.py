"""Files as people have them, through the whole job: nothing fails after the work, nothing is lost in silence.

Kinds of faults, and where their cases are: in FAULTS under the word given, and in other tests:

| kind | cases |
|---|---|
| sound that MP4 refuses late | `pcm`; test_video_sides |
| sound without a layout, or of another codec | `sound`; test_video_sides |
| sound that never comes, or late, or twice | `track`; test_video_sides |
| timestamps that start over, jump, wrap, repeat | `time`; test_video_times |
| frames without times of their own | `order`; test_video_times |
| rates of raw streams, counts of frames | `raw`, `count`; test_video_times |
| what a file is | test_still_or_moving_by_content; test_pictures |
| names with signs | test_name_with_signs; test_pictures |
| transparency | `alpha`; test_video_tags, test_pictures |
| profiles, EXIF, texts of pictures | test_pictures, test_media_kept |
| shape, size, turning | `shape`; test_video_tags, test_video_times, test_video_matrix |
| colour: siting, range, untagged HD | `colour`; test_video_colour, test_video_matrix |
| subtitles | `text`; test_video_sides |
| folders | test_pictures, test_many_inputs |
| numbers, outputs, pipes, huge pictures | test_cli_upscale, test_pictures |
| words, covers, time codes, attachments, data | `words`; test_media_kept, test_video_tags |
| damage | `cut`; test_video_damage |
"""

from __future__ import annotations

import io
import itertools
import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest
from PIL import Image
from test_video_sides import SIZE, upscale, write

TENTHS = [i / 10 for i in range(5)]


@dataclass(frozen=True)
class Fault:
    """A file to make, and what shall come of it."""

    make: Callable[[Path], Path]
    """Gets an empty folder, returns the file in it."""
    output: str = "out.mp4"
    job: dict[str, Any] = field(default_factory=dict)
    times: Sequence[float] | None = None
    """When the frames show, in seconds; None: as in the source, which for recordings begins anywhere."""
    counts: Sequence[int] = ()
    """How many frames there may be, where their times are not looked at."""
    beside: tuple[str, ...] = ()
    """Codecs of the streams beside the picture."""
    said: str = ""
    """Part of what the log says; where it is empty, nothing may be left out, converted or missing."""


def film(name: str, **options: Any) -> Callable[[Path], Path]:
    """Five frames of 10 a second, and half a second of sound."""
    return lambda folder: write(folder / name, **options)


def remux(
    source: Path,
    path: Path,
    change: Callable[[Any, int], bool | None] = lambda packet, number: None,
    **options: Any,
) -> Path:
    """The same packets in another file; `change` gets each with its number in its stream, False drops it."""
    with av.open(str(source)) as before, av.open(str(path), "w", **options) as out:
        streams = [out.add_stream_from_template(stream, opaque=True) for stream in before.streams]
        counts = [0] * len(streams)
        for packet in before.demux():
            index = packet.stream.index
            if packet.size:
                counts[index] += 1
                if change(packet, counts[index] - 1) is not False:
                    packet.stream = streams[index]
                    out.mux(packet)
    return path


def frames(
    path: Path,
    codec: str,
    pix_fmt: str = "yuv420p",
    *,
    count: int = 5,
    rate: int = 10,
    size: tuple[int, int] = SIZE,
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    prepare: Callable[[Any, Any], None] = lambda out, stream: None,
    **others: Any,
) -> Path:
    """A picture alone, in any format, half of it transparent where the format can."""
    with av.open(str(path), "w", **others) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        prepare(out, stream)
        for index in range(count):
            rgba = np.dstack([clips.picture(index, *size), np.full(size[::-1], 255, np.uint8)])
            rgba[:, size[0] // 2 :, 3] = 0
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = index if pts is None else pts[index], Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def picture_only(name: str, codec: str, pix_fmt: str = "yuv420p", **others: Any) -> Callable[[Path], Path]:
    return lambda folder: frames(folder / name, codec, pix_fmt, **others)


def remuxed(name: str, first: Callable[[Path], Path], change: Any = None, **options: Any):
    def make(folder: Path) -> Path:
        (folder / "first").mkdir()
        return remux(first(folder / "first"), folder / name, change or (lambda p, n: None), **options)

    return make


def cut(first: Callable[[Path], Path], keep: float) -> Callable[[Path], Path]:
    """A recording that was broken off."""

    def make(folder: Path) -> Path:
        path = first(folder)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        return path

    return make


def texts(name: str, form: str, content: str) -> Callable[[Path], Path]:
    """Subtitles of a form beside the picture."""

    def make(folder: Path) -> Path:
        with (
            av.open(str(write(folder / "plain.mkv"))) as picture,
            av.open(io.BytesIO(content.encode()), format=form) as text,
            av.open(str(folder / name), "w") as out,
        ):
            streams = [out.add_stream_from_template(c.streams[0], opaque=True) for c in (picture, text)]
            for container, stream in zip((picture, text), streams, strict=True):
                for packet in container.demux():
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
        return folder / name

    return make


ASS = """[Script Info]
ScriptType: v4.00+
[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,20
[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:00.10,0:00:00.40,Default,,0,0,0,,{\\i1}one{\\i0}, two
"""
VTT = "WEBVTT\n\n00:00.100 --> 00:00.400\n<v Ann>one & two</v>\n"


def bitmaps(folder: Path) -> Path:
    """Subtitles of a Blu-ray: a screen without an object, and its end."""
    screen = struct.pack(">HHBHBBBB", 16, 16, 0x10, 0, 0x80, 0, 0, 0)
    sup = b"".join(
        b"PG" + struct.pack(">IIBH", 9000 + 9000 * i, 0, kind, len(data)) + data
        for i in range(2)
        for kind, data in ((0x16, screen), (0x80, b""))
    )
    with (
        av.open(str(write(folder / "plain.mkv"))) as picture,
        av.open(io.BytesIO(sup), format="sup") as text,
        av.open(str(folder / "a.mkv"), "w") as out,
    ):
        streams = [out.add_stream_from_template(c.streams[0], opaque=True) for c in (picture, text)]
        for container, stream in zip((picture, text), streams, strict=True):
            for packet in container.demux():
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    return folder / "a.mkv"


def undecodable(folder: Path) -> Path:
    """Sound that cannot be decoded, beside a good picture."""
    path = write(folder / "a.mkv", sound="wavpack")
    with av.open(str(path)) as container:
        blocks = [bytes(packet)[48:] for packet in container.demux(audio=0) if packet.size]
    data = path.read_bytes()
    for block in blocks:
        assert block in data
        data = data.replace(block, b"\xff" * len(block))
    path.write_bytes(data)
    return path


def late_sound(seconds: float) -> Callable[[Any, int], None]:
    def change(packet: Any, number: int) -> None:
        if packet.stream.type == "audio":
            shift = round(seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift

    return change


def twice(kind: str) -> Callable[[Any, int], None]:
    """The third packet has the times of the second."""
    seen: dict[str, Any] = {}

    def change(packet: Any, number: int) -> None:
        if packet.stream.type == kind:
            if number == 1:
                seen["times"] = packet.pts, packet.dts
            elif number == 2:
                packet.pts, packet.dts = seen["times"]

    return change


def only(kind: str) -> Callable[[Any, int], bool]:
    return lambda packet, number: packet.stream.type == kind


def with_font(folder: Path) -> Path:
    clips.needs(av.container.OutputContainer, "add_attachment")
    source = write(folder / "plain.mkv")
    with av.open(str(source)) as before, av.open(str(folder / "a.mkv"), "w") as out:
        stream = out.add_stream_from_template(before.streams[0], opaque=True)
        out.add_attachment("Arial.ttf", "font/ttf", b"\0\1\0\0" + bytes(40))
        for packet in before.demux():
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return folder / "a.mkv"


def with_data(folder: Path) -> Path:
    """A transport stream with a stream of a camera's own data."""
    source = write(folder / "plain.ts", codec="mpeg2video")
    with av.open(str(source)) as before, av.open(str(folder / "a.ts"), "w") as out:
        clips.needs(out, "add_data_stream")
        stream = out.add_stream_from_template(before.streams[0], opaque=True)
        data = out.add_data_stream("klv")
        for packet in before.demux():
            if packet.size:
                packet.stream = stream
                out.mux(packet)
                extra = av.Packet(b"\x06\x0e\x2b\x34" + bytes(20))
                extra.pts = extra.dts = packet.dts
                extra.time_base, extra.stream = packet.time_base, data
                out.mux(extra)
    return folder / "a.ts"


FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}
UNKNOWN_LENGTH = {"container_options": {"live": "1"}}
PCM = {
    "pcm s16 mono avi": ("a.avi", "pcm_s16le", "mono", "pcm_s16le"),
    "pcm s16 quad mkv": ("a.mkv", "pcm_s16le", "quad", "pcm_s16le"),
    "pcm s16 6.1 mkv": ("a.mkv", "pcm_s16le", "6.1", "pcm_s16le"),
    "pcm s32 stereo mkv": ("a.mkv", "pcm_s32le", "stereo", "pcm_s32le"),
    "pcm f32 stereo mkv": ("a.mkv", "pcm_f32le", "stereo", "pcm_f32le"),
    "pcm f64 stereo mkv": ("a.mkv", "pcm_f64le", "stereo", "pcm_f64le"),
    "pcm s16be stereo mov": ("a.mov", "pcm_s16be", "stereo", "pcm_s16be"),
    "pcm s24 stereo mov": ("a.mov", "pcm_s24le", "stereo", "pcm_s24le"),
    "pcm s16be stereo mp4": ("a.mp4", "pcm_s16be", "stereo", "pcm_s16be"),
    "pcm mulaw mono avi": ("a.avi", "pcm_mulaw", "mono", "aac"),
    "pcm alaw stereo nut": ("a.nut", "pcm_alaw", "stereo", "aac"),
    "pcm u8 mono mov": ("a.mov", "pcm_u8", "mono", "aac"),
}
SOUND = {
    "sound adpcm ms": ("a.avi", "adpcm_ms", "stereo", "aac"),
    "sound adpcm swf": ("a.flv", "adpcm_swf", "mono", "aac"),
    "sound wmav1": ("a.asf", "wmav1", "stereo", "aac"),
    "sound mp2 ts": ("a.ts", "mp2", "stereo", "mp3"),
    "sound mp3 avi": ("a.avi", "libmp3lame", "stereo", "mp3"),
    "sound ac3 5.1": ("a.mkv", "ac3", "5.1", "ac3"),
    "sound eac3": ("a.mkv", "eac3", "stereo", "eac3"),
    "sound flac": ("a.mkv", "flac", "stereo", "flac"),
    "sound alac": ("a.mov", "alac", "stereo", "alac"),
    "sound wavpack": ("a.mkv", "wavpack", "stereo", "aac"),
    "sound opus": ("a.mkv", "libopus", "stereo", "opus"),
}


def of_sound(name: str, sound: str, layout: str, codec: str) -> Fault:
    picture = {"a.ts": "mpeg2video", "a.flv": "flv1"}.get(name, "mpeg4")
    rate = 44100 if name == "a.flv" else 48000
    said = "is converted to aac" if codec == "aac" else ""
    make = film(name, sound=sound, layout=layout, rate=rate, codec=picture)
    return Fault(make, beside=(codec,), said=said)


def unended(packet: Any, number: int) -> None:
    if packet.stream.type == "subtitle":
        packet.duration = 0


def reshaped(folder: Path) -> Path:
    """A broadcast that goes from 4:3 to 16:9."""
    made = []
    for number, shape in enumerate((Fraction(4, 3), Fraction(16, 9))):

        def prepare(out: Any, stream: Any, aspect: Fraction = shape * Fraction(36, 48)) -> None:
            stream.codec_context.sample_aspect_ratio = aspect

        path = folder / f"{number}.m2v"
        made.append(frames(path, "mpeg2video", count=4, rate=25, size=(48, 36), prepare=prepare))
    (folder / "a.m2v").write_bytes(b"".join(path.read_bytes() for path in made))
    return folder / "a.m2v"


BFRAMES = {"bf": "2", "g": "12"}
FAULTS: dict[str, Fault] = {
    **{name: of_sound(*facts) for name, facts in (PCM | SOUND).items()},
    "sound flac to mov": Fault(
        film("a.mkv", sound="flac"), "out.mov", beside=("aac",), said="is converted to aac"
    ),
    "sound opus to mov": Fault(
        film("a.mkv", sound="libopus"), "out.mov", beside=("aac",), said="is converted to aac"
    ),
    "sound ac3 to webm": Fault(
        film("a.mkv", sound="ac3", layout="5.1"),
        "out.webm",
        beside=("opus",),
        said="is converted to",
    ),
    "track of another delay": Fault(
        remuxed("a.mkv", film("a.mkv", sound="aac"), late_sound(1.96)), beside=("aac",)
    ),
    "track without packets mkv": Fault(
        remuxed("b.mkv", film("a.mkv", sound="aac"), only("video")), said="it contains nothing"
    ),
    "track that cannot be decoded": Fault(undecodable, said="use an .mkv output to keep it"),
    "track with a time twice": Fault(
        remuxed("a.mkv", film("a.mkv", sound="aac"), twice("audio")), beside=("aac",)
    ),
    "time of a frame twice": Fault(
        remuxed("a.mkv", picture_only("a.mkv", "mjpeg", "yuvj420p"), twice("video")),
        times=TENTHS,
        said="out of order",
    ),
    **{
        f"track {codec} in ts": Fault(
            film("a.ts", codec="mpeg2video", sound=encoder), "out.mkv", beside=(codec,), times=TENTHS
        )
        for codec, encoder in {
            "mp2": "mp2",
            "mp3": "libmp3lame",
            "aac": "aac",
            "ac3": "ac3",
            "eac3": "eac3",
        }.items()
    },
    "count behind a long lead-in": Fault(
        remuxed(
            "a.mp4",
            picture_only("a.mp4", "libx264", count=50, options={"g": "60", "bf": "0", "sc_threshold": "0"}),
            lambda p, n: setattr(p, "pts", p.pts - round(4.5 / p.time_base)) or setattr(p, "dts", p.pts),
            container_options={"avoid_negative_ts": "disabled"},
        ),
        times=TENTHS,
    ),
    "time a month ahead": Fault(
        remuxed(
            "a.mkv",
            picture_only("a.mkv", "mjpeg", "yuvj420p"),
            lambda p, n: setattr(p, "pts", p.pts + 2_600_000_000 * (n > 2)) or setattr(p, "dts", p.pts),
        ),
        times=TENTHS,
        said="out of order",
    ),
    "time uneven beside sound": Fault(
        lambda folder: clips.write_video(
            folder / "a.mp4", 6, size=SIZE, audio=1, times=[0, 300, 1800, 1900, 4000, 4700]
        ),
        beside=("aac",),
    ),
    "time begins an hour in": Fault(
        remuxed(
            "a.mkv",
            film("a.mkv", codec="mjpeg"),
            lambda p, n: setattr(p, "pts", p.pts + 3600_000) or setattr(p, "dts", p.dts + 3600_000),
        ),
        times=[3600 + t for t in TENTHS],
    ),
    "time of 120 a second in milliseconds": Fault(
        picture_only("a.mkv", "mpeg4", rate=120), times=[round(i / 0.12) / 1000 for i in range(5)]
    ),
    "order mpeg4 in avi": Fault(picture_only("a.avi", "mpeg4", options=BFRAMES), times=TENTHS),
    "order h264 in wmv": Fault(picture_only("a.wmv", "libx264", options=BFRAMES), times=TENTHS),
    "order h264 in flv": Fault(picture_only("a.flv", "libx264", options=BFRAMES)),
    "order mpeg2 in ps": Fault(picture_only("a.vob", "mpeg2video", rate=25, options=BFRAMES), counts=[5]),
    "order h264 in ts": Fault(picture_only("a.ts", "libx264", options=BFRAMES), counts=[5]),
    "raw av1": Fault(picture_only("a.ivf", "libsvtav1")),
    "raw y4m": Fault(picture_only("a.y4m", "wrapped_avframe")),
    "raw vp8": Fault(picture_only("b.ivf", "libvpx")),
    "raw mpeg4": Fault(picture_only("a.m4v", "mpeg4", options=BFRAMES)),
    "count of fragments": Fault(film("a.mp4", sound="aac", **FRAGMENTS), beside=("aac",)),
    "count without a length mkv": Fault(film("a.mkv", sound="aac", **UNKNOWN_LENGTH), beside=("aac",)),
    "count of one frame beside long sound": Fault(
        remuxed("a.mkv", film("a.mkv", sound="aac"), lambda p, n: p.stream.type == "audio" or n == 0),
        times=[0],
        beside=("aac",),
    ),
    "cut fragments": Fault(
        cut(picture_only("a.mp4", "mjpeg", "yuvj420p", **FRAGMENTS), 0.9), counts=[4, 5], said="damaged"
    ),
    "cut avi": Fault(cut(picture_only("a.avi", "mjpeg", "yuvj420p"), 0.95), counts=[3, 4]),
    "cut before the first key frame": Fault(
        remuxed("a.ts", picture_only("a.ts", "mpeg2video", options={"g": "3"}), lambda p, n: n > 0),
        counts=[2, 3, 4],
    ),
    "alpha ffv1": Fault(picture_only("a.mkv", "ffv1", "bgra"), "pictures"),
    "alpha prores": Fault(picture_only("a.mov", "prores_ks", "yuva444p10le"), "pictures"),
    "alpha png": Fault(picture_only("a.mov", "png", "rgba"), "pictures"),
    "alpha qtrle": Fault(picture_only("a.mov", "qtrle", "argb"), "pictures"),
    "alpha vp8": Fault(
        picture_only(
            "a.webm",
            "libvpx",
            "yuva420p",
            options={"auto-alt-ref": "0"},
            prepare=lambda out, stream: stream.metadata.update(alpha_mode="1"),
        ),
        "pictures",
    ),
    "shape turned in mkv": Fault(
        remuxed("a.mkv", lambda folder: clips.write_video(folder / "a.mp4", 3, rotation=90)),
        job={"target": (96, 128)},
    ),
    "shape of 3gp": Fault(picture_only("a.3gp", "h263", size=(128, 96), count=2)),
    "shape changes": Fault(reshaped, counts=[7, 8], said="changes from 1 to 4/3; the output keeps"),
    "shape odd": Fault(picture_only("a.mkv", "ffv1", "bgr0", size=(17, 13))),
    "shape odd of its scale": Fault(picture_only("a.mkv", "ffv1", "bgr0", size=(17, 13)), job={"scale": 2.5}),
    "shape of 16:9 from dv": Fault(
        picture_only(
            "a.mkv",
            "mpeg2video",
            rate=25,
            prepare=lambda out, s: setattr(s.codec_context, "sample_aspect_ratio", Fraction(64, 45)),
        ),
        times=[i / 25 for i in range(5)],
    ),
    "colour smpte 240": Fault(
        lambda folder: clips.write_video(folder / "a.mp4", 5, size=SIZE, colour=(7, 2, 7, 7)),
        times=[i / 25 for i in range(5)],
    ),
    "colour 4:1:1": Fault(picture_only("a.mkv", "ffv1", "yuv411p")),
    "colour 4:1:0": Fault(picture_only("a.avi", "ffv1", "yuv410p")),
    "colour grey of 10 bits": Fault(picture_only("a.mkv", "ffv1", "gray10le")),
    "colour one bit": Fault(picture_only("a.avi", "rawvideo", "monow")),
    "colour jpeg in hevc": Fault(picture_only("a.mp4", "libx265", "yuvj420p", size=(64, 32))),
    "text ass to mp4": Fault(
        texts("a.mkv", "ass", ASS), beside=("mov_text",), said="is converted to mov_text"
    ),
    "text ass to mkv": Fault(texts("a.mkv", "ass", ASS), "out.mkv", beside=("ass",)),
    "text vtt to mp4": Fault(
        texts("a.webm.mkv", "webvtt", VTT), beside=("mov_text",), said="is converted to mov_text"
    ),
    "text mov to mkv": Fault(
        lambda folder: clips.write_video(folder / "a.mp4", 5, size=SIZE, subtitles=True),
        "out.mkv",
        times=[i / 25 for i in range(5)],
        beside=("subrip",),
        said="is converted to subrip",
    ),
    "text bitmaps to mp4": Fault(bitmaps, said="use an .mkv output to keep it"),
    "text bitmaps to mkv": Fault(bitmaps, "out.mkv", beside=("hdmv_pgs_subtitle",)),
    "words font to mp4": Fault(with_font, said="only .mkv can store attached files"),
    "words font to mkv": Fault(with_font, "out.mkv", beside=("ttf",)),
    "words data": Fault(with_data, counts=[5], said="its packets cannot be copied"),
}


MANY = {*PCM, *SOUND} - {
    "pcm s16 quad mkv",
    "pcm s16be stereo mp4",
    "pcm mulaw mono avi",
    "sound wmav1",
    "sound mp3 avi",
    "sound flac",
    "sound wavpack",
}
"""More of one kind, which run with `-m long`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in MANY else []) for name in FAULTS]
)
def test_a_file_as_people_have_them(name: str, pipe, tmp_path: Path, caplog) -> None:
    fault = FAULTS[name]
    (tmp_path / "in").mkdir()
    source = fault.make(tmp_path / "in")
    with caplog.at_level(logging.WARNING):
        output = upscale(pipe, source, tmp_path / fault.output, **fault.job)
    # FFmpeg's own lines are not ours: whether they are logged depends on what ran before.
    told = "\n".join(each.getMessage() for each in caplog.records if each.name.startswith("stream_diffvsr"))
    if fault.said:
        assert fault.said in told
    else:
        words = ("left out", "converted", "fewer", "missing", "damaged", "skipped")
        assert not any(word in told for word in words), told
    if output.is_dir():
        made = [Image.open(file) for file in sorted(output.iterdir())]
        assert len(made) == 5 and {image.mode for image in made} == {"RGBA"}
        alpha = np.asarray(made[0].getchannel("A"))
        assert alpha[:, : alpha.shape[1] // 3].min() > 200 and alpha[:, -alpha.shape[1] // 3 :].max() < 55
        return
    shown = [float(time) for time, _ in clips.frames_of(output)]
    if fault.counts:
        assert len(shown) in fault.counts and all(b > a for a, b in itertools.pairwise(shown))
    else:
        wanted = fault.times or [float(time) for time, _ in clips.frames_of(source)]
        late = shown[0] - wanted[0] if {output.suffix, source.suffix} & {".mkv", ".webm", ".ts"} else 0
        assert [time - late for time in shown] == pytest.approx(list(wanted), abs=2e-3)
    with av.open(str(output)) as container:
        codecs = [
            s.codec_context.codec.canonical_name for s in container.streams if s.type in ("audio", "subtitle")
        ]
        codecs += ["ttf" for s in container.streams if s.type == "attachment"]
    assert tuple(codecs) == fault.beside


@pytest.mark.parametrize(
    "name", ["100%.mp4", "a%03d.mp4", "concat:a|b.mkv", "\U0001f3ac \u738b.mp4", "-x.mp4", "a[1]'#?.mp4"]
)
def test_name_with_signs(name: str, pipe, tmp_path: Path, monkeypatch) -> None:
    """Of a source and of an output, both in the folder where the command is run."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "plain.mkv", sound="aac").rename(tmp_path / name)
    output = upscale(pipe, Path(name), Path(f"2{name}"))
    assert len(clips.frames_of(tmp_path / output)) == 5 and clips.packets_of(tmp_path / output, "audio")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, f"2{name}"])


def animation(folder: Path, name: str) -> Path:
    made = [Image.fromarray(clips.picture(i, *SIZE)) for i in range(3)]
    made[0].save(folder / name, save_all=True, append_images=made[1:], duration=[100, 200, 100])
    return folder / name


def still(folder: Path, name: str, orientation: int = 1, **options: Any) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(clips.picture(0, 24, 16)).save(folder / name, exif=exif, **options)
    return folder / name


def flic(folder: Path) -> Path:
    """An animation of Autodesk's: three frames of one colour each, a tenth of a second apart."""
    made = b""
    for number in range(3):
        colours = struct.pack("<IHHBB", 778, 4, 1, 0, 0) + bytes([80 * number] * 768)
        pixels = struct.pack("<IH", 6 + 256, 16) + bytes(256)
        made += struct.pack("<IHH8x", 16 + len(colours + pixels), 0xF1FA, 2) + colours + pixels
    head = struct.pack("<IHHHHHHI", 128 + len(made), 0xAF12, 3, 16, 16, 8, 3, 100)
    (folder / "a.flc").write_bytes(
        head.ljust(80, b"\0") + struct.pack("<II", 128, 128).ljust(48, b"\0") + made
    )
    return folder / "a.flc"


@pytest.mark.parametrize(
    ("make", "output", "wanted"),
    [
        (flic, "b.mp4", [0, 0.1, 0.2]),
        # Its first bytes could be those of a TGA picture.
        (picture_only("a.obu", "libsvtav1", size=(64, 64)), "b.mp4", [i / 25 for i in range(5)]),
        (lambda folder: animation(folder, "a.webp"), "b.mp4", [0, 0.1, 0.3]),
        (lambda folder: animation(folder, "a.png"), "b.mp4", [0, 0.1, 0.3]),
        (lambda folder: animation(folder, "a.avif"), "b.mp4", [0, 0.1, 0.3]),
        (lambda folder: still(folder, "a.avif"), "b.png", (96, 64)),
        (lambda folder: still(folder, "a.jpg", 6, subsampling="4:2:2"), "b.jpg", (64, 96)),
        (lambda folder: still(folder, "a.jpg", 8, subsampling="4:2:0"), "b.jpg", (64, 96)),
        (lambda folder: still(folder, "a.mp4", format="PNG"), "b.png", (96, 64)),
        (lambda folder: still(folder, "a.tif", 6), "b.tif", (64, 96)),
    ],
)
def test_still_or_moving_by_content(make, output: str, wanted: Any, pipe, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    try:
        source = make(tmp_path / "in")
    except (KeyError, ValueError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    result = upscale(pipe, source, tmp_path / output)
    if isinstance(wanted, tuple):
        with Image.open(result) as image:
            assert image.size == wanted and image.getexif().get(0x0112, 1) == 1
    else:
        assert [float(time) for time, _ in clips.frames_of(result)] == pytest.approx(wanted)


def test_a_still_before_others_is_said(pipe, tmp_path: Path, caplog) -> None:
    """A stream of JPEG pictures under the name of one."""
    frames(tmp_path / "a.mjpeg", "mjpeg", "yuvj420p").rename(tmp_path / "a.jpg")
    upscale(pipe, tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert "more JPEG pictures after the first" in caplog.text
    (tmp_path / "a.jpg").rename(tmp_path / "a.mjpeg")
    assert len(clips.frames_of(upscale(pipe, tmp_path / "a.mjpeg", tmp_path / "b.mp4"))) == 5
