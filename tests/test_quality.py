"""Measures of quality: equal to the library's, and right where the answer is known."""

from __future__ import annotations

import csv
import math
import re

import av
import piq
import pytest
import torch
from samples import moving

from stream_diffvsr import CheckpointError, IncompatibleInputError, ModelNotFoundError, to_pixels
from stream_diffvsr.cli.main import main
from stream_diffvsr.quality.measures import (
    NAMES,
    ghosts,
    measure,
    sample_zero_outside,
    visible,
    warping_error,
)
from stream_diffvsr.quality.networks import WEIGHTS, open_networks

LEARNED = {"lpips", "dists", "tlpips", "tof_raft"}


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


@pytest.fixture(scope="module")
def raft():
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    return raft_large(weights=None).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vgg():
    from torchvision.models import vgg16

    torch.manual_seed(0)
    return vgg16(weights=None, init_weights=False).features.requires_grad_(False)


@pytest.fixture(scope="module")
def published():
    """Random weights in the form of those that piq publishes; all of DISTS' together are 1."""
    generator = torch.Generator().manual_seed(0)
    lpips = [torch.rand(1, count, 1, 1, generator=generator) for count in (64, 128, 256, 512, 512)]
    alpha, beta = torch.rand(2, 1, 1475, 1, 1, generator=generator).softmax(0) / 1475
    return lpips, {"alpha": alpha, "beta": beta}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vgg, raft, published):
    """Files in torch's oldest format without code, as VGG-16 is published, and in the current one."""
    folder = tmp_path_factory.mktemp("weights")
    weights = {f"features.{name}": x for name, x in vgg.state_dict().items()}
    torch.save(weights, folder / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(published[0], folder / "lpips_weights.pt")
    torch.save(published[1], folder / "dists_weights.pt")
    torch.save(raft.state_dict(), folder / "raft_large.pth")
    return folder


@pytest.fixture(scope="module")
def networks(folder):
    return open_networks(folder)


def features(vgg, picture, pool=None):
    """The last activations of VGG-16's five blocks."""
    mean, spread = (
        torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x, found = (picture - mean) / spread, []
    for layer in vgg:
        if isinstance(layer, torch.nn.MaxPool2d):
            found.append(x)
            x = (pool or layer)(x)
        else:
            x = layer(x.clone())
    return found


def test_lpips_is_the_weighted_distance_of_unit_features(networks, vgg, published, result, truth):
    value = 0.0
    for weight, *pair in zip(published[0], features(vgg, result[:1]), features(vgg, truth[:1]), strict=True):
        a, b = (x / x.norm(dim=1, keepdim=True) for x in pair)
        value += float((weight * (a - b).square()).sum(1).mean())
    assert float(networks.lpips(result[:1], truth[:1])) == pytest.approx(value, rel=1e-4)


def test_dists_is_the_weighted_similarity_of_structure_and_texture(networks, vgg, published, result, truth):
    window = torch.hann_window(5, periodic=False)[1:-1]
    window = torch.outer(window, window)

    def pool(x):
        kernel = (window / window.sum()).expand(x.shape[1], 1, 3, 3)
        squares = torch.nn.functional.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1])
        return (squares + 1e-12).sqrt()

    one, other = ([picture, *features(vgg, picture, pool)] for picture in (result[:1], truth[:1]))
    both = list(zip(one, other, strict=True))
    means = [[x.mean((2, 3)) for x in pair] for pair in both]
    texture = torch.cat([(2 * a * b + 1e-6) / (a**2 + b**2 + 1e-6) for a, b in means], 1)
    spread = [[x.var((2, 3), correction=0) for x in pair] for pair in both]
    common = [(x * y).mean((2, 3)) - a * b for (x, y), (a, b) in zip(both, means, strict=True)]
    structure = torch.cat(
        [(2 * c + 1e-6) / (v + w + 1e-6) for c, (v, w) in zip(common, spread, strict=True)], 1
    )
    alpha, beta = (published[1][kind][..., 0, 0] for kind in ("alpha", "beta"))
    wanted = 1 - float((alpha * texture).sum() + (beta * structure).sum())
    assert float(networks.dists(result[:1], truth[:1])) == pytest.approx(wanted, abs=1e-4)


def test_measures_over_time_are_those_of_stablevsr(networks, raft):
    truth = to_pixels(moving(2, 128, 128))
    result = (truth + 0.1 * torch.randn(truth.shape)).clamp(0, 1)
    each = list(measure(pairs(result, truth), networks=networks))[1]
    flows = [raft(x[1:], x[:1])[-1] for x in (result, truth)]
    assert each.tof_raft == pytest.approx(float((flows[0] - flows[1]).abs().mean()), rel=1e-3)
    changes = [float(networks.lpips(x[:1], x[1:])) for x in (result, truth)]
    assert each.tlpips == pytest.approx(abs(changes[0] - changes[1]), rel=1e-4)
    assert min(getattr(each, name) for name in LEARNED) > 0


def test_learned_measures_of_a_perfect_result(networks, truth):
    first, second = measure(pairs(truth[:2], truth[:2]), networks=networks)
    assert (second.lpips, second.tlpips, second.tof_raft) == (0, 0, 0)
    assert second.dists == pytest.approx(0, abs=1e-6)
    assert math.isnan(first.tlpips) and math.isnan(first.tof_raft)


def test_missing_or_other_weights_are_refused(folder, tmp_path):
    with pytest.raises(ModelNotFoundError) as missing:
        open_networks(tmp_path)
    assert all(url in str(missing.value) for url in WEIGHTS.values()) and "\n" not in str(missing.value)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in ("vgg16.pth", "lpips_weights.pt", "dists_weights.pt", "raft_large.pth"):
        (tmp_path / name).unlink()
        with pytest.raises(ModelNotFoundError, match=name.split("_weights")[0].split(".")[0]):
            open_networks(tmp_path)
        torch.save({"alpha": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            open_networks(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(folder / name)


def test_a_ghost_is_counted_where_the_previous_frame_comes_back():
    plain = torch.full((1, 3, 48, 64), 0.3)
    before = plain.clone()
    before[..., 10:30, 10:30] += 0.3 + 0.2 * torch.rand(20, 20)
    still, moved = torch.zeros(1, 2, 48, 64), torch.zeros(1, 2, 48, 64)
    moved[:, 0] = -24
    faint = plain + 0.3 * (before - plain)
    elsewhere = faint.roll(24, 3)
    assert ghosts(faint, plain, plain, before, still) == 1
    assert ghosts(elsewhere, plain, plain, before, moved) == 1, "moved along the flow"
    assert ghosts(elsewhere, plain, plain, before, still) == 0, "not like what was there"
    assert ghosts(2 * plain - faint, plain, plain, before, still) == 0, "the opposite"
    assert ghosts(faint, faint, plain, before, still) == 0, "the truth shows it"
    assert ghosts(faint, plain, faint, before, still) == 0, "not from guidance"
    small = plain.clone()
    small[..., 10:14, 10:14] = faint[..., 10:14, 10:14]
    assert ghosts(small, plain, plain, before, still) == 0, "too small"


def write_clip(path, frames):
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[-1], frames.shape[-2], "bgr0"
        for frame in (frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_command(tmp_path, folder, result, truth, capsys):
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
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines()]
    assert lines[0] == ["measure", "mean of 2 frames", "computed from"]
    assert [line[0] for line in lines[2:]] == [n for n in NAMES if n not in LEARNED | {"ghosts"}]
    assert all(re.search(r"(piq|torch) \d", how) for _, _, how in lines[2:]), "with versions"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main(["metrics", files[0], str(tmp_path / "missing.mkv")]) == 2
    assert main(["metrics", *files[:2], "--weights", str(tmp_path)]) == 2
    assert WEIGHTS["raft_large"] in capsys.readouterr().err
    assert main(["metrics", *files[:2], "--weights", str(folder), "--unguided", files[0]]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in NAMES) and "| ghosts | 0 |" in printed
    assert "raft_large.pth" in printed
