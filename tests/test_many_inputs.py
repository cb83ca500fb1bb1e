"""Several inputs in one run of the command, and the list of scenes."""

from __future__ import annotations

from pathlib import Path

import clips
import numpy as np
import pytest

from stream_diffvsr.cli.main import main

STARTS = (0, 2, 5)


def scenes_of(index: int, width: int, height: int) -> np.ndarray:
    picture = clips.picture(index, width, height)
    return picture if sum(index >= start for start in STARTS) % 2 else 255 - picture[::-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of videos, of which one is none."""
    folder = tmp_path_factory.mktemp("videos")
    clips.write_video(folder / "a.mp4", 6, size=(16, 16), draw=scenes_of)
    (folder / "bad.mp4").write_bytes(b"no video")
    clips.write_video(folder / "c.mp4", 2, size=(16, 16))
    return folder


def upscale(checkpoint: Path, *arguments: object) -> int:
    base = ["--model", checkpoint, "--device", "cpu", "--flow", "none", "--steps", 1]
    return main(["upscale", *map(str, [*arguments, *base, "--progress", "none", "--threads", 1])])


def test_a_bad_file_stops_no_others_and_done_ones_are_skipped(folder, checkpoint, tmp_path, capsys) -> None:
    made = tmp_path / "out"
    assert upscale(checkpoint, folder, "-o", made) == 1
    out, err = capsys.readouterr()
    assert out.split() == [str(made / "a_4x.mp4"), str(made / "c_4x.mp4")]
    assert "bad_4x.mp4: " in err and err.strip().endswith("1 of 3 files failed")
    assert [len(clips.frames_of(made / name)) for name in ("a_4x.mp4", "c_4x.mp4")] == [6, 2]
    before = (made / "a_4x.mp4").stat().st_mtime_ns
    (made / "c_4x.mp4").unlink()
    assert upscale(checkpoint, folder / "a.mp4", folder / "c.mp4", "-o", made) == 0
    assert capsys.readouterr().out.split() == [str(made / "c_4x.mp4")]
    assert (made / "a_4x.mp4").stat().st_mtime_ns == before


def test_several_inputs_need_a_folder_and_names_of_their_own(folder, checkpoint, tmp_path, capsys) -> None:
    inputs = [folder / "a.mp4", folder / "c.mp4"]
    for more, said in (
        (["-o", tmp_path / "one.mkv"], "set a folder with -o"),
        (["-o", tmp_path, "--preview", 2], "work with only one input"),
    ):
        assert upscale(checkpoint, *inputs, *more) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "a.mp4").symlink_to(folder / "a.mp4")
    assert upscale(checkpoint, folder / "a.mp4", tmp_path / "a.mp4", "-o", tmp_path / "out") == 2
    assert "two inputs would both become" in capsys.readouterr().err


def test_the_scenes_are_those_that_a_run_finds(folder, checkpoint, tmp_path, capsys) -> None:
    lists = [tmp_path / "told.csv", tmp_path / "found.csv"]
    assert main(["scenes", str(folder / "a.mp4"), "--cuts-out", str(lists[0])]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0 to 1: 2 frames",
        "2 to 4: 3 frames",
        "5 to 5: 1 frame",
    ]
    assert upscale(checkpoint, folder / "a.mp4", "-o", tmp_path / "out.mkv", "--cuts-out", lists[1]) == 0
    assert lists[0].read_text() == lists[1].read_text()
    assert main(["scenes", str(folder / "a.mp4"), "--start", "90"]) == 2
    assert "no frames between --start and --end" in capsys.readouterr().err
