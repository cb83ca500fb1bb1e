"""The command line: exit codes and one-sentence errors for every bad input, and what a good run writes."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import clips
import pytest
from PIL import Image

from stream_diffvsr import StreamDiffVSRState
from stream_diffvsr.cli.main import main


@pytest.fixture
def command(checkpoint: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `stream-diffvsr upscale` here: exit code, standard output, last line of standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        model = ["--model", str(checkpoint), "--flow", "none", "--device", "cpu", "--steps", "1"]
        code = main(["upscale", *model, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().splitlines()[-1] if captured.err.strip() else ""

    return run


def cut_video(folder: Path) -> Path:
    """An mp4 whose index, at its end, is missing."""
    video = clips.write_video(folder / "whole.mp4")
    cut = folder / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 3])
    return cut


def text_as_video(folder: Path) -> Path:
    (folder / "text.mp4").write_text("This is no video.\n" * 50)
    return folder / "text.mp4"


def empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def only_sound(folder: Path) -> Path:
    import av

    with av.open(str(folder / "sound.m4a"), "w", format="mp4") as out:
        clips.write_sound(out, out.add_stream("aac", rate=48000, layout="stereo"), 8, 50)
    return folder / "sound.m4a"


def folder_without_pictures(folder: Path) -> Path:
    (folder / "none").mkdir()
    (folder / "none" / "readme.txt").write_text("no")
    return folder / "none"


def broken_picture(folder: Path) -> Path:
    Image.fromarray(clips.picture(0)).save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    return folder / "cut.png"


def too_small(folder: Path) -> Path:
    Image.fromarray(clips.picture(0, 20, 20)[:4, :4]).save(folder / "small.png")
    return folder / "small.png"


BAD_INPUTS = {
    "missing": (lambda folder: folder / "missing.mp4", "does not exist"),
    "empty": (empty, "is empty"),
    "cut": (cut_video, "cannot be opened"),
    "text": (text_as_video, "cannot be opened"),
    "sound": (only_sound, "no video stream"),
    "no pictures": (folder_without_pictures, "contains no pictures"),
    "broken picture": (broken_picture, "cannot be read|is damaged"),
    "too small": (too_small, "too small"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name: str, command, tmp_path: Path) -> None:
    make, said = BAD_INPUTS[name]
    source = make(tmp_path)
    before = set(tmp_path.rglob("*"))
    code, _, error = command(source)
    assert code == 2, error
    assert error.startswith("stream-diffvsr: ") and "Traceback" not in error
    import re

    assert re.search(said, error), error
    assert set(tmp_path.rglob("*")) == before, "something was left behind"


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_folder(command, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0)
    try:
        code, _, error = command(folder)
    finally:
        folder.chmod(0o700)
    assert code == 2 and "cannot be read" in error


def test_unreadable_by_a_failing_system(command, tmp_path: Path, monkeypatch) -> None:
    """The same for the superuser, whom no permission stops."""
    folder = tmp_path / "locked"
    folder.mkdir()

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    code, _, error = command(folder)
    assert code == 2 and "cannot be read (Permission denied)" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "{folder}/missing/out.mp4"], "does not exist"),
        (["-o", "{folder}/out.avi"], "a supported extension"),
        (["-o", "{folder}/out.png"], "a supported extension"),
        (["-o", "{folder}/in.mp4", "--overwrite"], "is the source itself"),
        (["--steps", "0"], "num_inference_steps"),
        (["--codec", "prores", "--crf", "3"], "no quality setting"),
        (["--crf", "52"], "h264 accepts --crf values from 0 to 51, not 52"),
        (["--codec", "av1", "--crf=-1"], "av1 accepts --crf values from 0 to 63"),
        (["--scale", "1e9"], "scale must be a finite number from 0.01 to 100"),
        (["--short-edge", "99999999"], "short_edge must be a whole number from 2 to 65535"),
        (["--codec", "ffv1", "-o", "{folder}/out.webm"], "cannot be written to webm"),
        (["--pix-fmt", "nonsense"], "use one of"),
        (["--target", "101x51"], "even dimensions"),
        (["--pre-scale", "0.1"], "too small"),
        (["--start", "100"], "no frames in the requested span"),
        (["--stream", "5"], "no video stream 5"),
        (["--scene-cut", "{folder}/missing.csv"], "cannot be read"),
        (["--scene-cut", "300"], "from 0 to 255"),
        (["--state-in", "{folder}/missing.safetensors"], "saved state not found"),
        (["--scale", "nan"], "scale must be a finite number"),
        (["--scale", "0"], "scale must be a finite number"),
        (["--pre-scale", "inf"], "pre_scale must be a finite number"),
        (["--short-edge", "0"], "short_edge must be a whole number"),
        (["--target", "64x64", "--scale", "2"], "use only one"),
        (["--segment", "0"], "segment_frames must be a whole number of at least 1"),
        (["--tile-size", "100", "--tile-overlap", "50"], "tile_overlap must be below half"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, command, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 2)
    before = source.read_bytes()
    code, _, error = command(source, *[text.format(folder=tmp_path) for text in arguments])
    assert code == 2, error
    assert said in error
    assert source.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--start", "soon"], "not a position in a video"),
        (["--target", "wide"], "must look like 1920x1080"),
        (["--target", "100000x64"], "sides of at most 65535"),
        (["--fps", "1/0"], "rate must be given as FRAMES_PER_SECOND"),
        (["--fps", "0"], "rate must be given as FRAMES_PER_SECOND"),
        (["--fps", "1e400"], "rate must be given as FRAMES_PER_SECOND"),
        (["--fps", "1e999999999"], "rate must be given as FRAMES_PER_SECOND"),
        (["--fps", "1/1000000000000"], "rate must be given as FRAMES_PER_SECOND"),
        (["--codec", "divx"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be_read(
    arguments: list[str], said: str, command, tmp_path: Path, capsys
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path / "in.mp4", *arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-o", "--compare", "--state-out", "--cuts-out"])
def test_a_folder_in_the_place_of_a_file(flag: str, command, tmp_path: Path) -> None:
    """Told before the work, and not when the file is given its name."""
    (tmp_path / "there.mp4").mkdir()
    source = clips.write_video(tmp_path / "in.mp4", 2)
    code, _, error = command(source, flag, tmp_path / "there.mp4", "--overwrite")
    assert code == 2 and "is a folder: name a file in it" in error
    Image.fromarray(clips.picture(0)).save(tmp_path / "a.png")
    code, _, error = command(tmp_path / "a.png", "-o", tmp_path / "there.mp4")
    assert code == 2 and "is a folder" in error


def test_a_read_only_output_folder(command, tmp_path: Path, monkeypatch) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 2)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, error = command(source)
    assert code == 2 and "read-only" in error


def test_states_of_another_size_or_model(command, guided, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 2)
    other = clips.write_video(tmp_path / "other.mp4", 2, size=(48, 32))
    assert command(other, "--state-out", tmp_path / "s.safetensors")[0] == 0
    code, _, error = command(source, "--state-in", tmp_path / "s.safetensors")
    assert code == 2 and "48x32" in error and "32x24" in error
    state = StreamDiffVSRState(metadata={"model": "somebody else's"})
    state.save(tmp_path / "t.safetensors")
    code, _, error = command(source, "--state-in", tmp_path / "t.safetensors")
    assert code == 2 and "somebody else's" in error


def test_failing_while_running_is_exit_code_1(command, tmp_path: Path, monkeypatch) -> None:
    from stream_diffvsr.media import write

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.SegmentWriter, "add", full)
    code, _, error = command(clips.write_video(tmp_path / "in.mp4", 2))
    assert code == 1 and "No space left" in error
    assert not (tmp_path / "in_4x.mp4").exists()


def test_interrupted_is_exit_code_130(command, tmp_path: Path, monkeypatch) -> None:
    from stream_diffvsr.cli import upscale

    def interrupt(steps, *_: object) -> None:
        next(iter(steps))
        raise KeyboardInterrupt

    source = clips.write_video(tmp_path / "in.mp4", 4)
    with monkeypatch.context() as patch:
        patch.setattr(upscale, "run_to_end", interrupt)
        assert command(source)[0] == 130
    assert len(clips.frames_of(tmp_path / "in_4x.mp4")) == 1
    assert command(source)[0] == 0
    assert len(clips.frames_of(tmp_path / "in_4x.mp4")) == 4


def test_names_of_outputs(command, tmp_path: Path) -> None:
    image = Image.fromarray(clips.picture(0))
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.gif")
    (tmp_path / "frames").mkdir()
    image.save(tmp_path / "frames" / "1.png")
    clips.write_video(tmp_path / "c.mkv", 2)
    clips.write_video(tmp_path / "d.avi", 2, codec="mpeg4")
    made = {name: command(tmp_path / name) for name in ("a.jpg", "b.gif", "frames", "c.mkv", "d.avi")}
    assert {name: code for name, (code, _, _) in made.items()} == dict.fromkeys(made, 0)
    assert {name: Path(out.strip()).name for name, (_, out, _) in made.items()} == {
        "a.jpg": "a_4x.jpg",
        "b.gif": "b_4x.png",
        "frames": "frames_4x",
        "c.mkv": "c_4x.mkv",
        "d.avi": "d_4x.mp4",
    }
    assert all((tmp_path / Path(out.strip()).name).exists() for _, out, _ in made.values())
    for size, said in (
        (("--scale", 2.5), "2.5x"),
        (("--short-edge", 40), "40p"),
        (("--target", "50x40"), "50x40"),
    ):
        code, out, _ = command(tmp_path / "a.jpg", *size)
        assert (code, Path(out.strip()).name) == (0, f"a_{said}.jpg")
    assert not list(tmp_path.glob("*.parts"))


def test_preview_and_cut_list(command, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 4)
    assert command(source, "--preview", 2, "--cuts-out", tmp_path / "cuts.csv")[0] == 0
    with Image.open(tmp_path / "in_4x_preview.jpg") as preview:
        assert preview.size == (256, 96)
    assert (tmp_path / "cuts.csv").read_text().splitlines()[1] == "1,1,4,4"


def test_plan_is_told_and_nothing_written(command, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 3)
    code, out, _ = command(
        source, "--plan", "--memory-plan", "tiled", "--tile-size", 128, "--tile-overlap", 32
    )
    assert code == 0
    size, plan, memory, disk, time = out.strip().splitlines()
    assert size == "size: 32x24 to 128x96, 3 frames"
    assert plan == "plan: convolutions in bands of 128 rows, U-Net in tiles of 128 (overlap 32)"
    assert memory.startswith("memory: about ") and disk.startswith("disk: about ")
    assert time.startswith("time: ") and time.endswith(" in all")
    assert [file.name for file in tmp_path.iterdir()] == ["in.mp4"]


def test_plan_of_released_weights_that_are_absent(tmp_path: Path, monkeypatch, capsys) -> None:
    """Told from their known widths; nothing is downloaded for it."""
    from stream_diffvsr.cli import upscale

    monkeypatch.setattr(upscale, "resolve", lambda model: None)
    monkeypatch.setattr(upscale, "open_model", None)
    source = clips.write_video(tmp_path / "in.mp4", 2)
    memory = ["--memory-plan", "banded", "--flow-scale", "0.5"]
    assert main(["upscale", str(source), "--plan", "--model", "v1", "--device", "cpu", *memory]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "plan: flow without its correlation volume, convolutions in bands of 128 rows"
    assert "weights 2.56" in lines[2] and "download" in lines[4]


def test_demo(checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The demo as it is, with few small frames and the tiny networks."""
    from stream_diffvsr.cli import demo

    for name, value in {"WIDTH": 40, "HEIGHT": 24, "FRAMES": 2}.items():
        monkeypatch.setattr(demo, name, value)
    folder = tmp_path / "demo"
    assert (
        main(["demo", "-o", str(folder), "--model", str(checkpoint), "--flow", "none", "--device", "cpu"])
        == 0
    )
    assert str(folder / "clip_4x.mp4") in capsys.readouterr().out
    assert len(clips.frames_of(folder / "clip_4x.mp4")) == 2
    with Image.open(folder / "compare.png") as picture:
        assert picture.size == (3 * 160 + 16, 96)


def test_ctrl_c_while_it_starts(monkeypatch, capsys) -> None:
    """One word, not a page of what was being imported."""
    from stream_diffvsr.cli import start

    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "stream_diffvsr.cli.main", Interrupted("main"))
    assert start() == 130
    assert capsys.readouterr().err == "stream-diffvsr: interrupted\n"


def test_the_bar_of_a_file_whose_length_nobody_knows(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """It counts up, where it once began anew with every frame."""
    source = clips.write_video(tmp_path / "a.m2v", 5, codec="mpeg2video", ticks=Fraction(1, 25))
    options = ["--flow", "none", "--device", "cpu", "--steps", "1"]
    assert main(["upscale", "--model", str(checkpoint), *options, str(source)]) == 0
    shown = [line for line in capsys.readouterr().err.splitlines() if "frame/s" in line]
    assert shown[-1].startswith("5frame ") and not any("-" in line for line in shown)


def test_a_reader_that_has_seen_enough_gets_no_error():
    """As in `stream-diffvsr doctor | head`: the pipe is closed before anything was written."""
    command = [sys.executable, "-m", "stream_diffvsr.cli.main", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1
    assert "Broken pipe" not in error and "Traceback" not in error
