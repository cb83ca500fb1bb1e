"""Measures of quality: equal to the library's, and right where the answer is known."""

from __future__ import annotations

import csv
import math

import av
import piq
import pytest
import torch
from samples import moving

from stream_diffvsr import IncompatibleInputError, to_pixels
from stream_diffvsr.cli.main import main
from stream_diffvsr.quality.measures import NAMES, measure, sample_zero_outside, visible, warping_error


@pytest.fixture(scope="module")
def truth():
    return to_pixels(moving(3, 60, 72))


@pytest.fixture(scope="module")
def result(truth):
    return (truth + 0.03 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def pairs(result, truth):
    return zip(result.split(1), truth.split(1), strict=True)


def test_equal_to_the_library(result, truth):
    first = next(measure(pairs(result, truth)))
    a, b = result[:1], truth[:1]
    assert first.psnr_rgb == pytest.approx(float(piq.psnr(a, b)), abs=1e-3)
    assert first.psnr_y == pytest.approx(float(piq.psnr(a, b, convert_to_greyscale=True)), abs=1e-2)
    assert first.ssim_rgb == pytest.approx(float(piq.ssim(a, b, downsample=False)), abs=1e-6)
    assert first.gmsd == pytest.approx(float(piq.gmsd(a, b)), abs=1e-6)
    assert first.vif == pytest.approx(float(piq.vif_p(a, b)), abs=1e-6)
    assert math.isnan(first.tof)


def test_a_perfect_result(truth):
    for index, each in enumerate(measure(pairs(truth, truth))):
        assert (each.psnr_y, each.psnr_rgb) == (math.inf, math.inf)
        assert (each.ssim_y, each.gmsd, each.vif) == pytest.approx((1, 0, 1), abs=1e-5)
        assert math.isnan(each.tof) if index == 0 else each.tof == 0


def test_sharpness_and_tint_where_the_answer_is_known(truth):
    half = 0.5 + (truth - 0.5) / 2
    assert next(measure(pairs(half, truth))).sharpness == pytest.approx(0.5, abs=1e-4)
    tinted = truth * 0.8 + 0.1
    shifted = tinted + torch.tensor([0.0, 0.0, 0.01])[:, None, None]  # blue: luminance 0.00114 higher
    each = next(measure(pairs(shifted, tinted)))
    cb, cr = (0.01 - 0.00114) / 1.772, -0.00114 / 1.402
    assert each.colour_error == pytest.approx(255 * math.sqrt((cb**2 + cr**2) / 2), rel=1e-3)
    grain = 0.5 + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    assert next(measure(pairs(grain, grain * 0 + 0.5))).colour_error < 1.5, "only what is left of a blur"


def test_known_noise_gives_known_psnr(truth):
    grey = torch.full_like(truth, 0.5)
    each = next(measure(pairs(grey + 0.1, grey)))
    assert each.psnr_y == pytest.approx(20, abs=1e-4)


def test_flicker_raises_the_errors_over_time(truth):
    steady = list(measure(pairs(truth, truth)))[1:]
    flicker = truth + 0.1 * torch.tensor([0.0, 1, 0])[:, None, None, None]
    shaken = list(measure(pairs(flicker, truth)))[1:]
    assert all(b.warping_error > 10 * a.warping_error for a, b in zip(steady, shaken, strict=True))


def test_warping_error_is_zero_along_the_true_motion():
    frames = moving(2, 32, 40)  # each shows the pattern of the one before, two pixels further left
    flow = torch.zeros(1, 2, 32, 40)
    flow[:, 0] = -2
    wide = moving(2, 32, 44)
    shown, before = wide[1:, ..., :40], wide[1:, ..., 2:42]
    seen = visible(flow, -flow)
    assert seen[..., 2:].all()
    assert not seen[..., :2].any(), "what came in from outside is not judged"
    assert warping_error(before, shown, -flow, visible(-flow, flow)) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(sample_zero_outside(frames[:1], torch.zeros_like(flow)), frames[:1], atol=1e-5)


def test_the_border_does_not_count(truth):
    spoiled = truth.clone()
    spoiled[..., :4, :] = 0
    assert next(measure(pairs(spoiled, truth), border=4)).psnr_y == math.inf
    assert next(measure(pairs(spoiled, truth))).psnr_y < 40


@pytest.mark.parametrize(("shape", "border"), [((1, 3, 60, 70), 0), ((1, 3, 60, 72), 10)])
def test_what_cannot_be_compared_is_refused(truth, shape, border):
    with pytest.raises(IncompatibleInputError):
        next(measure([(torch.zeros(shape), truth[:1])], border))


def write_clip(path, frames):
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[-1], frames.shape[-2], "bgr0"
        for frame in (frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_command(tmp_path, result, truth, capsys):
    write_clip(tmp_path / "r.mkv", result[:2])
    write_clip(tmp_path / "t.mkv", truth)
    files = [str(tmp_path / name) for name in ("r.mkv", "t.mkv", "f.csv", "p.png")]
    assert main(["metrics", *files[:2], "--csv", files[2], "--plot", files[3]]) == 0
    printed = capsys.readouterr()
    assert "t.mkv has more frames" in printed.err
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    assert [row["frame"] for row in rows] == ["0", "1"]
    assert rows[0]["tof"] == ""
    assert f"{float(rows[0]['psnr_y']) / 2 + float(rows[1]['psnr_y']) / 2:.5g}" in printed.out
    assert all(name in printed.out for name in NAMES)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main(["metrics", files[0], str(tmp_path / "missing.mkv")]) == 2
