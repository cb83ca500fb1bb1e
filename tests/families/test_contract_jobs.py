"""A job with every family: cancelled, resumed, sized as asked; and the commands over each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from family_cases import CASES
from job_process import job_of, start
from test_pictures import save_deep

from stream_diffvsr import load_pipeline
from stream_diffvsr.cli.main import main
from stream_diffvsr.errors import IncompatibleInputError
from stream_diffvsr.families.flashvsr.options import FlashVSROptions
from stream_diffvsr.families.swiftvr.options import SwiftVROptions
from stream_diffvsr.families.wan.chunks import result_size
from stream_diffvsr.jobs.job import settle_job
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.load import FAMILIES
from stream_diffvsr.media.pictures import read
from stream_diffvsr.media.sizes import enlarge
from stream_diffvsr.options import from_json, to_json
from stream_diffvsr.tensors import from_pixels, to_pixels
from stream_diffvsr.upscaler import Info, State, Upscaler


@dataclass
class Subject:
    path: Path
    model: Upscaler
    source: Path
    """A clip to beyond the second border, with sound."""
    count: int


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    made = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        path = case.make(folder)
        model = load_pipeline(path, device="cpu", **case.loading)
        count = model.info.first + 2 * model.info.chunk + 3
        source = clips.write_video(folder / "in.mp4", count, size=(16, 16), audio=1)
        made[name] = Subject(path, model, source, count)
    return made


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def subject(family: str, subjects: dict[str, Subject]) -> Subject:
    return subjects[family]


def job(family: str, subject: Subject, output: Path, **other: Any) -> VideoJob:
    """Twice as large, without a second resampling: a family of any scale does that itself."""
    model, options = subject.model, {**CASES[family].options, **other.pop("options", {})}
    scale = {"scale": 2.0} if model.info.scales is None else {}
    settings = {"codec": "ffv1", "segment_frames": 2, "scene_cut": "off", **scale, **other}
    return VideoJob(source=subject.source, output=output, options=model.Options(**options), **settings)


def same_frames(one: Path, other: Path) -> None:
    found, wanted = clips.frames_of(one), clips.frames_of(other)
    assert [time for time, _ in found] == [time for time, _ in wanted]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True))


def test_cancelled_and_resumed_equals_one_run(family, subject, tmp_path):
    whole, parts = tmp_path / "whole.mkv", tmp_path / "parts.mkv"
    steps = list(run(subject.model, job(family, subject, whole)))
    assert [step.index for step in steps] == list(range(subject.count))
    assert [step.done for step in steps] == list(range(1, subject.count + 1))
    # The frames are the model's own, at the size asked for.
    options = subject.model.Options(**CASES[family].options)
    if subject.model.info.scales is None:
        options = replace(options, scale=2.0)
    frames = [from_pixels(step.lq) for step in steps]
    for step, result in zip(steps, subject.model.stream(frames, options), strict=True):
        assert torch.equal(step.hq, to_pixels(result.hq))
    side = 16 * int((subject.model.info.scales or [2])[0])
    assert clips.frames_of(whole)[0][1].shape == (side, side, 3)
    assert clips.packets_of(whole, "audio") == clips.packets_of(subject.source, "audio")

    after = subject.model.info.first + subject.model.info.chunk + 1
    with contextlib.closing(run(subject.model, job(family, subject, parts))) as begun:
        for _ in range(after):
            next(begun)
    assert len(clips.frames_of(parts)) == after
    rest = [step.index for step in run(subject.model, job(family, subject, parts))]
    assert 0 < rest[0] <= after and rest == list(range(rest[0], subject.count))
    same_frames(parts, whole)
    assert clips.packets_of(parts, "audio") == clips.packets_of(subject.source, "audio")
    assert not Path(f"{parts}.parts").exists()


@pytest.mark.parametrize("family", ["flashvsr", "swiftvr", "image"])  # diffvsr: test_video_job.py
def test_killed_in_the_middle_and_resumed_equals_one_run(family, subject, tmp_path):
    """kill -9 while a frame behind the first border is written."""
    whole, parts = tmp_path / "whole.mp4", tmp_path / "parts.mp4"
    list(run(subject.model, job_of(family, subject.model, subject.source, whole)))
    at = subject.model.info.first + 2
    process, progress = start(subject.path, subject.source, parts, family=family, hold=at)
    while progress.recv() != at:
        pass
    process.kill()
    process.join()
    assert process.exitcode and not parts.exists()
    rest = [step.index for step in run(subject.model, job_of(family, subject.model, subject.source, parts))]
    assert 0 < rest[0] <= at and rest == list(range(rest[0], subject.count))
    same_frames(parts, whole)


def test_16_bits_and_alpha_of_a_picture_are_kept(family, subject, tmp_path):
    """The colours are the model's own, to the last of 16 bits; transparency is enlarged beside them."""
    source = save_deep(
        tmp_path / "in.png", np.random.default_rng(0).integers(0, 65536, (16, 16, 4), np.uint16)
    )
    task = replace(job(family, subject, tmp_path / "out.png", codec="h264"), source=source)
    (step,) = run(subject.model, task)
    before, after = read(source), read(tmp_path / "out.png")
    assert before.bits == after.bits == 16
    assert torch.equal((step.hq * 65535).round(), (after.rgb * 65535).round())
    assert before.alpha is not None and after.alpha is not None
    wide = enlarge(before.alpha, (step.hq.shape[-2], step.hq.shape[-1]))
    assert torch.equal((wide * 65535).round(), (after.alpha * 65535).round())


@pytest.mark.long
def test_a_state_joins_two_jobs_or_says_why_not(family, subject, tmp_path, caplog):
    """Frames and the second half of them, from the state that the first left."""
    whole, end = tmp_path / "whole.mkv", subject.count - 3
    list(run(subject.model, job(family, subject, whole)))
    first = job(family, subject, tmp_path / "a.mkv", end=end - 1, state_out=tmp_path / "state")
    list(run(subject.model, first))
    state = State.load(tmp_path / "state")
    assert state.index == end
    if not subject.model.info.frame_by_frame:
        assert "starts a new sequence" in caplog.text and not state.has_previous
    list(run(subject.model, job(family, subject, tmp_path / "b.mkv", start=end, state=state)))
    found = clips.frames_of(tmp_path / "a.mkv") + clips.frames_of(tmp_path / "b.mkv")
    wanted = clips.frames_of(whole)
    assert len(found) == len(wanted)
    if subject.model.info.frame_by_frame:
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, None),
        ({"scale": 2.5}, (40, 40)),
        ({"target": (48, 40)}, (40, 48)),
        ({"target": (61, 43), "pix_fmt": "yuv444p"}, (43, 61)),
        ({"scale": 2.7}, (44, 44)),
        ({"scale": 6.0}, (96, 96)),
        ({"short_edge": 20, "pre_scale": 0.5}, (20, 20)),
    ],
)
def test_sizes_of_the_output(sizes, expected, family, subject, tmp_path):
    scale = int((subject.model.info.scales or [4])[0])
    own = {"scale": 4.0} if subject.model.info.scales is None else {}
    asked = {"scale": None, **sizes, "end": 0}
    made = job(family, subject, tmp_path / "out.mkv", options=own, **asked)
    (step,) = run(subject.model, made)
    assert tuple(step.hq.shape[-2:]) == (expected or (16 * scale, 16 * scale))


@pytest.mark.parametrize("options", [FlashVSROptions, SwiftVROptions])
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (33, 21), (67, 100), (300, 500), (480, 853)])
def test_models_of_any_scale_make_each_size_themselves(size, options):
    """From 1 to 4 times as large on each side, nothing is resampled after them."""
    height, width = size
    targets = [(width, height), (width + 1, height), (4 * width - 3, 3 * height + 1), (4 * width, 4 * height)]
    sizes = [{"target": each} for each in targets] + [{"scale": each} for each in (1.5, 2.7, 3.9)]
    for asked in [*sizes, {"short_edge": 2 * min(size) + 3}]:
        made = VideoJob(source=Path("a"), output=Path("b"), **asked)
        made = settle_job(made, Info("", "", "", scales=None), options, *size)
        assert result_size(torch.empty(1, 3, *size, device="meta"), made.options) == made.sizes.output(*size)
        assert from_json(options, json.loads(json.dumps(to_json(made.options)))) == made.options


@pytest.fixture
def command(family, subject, capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object, model: Path | None = None) -> tuple[int, str, str]:
        base = ["upscale", str(subject.source), "--model", str(model or subject.path), "--device", "cpu"]
        own = ["--flow", "none", "--steps", "1"] if family == "diffvsr" else []
        code = main([*base, *own, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().splitlines()[-1] if captured.err.strip() else ""

    return call


def test_the_command_upscales(family, subject, command, tmp_path):
    output = tmp_path / "out.mkv"
    code, out, error = command("--scale", 2, "-o", output, "--end", 2, "--codec", "ffv1")
    assert (code, out.strip()) == (0, str(output)), error
    assert [frame.shape for _, frame in clips.frames_of(output)] == [(32, 32, 3)] * 3
    code, out, error = command("--preset", "fast", "--end", 0, "-o", tmp_path / "fast.mkv")
    assert code == 0, error


@pytest.mark.long
def test_the_plan_is_told(family, subject, command):
    code, out, error = command("--plan", "--scale", 2)
    assert code == 0, error
    lines = out.strip().splitlines()
    assert lines[0] == f"size: 16x16 to 32x32, {subject.count} frames"
    assert [line.partition(":")[0] for line in lines] == [
        "size", *(["plan"] if family == "diffvsr" else []), "memory", "disk", "time"
    ]  # fmt: skip
    assert not Path(f"{subject.source}".replace("in.mp4", "in_4x.mp4")).exists()


FOREIGN = {
    "diffvsr": ["--decoder", "full"],
    "flashvsr": ["--steps", "2"],
    "swiftvr": ["--sparse-ratio", "1.5"],
    "image": ["--seed", "3"],
}


def test_flags_of_another_family_are_refused(family, command, tmp_path):
    code, _, error = command(*FOREIGN[family], "-o", tmp_path / "out.mkv")
    title = FAMILIES[family].title
    assert code == 2 and error.endswith(f"({title}) does not support {FOREIGN[family][0]}")
    for arguments in (["--flow", "dis"], ["--quantize", "int8"]) if family != "diffvsr" else ():
        code, _, error = command(*arguments, "-o", tmp_path / "out.mkv")
        assert code == 2 and arguments[0][2:] in error and title in error
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_lists_each_as_complete(subjects, monkeypatch, capsys, tmp_path):
    for name in ("diffvsr", "flashvsr", "swiftvr"):
        path = subjects[name].path
        assert main(["doctor", str(path.parent)]) == 0
        told = f": {path}, complete, will be used"
        assert told in capsys.readouterr().out


def test_a_version_is_told_and_only_where_there_are_several(subjects, tmp_path, capsys):
    folder = CASES["flashvsr"].make(tmp_path).rename(tmp_path / "mine")
    with pytest.raises(IncompatibleInputError, match=r"version must be 'v1' or 'v1\.1'") as caught:
        load_pipeline(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert load_pipeline(folder, device="cpu", version="v1").info.model.endswith("-v1")
    assert main(["doctor", str(tmp_path)]) == 0
    told = f"mine: {folder}, ignored: it could be version v1 or v1.1: rename the folder to flashvsr-v1 or "
    assert told in capsys.readouterr().out
    with pytest.raises(IncompatibleInputError, match="version"):
        load_pipeline(subjects["swiftvr"].path, device="cpu", version="v1")
    source = subjects["flashvsr"].source
    assert main(["upscale", str(source), "--model", str(folder), "--device", "cpu"]) == 2
    assert "flashvsr-v1.1" in capsys.readouterr().err
    # A copy whose file name tells it.
    (folder / "diffusion_pytorch_model_streaming_dmd.safetensors").rename(folder / "FlashVSR1_1.safetensors")
    assert load_pipeline(folder, device="cpu").info.model.endswith("-v1.1")
    assert main(["doctor", str(tmp_path)]) == 0
    assert f"mine: {folder}, complete" in capsys.readouterr().out
