"""What lies around the picture is kept, or said once; what was made ready once is not made again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import pytest
from PIL import Image, PngImagePlugin
from test_video_sides import ONE_STEP, seen, upscale, write

from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media import pictures, sides
from stream_diffvsr.media.sides import LISTING, make_sides
from stream_diffvsr.media.tracks import kept_words


def jpeg(size: tuple[int, int] = (16, 16), kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, kind)
    return file.getvalue()


def with_cover(path: Path, kind: str = "JPEG") -> Path:
    """A video with sound and a cover picture."""
    source = write(path.with_name("plain.mkv"), sound="aac")
    with (
        av.open(str(source)) as plain,
        av.open(io.BytesIO(jpeg(kind=kind)), format=f"{kind.lower()}_pipe") as cover,
        av.open(str(path), "w") as out,
    ):
        streams = [out.add_stream_from_template(stream, opaque=True) for stream in plain.streams]
        if path.suffix == ".mkv":
            out.add_attachment(f"cover.{kind.lower()}", f"image/{kind.lower()}", jpeg(kind=kind))
        else:
            picture = out.add_stream_from_template(cover.streams[0], opaque=True)
            picture.disposition = av.stream.Disposition.attached_pic.value
            packet = next(cover.demux(cover.streams[0]))
            packet.stream, packet.pts, packet.dts = picture, 0, 0
            out.mux(packet)
        for packet in plain.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    return path


def cover_of(path: Path) -> bytes | None:
    with av.open(str(path)) as container:
        for stream in container.streams.video:
            if stream.disposition & av.stream.Disposition.attached_pic:
                return bytes(next(p for p in container.demux(stream) if p.size))
    return None


@pytest.mark.parametrize(
    ("source", "output", "kind"),
    [("a.mp4", "b.mp4", "JPEG"), ("a.mkv", "b.mp4", "PNG"), ("a.mp4", "b.mkv", "PNG")],
)
def test_the_cover_picture_goes_along(source, output, kind, pipe, tmp_path: Path, caplog) -> None:
    clips.needs(av.container.OutputContainer, "add_attachment")
    made = with_cover(tmp_path / source, kind)
    result = upscale(pipe, made, tmp_path / output)
    assert cover_of(result) == jpeg(kind=kind)
    assert seen(result)[0] == ("video", "h264") and ("audio", "aac") in seen(result)
    assert "left out" not in caplog.text


@pytest.mark.parametrize("form", ["mov", "webm"])
def test_a_cover_that_a_container_does_not_hold_is_said(form: str, tmp_path: Path, caplog) -> None:
    clips.needs(av.container.OutputContainer, "add_attachment")
    make_sides(with_cover(tmp_path / "a.mp4"), form, tmp_path)
    assert f"video stream 2 is left out: {form} cannot store a cover picture" in caplog.text


def test_mp4_holds_words_of_any_name_or_a_cover_but_not_both(pipe, tmp_path: Path, caplog) -> None:
    clips.needs(av.container.OutputContainer, "add_attachment")
    made = with_cover(tmp_path / "a.mp4")
    result = upscale(pipe, made, tmp_path / "b.mp4", metadata={"comment": "ours"})
    assert cover_of(result) == jpeg() and "left out" not in caplog.text
    result = upscale(pipe, made, tmp_path / "c.mp4", metadata={"workflow": "{}"})
    with av.open(str(result)) as container:
        assert container.metadata["workflow"] == "{}"
    assert cover_of(result) is None
    assert "the cover picture is left out: mp4 cannot store one together with workflow" in caplog.text


def test_words_that_a_container_refuses_cost_themselves(pipe, tmp_path: Path, caplog) -> None:
    """FFmpeg writes a time code into MP4 at rates it knows, and refuses the whole file at others."""
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video = out.add_stream("mpeg4", rate=1000)
        video.width, video.height, video.pix_fmt = 16, 16, "yuv420p"
        video.metadata["timecode"] = "01:00:00:00"
        sound = out.add_stream("aac", rate=48000, layout="stereo")
        for index in range(3):
            out.mux(video.encode(av.VideoFrame.from_ndarray(clips.picture(index, 16, 16), format="rgb24")))
        out.mux(video.encode(None))
        clips.write_sound(out, sound, 4, 50)
    result = upscale(pipe, tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert seen(result) == [("video", "h264"), ("audio", "aac")]
    assert caplog.text.count("chapters, metadata, cover pictures and attached files are left out: ") == 1


PHOTO = {0x010E: "a hill", 0x010F: "Camera", 0x0112: 6, 0x8769: {0x829A: 0.5, 0xA002: 9, 0x927C: b"own"}}
GPS = {1: "N", 2: (52.0, 30.0, 0.0)}


def photo(path: Path, **options: Any) -> Path:
    exif = Image.Exif()
    for tag, value in PHOTO.items():
        exif[tag] = value
    exif[0x8825] = GPS
    Image.fromarray(clips.picture(0, 16, 12)).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize(
    ("source", "suffix"), [("a.jpg", "jpg"), ("a.jpg", "png"), ("a.png", "webp"), ("a.png", "tif")]
)
def test_exif_goes_along_without_what_is_no_longer_true(source, suffix, pipe, tmp_path: Path, caplog) -> None:
    result = upscale(pipe, photo(tmp_path / source), tmp_path / f"b.{suffix}")
    with Image.open(result) as image:
        assert image.size == (48, 64)
        if suffix == "tif":
            assert "without its EXIF data" in caplog.text
            return
        exif = image.getexif()
        assert (exif[0x010E], exif[0x010F]) == ("a hill", "Camera")
        assert exif.get(0x0112, 1) == 1
        words = exif.get_ifd(0x8769)
        assert float(words[0x829A]) == 0.5 and not {0xA002, 0x927C} & words.keys()
        assert exif.get_ifd(0x8825)[1] == "N"


def test_damaged_exif_costs_itself(pipe, tmp_path: Path) -> None:
    data = photo(tmp_path / "a.jpg").read_bytes()
    place = data.index(b"Exif\0\0")
    (tmp_path / "a.jpg").write_bytes(data[: place + 14] + b"\xff" * 40 + data[place + 54 :])
    with Image.open(upscale(pipe, tmp_path / "a.jpg", tmp_path / "b.jpg")) as image:
        assert image.size in ((64, 48), (48, 64))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_texts_of_a_png_go_along_and_their_loss_is_said(bits: int, pipe, tmp_path: Path, caplog) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", json.dumps({"nodes": list(range(600))}), zip=True)
    info.add_itxt("title", "\u00fcber", "de", "Titel")
    info.add_text("Raw profile type exif", "old")
    if bits == 8:
        Image.fromarray(clips.picture(0, 16, 12)).save(tmp_path / "a.png", pnginfo=info)
    else:
        rgb = pictures.from_pillow(Image.fromarray(clips.picture(0, 16, 12))).rgb
        texts = {"workflow": json.dumps({"nodes": list(range(600))}), "title": "\u00fcber"}
        pictures.write(tmp_path / "a.png", pictures.Picture(rgb, None, 16, {"text": texts}))
    with Image.open(upscale(pipe, tmp_path / "a.png", tmp_path / "b.png")) as image:
        assert json.loads(image.text["workflow"])["nodes"][-1] == 599  # type: ignore[attr-defined]
        assert image.text["title"] == "\u00fcber" and len(image.text) == 2  # type: ignore[attr-defined]
    assert pictures.read(tmp_path / "b.png").bits == bits
    upscale(pipe, tmp_path / "a.png", tmp_path / "b.jpg")
    assert caplog.text.count("writing b.jpg without its text metadata, which only .png can store") == 1


def test_other_video_streams_are_said(tmp_path: Path, caplog) -> None:
    from stream_diffvsr.media.read import VideoSource

    with av.open(str(write(tmp_path / "p.mkv"))) as plain, av.open(str(tmp_path / "a.mkv"), "w") as out:
        streams = [out.add_stream_from_template(plain.streams[0], opaque=True) for _ in range(2)]
        for packet in plain.demux():
            if packet.size:
                data = av.Packet(bytes(packet))
                data.pts, data.dts, data.time_base = packet.pts, packet.dts, packet.time_base
                for stream in streams:
                    data.stream = stream
                    out.mux(data)
    assert VideoSource(tmp_path / "a.mkv").stream_index == 0
    assert "only stream 0 (16x16) is upscaled, not 1: use --stream to choose another" in caplog.text
    caplog.clear()
    assert VideoSource(tmp_path / "a.mkv", 1).stream_index == 1
    assert not caplog.text


def test_a_still_before_the_film_is_not_the_film(tmp_path: Path) -> None:
    """A camera's large still, a stream of one frame that is not marked as a cover."""
    from stream_diffvsr.media.read import VideoSource

    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        streams = [out.add_stream(codec, rate=25) for codec in ("mjpeg", "mpeg4")]
        for stream, pix_fmt, side in zip(streams, ("yuvj420p", "yuv420p"), (32, 16), strict=True):
            stream.width, stream.height, stream.pix_fmt = side, side, pix_fmt
        for stream, side, count in zip(streams, (32, 16), (1, 3), strict=True):
            for index in range(count):
                picture = av.VideoFrame.from_ndarray(clips.picture(index, side, side), format="rgb24")
                picture.pts, picture.time_base = index, Fraction(1, 25)
                out.mux(stream.encode(picture))
            out.mux(stream.encode(None))
    assert VideoSource(tmp_path / "a.mp4").stream_index == 1


def test_words_about_the_old_file_are_not_kept() -> None:
    words = {"BPS-eng": "9", "NUMBER_OF_FRAMES": "5", "_STATISTICS_TAGS": "BPS", "DURATION": "1", "uid": "a"}
    words |= {"material_package_umid": "b", "toolkit_version_num": "1", "title": "c", "language": "deu"}
    assert kept_words(words) == {"title": "c", "language": "deu"}


def test_what_is_made_ready_is_used_again_and_told_again(tmp_path: Path, caplog) -> None:
    source = write(tmp_path / "a.avi", sound="pcm_u8")
    first = make_sides(source, "mp4", tmp_path)
    stamp = first[0].path.stat().st_mtime_ns
    said = caplog.messages.copy()
    assert "is converted to aac" in said[0]
    caplog.clear()
    assert make_sides(source, "mp4", tmp_path) == first
    assert first[0].path.stat().st_mtime_ns == stamp and caplog.messages == said
    first[0].path.write_bytes(first[0].path.read_bytes()[:-1])
    again = make_sides(source, "mp4", tmp_path)
    assert again[0].first == first[0].first and again[0].path.stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    "listing", ["", "[]", "{}", '{"sides": [{"path": "../../x", "size": 1}], "said": []}']
)
def test_a_damaged_listing_is_made_anew(listing: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv", sound="aac")
    (tmp_path / LISTING).write_text(listing)
    assert [side.path.name for side in make_sides(source, "mp4", tmp_path)] == ["side-1.mp4"]


def test_making_ready_tells_how_far_it_is_and_can_be_stopped(tmp_path: Path, monkeypatch, caplog) -> None:
    source = clips.write_video(tmp_path / "a.mkv", 100, size=(16, 16), audio=1, audio_packets=200)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(sides, "REPORT_SECONDS", -1.0)
    with caplog.at_level("INFO"):
        make_sides(source, "mp4", tmp_path, lambda *done: told.append(done))
    assert len(told) > 3 and told == sorted(told) and told[-1][0] <= told[-1][1] == source.stat().st_size
    assert "preparing sound and subtitles: " in caplog.text
    (tmp_path / LISTING).unlink()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sides(source, "mp4", tmp_path, stop)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mkv"]


def test_a_run_that_ends_before_its_first_segment_keeps_what_was_made_ready(pipe, tmp_path: Path) -> None:
    """And nothing else of it binds: the next one may ask for other settings."""
    source = write(tmp_path / "a.mkv", sound="aac")
    job = VideoJob(source=source, output=tmp_path / "b.mp4", options=ONE_STEP)

    def stop(stage: str, index: int, total: int) -> None:
        if stage != "sound and subtitles":
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        list(run(pipe, job, stop))
    side = tmp_path / "b.mp4.parts" / "side-1.mp4"
    stamp = side.stat().st_mtime_ns
    told = []
    for _ in run(pipe, replace(job, crf=30), lambda *step: told.append(side.stat().st_mtime_ns)):
        pass
    assert set(told) == {stamp}
    assert seen(tmp_path / "b.mp4") == [("video", "h264"), ("audio", "aac")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mkv", "b.mp4"]
