"""Upscale Video, with the tiny checkpoint and clips made here."""

from __future__ import annotations

import io
import itertools
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from node_clips import frames_of, make_clip, pattern
from node_pack import load_pack, part
from PIL import Image

PACK = load_pack()
NODES = PACK.NODE_CLASS_MAPPINGS
LOADER = NODES["StreamDiffVSR_Loader"]
VIDEO = NODES["StreamDiffVSR_UpscaleVideo"]
UPSCALE = NODES["StreamDiffVSR_Upscale"]
SETTINGS = NODES["StreamDiffVSR_Settings"]
job = part(PACK, "nodes.job")
FRAMES = 6


@pytest.fixture(scope="module")
def pipe(checkpoint: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))
        return LOADER().execute(checkpoint.name, "cpu", "float32", "none")[0]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "input" / "ein Film – 上.mp4", FRAMES)


class CancelError(Exception):
    """As ComfyUI's interrupt, a plain exception."""


def upscale(pipe, **inputs) -> Path:
    return Path(VIDEO().execute(pipe, num_inference_steps=1, **inputs)["result"][0])


class FromFile:
    """A VIDEO as ComfyUI's Load Video hands it on."""

    def __init__(self, source, trim=(0.0, 0.0)) -> None:
        self.source, self.trim = source, trim

    def get_stream_source(self):
        return self.source

    def get_active_trim_window(self):
        return self.trim


def test_a_whole_file(pipe, clip: Path) -> None:
    done = VIDEO().execute(
        pipe,
        video_path=str(clip),
        num_inference_steps=1,
        prompt={"1": {}},
        extra_pnginfo={"workflow": {"nodes": []}},
    )
    path = Path(done["result"][0])
    assert path == Path.cwd() / "output" / "stream_diffvsr" / f"{clip.stem}_4x_00001_.mp4"
    frames = frames_of(path)
    assert frames.shape == (FRAMES, 128, 192, 3)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert container.streams.video[0].average_rate == 12
        assert json.loads(container.metadata["prompt"]) == {"1": {}}
        assert json.loads(container.metadata["workflow"]) == {"nodes": []}
    shown = {"filename": path.name, "subfolder": "stream_diffvsr", "type": "output"}
    assert done["ui"]["images"] == [shown] and done["ui"]["animated"] == (True,)
    assert not list(path.parent.glob("*.parts"))


def test_it_shows_the_frames_that_upscale_makes(pipe, clip: Path) -> None:
    settings = SETTINGS().execute(codec="ffv1", pix_fmt="yuv444p", scene_cut="off")[0]
    path = upscale(pipe, video_path=str(clip), settings=settings)
    assert path.suffix == ".mkv"
    images = torch.from_numpy(frames_of(clip)).float() / 255
    expected, _ = UPSCALE().execute(pipe, images, num_inference_steps=1)
    difference = np.abs(frames_of(path).astype(int) - (expected * 255).round().numpy().astype(int))
    assert difference.max() <= 3  # what 8 bits of YUV round away


def test_names_are_numbered_and_nothing_is_overwritten(pipe, clip: Path) -> None:
    first = upscale(pipe, video_path=clip.name)
    content = first.read_bytes()
    second = upscale(pipe, video_path=clip.name)
    named = [upscale(pipe, video_path=clip.name, output_path="my/film.mkv").name for _ in range(2)]
    assert (first.name[-10:], second.name[-10:]) == ("00001_.mp4", "00002_.mp4")
    assert named == ["film.mkv", "film_00001_.mkv"]
    assert first.read_bytes() == content


def test_the_span_is_inclusive(pipe, clip: Path) -> None:
    assert len(frames_of(upscale(pipe, video_path=str(clip), start_frame=2, end_frame=4))) == 3


@pytest.mark.parametrize(
    "trim, count", [((0.0, 0.0), 6), ((0.25, 0.0), 3), ((0.0, 0.25), 3), ((1 / 6, 1 / 6), 2)]
)
def test_a_trimmed_video_is_honoured(pipe, clip: Path, trim, count: int) -> None:
    assert len(frames_of(upscale(pipe, video=FromFile(str(clip), trim)))) == count


def test_a_video_in_memory(pipe, clip: Path) -> None:
    path = upscale(pipe, video=FromFile(io.BytesIO(clip.read_bytes())))
    assert len(frames_of(path)) == FRAMES


def test_a_cancelled_video_in_memory_goes_on(pipe, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, steps = clip.read_bytes(), itertools.count()

    def cancel(*_) -> None:
        if next(steps) > 8:
            raise CancelError

    with monkeypatch.context() as patch, pytest.raises(CancelError):
        patch.setattr(part(PACK, "nodes.host"), "check_interrupt", cancel)
        upscale(pipe, video=FromFile(io.BytesIO(content)))
    (cut,) = Path("output/stream_diffvsr").resolve().glob("*.mp4")
    assert len(frames_of(cut)) < FRAMES
    assert upscale(pipe, video=FromFile(io.BytesIO(content))) == cut
    assert len(frames_of(cut)) == FRAMES


def test_frames_per_batch_never_changes_the_file(pipe, clip: Path) -> None:
    settings = SETTINGS().execute(codec="ffv1")[0]
    paths = [upscale(pipe, video_path=str(clip), frames_per_batch=n, settings=settings) for n in (0, 1, 256)]
    first, *others = [frames_of(path) for path in paths]
    assert all(np.array_equal(first, other) for other in others)


def test_a_cancelled_run_is_playable_and_goes_on(pipe, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def cancel(*_) -> None:
        nonlocal steps
        steps += 1
        if steps > 8:
            raise CancelError

    whole = frames_of(upscale(pipe, video_path=str(clip), output_path="whole.mp4"))
    host = part(PACK, "nodes.host")
    with monkeypatch.context() as patch, pytest.raises(CancelError):
        patch.setattr(host, "check_interrupt", cancel)
        upscale(pipe, video_path=str(clip), output_path="cut.mp4")
    cut = Path("output/cut.mp4").resolve()
    half = frames_of(cut)
    assert 0 < len(half) < FRAMES
    # The encoder looks ahead, so its last frames differ by a little where the file ends early.
    assert np.abs(half.astype(int) - whole[: len(half)]).mean() < 2
    # Another job takes another name, the same one goes on under its own.
    other = upscale(pipe, video_path=str(clip), output_path="cut.mp4", seed=1)
    assert other.name == "cut_00001_.mp4"
    assert upscale(pipe, video_path=str(clip), output_path="cut.mp4") == cut
    assert np.array_equal(frames_of(cut), whole)
    assert not list(cut.parent.glob("*.parts"))


@pytest.mark.parametrize(
    "inputs, said",
    [
        ({}, "either video_path or video; got neither"),
        ({"video_path": "x.mp4", "video": FromFile("x.mp4")}, "got both"),
        ({"video": FromFile("x.mp4", (1.0, 1.0)), "start_frame": 3}, "already trimmed: leave start_frame"),
        ({"video_path": "gone.mp4"}, "gone.mp4"),
    ],
)
def test_what_cannot_be_done_is_said(pipe, inputs: dict, said: str) -> None:
    with pytest.raises(Exception, match="(?s)" + said):
        upscale(pipe, **inputs)


class FromComponents:
    """A VIDEO as Create Video hands it on, or one from a file that was edited."""

    def __init__(self, images: torch.Tensor, audio: dict | None = None, rate=Fraction(30000, 1001)) -> None:
        self.parts = SimpleNamespace(images=images, audio=audio, frame_rate=rate)

    def get_components(self):
        return self.parts

    def has_pending_frame_edits(self) -> bool:
        return True


def test_a_video_of_frames_in_memory_is_upscaled_with_its_sound(pipe) -> None:
    images = torch.rand(4, 16, 24, 3)
    sound = {"waveform": torch.rand(1, 2, 44100) * 2 - 1, "sample_rate": 44100}
    settings = SETTINGS().execute(codec="ffv1", pix_fmt="yuv444p", scene_cut="off")[0]
    path = upscale(pipe, video=FromComponents(images, sound), settings=settings)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    expected, _ = UPSCALE().execute(pipe, images, num_inference_steps=1)
    difference = np.abs(frames_of(path).astype(int) - (expected * 255).round().numpy().astype(int))
    assert difference.max() <= 3  # what 8 bits of YUV round away
    # As far as there is a picture, in 24 bits.
    count = -(-44100 * 4 * 1001 // 30000)
    given = sound["waveform"][0, :, :count].T.reshape(1, -1).numpy()
    assert heard.shape == given.shape and np.abs(heard / 2**31 - given).max() < 2**-22


def test_a_video_of_frames_in_memory_is_written_as_players_take_it_and_goes_on(
    pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, steps = FromComponents(torch.rand(4, 16, 24, 3)), itertools.count()

    def cancel(*_) -> None:
        if next(steps) > 5:
            raise CancelError

    with monkeypatch.context() as patch, pytest.raises(CancelError):
        patch.setattr(part(PACK, "nodes.host"), "check_interrupt", cancel)
        upscale(pipe, video=made)
    (cut,) = Path("output/stream_diffvsr").resolve().glob("*.mp4")
    for file in Path("temp").glob("stream_diffvsr_*"):
        file.unlink()  # as when ComfyUI starts again
    assert upscale(pipe, video=made) == cut
    with av.open(str(cut)) as container:
        assert container.streams.video[0].format.name == "yuv420p"
    assert len(frames_of(cut)) == 4


def test_an_empty_video_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match="there are no images: check the loader's cap and skip"):
        upscale(pipe, video=FromComponents(torch.zeros(0, 16, 24, 3)))


def test_paths_are_checked_before_the_run(clip: Path) -> None:
    assert VIDEO.VALIDATE_INPUTS(str(clip), "") is True
    assert VIDEO.VALIDATE_INPUTS(f'"{clip}" ', None) is True
    for fine in ("a/b.mp4", "a/b.MKV", "a/shot.v2", "my film 1.5", "films/"):
        assert VIDEO.VALIDATE_INPUTS(None, fine) is True


@pytest.mark.parametrize(
    "path, output, said",
    [
        ("gone.mp4", "", "video_path must be .*gone.mp4 does not exist"),
        ("~nobody-here/x.mp4", "", "home folder"),
        ("", "../x.mp4", "outputs must be inside"),
        ("", "x/my.gif", r"output_path must end in one of \.mp4, .*got x/my\.gif"),
        ("", "x/my.AVI", "have no extension"),
        ("", "x/my.m2ts", "have no extension"),
        ("", "x/my.png", "have no extension"),
    ],
)
def test_a_bad_path_is_refused_before_the_run(path: str, output: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VIDEO.VALIDATE_INPUTS(path, output)


def test_webm_takes_its_own_codec(pipe, clip: Path) -> None:
    path = upscale(pipe, video_path=str(clip), output_path="x/my.webm", end_frame=1)
    assert path.name == "my.webm"
    with av.open(str(path)) as container:
        assert "av1" in container.streams.video[0].codec_context.name


def test_errors_of_the_engine_speak_of_widgets(pipe, clip: Path) -> None:
    settings = SETTINGS().execute(codec="prores")[0]
    with pytest.raises(Exception, match="another codec of Settings or another extension for output_path"):
        upscale(pipe, video_path=str(clip), output_path="my.webm", settings=settings)


def test_pictures_of_several_sizes_are_refused_by_name(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "input" / "mixed"
    folder.mkdir(parents=True)
    for index, size in enumerate([(24, 16), (16, 24)]):
        Image.fromarray(pattern(index, *size)).save(folder / f"shot {index}.png")
    with pytest.raises(Exception, match=r"shot 1.png is 16x24, but shot 0.png is 24x16.*give all pictures"):
        upscale(pipe, video_path="mixed")


def test_a_result_that_is_gone_is_made_again(pipe, clip: Path) -> None:
    run = {"video_path": str(clip), "output_path": "a.mp4", "end_frame": 1, "unique_id": "77"}
    before = VIDEO.IS_CHANGED(**run)
    path = upscale(pipe, **run)
    assert VIDEO.IS_CHANGED(**run) == before
    path.unlink()
    after = VIDEO.IS_CHANGED(**run)
    assert after != before
    assert upscale(pipe, **run) == path and path.exists()
    assert VIDEO.IS_CHANGED(**run) == after  # which is kept from now on
    assert VIDEO.IS_CHANGED(**{**run, "unique_id": "78"}) == before


def test_an_edited_source_is_noticed(clip: Path) -> None:
    before = VIDEO.IS_CHANGED(video_path=str(clip), seed=1)
    assert VIDEO.IS_CHANGED(video_path=str(clip), seed=1) == before
    clip.write_bytes(clip.read_bytes() + b"0")
    assert VIDEO.IS_CHANGED(video_path=str(clip)) != before
    assert VIDEO.IS_CHANGED(video_path="") == VIDEO.IS_CHANGED()


def test_a_folder_of_pictures(pipe, tmp_path: Path) -> None:
    """Upscaled in the order of their names, and again when one of them was edited."""
    folder = tmp_path / "input" / "shots"
    folder.mkdir(parents=True)
    for index in range(3):
        Image.fromarray(pattern(index, 24, 16)).save(folder / f"shot {index}.png")
    path = upscale(pipe, video_path="shots", settings=SETTINGS().execute(codec="ffv1")[0])
    assert frames_of(path).shape == (3, 64, 96, 3)
    before = VIDEO.IS_CHANGED(video_path="shots")
    assert VIDEO.IS_CHANGED(video_path="shots") == before
    Image.fromarray(pattern(9, 24, 16)).save(folder / "shot 1.png")
    assert VIDEO.IS_CHANGED(video_path="shots") != before


def test_each_codec_gets_a_container_that_holds_it(pipe, clip: Path) -> None:
    plans = {}
    for codec in SETTINGS.INPUT_TYPES()["optional"]["codec"][0]:
        settings = SETTINGS().execute(codec=codec)[0]
        planned = job.make_job(None, job.Source(clip), settings)
        plans[codec] = planned.output.name, planned.crf
    assert plans == {
        "h264": (".mp4", 18),
        "h265": (".mp4", 18),
        "av1": (".mp4", 18),
        "prores": (".mov", None),
        "ffv1": (".mkv", None),
        "png": (".mov", None),
    }
