"""Scene cuts: the measure, the rule, the lists."""

from __future__ import annotations

from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, VideoError, from_pixels
from stream_diffvsr.jobs import scenes
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media.read import VideoSource, open_source
from stream_diffvsr.media.span import Span

ONE_STEP = UpscaleOptions(num_inference_steps=1)


def two_scenes(index: int, width: int, height: int) -> np.ndarray:
    """Frame 4 begins another scene: inverted, and mirrored."""
    picture = clips.picture(index, width, height)
    return picture if index < 4 else 255 - picture[::-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return clips.write_video(tmp_path_factory.mktemp("scenes") / "in.mp4", 7, draw=two_scenes)


@given(st.integers(0, 2**32 - 1))
def test_the_measure_is_opencvs(seed: int) -> None:
    """Mean difference of OpenCV's 8-bit HSV, as PySceneDetect's content detector takes it."""
    cv2 = pytest.importorskip("cv2")
    generator = np.random.default_rng(seed)
    before, now = generator.integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    one, other = (cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).astype(int) for frame in (before, now))
    wanted = np.abs(one - other).mean()
    lq = [from_pixels(torch.from_numpy(f).movedim(-1, 0)[None].float() / 255) for f in (before, now)]
    looks = [scenes.SceneCut().summary(each) for each in lq]
    assert scenes.difference(*looks) == pytest.approx(wanted, abs=0.35)


@pytest.mark.parametrize("rotation", [0, 90, 180])
@pytest.mark.parametrize("size", [(526, 20), (24, 790), (24, 16)])
def test_reading_ahead_sees_what_a_run_sees(size: tuple[int, int], rotation: int, tmp_path: Path) -> None:
    """Bit for bit, from a part of the pixels."""
    (tmp_path / "pictures").mkdir()
    for index in range(2):
        Image.fromarray(clips.picture(index, *size)).save(tmp_path / "pictures" / f"{index}.png")
    video = clips.write_video(tmp_path / "in.mp4", 2, size=size, rotation=rotation)
    for source in (open_source(video), open_source(tmp_path / "pictures")):
        for frame in source.frames(Span()):
            assert frame.size == frame.rgb.shape[2:]
            thinned = frame.thinned(scenes.thinning(*frame.size))
            assert max(thinned.shape) >= min(256, max(size))
            assert torch.equal(
                scenes.hsv(from_pixels(thinned)), scenes.SceneCut().summary(from_pixels(frame.rgb))
            )


def test_equal_frames_differ_by_nothing() -> None:
    look = scenes.hsv(torch.rand(1, 3, 8, 8) * 2 - 1)
    assert scenes.difference(look, look) == 0


def test_a_difference_that_reaches_the_threshold_is_a_cut() -> None:
    first, second = (scenes.hsv(torch.rand(1, 3, 8, 8) * 2 - 1) for _ in range(2))
    apart = scenes.difference(first, second)
    assert scenes.SceneCut(apart).between(1, first, second)
    assert not scenes.SceneCut(apart + 1e-6).between(1, first, second)


def test_a_frame_after_a_cut_is_as_with_an_empty_state(source, guided) -> None:
    """And the frame index, and with it the noise, goes on."""
    steps = list(run_frames(source, guided, "auto"))
    assert [step.cut for step in steps] == [False] * 4 + [True] + [False] * 2
    frame = list(VideoSource(source).frames(Span()))[4]
    alone = guided.process_frame(from_pixels(frame.rgb), StreamDiffVSRState(frame_index=4), ONE_STEP)
    from stream_diffvsr import to_pixels

    assert torch.equal(steps[4].hq, to_pixels(alone.hq))
    uncut = list(run_frames(source, guided, "off"))
    assert torch.equal(steps[3].hq, uncut[3].hq)
    assert not torch.equal(steps[4].hq, uncut[4].hq)


def run_frames(source: Path, pipe, rule: str, **settings):
    output = source.with_name(f"out-{rule}.mp4")
    job = VideoJob(source=source, output=output, options=ONE_STEP, scene_cut=rule, overwrite=True, **settings)
    yield from run(pipe, job)


def test_cuts_at_the_joints_of_segments_and_runs(source, guided, tmp_path) -> None:
    """Segments that end at, before and after the cut change nothing, nor does stopping there."""
    import contextlib

    results = []
    for length in (3, 4, 5):
        job = VideoJob(
            source=source,
            output=tmp_path / f"{length}.mkv",
            options=ONE_STEP,
            codec="ffv1",
            segment_frames=length,
        )
        with contextlib.closing(run(guided, job)) as steps:
            for _ in range(length + 1):
                next(steps)
        for _ in run(guided, job):
            pass
        results.append([picture for _, picture in clips.frames_of(job.output)])
    for result in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_a_cut_where_a_run_was_stopped_is_found_without_a_frame_in_the_state(source, tmp_path) -> None:
    """As of a single-image model, which remembers nothing."""
    import contextlib

    from safetensors.torch import save_file
    from spandrel.architectures.SPAN import SPAN

    from stream_diffvsr import load_pipeline

    torch.manual_seed(0)
    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    pipe = load_pipeline(tmp_path / "model.safetensors", device="cpu")
    job = VideoJob(source=source, output=tmp_path / "out.mkv", codec="ffv1", segment_frames=4)
    with contextlib.closing(run(pipe, job)) as steps:
        assert [next(steps).cut for _ in range(5)] == [False] * 4 + [True]
    assert [(step.index, step.cut) for step in run(pipe, job)] == [(4, True), (5, False), (6, False)]
    assert clips.frames_of(job.output)[0][1].shape[1] == 2 * clips.frames_of(source)[0][1].shape[1]


def test_lists_are_written_and_read_back(source, guided, tmp_path) -> None:
    cuts = tmp_path / "cuts.csv"
    list(run_frames(source, guided, "auto", cuts_out=cuts))
    assert cuts.read_text().splitlines()[1:] == ["1,1,4,4", "2,5,7,3"]
    assert scenes.parse(str(cuts)).listed == {0, 4}
    (tmp_path / "plain.csv").write_text("4\n6\n")
    assert scenes.parse(str(tmp_path / "plain.csv")).listed == {4, 6}


@pytest.mark.parametrize("text", ["nonsense.csv", "-1", "256", "nan"])
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(VideoError):
        scenes.parse(text)


def test_a_list_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("one,two\n")
    with pytest.raises(VideoError, match="not a list of cuts"):
        scenes.parse(str(tmp_path / "a.csv"))
