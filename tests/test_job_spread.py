"""Scenes rendered by several workers are those of one process; losses cost scenes and nothing else."""

from __future__ import annotations

import dataclasses
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
from local_pool import LocalPool, travelled

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, VideoError, load_pipeline
from stream_diffvsr.errors import IncompatibleInputError
from stream_diffvsr.jobs.ahead import Split, find_scenes
from stream_diffvsr.jobs.cluster import check_same, parse_devices
from stream_diffvsr.jobs.journal import WorkFolder
from stream_diffvsr.jobs.prepare import prepare
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.jobs.scenes import Scene
from stream_diffvsr.jobs.spread import Spread
from stream_diffvsr.jobs.worker import from_json, to_json

COUNT = 14
STARTS = (0, 3, 8, 10)


def scenes_of(index: int, width: int, height: int) -> np.ndarray:
    picture = clips.picture(index, width, height)
    number = sum(index >= start for start in STARTS)
    return picture if number % 2 else 255 - picture[::-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return clips.write_video(folder / "in.mp4", COUNT, size=(24, 16), draw=scenes_of, audio=1)


@pytest.fixture(scope="module")
def model(checkpoint) -> dict[str, Any]:
    return {"source": str(checkpoint), "device": "cpu", "flow": "dis"}


@pytest.fixture(scope="module")
def plain(model):
    return load_pipeline(**model)


def job(source: Path, output: Path, **other: Any) -> VideoJob:
    settings = {"segment_frames": 2, "codec": "ffv1", **other}
    return VideoJob(source=source, output=output, options=UpscaleOptions(num_inference_steps=1), **settings)


@pytest.fixture(scope="module")
def whole(source, plain, tmp_path_factory) -> list[Any]:
    output = tmp_path_factory.mktemp("whole") / "out.mkv"
    steps = list(run(plain, job(source, output)))
    assert tuple(step.index for step in steps if step.cut) == STARTS[1:]
    return clips.frames_of(output)


def spread(pool: LocalPool, *jobs: VideoJob, split: Split | None = None) -> list[Any]:
    driver = Spread(jobs, pool, split)
    told = list(driver.steps())
    assert told[-1].files == len(jobs)
    return [outcome.error for outcome in driver.outcomes]


def same(output: Path, wanted: list[Any]) -> None:
    found = clips.frames_of(output)
    assert [time for time, _ in found] == [time for time, _ in wanted]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("count", "lost"),
    [(3, 2), *(pytest.param(count, 0, marks=pytest.mark.long) for count in (1, 2))],
)
def test_many_equal_one(count, lost, source, model, whole, tmp_path) -> None:
    pool = LocalPool(model, count, lost)
    task = job(source, tmp_path / "out.mkv", cuts_out=tmp_path / "cuts.csv")
    assert spread(pool, task) == [None]
    same(task.output, whole)
    assert clips.packets_of(task.output, "audio") == clips.packets_of(source, "audio")
    firsts = [line.split(",")[1] for line in (tmp_path / "cuts.csv").read_text().splitlines()[1:]]
    assert firsts == [str(start + 1) for start in STARTS]
    assert {first for _, first in pool.given} == set(STARTS)
    assert not WorkFolder(task.output).folder.exists()


def test_the_journal_is_written_by_the_command_alone(source, model, tmp_path, monkeypatch) -> None:
    """A worker's would lack the scenes that were found meanwhile."""
    save, writers = WorkFolder.save, set()

    def noted(work: WorkFolder, journal: Any) -> None:
        writers.add(threading.current_thread())
        save(work, journal)

    monkeypatch.setattr(WorkFolder, "save", noted)
    assert spread(LocalPool(model, 2), job(source, tmp_path / "out.mkv")) == [None]
    assert writers == {threading.main_thread()}


def test_a_run_that_is_stopped_goes_on_in_either_way(source, model, plain, whole, tmp_path) -> None:
    """What several workers began, one process ends, and the other way round."""
    task = job(source, tmp_path / "a.mkv")
    driver = Spread([task], LocalPool(model, 1))
    steps = driver.steps()
    while not list(WorkFolder(task.output).folder.glob("segment-*")):
        next(steps)
    steps.close()
    done = WorkFolder(task.output).load()
    assert done is not None and 0 < done.frames < COUNT
    assert len(clips.frames_of(task.output)) == done.frames
    again = [step.index for step in run(plain, task)]
    assert len(again) < COUNT
    same(task.output, whole)

    task = job(source, tmp_path / "b.mkv")
    begun = run(plain, task)
    for _ in range(7):
        next(begun)
    begun.close()
    pool = LocalPool(model, 2)
    assert spread(pool, task) == [None]
    assert {first for _, first in pool.given} == {3, 8, 10}
    same(task.output, whole)


@pytest.mark.long
def test_a_scene_goes_on_where_the_lost_worker_left_a_state(source, model, whole, tmp_path) -> None:
    task = job(source, tmp_path / "out.mkv", scene_cut="off")
    driver = Spread([task], LocalPool(model, 1))
    steps = driver.steps()
    while not list(WorkFolder(task.output).folder.glob("segment-*")):
        next(steps)
    steps.close()
    begun = WorkFolder(task.output).load()
    assert (begun is not None and len(begun.segments) == 0) or begun.frames < COUNT
    assert spread(LocalPool(model, 1), task) == [None]
    one = job(source, tmp_path / "one.mkv", scene_cut="off")
    list(run(load_pipeline(**model), one))
    same(task.output, clips.frames_of(one.output))


def test_bad_files_stop_no_others(source, model, whole, tmp_path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    sources = [tmp_path / "bad.mp4", source, tmp_path / "missing.mp4", source]
    jobs = [job(path, tmp_path / f"{n}.mkv") for n, path in enumerate(sources)]
    driver = Spread(jobs, LocalPool(model, 2))
    list(driver.steps())
    ends = {outcome.job.output.stem: outcome.error for outcome in driver.outcomes}
    assert {name for name, error in ends.items() if error is None} == {"1", "3"}
    assert "cannot be opened" in str(ends["0"]) and "does not exist" in str(ends["2"])
    same(jobs[1].output, whole)
    same(jobs[3].output, whole)


def test_a_segment_that_is_not_as_the_worker_says_fails_the_job(source, model, tmp_path) -> None:
    """And nothing of it is joined."""

    class Damaging(LocalPool):
        def answers(self, seconds: float) -> list[tuple[str, Any]]:
            found = super().answers(seconds)
            for name in {
                name for _, answer in found for each in answer["segments"] for name in each["digests"]
            }:
                with (WorkFolder(task.output).folder / name).open("r+b") as file:
                    file.truncate(file.seek(0, 2) - 1)
            return found

    task = job(source, tmp_path / "out.mkv")
    (error,) = spread(Damaging(model, 1), task)
    assert isinstance(error, VideoError) and "does not match the journal" in str(error)
    assert not task.output.exists()


@pytest.mark.parametrize("state", [False, True])
def test_the_pass_ahead_finds_what_one_process_finds(state, source, plain, tmp_path) -> None:
    given = None
    if state:
        steps = list(run(plain, job(source, tmp_path / "a.mkv", end=4, state_out=tmp_path / "state")))
        assert len(steps) == 5
        given = StreamDiffVSRState.load(tmp_path / "state")
    task = job(source, tmp_path / "b.mkv", start=5 if state else 0, state=given)
    found = list(find_scenes(prepare(task), state="s" if state else ""))
    assert [(s.first, s.end) for s in found] == (
        [(5, 8), (8, 10), (10, 14)] if state else [(0, 3), (3, 8), (8, 10), (10, 14)]
    )
    assert found[0].state == ("s" if state else "") and not any(s.state for s in found[1:])
    for scene in found[1:]:
        assert Scene.from_json(travelled(scene.to_json())) == scene and scene.place is not None
        assert scene.place.index == scene.first - 1


@pytest.mark.long
def test_parts_of_a_long_scene_begin_earlier(source, plain, model, tmp_path) -> None:
    task = job(source, tmp_path / "out.mkv", scene_cut="off")
    found = list(find_scenes(prepare(task), Split(5, 2)))
    assert [(s.first, s.end, s.warm_up) for s in found] == [(0, 5, 0), (5, 10, 2), (10, 14, 2)]
    assert [s.place and s.place.index for s in found] == [None, 2, 7]
    assert spread(LocalPool(model, 2), task, split=Split(5, 2)) == [None]
    one = job(source, tmp_path / "one.mkv", scene_cut="off")
    list(run(plain, one))
    split, exact = clips.frames_of(task.output), clips.frames_of(one.output)
    assert [time for time, _ in split] == [time for time, _ in exact]
    equal = [bool(np.array_equal(a, b)) for (_, a), (_, b) in zip(split, exact, strict=True)]
    assert all(equal[:5]) and not all(equal[5:])


def test_jobs_travel_whole() -> None:
    task = VideoJob(
        source=Path("/a/in.mp4"),
        output=Path("/b/out.mkv"),
        start="1.5s",
        end=9,
        target=(64, 48),
        rate=Fraction(30000, 1001),
        options=UpscaleOptions(seed=2**63 + 1),
        metadata={"a": "b"},
    )
    assert from_json(travelled(to_json(task)), UpscaleOptions) == task
    assert {field.name for field in dataclasses.fields(task)} == set(to_json(task))


FACTS = {"machine": "a", "version": "1", "torch": "2", "device": "cpu", "threads": 1, "info": {"model": "m"}}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"version": "2"}, "stream-diffvsr 1, but b has 2"),
        ({"threads": 2}, "threads per worker 1, but b has 2"),
        ({"info": {"model": "n"}}, "the model m, but b has n"),
        ({"error": "no such device"}, "b: no such device"),
    ],
)
def test_workers_that_differ_are_refused(other, said) -> None:
    with pytest.raises(VideoError, match=said):
        check_same({"1": FACTS, "2": {**FACTS, "machine": "b", **other}})


def test_devices_are_read() -> None:
    assert parse_devices("cpu:3").names == ("cpu",) * 3
    for text in ("cpu:0", "gpu", "", "cuda:0,cuda:0", "0,0"):
        with pytest.raises(IncompatibleInputError, match=r"devices must be all"):
            parse_devices(text)
    with pytest.raises(IncompatibleInputError, match="on this machine: choose one of auto"):
        parse_devices("0,97")


def test_another_folder_is_noticed(source, model, plain, tmp_path) -> None:
    pool, task = LocalPool(model, 1), job(source, tmp_path / "out.mkv")
    with WorkFolder(task.output).locked():
        (wrong,) = pool.check_access(to_json(task), {"files": 1}, WorkFolder(task.output).token())
        assert "a different file" in wrong
        from stream_diffvsr.jobs.prepare import source_fingerprint

        (wrong,) = pool.check_access(to_json(task), source_fingerprint(source), "another process")
        assert "choose an output in a folder that all machines share" in wrong
        assert (
            pool.check_access(to_json(task), source_fingerprint(source), WorkFolder(task.output).token())
            == []
        )
