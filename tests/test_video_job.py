"""Jobs that are stopped in every way go on where they were, and the frames are the same to the last bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
from job_process import messages, start

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, VideoError
from stream_diffvsr.jobs.job import Speed
from stream_diffvsr.jobs.journal import WorkFolder
from stream_diffvsr.jobs.run import VideoJob, run

ONE_STEP = UpscaleOptions(num_inference_steps=1)


def job(source: Path, output: Path, **settings: Any) -> VideoJob:
    return VideoJob(source=source, output=output, options=ONE_STEP, **{"segment_frames": 3, **settings})


def finish(pipe, task: VideoJob) -> list[int]:
    """Run a job to its end; the indices of the frames that were computed."""
    return [step.index for step in run(pipe, task)]


def same_frames(one: Path, other: Path) -> None:
    before, after = clips.frames_of(one), clips.frames_of(other)
    assert [when for when, _ in before] == [when for when, _ in after]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return clips.write_video(tmp_path_factory.mktemp("source") / "in.mp4", 11, audio=1, audio_packets=20)


@pytest.fixture(scope="module")
def whole(source: Path, guided, tmp_path_factory) -> Path:
    """The uninterrupted result, in a lossy codec with frames that depend on each other."""
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert finish(guided, job(source, output)) == list(range(11))
    return output


def test_segments_last_about_a_minute(source, guided, tmp_path: Path, monkeypatch) -> None:
    """A run that is killed loses no more than that; a resumed job keeps the number of frames."""
    task = job(source, tmp_path / "out.mp4", segment_frames=None)
    monkeypatch.setattr(Speed, "fps", 4 / 60)
    for frames in ((0, 4), (4, 8)):
        with contextlib.closing(run(guided, task)) as steps:
            for step in steps:
                if step.index == 8:
                    break
        monkeypatch.setattr(Speed, "fps", 5.0)
        starts = [each.name for each in (tmp_path / "out.mp4.parts").glob("main-*.mp4")]
        assert {f"main-{frame:06}.mp4" for frame in frames} <= set(starts)
    assert finish(guided, task)[-1] == 10


@pytest.mark.parametrize("after", [1, 3, 4, 8, 11])
def test_cancelling_leaves_a_playable_file_and_goes_on(after: int, source, whole, guided, tmp_path) -> None:
    output = tmp_path / "out.mp4"
    with contextlib.closing(run(guided, job(source, output))) as steps:
        for _ in range(after):
            next(steps)
    assert len(clips.frames_of(output)) == after
    assert finish(guided, job(source, output)) == list(range((after - 1) // 3 * 3, 11))
    same_frames(output, whole)
    assert clips.packets_of(output, "audio") == clips.packets_of(source, "audio")
    assert not (tmp_path / "out.mp4.parts").exists()


def test_an_exception_of_on_step_cancels(source, whole, guided, tmp_path) -> None:
    calls = []

    def stop(stage: str, index: int, total: int) -> None:
        calls.append(stage)
        if len(calls) > 20:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        for _ in run(guided, job(source, tmp_path / "out.mp4"), on_step=stop):
            pass
    assert clips.frames_of(tmp_path / "out.mp4")
    finish(guided, job(source, tmp_path / "out.mp4"))
    same_frames(tmp_path / "out.mp4", whole)


def test_no_thread_outlives_a_cancelled_job(source, guided, tmp_path) -> None:
    before = set(threading.enumerate())
    steps = run(guided, job(source, tmp_path / "out.mp4"))
    next(steps)
    steps.close()
    assert set(threading.enumerate()) <= before


def test_segments_change_no_computed_frame(source, guided, tmp_path) -> None:
    """With a lossless codec the length of segments cannot be seen."""
    outputs = []
    for length in (1, 4, 100):
        outputs.append(tmp_path / f"{length}.mkv")
        finish(guided, job(source, outputs[-1], codec="ffv1", segment_frames=length))
    same_frames(outputs[0], outputs[2])
    same_frames(outputs[1], outputs[2])


def test_a_state_joins_two_jobs_exactly(source, guided, tmp_path) -> None:
    state = tmp_path / "state.safetensors"
    finish(guided, job(source, tmp_path / "all.mkv", codec="ffv1"))
    finish(guided, job(source, tmp_path / "a.mkv", codec="ffv1", end=4, state_out=state))
    loaded = StreamDiffVSRState.load(state)
    assert loaded.frame_index == 5
    finish(guided, job(source, tmp_path / "b.mkv", codec="ffv1", start=5, state=loaded))
    parts = clips.frames_of(tmp_path / "a.mkv") + clips.frames_of(tmp_path / "b.mkv")
    wanted = clips.frames_of(tmp_path / "all.mkv")
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(parts, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crf": 30}, "crf"),
        ({"options": UpscaleOptions(num_inference_steps=1, seed=5)}, "seed was 0 and is now 5"),
        ({"segment_frames": 4}, "segment was 3 and is now 4"),
        ({"scene_cut": "off"}, "scene cuts"),
    ],
)
def test_changed_settings_are_refused_with_what_differs(change, said, source, guided, tmp_path) -> None:
    output = tmp_path / "out.mp4"
    with contextlib.closing(run(guided, job(source, output))) as steps:
        for _ in range(4):
            next(steps)
    changed = VideoJob(**{**vars(job(source, output)), **change})
    with pytest.raises(VideoError, match=said):
        finish(guided, changed)
    again = VideoJob(**{**vars(changed), "restart": True, "overwrite": True})
    assert finish(guided, again) == list(range(11))


def test_a_changed_source_is_refused(source, guided, tmp_path) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(source.read_bytes())
    with contextlib.closing(run(guided, job(copy, tmp_path / "out.mp4"))) as steps:
        for _ in range(4):
            next(steps)
    clips.write_video(copy, 9)
    with pytest.raises(VideoError, match=r"source content was .* and is now .*--restart"):
        finish(guided, job(copy, tmp_path / "out.mp4"))


def test_two_runs_on_one_output_are_refused(source, guided, tmp_path) -> None:
    with contextlib.closing(run(guided, job(source, tmp_path / "out.mp4"))) as steps:
        next(steps)
        with pytest.raises(VideoError, match=f"process {os.getpid()}"):
            finish(guided, job(source, tmp_path / "out.mp4"))
    finish(guided, job(source, tmp_path / "out.mp4"))


def test_a_finished_output_is_refused_without_overwrite(source, whole, guided) -> None:
    before = whole.read_bytes()
    with pytest.raises(VideoError, match="--overwrite"):
        finish(guided, job(source, whole))
    assert whole.read_bytes() == before
    assert not Path(f"{whole}.parts").exists()


def test_foreign_files_in_the_work_folder_survive(source, guided, tmp_path) -> None:
    folder = tmp_path / "out.mp4.parts"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    finish(guided, job(source, tmp_path / "out.mp4"))
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]


def test_a_damaged_journal_or_segment_is_said(source, guided, tmp_path) -> None:
    output = tmp_path / "out.mp4"
    with contextlib.closing(run(guided, job(source, output))) as steps:
        for _ in range(4):
            next(steps)
    segment = next((tmp_path / "out.mp4.parts").glob("main-*"))
    content = segment.read_bytes()
    segment.write_bytes(content[:-10])
    with pytest.raises(VideoError, match="does not match the journal"):
        finish(guided, job(source, output))
    segment.write_bytes(content)
    WorkFolder(output).journal_file.write_text("{")
    with pytest.raises(VideoError, match="--restart"):
        finish(guided, job(source, output, overwrite=True))


def test_killed_between_its_last_steps(source, whole, guided, tmp_path, monkeypatch) -> None:
    """Everything is done but the new name, or but the cleaning up: the next run does only what is left."""
    for broken in ("_give_names", "_clean_up"):
        output = tmp_path / f"{broken}.mp4"

        def die(self) -> None:
            raise SystemExit("killed")

        with monkeypatch.context() as patch:
            patch.setattr(f"stream_diffvsr.jobs.run.Run.{broken}", die)
            with pytest.raises(SystemExit):
                finish(guided, job(source, output))
        assert finish(guided, job(source, output)) == []
        same_frames(output, whole)
        assert not Path(f"{output}.parts").exists()


KILLS = int(os.environ.get("STREAM_DIFFVSR_KILLS", "3"))


def test_kill_minus_nine(source, whole, guided, checkpoint, tmp_path) -> None:
    """STREAM_DIFFVSR_KILLS=20 pytest tests/test_video_job.py -k kill_minus: that many moments."""
    chance = random.Random(7)
    done = 0
    for number in range(KILLS):
        output = tmp_path / f"{number}.mp4"
        process, progress = start(checkpoint, source, output)
        computed = chance.randrange(0, 11)
        for _ in range(computed):
            progress.recv()
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.join()
        parts = Path(f"{output}.parts")
        if not parts.exists():
            done += 1
            continue
        assert not output.exists() or len(clips.frames_of(output)) == 11
        kept = journal_frames(parts)
        assert kept >= (computed - 1) // 3 * 3 - 3 * (computed % 3 == 0)
        assert finish(guided, job(source, output)) == list(range(kept, 11))
        same_frames(output, whole)
        assert clips.packets_of(output, "audio") == clips.packets_of(source, "audio")
    assert done < KILLS, "every process was done before it was killed"


def journal_frames(parts: Path) -> int:
    records = (json.loads(file.read_text()) for file in parts.glob("segment-*.json"))
    return sum(record["part"]["frames"] for record in records)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent differently there")
def test_control_c_leaves_a_playable_file(source, whole, guided, checkpoint, tmp_path) -> None:
    output = tmp_path / "out.mp4"
    process, progress = start(checkpoint, source, output)
    for _ in range(5):
        progress.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert messages(progress)[-1] == "KeyboardInterrupt()"
    process.join()
    assert process.exitcode != 0
    assert 5 <= len(clips.frames_of(output)) < 11
    finish(guided, job(source, output))
    same_frames(output, whole)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit there")
@pytest.mark.parametrize("limit", [2_000, 60_000, 150_000])
def test_a_disk_that_is_full(limit: int, source, whole, guided, checkpoint, tmp_path) -> None:
    """No file may grow beyond a limit: writing fails, nothing finished is lost, nothing broken stays."""
    output = tmp_path / "out.mp4"
    process, progress = start(checkpoint, source, output, limit)
    last = messages(progress)[-1]
    process.join()
    if process.exitcode == 0:
        same_frames(output, whole)
        return
    assert "File too large" in str(last)
    assert not output.exists(), "a broken output was left"
    finish(guided, job(source, output))
    same_frames(output, whole)


def test_too_little_room_is_said_before_it_is_used_up(source, guided, tmp_path, monkeypatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="MB are free"):
        finish(guided, job(source, tmp_path / "out.mp4"))
    assert not (tmp_path / "out.mp4").exists()


def refuse_what_is_open(monkeypatch) -> None:
    """As on Windows: what this process holds open can neither be deleted nor replaced."""
    unlink, replace = os.unlink, os.replace

    def is_open(path: Any) -> bool:
        links = list(Path("/proc/self/fd").iterdir())
        return any(link.exists() and link.samefile(path) for link in links)

    def guarded(call: Any) -> Any:
        def checked(*paths: Any, **others: Any) -> None:
            if any(is_open(path) for path in paths if Path(path).exists()):
                raise PermissionError(32, "used by another process", str(paths[0]))
            call(*paths, **others)

        return checked

    for name, call in (("unlink", unlink), ("remove", unlink), ("replace", replace), ("rename", os.rename)):
        monkeypatch.setattr(os, name, guarded(call))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see what is open")
@pytest.mark.parametrize("after", [None, 4])
def test_nothing_open_is_deleted_or_replaced(source, whole, guided, tmp_path, monkeypatch, after) -> None:
    refuse_what_is_open(monkeypatch)
    with (tmp_path / "held").open("w"), pytest.raises(PermissionError):
        (tmp_path / "held").unlink()
    output = tmp_path / "out.mp4"
    if after is not None:
        with contextlib.closing(run(guided, job(source, output))) as steps:
            for _ in range(after):
                next(steps)
        assert output.is_file()
    finish(guided, job(source, output))
    same_frames(output, whole)
    assert not (tmp_path / "out.mp4.parts").exists()


@pytest.mark.parametrize(
    "content",
    ['"text"', "[]", '{"format": 1, "parts": [], "state": "", "cuts": []}', '{"format": 2, "segments": 3}'],
)
def test_a_journal_that_is_none_is_one_sentence(source, guided, tmp_path, content) -> None:
    output = tmp_path / "out.mp4"
    WorkFolder(output).folder.mkdir()
    WorkFolder(output).journal_file.write_text(content)
    with pytest.raises(VideoError, match="--restart"):
        finish(guided, job(source, output))
    finish(guided, job(source, output, restart=True))
    assert not WorkFolder(output).folder.exists()
