"""Files of many kinds through the whole job: frames, times, tags and sound come out as they went in."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest

from stream_diffvsr import UpscaleOptions
from stream_diffvsr.jobs.run import VideoJob, run

ONE_STEP = UpscaleOptions(num_inference_steps=1)
UNEVEN = [0, 300, 1800, 1900, 4000, 4700, 9000, 9100]


def upscale(pipe, source: Path, output: Path, **settings: Any) -> Path:
    for _ in run(pipe, VideoJob(source=source, output=output, options=ONE_STEP, **settings)):
        pass
    return output


@dataclass(frozen=True)
class Case:
    """A file to make, and how it is written again."""

    source: str = "in.mp4"
    output: str = "out.mp4"
    make: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"
    tags: tuple[int, int, int, int] = (6, 1, 6, 6)
    turned: bool = False


CASES = {
    "plain": Case(),
    "vfr": Case(make={"times": UNEVEN}),
    "vfr mkv": Case("in.mkv", "out.mkv", make={"times": UNEVEN}),
    "vfr across containers": Case("in.mkv", "out.mp4", make={"times": UNEVEN}),
    "rotated 90": Case(make={"rotation": 90}, turned=True),
    "rotated 180": Case(make={"rotation": 180}),
    "rotated 270": Case(make={"rotation": 270}, turned=True),
    "odd size 444": Case(make={"size": (33, 25), "pix_fmt": "yuv444p"}),
    "odd size rgb": Case(
        "in.mkv", make={"size": (33, 25), "codec": "ffv1", "pix_fmt": "bgr0"}, tags=(1, 1, 1, 1)
    ),
    "422": Case(make={"pix_fmt": "yuv422p"}),
    "grey": Case("in.mkv", make={"codec": "ffv1", "pix_fmt": "gray"}, tags=(6, 2, 6, 6)),
    "10 bit": Case(make={"pix_fmt": "yuv420p10le"}, pix_fmt="yuv420p10le"),
    "10 bit h265": Case(make={"pix_fmt": "yuv420p10le"}, job={"codec": "h265"}, pix_fmt="yuv420p10le"),
    "hdr pq": Case(
        make={"pix_fmt": "yuv420p10le", "colour": (9, 1, 9, 16)}, pix_fmt="yuv420p10le", tags=(9, 1, 9, 16)
    ),
    "bt709": Case(make={"colour": (1, 1, 1, 1)}, tags=(1, 1, 1, 1)),
    "full range": Case(make={"colour": (6, 2, 6, 6)}, tags=(6, 2, 6, 6)),
    "two sounds": Case(make={"audio": 2}),
    "sound and text": Case(make={"audio": 1, "subtitles": True}),
    "sound and text mkv": Case(
        "in.mkv", "out.mkv", make={"audio": 2, "audio_codec": "libopus", "subtitles": True}
    ),
    "sound longer than video": Case(make={"audio": 1, "audio_packets": 60}),
    "one frame": Case(make={"frames": 1}),
    "b-frames": Case(make={"frames": 20, "options": {"bf": "4", "b-pyramid": "normal"}}),
    "non-zero start": Case(make={"times": [64000 + 512 * i for i in range(8)]}),
    "samples not square": Case(make={"aspect": Fraction(4, 3)}),
    "prores": Case("in.mp4", "out.mov", job={"codec": "prores"}, pix_fmt="yuv422p10le"),
    "ffv1": Case("in.mp4", "out.mkv", job={"codec": "ffv1"}),
    "png": Case("in.mp4", "out.mov", job={"codec": "png"}, pix_fmt="rgb24", tags=(0, 2, 6, 6)),
    "av1": Case("in.mp4", "out.mp4", job={"codec": "av1"}),
    "webm": Case("in.mkv", "out.webm", make={"audio": 1, "audio_codec": "libopus"}),
}


@pytest.mark.parametrize("name", CASES)
def test_everything_around_the_picture_is_kept(name: str, pipe, tmp_path: Path) -> None:
    case = CASES[name]
    source = clips.write_video(tmp_path / case.source, **case.make)
    output = upscale(pipe, source, tmp_path / case.output, segment_frames=3, **case.job)
    assert not list(tmp_path.glob("*.parts")), "work files were left behind"
    with av.open(str(source)) as before, av.open(str(output)) as after:
        first, second = before.streams.video[0], after.streams.video[0]
        width, height = (first.height, first.width) if case.turned else (first.width, first.height)
        assert (second.width, second.height) == (4 * width, 4 * height)
        # Older FFmpeg has another name for 4:2:0 of full range, and does not mark ProRes as limited.
        assert second.codec_context.pix_fmt.replace("yuvj", "yuv") == case.pix_fmt
        assert tags_of(second) in (case.tags, (case.tags[0], 0, *case.tags[2:]) if name == "prores" else ())
        aspect = first.sample_aspect_ratio or 1
        assert (second.sample_aspect_ratio or 1) == aspect
        if not case.make.get("times"):
            assert second.average_rate == first.average_rate
    wanted, times = ([time for time, _ in clips.frames_of(file)] for file in (source, output))
    coarse = case.output.endswith(("mkv", "webm"))
    # Matroska counts in milliseconds, and shifts all streams where one would begin before zero.
    late = times[0] - wanted[0] if coarse else 0
    assert [float(time - late) for time in times] == pytest.approx(
        list(map(float, wanted)), abs=6e-4 * coarse
    )
    assert clips.packets_of(output, "audio") == clips.packets_of(source, "audio")
    assert clips.packets_of(output, "subtitle") == clips.packets_of(source, "subtitle")


def tags_of(stream: Any) -> tuple[int, ...]:
    """Matrix, range, primaries and transfer, of the stream or else of its first frame."""
    context = stream.codec_context
    return tuple(
        int(getattr(context, name)) for name in ("colorspace", "color_range", "color_primaries", "color_trc")
    )


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_is_baked_in_the_right_way_round(turn: int, pipe, tmp_path: Path) -> None:
    """The picture shown is the coded one turned anticlockwise by what PyAV calls its rotation."""
    source = clips.write_video(tmp_path / "in.mp4", 1, rotation=turn, options={"crf": "1"}, pix_fmt="yuv444p")
    with av.open(str(source)) as container:
        coded = next(container.decode(video=0))
        shown = np.rot90(coded.to_ndarray(format="rgb24"), round(coded.rotation / 90))
    from stream_diffvsr.media.read import Span, VideoSource

    frame = next(VideoSource(source).frames(Span()))
    got = (frame.rgb[0].movedim(0, -1).numpy() * 255).round()
    assert got.shape == shown.shape
    assert np.abs(got - shown).mean() < 2


@pytest.mark.parametrize("output", ["out.mkv", "out.webm", "out.mov"])
def test_what_a_container_cannot_hold_is_converted_and_said(
    output: str, pipe, tmp_path: Path, caplog
) -> None:
    source = clips.write_video(tmp_path / "in.mp4", audio=1, subtitles=True)
    result = upscale(pipe, source, tmp_path / output)
    with av.open(str(result)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio", "subtitle"]
        names = [stream.codec_context.name for stream in container.streams][1:]
        sound = sum(frame.samples for frame in container.decode(audio=0))
    wanted = {"out.mkv": ["aac", "srt"], "out.webm": ["opus", "webvtt"], "out.mov": ["aac", "mov_text"]}[
        output
    ]
    assert names == wanted
    assert sound == pytest.approx(16 * 1024, abs=2100)
    assert ("is converted" in caplog.text) == (output != "out.mov")
    text = b"".join(clips.packets_of(result, "subtitle")[0])
    assert b"hello there" in text and b"and goodbye" in text


def test_words_and_chapters_are_kept(pipe, tmp_path: Path) -> None:
    chapters = [
        {
            "id": i,
            "start": 160 * i,
            "end": 160 * (i + 1),
            "time_base": Fraction(1, 1000),
            "metadata": {"title": name},
        }
        for i, name in enumerate(("one", "two"))
    ]
    source = clips.write_video(
        tmp_path / "in.mp4", metadata={"title": "A film", "workflow": "{}"}, chapters=chapters
    )
    output = upscale(pipe, source, tmp_path / "out.mp4", metadata={"comment": "ours"})
    with av.open(str(output)) as container:
        words = container.metadata
        titles = [(float(c["start"] * c["time_base"]), c["metadata"]["title"]) for c in container.chapters()]
    assert {key: words.get(key) for key in ("title", "workflow", "comment")} == {
        "title": "A film",
        "workflow": "{}",
        "comment": "ours",
    }
    assert titles == [(0.0, "one"), (0.16, "two")]


def test_a_span_starts_at_zero_with_its_own_sound(pipe, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 10, audio=1, audio_packets=30)
    output = upscale(pipe, source, tmp_path / "out.mp4", start=3, end="0.28s")
    assert [time for time, _ in clips.frames_of(output)] == [Fraction(i, 25) for i in range(5)]
    kept = clips.packets_of(output, "audio")[0]
    everything = clips.packets_of(source, "audio")[0]
    start = everything.index(kept[0])
    assert kept == everything[start : start + len(kept)]
    assert len(kept) == pytest.approx(0.2 * 48000 / 1024, abs=1)


def test_the_noise_of_a_span_is_that_of_the_source(pipe, tmp_path: Path) -> None:
    """Frame 3 alone, without a past, equals frame 3 of a run in which it begins a scene."""
    source = clips.write_video(tmp_path / "in.mp4", 5)
    cuts = tmp_path / "cuts.csv"
    cuts.write_text("3\n")
    whole = upscale(pipe, source, tmp_path / "a.mkv", codec="ffv1", scene_cut=str(cuts))
    part = upscale(pipe, source, tmp_path / "b.mkv", codec="ffv1", start=3, scene_cut="off")
    for (_, one), (_, other) in zip(clips.frames_of(whole)[3:], clips.frames_of(part), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"target": (100, 50)}, (100, 50)),
        ({"short_edge": 60}, (80, 60)),
        ({"scale": 2.0}, (64, 48)),
        ({"pre_scale": 0.5}, (64, 48)),
        ({"pre_scale": 0.5, "scale": 4.0}, (128, 96)),
    ],
)
def test_sizes(settings: dict[str, Any], size: tuple[int, int], pipe, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 2)
    output = upscale(pipe, source, tmp_path / "out.mp4", **settings)
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == size


def test_compare_is_bicubic_left_and_the_result_right(pipe, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 4)
    output = upscale(
        pipe, source, tmp_path / "out.mkv", codec="ffv1", compare=tmp_path / "compare.mkv", segment_frames=3
    )
    ours, both = clips.frames_of(output), clips.frames_of(tmp_path / "compare.mkv")
    assert len(both) == 4
    for (_, result), (_, split) in zip(ours, both, strict=True):
        assert np.array_equal(result[:, 66:], split[:, 66:])
        assert not np.array_equal(result[:, :62], split[:, :62])


def test_animated_pictures_and_folders(pipe, tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.fromarray(clips.picture(i)) for i in range(4)]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:], duration=[100, 50, 200, 100])
    output = upscale(pipe, tmp_path / "in.gif", tmp_path / "gif.mp4")
    assert [float(time) for time, _ in clips.frames_of(output)] == pytest.approx([0, 0.1, 0.15, 0.35])
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(frames):
        frame.save(folder / f"frame{[1, 2, 10, 11][index]}.png")
    output = upscale(pipe, folder, tmp_path / "folder.mp4", rate=Fraction(10))
    assert [float(time) for time, _ in clips.frames_of(output)] == pytest.approx([0, 0.1, 0.2, 0.3])
    output = upscale(pipe, folder, tmp_path / "pictures")
    assert sorted(file.name for file in output.iterdir()) == [
        "frame1.png",
        "frame10.png",
        "frame11.png",
        "frame2.png",
    ]
    assert {Image.open(file).size for file in output.iterdir()} == {(128, 96)}
    output = upscale(pipe, clips.write_video(tmp_path / "in.mp4", 3), tmp_path / "numbered", codec=None)
    assert sorted(file.name for file in output.iterdir()) == [f"{i:08}.png" for i in range(3)]
