"""What messages advise works: each remedy is tried after the message that names it."""

from __future__ import annotations

from pathlib import Path

import av
import clips
import pytest
from PIL import Image
from test_video_sides import SIZE, seen, upscale, write

from stream_diffvsr import VideoError
from stream_diffvsr.media import pictures


@pytest.mark.parametrize(
    ("name", "sound", "said", "codec"),
    [
        ("a.avi", "pcm_u8", "an output .mkv keeps it", "pcm_u8"),
        ("a.mkv", "wavpack", "an output .mkv keeps it", "wavpack"),
        ("a.avi", "adpcm_ms", "an output .mkv has it as FLAC", "flac"),
        ("a.wmv", "wmav2", "an output .mkv has it as FLAC", "flac"),
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
    with pytest.raises(VideoError, match="write to a folder, or give --target"):
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


def test_another_codec_or_suffix(pipe, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match="choose another --codec or suffix"):
        upscale(pipe, source, tmp_path / "b.webm", codec="ffv1")
    assert seen(upscale(pipe, source, tmp_path / "b.mkv", codec="ffv1")) == [("video", "ffv1")]
    output = upscale(pipe, source, tmp_path / "b.webm")
    with av.open(str(output)) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "av1"
    with pytest.raises(VideoError, match="leave --crf away"):
        upscale(pipe, source, tmp_path / "b.mov", codec="prores", crf=3)
    upscale(pipe, source, tmp_path / "b.mov", codec="prores")


def test_another_folder_or_a_new_one(pipe, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match="does not exist: create it, or choose another"):
        upscale(pipe, source, tmp_path / "new" / "b.mp4")
    (tmp_path / "new").mkdir()
    assert len(clips.frames_of(upscale(pipe, source, tmp_path / "new" / "b.mp4"))) == 5


def test_a_bitmap_subtitle_is_left_out_by_no_audio(pipe, tmp_path: Path, caplog) -> None:
    from test_video_faults import bitmaps

    source = bitmaps(tmp_path)
    upscale(pipe, source, tmp_path / "b.mp4", audio=False)
    assert "left out" not in caplog.text
