"""Colours kept and the strength of the model: on what goes out, and never in the sequence."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from samples import moving
from torch import Tensor

from stream_diffvsr import UpscaleOptions, load_pipeline, to_pixels
from stream_diffvsr.fidelity import _from_lab, _to_lab, adain, lab, wavelet
from stream_diffvsr.jobs.job import VideoJob
from stream_diffvsr.media.sizes import enlarge
from stream_diffvsr.upscaler import Upscaled

HEIGHT, WIDTH, COUNT, SHIFT = 24, 32, 4, 2
"""The clip pans by SHIFT pixels a frame."""
CROP = 32
"""Pixels of the result at its border, where what comes into the picture changes the broad colours: 31."""


def pixels(lq: Tensor) -> Tensor:
    return to_pixels(lq)


def finished(results: list[Upscaled], frames: Tensor, **fidelity) -> list[Tensor]:
    job = VideoJob(source=Path(), output=Path(), **fidelity)
    lqs = pixels(frames).split(1)
    return [job.finished(each.hq, lq, (HEIGHT, WIDTH)) for each, lq in zip(results, lqs, strict=True)]


def flicker(shown: list[Tensor], shift: int) -> float:
    """Mean change from frame to frame where the picture, moved by `shift` pixels, should be the same."""
    inside = [each[..., CROP:-CROP, CROP:-CROP] for each in shown]
    pairs = itertools.pairwise(inside[1:])
    width = inside[0].shape[-1] - shift
    return max(
        float((before[..., shift : shift + width] - now[..., :width]).abs().mean()) for before, now in pairs
    )


@pytest.fixture(scope="module", params=[0, SHIFT], ids=["still", "panning"])
def clip(request) -> tuple[int, Tensor, list[Upscaled]]:
    """Pixels of its motion, frames, and what nano makes of them."""
    shift = request.param
    frames = moving(COUNT, HEIGHT, WIDTH) if shift else moving(1, HEIGHT, WIDTH).repeat(COUNT, 1, 1, 1)
    pipe = load_pipeline("nano", device="cpu")
    return shift, frames, list(pipe.stream(frames.split(1), UpscaleOptions(num_inference_steps=1)))


@pytest.mark.parametrize("drift", [0.0, 0.05])
@pytest.mark.parametrize("fix", ["lab", "wavelet", "adain"])
def test_fixed_colours_flicker_no_more_than_before(clip, fix: str, drift: float) -> None:
    """Neither as the model makes it, nor with colours that drift.

    adain measures whole frames, which change where a picture pans: that may cost a part of an 8-bit level.
    """
    shift, frames, results = clip
    tint = torch.tensor([1.0, -1.0, 0.5])[None, :, None, None] * drift
    results = [replace(each, hq=each.hq + tint * each.index) for each in results]
    plain, fixed = finished(results, frames), finished(results, frames, colour_fix=fix)
    spare = 0.25 / 255 if fix == "adain" and shift else 0.0
    assert flicker(fixed, 4 * shift) <= flicker(plain, 4 * shift) + spare
    for each, lq in zip(fixed, pixels(frames).split(1), strict=True):
        light = (each - lq.mean((2, 3), keepdim=True)).mean((2, 3)) if fix == "lab" else torch.zeros(1, 1)
        assert (each.mean((2, 3)) - lq.mean((2, 3)) - light.mean(1)).abs().max() < 0.01


def test_strength_goes_from_bicubic_to_the_model(clip) -> None:
    _, frames, results = clip
    bicubic = [enlarge(lq, (4 * HEIGHT, 4 * WIDTH)) for lq in pixels(frames).split(1)]
    model = [to_pixels(each.hq) for each in results]
    for strength, expected in ((0.0, bicubic), (1.0, model)):
        assert all(map(torch.equal, finished(results, frames, strength=strength), expected))
    half = finished(results, frames, strength=0.5)
    torch.testing.assert_close(half[2], (bicubic[2] + model[2]) / 2)
    beyond = finished(results, frames, strength=1.5)
    torch.testing.assert_close(beyond[2], (1.5 * model[2] - 0.5 * bicubic[2]).clamp(0, 1))


def test_wavelet_changes_broad_colours_only() -> None:
    lq_up, hq = torch.full((1, 3, 96, 96), 0.4), torch.full((1, 3, 96, 96), 0.6)
    hq[..., ::2] += 0.1
    inside = (..., slice(32, -32), slice(32, -32))  # at the border a repeated column counts more
    torch.testing.assert_close(wavelet(hq, lq_up)[inside], hq[inside] - 0.25, atol=1e-3, rtol=0)
    fine = hq - hq.mean()
    torch.testing.assert_close(wavelet(hq, hq - fine)[inside], hq[inside], atol=1e-3, rtol=0)


def test_lab_changes_broad_hue_and_saturation_only() -> None:
    lq_up, hq = torch.full((1, 3, 96, 96), 0.4), torch.full((1, 3, 96, 96), 0.6)
    hq[:, 0] += 0.2
    hq[..., ::2] += 0.05
    fixed = lab(hq, lq_up)
    inside = (..., slice(32, -32), slice(32, -32))
    torch.testing.assert_close(_to_lab(fixed)[:, 0], _to_lab(hq)[:, 0], atol=0.05, rtol=0)
    assert _to_lab(fixed)[:, 1:].mean((2, 3)).abs().max() < 0.1 < _to_lab(hq)[:, 1:].mean((2, 3)).abs().max()
    fine = _to_lab(hq)[inside][:, 1:]
    assert (_to_lab(fixed)[inside][:, 1:] - fine).std((2, 3)).max() < 0.05  # moved as one
    torch.testing.assert_close(lab(hq, hq), hq)


def test_lab_is_the_standards() -> None:
    """sRGB's own corners, as they are tabled for its white."""
    tabled = {
        (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
        (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
        (0.0, 1.0, 0.0): (87.74, -86.18, 83.18),
        (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
    }
    rgb = torch.tensor(list(tabled))[:, :, None, None]
    found = _to_lab(rgb)[..., 0, 0] - torch.tensor([16.0, 0.0, 0.0])
    torch.testing.assert_close(found, torch.tensor(list(tabled.values())), atol=0.02, rtol=0)
    many = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_from_lab(_to_lab(many)), many, atol=1e-5, rtol=0)


def test_adain_gives_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    hq, lq_up = torch.rand((2, 1, 3, 16, 16), generator=generator)
    fixed = adain(hq, 0.5 * lq_up)
    for measure in (torch.mean, torch.std):
        torch.testing.assert_close(measure(fixed, (2, 3)), measure(0.5 * lq_up, (2, 3)), atol=1e-4, rtol=1e-3)
