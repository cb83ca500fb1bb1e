"""What a file says about its picture: HDR10 data, interlacing, and which encoder wrote it."""

from __future__ import annotations

import logging
import struct
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest
import torch

from stream_diffvsr import UpscaleOptions, VideoError
from stream_diffvsr.cli.main import main
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media import codecs
from stream_diffvsr.media.colour import Colour, planes_to_frame, rgb_to_planes
from stream_diffvsr.media.read import Span, VideoSource
from stream_diffvsr.media.streams import SourceInfo

DISPLAY = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.329, 0.005, 1000)
"""Red, green, blue and white as x and y, then the darkest and the brightest candela."""
HDR10 = (
    "log-level=error:max-cll=1000,400:"
    "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
)


def upscale(pipe, source: Path, output: Path, **settings: Any) -> Path:
    task = VideoJob(source=source, output=output, options=UpscaleOptions(num_inference_steps=1), **settings)
    for _ in run(pipe, task):
        pass
    return output


@pytest.fixture(scope="module")
def hdr(tmp_path_factory) -> Path:
    return clips.write_video(
        tmp_path_factory.mktemp("hdr") / "in.mp4",
        4,
        size=(64, 48),
        codec="libx265",
        pix_fmt="yuv420p10le",
        colour=(9, 1, 9, 16),
        options={"x265-params": HDR10},
    )


def light_of(path: Path) -> list[tuple[tuple[float, ...], tuple[int, ...]]]:
    """Mastering display and light level of each frame that has them."""
    found = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            data = {side.type.name: bytes(side) for side in frame.side_data}
            if "MASTERING_DISPLAY_METADATA" in data:
                numbers = struct.unpack_from("=20i", data["MASTERING_DISPLAY_METADATA"])
                pairs = zip(numbers[::2], numbers[1::2], strict=True)
                display = tuple(top / bottom for top, bottom in pairs)
                found.append((display, struct.unpack_from("=2I", data["CONTENT_LIGHT_LEVEL"])))
    return found


@pytest.mark.parametrize(
    ("codec", "suffix"), [("h265", "mp4"), ("h265", "mkv"), ("h264", "mkv"), ("h264", "mp4"), ("av1", "webm")]
)
def test_hdr10_data_is_carried(codec: str, suffix: str, hdr: Path, pipe, tmp_path: Path, caplog) -> None:
    """In each of the two segments at least, whose first frames a player may begin with."""
    output = upscale(pipe, hdr, tmp_path / f"out.{suffix}", codec=codec, segment_frames=2)
    found = light_of(output)
    assert len(found) == {"h264": 2}.get(codec, 4)
    for display, levels in found:
        # AV1 counts in 1/65536, and light in 1/256 and 1/16384.
        assert display == pytest.approx(DISPLAY, rel=1e-2 if codec == "av1" else 1e-9, abs=2e-5)
        assert levels == (1000, 400)
    with av.open(str(output)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (9, 9, 16)
        assert context.pix_fmt == "yuv420p10le"
        # Apple's players know H.265 by this name only.
        assert suffix != "mp4" or codec != "h265" or context.codec_tag == "hvc1"
    assert "HDR10" not in caplog.text


def test_where_hdr10_data_cannot_be_carried_it_is_said_once(hdr: Path, pipe, tmp_path: Path, caplog) -> None:
    output = upscale(pipe, hdr, tmp_path / "out.mov", codec="prores")
    assert light_of(output) == []
    said = [message for message in caplog.messages if "HDR10" in message]
    assert said == [
        "writing prores without the source's HDR10 data (mastering display, light level), which only h264, "
        "h265, av1 can store"
    ]


@pytest.mark.parametrize("source", [{"x264-params": "tff=1"}, {"x264-params": "bff=1"}, {}])
def test_interlaced_sources_are_said(source: dict[str, str], pipe, tmp_path: Path, caplog) -> None:
    path = clips.write_video(tmp_path / "in.mp4", 2, size=(32, 32), options=source)
    upscale(pipe, path, tmp_path / "out.mp4")
    said = [message for message in caplog.messages if "is interlaced: deinterlace it first" in message]
    assert len(said) == bool(source)


HARDWARE = [name for name in codecs.CODECS if "_" in name]


@pytest.mark.parametrize("codec", HARDWARE)
def test_a_hardware_encoder_works_or_one_sentence_says_why(
    codec: str, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 2, size=(64, 48))
    model = ["--model", str(checkpoint), "--flow", "none", "--device", "cpu", "--steps", "1"]
    code = main(["upscale", str(source), "--codec", codec, *model])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    if codecs.open_error(codec) is None:
        assert code == 0
        assert len(clips.frames_of(tmp_path / "in_4x.mp4")) == 2
        return
    assert code == 2
    assert said.startswith(f"stream-diffvsr: the encoder {codec} cannot be opened on this machine (")
    assert said.endswith("use --codec to choose one of these: h264, h265, av1, prores, ffv1, png.")
    assert [file.name for file in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.parametrize(("name", "native", "shift"), [("yuv420p", "nv12", 0), ("yuv420p10le", "p010le", 6)])
def test_the_order_that_hardware_takes_changes_no_value(name: str, native: str, shift: int) -> None:
    planes = rgb_to_planes(torch.rand(1, 3, 32, 48), name, Colour(1, False, 1, 1))
    frame = planes_to_frame(planes, native)
    luma, chroma = (
        np.frombuffer(plane, planes[0].dtype).reshape(rows, -1)[:, :48]
        for plane, rows in zip(frame.planes, (32, 16), strict=True)
    )
    for ours, theirs in zip(planes, (luma, chroma[:, ::2], chroma[:, 1::2]), strict=True):
        assert np.array_equal(ours << shift, theirs)


def test_every_format_of_an_encoder_can_be_made() -> None:
    for codec in codecs.CODECS.values():
        for name in codec.formats:
            planes = rgb_to_planes(torch.rand(1, 3, 32, 48), name, Colour(1, False, 1, 1))
            native = codec.native.get(name, name)
            assert planes_to_frame(planes, native).format.name == native


def test_bits_that_are_lost_are_said(caplog) -> None:
    info = SourceInfo(32, 32, 10, Fraction(1, 25), Fraction(25), 1, Colour(9, False, 9, 16))
    for codec, pix_fmt, lost in (
        ("h264_nvenc", None, True),
        ("h264", "yuv420p", True),
        ("hevc_nvenc", None, False),
    ):
        caplog.clear()
        codecs.choose_encoding(codec, pix_fmt, None, info, (128, 128))
        assert ("reducing the bit depth from 10 to 8" in caplog.text) == lost


def test_an_encoder_that_opens_but_not_for_this(monkeypatch) -> None:
    info = SourceInfo(32, 32, 8, Fraction(1, 25), Fraction(25), 1, Colour(1, False, 1, 1))
    encoding = codecs.choose_encoding("h264", None, None, info, (20_000, 20_000))
    with pytest.raises(VideoError, match=r"h264 cannot encode 20000x20000 as yuv420p"):
        codecs.check_encoder(encoding, "mp4")


def test_dynamic_hdr_is_said_to_be_lost(caplog) -> None:
    from stream_diffvsr.media.streams import hdr_data

    class Side:
        """As PyAV shows side data."""

        def __init__(self, name: str, data: bytes) -> None:
            self.type = type("Kind", (), {"name": name})
            self.data = data

        def __bytes__(self) -> bytes:
            return self.data

    numbers = np.arange(1, 21, dtype=np.int32).tobytes()
    side_data = [
        Side("DYNAMIC_HDR_PLUS", b"x"),
        Side("MASTERING_DISPLAY_METADATA", numbers + struct.pack("=2i", 1, 0)),
        Side("CONTENT_LIGHT_LEVEL", struct.pack("=2I", 5, 6)),
    ]
    with caplog.at_level(logging.WARNING):
        assert set(hdr_data(types.SimpleNamespace(side_data=side_data), {})) == {"CONTENT_LIGHT_LEVEL"}
    assert "DYNAMIC_HDR_PLUS cannot be kept" in caplog.text
    assert "is incomplete" in caplog.text


def test_what_a_frame_says_and_nobody_can_carry_on_is_said(caplog) -> None:
    from stream_diffvsr.media.streams import display_matrix, hdr_data

    class Unknown:
        """Side data of a kind that PyAV has no name for yet, such as EXIF."""

        @property
        def type(self) -> None:
            raise ValueError("99 is not a valid Type")

        def __bytes__(self) -> bytes:
            return b"x"

    class Sphere:
        type = types.SimpleNamespace(name="SPHERICAL")

        def __bytes__(self) -> bytes:
            return b"x"

    frame = types.SimpleNamespace(rotation=0, side_data=[Unknown(), Sphere()])
    assert display_matrix(frame) is None and hdr_data(frame, {}) == {}
    assert "360 degree projection cannot be kept" in caplog.text


def test_two_views_in_one_picture(pipe, tmp_path: Path, caplog) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.metadata["stereo_mode"] = "left_right"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(clips.picture(0, 32, 16), format="rgb24")))
        out.mux(stream.encode(None))
    output = upscale(pipe, tmp_path / "a.mkv", tmp_path / "b.mkv")
    assert "3D" not in caplog.text
    with av.open(str(output)) as container:
        assert container.streams.video[0].metadata["stereo_mode"] == "left_right"
    upscale(pipe, tmp_path / "a.mkv", tmp_path / "c.mkv", audio=False)
    upscale(pipe, tmp_path / "a.mkv", tmp_path / "d.mp4")
    assert caplog.text.count("the layout of the 3D views is lost: to keep it, write an .mkv file") == 2


def test_the_time_code_in_the_data_of_a_camera(pipe, tmp_path: Path, caplog) -> None:
    """Sony's, which has it at the begin of each packet."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 16, 16, "yuv420p"
        clips.needs(out, "add_mux_stream")
        data = out.add_mux_stream("mov_text", time_base=Fraction(1, 1000))
        for index in range(2):
            out.mux(video.encode(av.VideoFrame.from_ndarray(clips.picture(index, 16, 16), format="rgb24")))
            packet = av.Packet(bytes([0, 18, *range(11), 9, 24, 53, 0, 14, 0, 0]))
            packet.pts = packet.dts = 40 * index
            packet.duration, packet.time_base, packet.stream = 40, Fraction(1, 1000), data
            out.mux(packet)
        out.mux(video.encode(None))
    path.write_bytes(path.read_bytes().replace(b"tx3g", b"rtmd").replace(b"sbtl", b"meta"))
    output = upscale(pipe, path, tmp_path / "b.mp4")
    assert "data stream 1 (SubtitleHandler) is left out: its packets cannot be copied" in caplog.text
    with av.open(str(output)) as container:
        assert container.streams.video[0].metadata["timecode"] == "09:24:53:14"


def test_the_time_code_is_kept(pipe, tmp_path: Path, caplog) -> None:
    with av.open(str(tmp_path / "a.mov"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.metadata["timecode"] = "01:00:00:23"
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(clips.picture(index, 32, 32), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    for start, code in ((0, "01:00:00:23"), (2, "01:00:01:00"), ("0.12s", "01:00:01:01")):
        output = upscale(pipe, tmp_path / "a.mov", tmp_path / f"{start}.mov", start=start)
        with av.open(str(output)) as container:
            assert container.streams.video[0].metadata["timecode"] == code
    assert "time code" not in caplog.text


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60000, 1001)])
def test_time_codes_of_later_frames(rate: Fraction) -> None:
    """Counted one by one, from before midnight: with dropped numbers where the rate is 29.97 or 59.94."""
    from stream_diffvsr.media.tracks import later_time_code, with_later_time_code

    second = round(rate)
    drop, mark = (second // 15, ";") if rate.denominator > 1 else (0, ":")
    codes = [
        f"{hour:02}:{minute:02}:{s:02}{mark}{number:02}"
        for hour, minute in [(23, minute) for minute in range(48, 60)] + [(0, minute) for minute in range(12)]
        for s in range(60)
        for number in range(0 if s or minute % 10 == 0 else drop, second)
    ]
    for number in [*range(0, len(codes), 7), *range(60 * second - 99, 60 * second + 99)]:
        assert later_time_code(codes[0], number, rate) == codes[number]
        assert later_time_code(codes[99], number - 99, rate) == codes[number]
    words = {"TIMECODE": codes[0], "title": "a"}
    assert with_later_time_code(words, Fraction(0), rate) == words
    assert with_later_time_code({"timecode": "soon", "title": "a"}, Fraction(1), rate) == {"title": "a"}


def test_the_shape_shown_stays_at_any_size(pipe, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "a.mp4", 1, size=(36, 28), aspect=Fraction(64, 45))
    for number, target in enumerate([(128, 72), (144, 112)]):
        output = upscale(pipe, source, tmp_path / f"{number}.mp4", target=target)
        with av.open(str(output)) as container:
            stream = container.streams.video[0]
            shape = Fraction(stream.width, stream.height) * (stream.sample_aspect_ratio or 1)
        assert shape == Fraction(36, 28) * Fraction(64, 45)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_motion_jpeg_of_a_camera_that_writes_exif(orientation: int, pipe, tmp_path: Path) -> None:
    """Read, and turned as the camera says."""
    import io

    from PIL import Image, ImageOps

    source, exif, shown = tmp_path / "a.avi", Image.Exif(), []
    exif[0x0112], exif[0x010F] = orientation, "Camera"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("mjpeg", rate=10, width=48, height=32, pix_fmt="yuvj420p")
        for index in range(2):
            file = io.BytesIO()
            Image.fromarray(clips.picture(index, 48, 32)).save(file, "jpeg", quality=95, exif=exif)
            shown.append(np.asarray(ImageOps.exif_transpose(Image.open(file))))
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts = stream, index, index
            packet.time_base = Fraction(1, 10)
            out.mux(packet)
    frames = [frame.rgb[0].movedim(0, -1).numpy() * 255 for frame in VideoSource(source).frames(Span())]
    for found, wanted in zip(frames, shown, strict=True):
        assert found.shape == wanted.shape and np.abs(found - wanted).mean() < 3
    output = upscale(pipe, source, tmp_path / "out.mkv", codec="ffv1")
    (first, _) = clips.frames_of(output)
    assert first[1].shape[:2] == (4 * shown[0].shape[0], 4 * shown[0].shape[1])


def test_the_alpha_of_webm_is_read(tmp_path: Path) -> None:
    if "libvpx-vp9" not in av.codecs_available:
        pytest.skip("this build of FFmpeg has no libvpx-vp9")
    with av.open(str(tmp_path / "a.webm"), "w") as out:
        stream = out.add_stream("libvpx-vp9", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuva420p"
        stream.metadata["alpha_mode"] = "1"
        picture = np.full((32, 32, 4), 200, np.uint8)
        picture[..., 3] = 255
        picture[:, 16:, 3] = 0
        frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="yuva420p")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    source = VideoSource(tmp_path / "a.webm")
    alpha = next(source.frames(Span())).alpha
    assert source.info.has_alpha and alpha is not None
    assert float(alpha[..., :12].min()) > 0.9 and float(alpha[..., 20:].max()) < 0.1
