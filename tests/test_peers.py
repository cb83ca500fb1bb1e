"""benchmarks/peers.py: what it compares is enlarged by the same rules, and what is missing is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from samples import moving
from test_quality import write_clip
from torch.nn import functional as F

from stream_diffvsr import to_pixels
from stream_diffvsr.media.sizes import resize
from stream_diffvsr.quality.measures import luma, psnr

ROOT = Path(__file__).parents[1]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (ROOT, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    import peers

    return peers


def test_one_command_makes_table_figures_and_pictures(peers, tmp_path, monkeypatch, capsys):
    truth = (to_pixels(moving(4, 64, 72)) * 255).round() / 255
    write_clip(tmp_path / "clip.mkv", truth)
    monkeypatch.setitem(peers.PEERS, "SPAN", peers.Peer("no-such-wheel", "no_such_package", "x"))
    clip, names = f"{tmp_path}/clip.mkv@2", ["bicubic", "sharpened bicubic", "nano", "nano, unguided"]
    command = ["peers.py", clip, "-o", f"{tmp_path}/out", "--sizes", "--methods", *names, "SPAN"]
    monkeypatch.setattr("sys.argv", command)
    peers.main()
    printed = capsys.readouterr()
    assert "SPAN is left out: it needs the package no-such-wheel" in printed.err
    assert [line.split(" | ")[0][2:] for line in printed.out.splitlines()[2:6]] == names
    assert "piq" in printed.out and "1 threads" in printed.out
    clean, h264 = json.loads((tmp_path / "out" / "peers.json").read_text())["clips"]["clip@2"].values()
    lq = (resize(truth[2:], (16, 18)).clamp(0, 1) * 255).round() / 255
    plain = F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1).mul(255).round() / 255
    a, b = (luma(x)[..., 8:-8, 8:-8] for x in (plain, truth[2:]))
    wanted = (psnr(a[:1], b[:1]) + psnr(a[1:], b[1:])) / 2
    assert clean["bicubic"]["psnr_y"] == pytest.approx(wanted, abs=1e-3)
    assert clean["sharpened bicubic"]["sharpness"] > clean["bicubic"]["sharpness"]
    assert clean["nano"]["psnr_y"] > h264["nano"]["psnr_y"]
    assert clean["nano, unguided"]["ghosts"] == 0 and math.isnan(clean["bicubic"]["ghosts"])
    assert Image.open(tmp_path / "out" / "clip@2-clean.png").size == (4 * 144 + 3 * 4, 128)


def test_a_clip_that_is_not_there_is_refused(peers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["peers.py", f"{tmp_path}/none.mp4@3", "-o", str(tmp_path)])
    with pytest.raises(SystemExit):
        peers.main()
    assert "none.mp4 is not a file" in capsys.readouterr().err


def test_costs_of_a_frame(peers):
    found = peers.cost("nano", 16, 12, 1, 1)
    assert found["ms"] > 0 and found["mb"] >= 0


def test_networks_of_ncnn_get_the_picture_as_it_is(peers, tmp_path, monkeypatch):
    """A network that repeats each pixel, with a picture of odd sides whose channels come last."""
    pytest.importorskip("ncnn")
    folder = tmp_path / "tiny_network" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    layers = "Input in 0 1 data", "Interp up 1 1 data output 0=1 1=2.0 2=2.0"
    (folder / "x2.param").write_text("\n".join(["7767517", "2 2", *layers, ""]))
    (folder / "x2.bin").touch()
    monkeypatch.syspath_prepend(tmp_path)
    enlarge = peers.open_peer(peers.Peer("tiny", "tiny_network", "x2", times=2))
    frame = torch.rand(1, 3, 7, 13).to(memory_format=torch.channels_last)
    torch.testing.assert_close(enlarge(frame), F.interpolate(frame, scale_factor=4))
