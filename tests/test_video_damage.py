"""Damaged files: never a crash, never a hang, never a broken output without a word."""

from __future__ import annotations

import os
import random
from fractions import Fraction
from pathlib import Path

import clips
import pytest

from stream_diffvsr import StreamDiffVSRError, UpscaleOptions
from stream_diffvsr.errors import VideoError
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media.containers import ASF, is_joined
from stream_diffvsr.media.read import open_source

DAMAGES = int(os.environ.get("STREAM_DIFFVSR_DAMAGES", "20"))
"""STREAM_DIFFVSR_DAMAGES=200 pytest tests/test_video_damage.py: that many files."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[bytes]:
    """Files of several containers and codecs."""
    folder = tmp_path_factory.mktemp("originals")
    made = [
        clips.write_video(folder / "a.mp4", 12, audio=1),
        clips.write_video(folder / "b.mkv", 12, audio=1, audio_codec="libopus"),
        clips.write_video(folder / "c.avi", 12, codec="mpeg4"),
        clips.write_video(folder / "d.ts", 12),
        clips.write_video(folder / "e.webm", 12, codec="libvpx-vp9"),
    ]
    return [file.read_bytes() for file in made]


def damage(data: bytes, chance: random.Random) -> bytes:
    """Cut off, or with some bits turned over, or with a hole of zeros."""
    kind = chance.choice(["cut", "flip", "hole"])
    if kind == "cut":
        return data[: chance.randrange(1, len(data))]
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(chance.choice([1, 5, 50])):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    else:
        start = chance.randrange(len(changed))
        length = min(chance.randrange(1, 2000), len(changed) - start)
        changed[start : start + length] = bytes(length)
    return bytes(changed)


def test_damaged_files(originals: list[bytes], pipe, tmp_path: Path, caplog) -> None:
    chance = random.Random(3)
    outcomes = {"refused": 0, "done": 0}
    for number in range(DAMAGES):
        source, output = tmp_path / f"{number}.bin", tmp_path / f"{number}.mp4"
        source.write_bytes(damage(originals[number % len(originals)], chance))
        job = VideoJob(
            source=source, output=output, options=UpscaleOptions(num_inference_steps=1), segment_frames=5
        )
        try:
            computed = sum(1 for _ in run(pipe, job))
        except StreamDiffVSRError as error:
            outcomes["refused"] += 1
            assert len(str(error)) > 20
            assert not output.exists(), f"{number}: {error}"
        else:
            outcomes["done"] += 1
            assert len(clips.frames_of(output)) == computed > 0
    assert min(outcomes.values()) > 0, outcomes


def test_damaged_packets_are_skipped_and_counted(pipe, tmp_path: Path, caplog) -> None:
    """A hole in the middle: the frames before and after it are there."""
    source = clips.write_video(tmp_path / "a.avi", 20, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(source.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 700] = bytes(700)
    source.write_bytes(bytes(data))
    job = VideoJob(source=source, output=tmp_path / "b.mp4", options=UpscaleOptions(num_inference_steps=1))
    indices = [step.index for step in run(pipe, job)]
    times = [time for time, _ in clips.frames_of(tmp_path / "b.mp4")]
    assert indices == list(range(len(indices)))
    assert 16 <= len(indices) <= 20
    assert times == sorted(set(times)) and len(times) == len(indices)
    assert times[5] == Fraction(5, 25)
    if len(indices) < 20:
        assert "damaged packets skipped" in caplog.text or "fewer than its index" in caplog.text


@pytest.mark.parametrize(
    ("suffix", "codec"), [("flv", "h264"), ("mp4", "h264"), ("mov", "h264"), ("wmv", "wmv2")]
)
def test_files_put_behind_one_another_are_told(suffix: str, codec: str, tmp_path: Path, caplog) -> None:
    """FFmpeg reads the first alone; of others, as Matroska, it reads all."""
    one = clips.write_video(tmp_path / f"one.{suffix}", 4, codec=codec)
    open_source(one)
    assert "joined files" not in caplog.text
    both = tmp_path / f"both.{suffix}"
    both.write_bytes(2 * one.read_bytes())
    open_source(both)
    assert "joined files" in caplog.text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("mpeg2video", "mp2"), ("h264", "aac")),
        (("h264", "aac"), ("mpeg2video", "mp2")),
        (("mpeg2video", "libmp3lame"), ("h264", "aac")),
    ],
)
def test_another_codec_under_the_same_numbers_is_told(first, second, pipe, tmp_path: Path, caplog) -> None:
    """As where a recording goes over to another channel; FFmpeg keeps the first codec, and shows no error."""
    parts = [
        clips.write_video(
            *(tmp_path / f"{codec}.ts", 60),
            codec=codec,
            audio=1,
            audio_codec=sound,
            ticks=Fraction(1, 25),
        )
        for codec, sound in (first, second)
    ]
    source = tmp_path / "both.ts"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    job = VideoJob(source=source, output=tmp_path / "b.mp4", options=UpscaleOptions(num_inference_steps=1))
    assert 55 <= sum(1 for _ in run(pipe, job)) <= 61
    picture = "damaged packets" if first[0] == "h264" else "packets without a picture"
    assert f"{picture} skipped" in caplog.text
    assert "cannot be decoded and are left out" in caplog.text


@pytest.mark.parametrize("form", ["asf", "mov,mp4,m4a,3gp,3g2,mj2"])
def test_a_size_that_no_file_has_ends_the_search(form: str, tmp_path: Path) -> None:
    size = b"\xff" * 8
    head = ASF + size if form == "asf" else b"\0\0\0\1free" + size
    (tmp_path / "a").write_bytes(head.ljust(64, b"\0"))
    assert not is_joined(tmp_path / "a", form)


def test_a_source_that_is_taken_away_is_named_and_nothing_is_lost(pipe, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "a.mp4", 6, audio=1)
    job = VideoJob(
        source=source,
        output=tmp_path / "b.mp4",
        options=UpscaleOptions(num_inference_steps=1),
        segment_frames=2,
    )
    with pytest.raises(VideoError, match=r"a\.mp4 does not exist"):
        for step in run(pipe, job):
            if step.index == 5:
                source.rename(tmp_path / "c.mp4")
    (tmp_path / "c.mp4").rename(source)
    assert not list(run(pipe, job))
    assert len(clips.frames_of(tmp_path / "b.mp4")) == 6 and clips.packets_of(tmp_path / "b.mp4", "audio")
