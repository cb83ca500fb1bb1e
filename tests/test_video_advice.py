"""What messages advise works: each remedy is tried after the message that names it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import re
import sys
import types
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from PIL import Image
from test_media_kept import cover_of, with_cover
from test_video_faults import bitmaps, frames
from test_video_sides import ONE_STEP, SIZE, seen, upscale, write

import stream_diffvsr
from stream_diffvsr import VideoError
from stream_diffvsr.cli import main as command
from stream_diffvsr.cli import serve, train
from stream_diffvsr.cli.many import workers_from_flags
from stream_diffvsr.errors import IncompatibleInputError
from stream_diffvsr.jobs.cluster import Devices, check_same
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media import pictures
from stream_diffvsr.media.tracks import Window, copy_chapters
from stream_diffvsr.media.ways import RefusedError, Translated
from stream_diffvsr.service.settings import Settings
from stream_diffvsr.training.options import TrainOptions


@pytest.mark.parametrize(
    ("name", "sound", "said", "codec"),
    [
        ("a.avi", "pcm_u8", "use an .mkv output to keep it", "pcm_u8"),
        ("a.mkv", "wavpack", "use an .mkv output to keep it", "wavpack"),
        ("a.avi", "adpcm_ms", "use an .mkv output to store it as FLAC", "flac"),
        ("a.wmv", "wmav2", "use an .mkv output to store it as FLAC", "flac"),
    ],
)
def test_another_container_for_the_sound(name, sound, said, codec, pipe, tmp_path: Path, caplog) -> None:
    source = write(tmp_path / name, sound=sound)
    assert seen(upscale(pipe, source, tmp_path / "b.mp4"))[1] == ("audio", "aac")
    assert said in caplog.text
    assert seen(upscale(pipe, source, tmp_path / "b.mkv"))[1] == ("audio", codec)
    caplog.clear()
    assert [kind for kind, _ in seen(upscale(pipe, source, tmp_path / "c.mp4", audio=False))] == ["video"]
    assert "converted" not in caplog.text


def mixed(folder: Path, *files: tuple[str, tuple[int, int]]) -> Path:
    folder.mkdir()
    for name, size in files:
        Image.fromarray(clips.picture(0, *size)).save(folder / name)
    return folder


def test_pictures_of_several_sizes_with_a_target(pipe, tmp_path: Path) -> None:
    folder = mixed(tmp_path / "in", ("1.png", (16, 16)), ("2.png", (24, 16)))
    with pytest.raises(VideoError, match="write to a folder, or set --target"):
        upscale(pipe, folder, tmp_path / "b.mp4")
    frames = clips.frames_of(upscale(pipe, folder, tmp_path / "b.mp4", target=(64, 48)))
    assert [picture.shape[:2] for _, picture in frames] == [(48, 64)] * 2
    assert len(list(upscale(pipe, folder, tmp_path / "out").iterdir())) == 2


def test_two_pictures_of_one_name_are_renamed(pipe, tmp_path: Path) -> None:
    folder = mixed(tmp_path / "in", ("a.gif", SIZE), ("a.png", SIZE), ("a.gif.png", SIZE))
    with pytest.raises(VideoError, match=r"both become a\.gif\.png: rename one of them"):
        upscale(pipe, folder, tmp_path / "out")
    (folder / "a.gif.png").rename(folder / "b.png")
    made = upscale(pipe, folder, tmp_path / "out")
    assert sorted(file.name for file in made.iterdir()) == ["a.gif.png", "a.png", "b.png"]


def test_a_smaller_picture(pipe, tmp_path: Path, monkeypatch) -> None:
    folder = mixed(tmp_path / "in", ("huge.png", (24, 16)), ("small.png", (12, 12)))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
        with pytest.raises(VideoError, match="or make it smaller"):
            upscale(pipe, folder / "huge.png", tmp_path / "b.png")
        output = upscale(pipe, folder / "small.png", tmp_path / "b.png")
    assert pictures.size_of(output) == (48, 48)


def test_a_picture_cut_into_parts(pipe, tmp_path: Path, monkeypatch) -> None:
    folder = mixed(tmp_path / "in", ("huge.png", (24, 16)))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
        with pytest.raises(VideoError, match="cut it into parts"):
            upscale(pipe, folder / "huge.png", tmp_path / "b.png")
    (folder / "huge.png").unlink()
    whole = Image.fromarray(clips.picture(0, 24, 16))
    for left in (0, 12):
        whole.crop((left, 0, left + 12, 16)).save(folder / f"{left}.png")
    parts = sorted(upscale(pipe, folder, tmp_path / "out").iterdir())
    assert [part.name for part in parts] == ["0.png", "12.png"]
    assert all(pictures.size_of(part) == (48, 64) for part in parts)


def test_heic_with_the_package_or_as_jpeg(pipe, tmp_path: Path, monkeypatch) -> None:
    """Of several pictures in a file the one that it names first is meant."""
    heif = pytest.importorskip("pillow_heif")
    made, names = heif.HeifFile(), Image.Exif()
    names[0x10F] = "ACME"
    for turned in (0, 180):
        picture = Image.fromarray(clips.picture(0, 64, 48)).rotate(turned)
        picture.info["exif"] = names.tobytes()
        made.add_from_pillow(picture)
    made.save(tmp_path / "a.heic", quality=-1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(VideoError, match="pip install pillow-heif, or save it as JPEG"):
            upscale(pipe, tmp_path / "a.heic", tmp_path / "a.png")
    with Image.open(upscale(pipe, tmp_path / "a.heic", tmp_path / "a.png")) as picture:
        assert picture.size == (256, 192) and picture.getexif()[0x10F] == "ACME"
        found = np.asarray(picture.resize((64, 48), Image.Resampling.BOX)).astype(int)
    Image.fromarray(clips.picture(0, 64, 48)).save(tmp_path / "b.jpg", quality=98)
    with Image.open(upscale(pipe, tmp_path / "b.jpg", tmp_path / "b.png")) as picture:
        jpeg = np.asarray(picture.resize((64, 48), Image.Resampling.BOX)).astype(int)
    assert np.abs(found - jpeg).mean() < 8 < np.abs(found - jpeg[::-1, ::-1]).mean()


def test_a_pipe_saved_as_a_file(pipe, tmp_path: Path) -> None:
    os = pytest.importorskip("os")
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "in.mkv")
    with pytest.raises(VideoError, match="save it as a file first"):
        upscale(pipe, tmp_path / "in.mkv", tmp_path / "b.mp4")
    (tmp_path / "in.mkv").unlink()
    assert len(clips.frames_of(upscale(pipe, write(tmp_path / "in.mkv"), tmp_path / "b.mp4"))) == 5


def test_frames_of_another_size_by_themselves(pipe, tmp_path: Path) -> None:
    for name, size in (("a", (16, 16)), ("b", (24, 16))):
        clips.write_video(tmp_path / f"{name}.h264", 3, size=size)
    with (tmp_path / "c.h264").open("wb") as both:
        for name in "ab":
            both.write((tmp_path / f"{name}.h264").read_bytes())
    with pytest.raises(VideoError, match=r"with --start 3 and another output"):
        upscale(pipe, tmp_path / "c.h264", tmp_path / "c.mp4")
    (tmp_path / "rest").mkdir()
    rest = clips.frames_of(upscale(pipe, tmp_path / "c.h264", tmp_path / "rest" / "c.mp4", start="3"))
    assert [picture.shape for _, picture in rest] == [(64, 96, 3)] * 3


def test_waiting_for_another_run_or_another_output(pipe, tmp_path: Path) -> None:
    source, job = write(tmp_path / "a.mkv"), {"options": ONE_STEP, "output": tmp_path / "b.mp4"}
    with contextlib.closing(run(pipe, VideoJob(source=source, **job))) as other:
        next(other)
        with pytest.raises(VideoError, match="wait for it, or choose another output"):
            upscale(pipe, source, tmp_path / "b.mp4")
        (tmp_path / "new").mkdir()
        upscale(pipe, source, tmp_path / "new" / "b.mp4")
        for _ in other:
            pass
    with pytest.raises(VideoError, match="choose another output with -o, or set --overwrite"):
        upscale(pipe, source, tmp_path / "b.mp4")
    upscale(pipe, source, tmp_path / "b.mp4", overwrite=True)


@pytest.mark.parametrize(
    ("codec", "settings", "remedy"),
    [
        ("h264", {"target": (17_000, 64)}, {"codec": "ffv1"}),
        ("h265", {"target": (64, 8)}, {"target": (64, 64)}),
        ("h265", {"target": (48, 64)}, {"target": (64, 64)}),
    ],
)
def test_another_setting_where_an_encoder_refuses(codec, settings, remedy, pipe, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match="choose another --codec or --target"):
        upscale(pipe, source, tmp_path / "b.mkv", codec=codec, **settings)
    upscale(pipe, source, tmp_path / "b.mkv", **{"codec": codec, **settings, **remedy})


def filtered(source: Path, path: Path, *filters: tuple[str, str | None]) -> Path:
    """A video after filters of FFmpeg."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        graph = av.filter.Graph()
        steps = [graph.add_buffer(template=given.streams.video[0])]
        steps += [graph.add(*each) for each in (*filters, ("buffersink", None))]
        for first, second in pairwise(steps):
            first.link_to(second)
        graph.configure()
        for frame in [*given.decode(video=0), None]:
            graph.push(frame)
            with contextlib.suppress(av.BlockingIOError, av.EOFError):
                while True:
                    made = graph.pull()
                    made.pict_type, made.pts, made.time_base = 0, None, Fraction(1, 25)
                    out.mux(video.encode(made))
        out.mux(video.encode(None))
    return path


def test_colours_that_were_converted(pipe, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "a.mp4", 2, size=(32, 32), colour=(8, 1, 1, 1))
    with pytest.raises(VideoError, match=r"uses colour matrix 8 .*: convert it first"):
        upscale(pipe, source, tmp_path / "b.mp4")
    converted = filtered(source, tmp_path / "c.mkv", ("colorspace", "ispace=ycgco:all=bt709"))
    assert len(clips.frames_of(upscale(pipe, converted, tmp_path / "b.mp4"))) == 2


def test_a_film_that_was_deinterlaced(pipe, tmp_path: Path, caplog) -> None:
    source = clips.write_video(tmp_path / "a.mkv", 4, size=(32, 32), options={"x264-params": "tff=1"})
    upscale(pipe, source, tmp_path / "b.mp4")
    assert "is interlaced: deinterlace it first" in caplog.text
    filtered(source, tmp_path / "c.mkv", ("bwdif", None))
    caplog.clear()
    upscale(pipe, tmp_path / "c.mkv", tmp_path / "d.mp4")
    assert "interlaced" not in caplog.text


def test_another_codec_or_suffix(pipe, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match="choose another --codec or suffix"):
        upscale(pipe, source, tmp_path / "b.webm", codec="ffv1")
    assert seen(upscale(pipe, source, tmp_path / "b.mkv", codec="ffv1")) == [("video", "ffv1")]
    output = upscale(pipe, source, tmp_path / "b.webm")
    with av.open(str(output)) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "av1"
    with pytest.raises(VideoError, match="omit --crf"):
        upscale(pipe, source, tmp_path / "b.mov", codec="prores", crf=3)
    upscale(pipe, source, tmp_path / "b.mov", codec="prores")


def test_another_folder_or_a_new_one(pipe, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match="does not exist: create it, or choose another"):
        upscale(pipe, source, tmp_path / "new" / "b.mp4")
    (tmp_path / "new").mkdir()
    assert len(clips.frames_of(upscale(pipe, source, tmp_path / "new" / "b.mp4"))) == 5


def test_a_bitmap_subtitle_is_left_out_by_no_audio(pipe, tmp_path: Path, caplog) -> None:
    source = bitmaps(tmp_path)
    upscale(pipe, source, tmp_path / "b.mp4", audio=False)
    assert "left out" not in caplog.text


def test_a_target_with_square_pixels(pipe, tmp_path: Path, caplog) -> None:
    """AV1 has no word for the shape of pixels, and Matroska is not told it."""
    source = clips.write_video(tmp_path / "a.mp4", 1, size=(36, 28), aspect=Fraction(4, 3))
    upscale(pipe, source, tmp_path / "b.webm")
    assert "b.webm will be displayed as 144x112 instead of 192x112" in caplog.text
    assert "--target 192x112 makes them square" in caplog.text
    caplog.clear()
    with av.open(str(upscale(pipe, source, tmp_path / "c.webm", target=(192, 112)))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.sample_aspect_ratio or 1) == (192, 112, 1)
    upscale(pipe, source, tmp_path / "d.mkv")
    assert "will be displayed" not in caplog.text


def test_a_source_that_was_still_being_written(pipe, tmp_path: Path, caplog) -> None:
    whole = frames(tmp_path / "whole.ts", "mpeg2video", count=50, size=(64, 64)).read_bytes()
    source, output = tmp_path / "a.ts", tmp_path / "b.mp4"
    source.write_bytes(whole[: len(whole) // 2])
    with contextlib.closing(run(pipe, VideoJob(source=source, output=output, options=ONE_STEP))) as steps:
        for _ in steps:
            source.write_bytes(whole)
    assert (
        "it was still being written" in caplog.text
        and "run the job again when the file is complete" in caplog.text
    )
    caplog.clear()
    assert len(clips.frames_of(upscale(pipe, source, output, overwrite=True))) == 50
    assert "being written" not in caplog.text


def test_samples_of_sixteen_bits(pipe, tmp_path: Path) -> None:
    values = np.linspace(0, 1, 16 * 16, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values, "F").save(tmp_path / "a.tif")
    with pytest.raises(VideoError, match="samples is unknown; convert it to 16 bits"):
        upscale(pipe, tmp_path / "a.tif", tmp_path / "b.tif")
    Image.fromarray((values * 65535).astype(np.uint16)).save(tmp_path / "a.tif")
    assert pictures.size_of(upscale(pipe, tmp_path / "a.tif", tmp_path / "b.tif")) == (64, 64)


def test_even_sides_and_a_format_that_is_listed(pipe, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match=r"yuv420p requires even dimensions, .*: change the target size"):
        upscale(pipe, source, tmp_path / "b.mp4", target=(101, 51))
    upscale(pipe, source, tmp_path / "b.mp4", target=(102, 52))
    with pytest.raises(VideoError, match=r"does not support the pixel format 'yuv411p' here; use .*yuv444p,"):
        upscale(pipe, source, tmp_path / "c.mp4", pix_fmt="yuv411p")
    upscale(pipe, source, tmp_path / "c.mp4", pix_fmt="yuv444p")


def test_a_cover_beside_a_word_that_mp4_does_not_know(pipe, tmp_path: Path, caplog) -> None:
    source = with_cover(tmp_path / "a.mkv")
    job = {"metadata": {"mood": "calm"}}
    upscale(pipe, source, tmp_path / "b.mp4", **job)
    assert "cover picture is left out: mp4 cannot store one together with mood, but .mkv can" in caplog.text
    upscale(pipe, source, tmp_path / "b.mkv", **job)
    assert cover_of(tmp_path / "b.mp4") is None and cover_of(tmp_path / "b.mkv") is not None


def test_a_newer_av(tmp_path: Path, caplog) -> None:
    """What an older one cannot do, this one does."""
    chapter = {"id": 1, "start": 0, "end": 100, "time_base": Fraction(1, 1000), "metadata": {"title": "one"}}
    source = clips.write_video(tmp_path / "a.mp4", 5, subtitles=True, chapters=[chapter])
    with av.open(str(source)) as given, av.open(str(tmp_path / "b.webm"), "w") as out:
        clips.needs(out, "add_mux_stream")
        text = given.streams.subtitles[0]
        older = types.SimpleNamespace(format=out.format)
        with pytest.raises(RefusedError, match="update the av package"):
            Translated(older, text)
        with caplog.at_level("INFO"):
            copy_chapters(older, given, Window())
        assert "update the av package" in caplog.text
        assert Translated(out, text).name == "webvtt"
        copy_chapters(out, given, Window())
        assert len(out.chapters()) == 1


def named_in_messages(pattern: str) -> set[str]:
    """What the texts of the package name, its own descriptions of functions among them."""
    found: set[str] = set()
    for file in Path(stream_diffvsr.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(pattern, node.value))
    return found


def test_options_commands_and_extras_that_messages_name(capsys) -> None:
    known = {"--head", "--worker", "--version"}  # of `ray start`, of a program of our own, and of all
    for name in command.COMMANDS:
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    assert named_in_messages(r"(?<![\w-])--[a-z][a-z0-9-]+") <= known
    assert named_in_messages(r"'stream-diffvsr ([a-z]+)") <= set(command.COMMANDS)
    about = importlib.metadata.metadata("stream-diffvsr")
    extras = named_in_messages(r"stream-diffvsr\[([a-z0-9]+)\]")
    assert extras >= {"ray", "s3", "service"} and extras <= set(about.get_all("Provides-Extra", []))
    brought = [each for each in about.get_all("Requires-Dist", []) if 'extra == "service"' in each]
    for module in serve.NEEDED:
        assert any(each.startswith(module.replace("_", "-")) for each in brought), module


def test_flags_for_several_workers() -> None:
    def workers(*flags: str) -> Devices | None:
        return workers_from_flags(command.parse(["upscale", "a.mp4", *flags]))

    for flags, said in (
        (["--split-scenes", "5"], "--split-scenes needs --devices or --ray"),
        (["--preview", "1", "--devices", "cpu"], "--preview does not work with --devices or --ray"),
        (["--ray", "auto", "--devices", "all"], "--devices can only be cpu:N"),
    ):
        with pytest.raises(IncompatibleInputError, match=said):
            workers(*flags)
    for flags in (["--devices", "cpu:2"], ["--ray", "auto"]):
        assert workers("--split-scenes", "5", *flags) is not None
    assert workers("--preview", "1") is None
    remedied = workers("--ray", "auto", "--devices", "cpu:2"), workers("--ray", "auto", "--device", "cuda")
    assert [each and each.kind for each in remedied] == ["cpu", "cuda"]


def test_machines_with_equal_packages() -> None:
    facts = {
        "machine": "a",
        "version": "1",
        "torch": "2",
        "device": "cpu",
        "threads": 1,
        "info": {"model": "m"},
    }
    with pytest.raises(VideoError, match="a has torch 2, but b has 3: all workers must match"):
        check_same({"1": facts, "2": {**facts, "machine": "b", "torch": "3"}})
    check_same({"1": facts, "2": {**facts, "machine": "b"}})


def test_a_server_with_a_token() -> None:
    with pytest.raises(IncompatibleInputError, match="needs a token: set --token"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", token="a long word").host == "0.0.0.0"


def test_another_output_or_resume_for_training(tmp_path: Path) -> None:
    def output(name: str, resume: bool = False) -> Path:
        args = argparse.Namespace(output=tmp_path / name, resume=resume, clips=[tmp_path])
        return train.output_of(args, TrainOptions())

    train.run_folder(tmp_path / "begun.safetensors").mkdir()
    with pytest.raises(IncompatibleInputError, match="add --resume, or choose a new --output"):
        output("begun")
    assert output("begun", resume=True).name == "begun.safetensors"
    with pytest.raises(IncompatibleInputError, match="check --output, or omit --resume"):
        output("new", resume=True)
    (tmp_path / "done.safetensors").touch()
    with pytest.raises(IncompatibleInputError, match="exists: choose a new --output"):
        output("done")
    assert output("new").name == "new.safetensors"
