"""The journal of a job is a set of segments: in any order, from several processes, with holes."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
from chunk_family import ChunkOptions, ChunkUpscaler

from stream_diffvsr import UpscaleOptions, VideoError
from stream_diffvsr.families.diffvsr import plan
from stream_diffvsr.jobs import render
from stream_diffvsr.jobs.journal import Journal, Segment, WorkFolder, continue_from, resumable
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media.join import SegmentFile
from stream_diffvsr.media.write import VideoSink
from stream_diffvsr.upscaler import State

COUNT, CUTS = 12, (5, 9)
ONE_STEP = UpscaleOptions(num_inference_steps=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "cuts.csv").write_text("\n".join(map(str, CUTS)))
    return clips.write_video(folder / "in.mp4", COUNT, audio=1)


def job(source: Path, output: Path, **other: Any) -> VideoJob:
    settings = {"segment_frames": 2, "scene_cut": str(source.parent / "cuts.csv"), "codec": "ffv1", **other}
    return VideoJob(source=source, output=output, **{"options": ONE_STEP, **settings})


def unfinished(pipe: Any, task: VideoJob) -> Path:
    """The work folder of a job that was stopped when only its join was left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stream_diffvsr.jobs.run.Run._join", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(run(pipe, task))
    return WorkFolder(task.output).folder


@pytest.fixture(scope="module")
def whole(source: Path, guided, tmp_path_factory) -> list[Any]:
    output = tmp_path_factory.mktemp("whole") / "out.mkv"
    list(run(guided, job(source, output)))
    return clips.frames_of(output)


def drop(folder: Path, *starts: int) -> None:
    for start in starts:
        (folder / f"segment-{start:06}.json").unlink()


def same(output: Path, wanted: list[Any]) -> None:
    found = clips.frames_of(output)
    assert [time for time, _ in found] == [time for time, _ in wanted]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True))


def test_a_finished_file_only_gets_its_name(source, guided, whole, tmp_path, monkeypatch) -> None:
    """Where a run died between the join and the renaming, nothing is joined or computed again."""
    task = job(source, tmp_path / "out.mkv")
    with monkeypatch.context() as patch:
        patch.setattr("stream_diffvsr.jobs.run.Run._give_names", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(run(guided, task))
    monkeypatch.setattr("stream_diffvsr.jobs.run.Run._join", lambda self: pytest.fail("joined again"))
    assert list(run(guided, task)) == []
    same(task.output, whole)
    assert not WorkFolder(task.output).folder.exists()


def test_a_file_that_took_the_place_of_a_partial_one_is_kept(source, guided, tmp_path) -> None:
    """Only what this job wrote itself may be replaced when it goes on."""
    task = job(source, tmp_path / "out.mkv")
    with contextlib.closing(run(guided, task)) as steps:
        for _ in range(3):
            next(steps)
    assert task.output.is_file()
    task.output.write_bytes(b"a user's own")
    with pytest.raises(VideoError, match="exists: choose another"):
        list(run(guided, task))
    assert task.output.read_bytes() == b"a user's own"


def test_every_scene_keeps_the_memory_plan_of_the_job(source, guided, tmp_path, monkeypatch) -> None:
    """It is chosen once: memory that is free again does not change the rest of the frames."""
    task = job(source, tmp_path / "out.mkv", state_out=tmp_path / "end.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "free_memory", lambda device: 1)
        with contextlib.closing(run(guided, task)) as steps:
            next(steps)
    begun = WorkFolder(task.output).load()
    assert begun is not None
    list(run(guided, task))
    assert State.load(tmp_path / "end.safetensors").provenance.details["plan"] == begun.provenance["plan"]


def test_segments_are_named_by_their_frames_and_end_with_their_scene(source, guided, tmp_path) -> None:
    folder = unfinished(guided, job(source, tmp_path / "out.mkv"))
    journal = WorkFolder(tmp_path / "out.mkv").load()
    assert journal is not None and journal.frames == COUNT and journal.cuts == list(CUTS)
    found = [(s.start, s.end, s.scene, s.closed) for s in journal.segments]
    assert found == [
        (0, 2, 0, False), (2, 4, 0, False), (4, 5, 0, True),
        (5, 7, 5, False), (7, 9, 5, True),
        (9, 11, 9, False), (11, 12, 9, True),
    ]  # fmt: skip
    assert not list(folder.glob("state-*")), "a scene that is done needs no state"


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ((0, 2, 4), range(5)),  # the first scene
        ((5, 7), range(5, 9)),  # one in the middle
        ((7, 2), [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # the states before are gone: whole scenes
        ((9, 11, 0, 2, 4), [0, 1, 2, 3, 4, 9, 10, 11]),
    ],
)
def test_holes_are_filled_and_nothing_else_is_done_again(
    lost, again, source, whole, guided, tmp_path
) -> None:
    task = job(source, tmp_path / "out.mkv")
    drop(unfinished(guided, task), *lost)
    assert [step.index for step in run(guided, task)] == list(again)
    same(task.output, whole)
    assert clips.packets_of(task.output, "audio") == clips.packets_of(source, "audio")
    assert not WorkFolder(task.output).folder.exists()


def test_a_state_that_is_too_large_to_keep_costs_its_scene(
    source, whole, guided, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(render, "LARGE_STATE", 10)
    task = job(source, tmp_path / "out.mkv")
    steps = run(guided, task)
    assert [next(steps).index for _ in range(8)][-1] == 7
    steps.close()
    assert [step.index for step in run(guided, replace(task, overwrite=True))] == list(range(5, COUNT))
    same(task.output, whole)


def test_room_is_looked_for_by_the_size_of_the_familys_own_state(source, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(render, "check_space", lambda folder, needed: asked.append(needed))
    settings = {"options": ChunkOptions(), "scene_cut": "off", "audio": False}
    long = clips.write_video(tmp_path / "long.mp4", 50)
    task = replace(job(source, tmp_path / "out.mkv", **settings), source=long)
    list(run(ChunkUpscaler(), task))
    assert asked[0] == 0 < asked[1]


def test_a_segment_with_other_bytes_of_the_same_number_is_said(source, guided, tmp_path) -> None:
    task = job(source, tmp_path / "out.mkv")
    file = next(unfinished(guided, task).glob("main-000005*"))
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(VideoError, match=r"main-000005.* does not match the journal: start over"):
        list(run(guided, task))


@pytest.mark.parametrize("change", [{"state": "../x"}, {"digests": {"/etc/passwd": ""}}, {"start": None}])
def test_a_record_that_is_none_is_one_sentence(change, source, guided, tmp_path) -> None:
    task = job(source, tmp_path / "out.mkv")
    record = unfinished(guided, task) / "segment-000005.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    with pytest.raises(VideoError, match=r"segment-000005.json cannot be read .*--restart"):
        list(run(guided, task))


def segment(start: int, end: int, scene: int, closed: bool = False, state: str = "") -> Segment:
    return Segment(start, scene, SegmentFile("", end - start, 0, start, end), closed, {}, state)


def test_what_work_can_go_on_from() -> None:
    a, b, c = segment(0, 2, 0), segment(2, 4, 0, state="s"), segment(4, 6, 0, closed=True)
    d, e = segment(6, 8, 6), segment(8, 9, 6)
    assert resumable([e, a, d, c, b]) == (a, b, c), "the end of scene 6 has no state"
    assert resumable([b, c]) == (), "the beginning of the scene is not there"
    assert resumable([b, a]) == (a, b)
    assert resumable([a, c, d]) == ()
    gaps = Journal({}, {}, {}, first=0, segments=(a, b, segment(6, 8, 6, closed=True))).gaps()
    assert [(x and x.start, y and y.start) for x, y in gaps] == [(2, 6), (6, None)]


def test_other_versions_are_told_when_a_job_goes_on(tmp_path, caplog):
    before = Journal({"size": 1}, {"seed": 0}, {"torch": "2.1", "threads": "1"})
    with caplog.at_level(logging.WARNING):
        assert continue_from(before, replace(before), tmp_path) == before
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        continue_from(before, replace(before, versions={"torch": "2.1", "threads": "2"}), tmp_path)
    assert "not an exact continuation" in caplog.text and "'threads': '2'" in caplog.text


def test_a_folder_without_a_journal_goes_with_its_run(tmp_path):
    """What was made ready for a job that never began goes; beside a journal it stays."""
    work = WorkFolder(tmp_path / "out.mp4")
    with work.locked():
        (work.folder / "side-list.json").write_text("[]")
    assert not work.folder.exists()
    with work.locked():
        (work.folder / "side-list.json").write_text("[]")
        work.save(Journal({}, {}, {}))
    assert (work.folder / "side-list.json").is_file()


@pytest.mark.parametrize(
    ("where", "name", "done"),
    [
        (
            VideoSink,
            "finish",
            2,
        ),  # the first call is the rehearsal's
        (render, "digest", 5),
        (WorkFolder, "add", 5),
        (Journal, "with_segment", 5),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_ctrl_c_while_a_segment_is_closed(pipe, source, tmp_path, monkeypatch, where, name, done):
    """What is done can be played, and the job continues."""
    task, real, calls = job(source, tmp_path / "out.mkv"), getattr(where, name), []

    def interrupted(*args: Any) -> Any:
        result = real(*args)
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run(pipe, task))
    monkeypatch.undo()
    assert len(clips.frames_of(task.output)) == done
    list(run(pipe, task))
    assert len(clips.frames_of(task.output)) == COUNT
