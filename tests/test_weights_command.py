"""`stream-diffvsr download` and `doctor`: as processes where that matters, over real HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from stand_in_hub import Fault, Handler, StandInHub, cut_after, status

from stream_diffvsr import find_checkpoints
from stream_diffvsr.cli.main import main
from stream_diffvsr.families.diffvsr.check import problem
from stream_diffvsr.load import download
from stream_diffvsr.weights.fetch import CHUNK
from stream_diffvsr.weights.find import VARIABLE
from stream_diffvsr.weights.released import RELEASES

UNET = "unet/diffusion_pytorch_model.safetensors"
COMMAND = "import sys; from stream_diffvsr.cli.main import main; sys.exit(main(sys.argv[1:]))"
CALL = "from stream_diffvsr.load import download; print(download('v1'))"

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(autouse=True)
def _no_torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="session")
def raft_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RAFT large with random weights."""
    from torchvision.models.optical_flow import raft_large

    path = tmp_path_factory.mktemp("raft") / "raft_large.safetensors"
    save_file(raft_large(weights=None).state_dict(), path)
    return path


@pytest.fixture
def raft(raft_file: Path, home: Path) -> Path:
    """It, in the user's models folder."""
    (home / "flow").mkdir(parents=True)
    return Path(shutil.copyfile(raft_file, home / "flow" / raft_file.name))


def start(
    hub: StandInHub, home: Path, *arguments: str, program: str = COMMAND, **variables: str
) -> subprocess.Popen[str]:
    data = home.parent.parent
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(data / "hub"), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell's background jobs, and all they start, ignore Ctrl-C.
    heed = None if sys.platform == "win32" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, text=True, preexec_fn=heed, **pipes)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def hang_after(count: int) -> Fault:
    """Send so many bytes, and no more for a while."""

    def fault(handler: Handler, content: bytes) -> None:
        cut_after(count)(handler, content)
        time.sleep(20)

    return fault


def test_two_processes_at_once(hub: StandInHub, home: Path):
    # The shapes are then known, so that the processes need no diffusers.
    download("v1", [home.parent / "first"])
    hub.requests.clear()
    ends = [end(process) for process in [start(hub, home, program=CALL) for _ in range(2)]]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert all(str(home / "v1") in out for _, out, _ in ends)
    assert problem(home / "v1") is None
    assert len(hub.gets(UNET)) == 1, "the second waited for the first"


def test_command(hub: StandInHub, home: Path, raft: Path, capsys: pytest.CaptureFixture[str]):
    hub.fail(UNET, cut_after(1000))
    assert main(["download"]) == 0
    out, error = capsys.readouterr()
    assert f"v1: {home / 'v1'}\n" in out and f"raft_large: {raft}\n" in out
    assert "100%" in error and "B/s" in error
    assert "HTTP" not in error, "the hub's client tells every request to those who listen"
    assert problem(home / "v1") is None


def test_command_without_connection(hub: StandInHub, home: Path):
    code, _, error = end(start(hub, home, "download", HF_HUB_OFFLINE="1"))
    assert code == 1
    assert "HF_HUB_OFFLINE" in error and str(home / "v1") in error and "Traceback" not in error
    assert hub.requests == []


def test_a_command_that_is_interrupted_or_killed(hub: StandInHub, home: Path, raft: Path):
    """What has come stays, nothing is left running, and the next call asks for the rest."""
    for signum, code, chunks in ((signal.SIGINT, 130, 2), (signal.SIGKILL, -signal.SIGKILL, 4)):
        hub.fail(UNET, hang_after(2 * CHUNK))
        process = start(hub, home, "download")
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size >= chunks * CHUNK for path in incomplete(home)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signum)
        got, _, error = end(process)
        assert got == code and (code < 0 or error.endswith("stream-diffvsr: interrupted\n"))
        assert incomplete(home) and find_checkpoints() == []
    code, _, error = end(start(hub, home, "download"))
    assert code == 0, error
    assert [request.start for request in hub.gets(UNET)] == [0, 2 * CHUNK, 4 * CHUNK]
    assert problem(home / "v1") is None


def incomplete(home: Path) -> list[Path]:
    """The U-Net's files that have begun to come."""
    return list((home / "v1.partial").rglob("unet/*.part"))


def test_through_a_proxy(hub: StandInHub, home: Path, raft: Path):
    """The only way to a hub whose name nobody knows; what it redirects to is asked for without."""
    proxy = dict.fromkeys(("HTTP_PROXY", "http_proxy"), hub.url)
    without = dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost")
    code, _, error = end(start(hub, home, "download", **proxy, **without, HF_ENDPOINT="http://hub.invalid"))
    assert code == 0, error
    assert problem(home / "v1") is None


def test_flow_weights_that_cannot_be_had(hub: StandInHub, home: Path, capsys: pytest.CaptureFixture[str]):
    """Then what runs without a connection is not all there, and a script is told so."""
    code, out, error = end(start(hub, home, "download", https_proxy="http://127.0.0.1:9"))
    assert code == 1 and f"v1: {home / 'v1'}\n" in out
    assert "flow weights of raft_large not found" in error and "Traceback" not in error
    (home / "flow").mkdir(parents=True)
    (home / "flow" / "raft_large.pth").write_bytes(b"<html>")
    assert main(["download"]) == 2
    assert "raft_large.pth (6 bytes) is" in capsys.readouterr().err


def test_a_revision_where_another_may_be(
    hub: StandInHub, home: Path, raft: Path, capsys: pytest.CaptureFixture[str]
):
    hub.fail("revision/other", status(404))
    assert main(["download"]) == 0
    hub.requests.clear()
    assert main(["download", "--revision", "other"]) == 2
    assert hub.requests == []
    error = capsys.readouterr().err
    assert "'other'" in error and "rename that folder" in error and str(home / "v1") in error
    assert main(["download", "--revision", "other", "--folder", str(home / "b")]) == 1
    assert "at revision 'other'" in capsys.readouterr().err
    assert main(["download", "--revision", "main", "--folder", str(home / "b")]) == 0
    assert str(home / "b" / "v1") in capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """What doctor says, by section."""
    assert main(["doctor", *arguments]) == 0
    sections = capsys.readouterr().out.strip().split("\n\n")[1:]
    return {title: [line.strip() for line in lines] for title, *lines in map(str.splitlines, sections)}


def test_doctor(
    checkpoint: Path, tmp_path: Path, raft: Path, home: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    given, variable = tmp_path / "given", tmp_path / "variable"
    monkeypatch.setenv(VARIABLE, str(variable))
    for path in (given / "v1", given / "mine", variable / "v1", home / "v1", home / "nano"):
        shutil.copytree(checkpoint, path)
    (given / "v1" / "vae" / "config.json").unlink()
    (home / "flow" / "raft_small.pth").write_bytes(b"cut")
    says = told(capsys, str(given))
    nano, mine, broken, used, named_nano, second, *missing = says["Weights"]
    assert [line.partition(":")[0] for line in missing] == [name for name in RELEASES if name != "v1"]
    assert nano.startswith("nano: ") and nano.endswith(", bundled")
    assert mine == f"mine: {given / 'mine'}, complete, will be used"
    assert broken.startswith(f"v1: {given / 'v1'}, ignored: ") and "vae/config.json" in broken
    assert used == f"v1: {variable / 'v1'}, complete, will be used"
    assert named_nano == f"nano: {home / 'nano'}, complete, but shadowed by the nano above"
    assert second == f"v1: {home / 'v1'}, complete, but shadowed by the v1 above"
    assert says["Folders"][:3] == [f"searched {folder}" for folder in (given, variable, home)]
    large, small, *_ = says["Flow"]
    assert large == f"raft_large: {raft}"
    assert small.startswith("raft_small: ignored: ") and "raft_small.pth (3 bytes)" in small


def test_doctor_where_a_package_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.setitem(sys.modules, "diffusers", None)  # type: ignore[arg-type]
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "nano" in out and "ignored: " in out and "diffusers" in out and "Folders" in out


def test_doctor_on_an_empty_machine(
    hub: StandInHub, home: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    from huggingface_hub import constants

    _, missing, *_ = told(capsys)["Weights"]
    assert missing.startswith(f"v1: not found; would be downloaded to {home / 'v1'} (")
    assert missing.endswith(f"from {hub.url}/Jamichsu/Stream-DiffVSR")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    says = told(capsys)
    assert says["Weights"][1].endswith("but HF_HUB_OFFLINE forbids it")
    assert says["Flow"][0].startswith(f"raft_large: not found; would be downloaded to {tmp_path / 'torch'}")


def test_doctor_tells_of_work_that_was_left_over(tmp_path: Path, capsys) -> None:
    from stream_diffvsr.jobs.journal import Journal, WorkFolder

    with WorkFolder(tmp_path / "film.mp4").locked() as work:
        work.save(Journal({}, {}, {}))
        (work.folder / "main-000000.mp4").write_bytes(bytes(3_000_000))
        assert main(["doctor", str(tmp_path)]) == 0
        assert f"{work.folder}: 3.0 MB, in use by a run" in capsys.readouterr().out
    (tmp_path / "no_work.parts").mkdir()
    assert main(["doctor", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{work.folder}: 3.0 MB, 0 frames done: run the same command again to continue" in said
    assert "no_work" not in said
    work.journal_file.write_text("[]")
    assert main(["doctor", str(tmp_path)]) == 0
    assert "cannot be read" in capsys.readouterr().out
