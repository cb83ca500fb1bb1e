"""Bands and tiles: everything is covered, weights sum to one, and neighbours share what they should."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stream_diffvsr import UpscaleOptions
from stream_diffvsr.families.diffvsr.denoise import UNET_MULTIPLE, Schedule, denoise, latent_tiles
from stream_diffvsr.families.diffvsr.networks import TorchCalls, TorchNetworks
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.flow import CallableFlow
from stream_diffvsr.flow.estimators import TileableFlow
from stream_diffvsr.tiling import bands, feather, spans, tiles
from stream_diffvsr.upscaler import ignore_progress


@st.composite
def cuts(draw):
    multiple = draw(st.sampled_from([1, 4, 8]))
    size = multiple * draw(st.integers(1, 40))
    overlap = draw(st.integers(0, (size - 1) // 2))
    return draw(st.integers(1, 400)), size, overlap, multiple


@given(cuts())
def test_spans_cover_in_order_with_their_overlap(cut):
    length, size, overlap, multiple = cut
    parts = spans(length, size, overlap, multiple)
    assert parts[0].start == 0 and parts[-1].stop == length
    assert all(part.start % multiple == 0 and 0 < part.stop - part.start <= size for part in parts)
    for before, after in itertools.pairwise(parts):
        assert before.start < after.start
        # Only where starts every `multiple` cannot be closer is less shared than asked for.
        assert before.stop - after.start >= min(overlap, size - multiple)


@given(cuts())
def test_feathers_are_positive_and_sum_to_one(cut):
    length, *rest = cut
    parts = spans(length, *rest)
    total = torch.zeros(length)
    for part, weight in zip(parts, feather(parts, length), strict=True):
        assert (weight > 0).all()
        total[part] += weight
    torch.testing.assert_close(total, torch.ones(length), atol=1e-6, rtol=0)


@given(st.integers(3, 90), st.data())
def test_two_spans_share_out_by_squares(size, data):
    overlap = data.draw(st.integers(1, (size - 1) // 2))
    length = 2 * size - overlap
    first, second = feather(spans(length, size, overlap), length)
    near = torch.arange(overlap) + 0.5
    rise = near**2 / (near**2 + (overlap - near) ** 2)
    torch.testing.assert_close(second, torch.cat([rise, torch.ones(size - overlap)]))
    torch.testing.assert_close(first, second.flip(0))


@given(cuts())
def test_no_weight_jumps(cut):
    """Where a tile begins or ends inside the picture, it counts the least."""
    length, *rest = cut
    parts = spans(length, *rest)
    weights = feather(parts, length)
    for (before, behind), (fading, rising) in zip(
        itertools.pairwise(parts), itertools.pairwise(weights), strict=True
    ):
        if before.stop - behind.start > 1:
            assert rising[0] < rising[1] and fading[-1] < fading[-2]


@given(st.integers(1, 90), st.integers(1, 90), cuts())
def test_blending_a_picture_cut_to_tiles_gives_the_picture(height, width, cut):
    picture, blended = torch.randn(1, 2, height, width), torch.zeros(1, 2, height, width)
    for tile in tiles(height, width, *cut[1:]):
        tile.add(tile.cut(picture), blended)
    torch.testing.assert_close(blended, picture, atol=1e-6, rtol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(256, 1024), st.integers(0, 127))
def test_latent_tiles_lie_on_the_grid_of_the_unet(height, width, size, overlap):
    parts = latent_tiles(4 * height, 4 * width, size, overlap)
    assert all(tile.rows.start % UNET_MULTIPLE == tile.columns.start % UNET_MULTIPLE == 0 for tile in parts)
    assert sum(float(tile.weight.sum()) for tile in parts) == pytest.approx(16 * height * width, rel=1e-5)


class Pointwise(torch.nn.Module):
    """In place of the U-Net: it looks at no neighbours, so tiles must make no difference."""

    def forward(self, x, timestep, **unused):
        return (torch.tanh(x[:, :4] + x[:, 4:].sum(1, keepdim=True) + timestep / 1000),)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(64, 512), st.integers(0, 255), st.integers(1, 3))
def test_denoising_in_tiles_cuts_and_blends_whole_tensors(pipe, height, width, size, overlap, steps):
    options = UpscaleOptions(num_inference_steps=steps)
    schedule = Schedule.prepare(pipe.scheduler_config, steps, None, torch.device("cpu"))
    noise, lq = torch.randn(1, 4, 4 * height, 4 * width), torch.randn(1, 3, 4 * height, 4 * width)
    networks = TorchNetworks(pipe.flow, Pointwise(), pipe.control, pipe.vae)
    calls = TorchCalls(networks, Plan(), torch.float32, pipe.placement, lambda stage: 0)
    same = {
        "prompts": [torch.zeros(1, 77, 1)],
        "schedule": schedule,
        "options": options,
        "on_step": ignore_progress,
    }
    results = [
        denoise(calls, noise, lq, None, tiles=parts, **same)
        for parts in (
            latent_tiles(4 * height, 4 * width, None, 0),
            latent_tiles(4 * height, 4 * width, size, min(overlap, (size - 1) // 2)),
        )
    ]
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_no_tile_size_is_one_tile_that_changes_nothing():
    (tile,) = latent_tiles(12, 20, None, 64)
    x, out = torch.randn(1, 4, 12, 20), torch.zeros(1, 4, 12, 20)
    tile.add(tile.cut(x), out)
    assert torch.equal(out, x)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 20), st.sampled_from([1, 2, 4]))
def test_bands_put_together_are_the_picture(height, rows, halo, scale):
    picture = torch.randn(1, 1, height * scale, 3)
    parts = [band.scaled(scale) for band in bands(height, rows, halo)]
    assert torch.equal(torch.cat([band.crop(band.see(picture)) for band in parts], dim=2), picture)


@given(st.integers(8, 40), st.integers(1, 12), st.integers(1, 3))
def test_a_convolution_over_bands_is_that_of_the_whole(height, rows, radius):
    x, kernel = torch.randn(1, 1, height, 9), torch.randn(1, 1, 2 * radius + 1, 3)
    whole = F.conv2d(x, kernel, padding=(radius, 1))
    parts = [
        band.crop(F.conv2d(band.see(x), kernel, padding=(radius, 1))) for band in bands(height, rows, radius)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


class _Constant(TileableFlow):
    def forward(self, current, previous):
        return torch.tensor([3.0, -2.0])[None, :, None, None].expand(1, 2, *current.shape[-2:])


@pytest.mark.parametrize("size", [(40, 56), (1200, 1100), (1024, 1793)])
def test_tiled_flow_of_a_constant_motion_is_the_whole_flow(size):
    frame, flow = torch.zeros(1, 3, *size), _Constant()
    assert (flow.estimate(frame, frame, "tiled") - flow.estimate(frame, frame, "whole")).abs().max() < 1e-5


def test_tiled_flow_of_a_changing_motion_is_the_whole_flow():
    frame = torch.randn(1, 3, 1300, 1100)

    class Colours(TileableFlow):
        def forward(self, current, previous):
            return current[:, :2] - previous[:, 1:]

    flow = Colours()
    assert (flow.estimate(frame, -frame, "tiled") - flow(frame, -frame)).abs().max() < 1e-5


def test_a_callable_always_gets_both_whole_frames():
    seen = []
    flow = CallableFlow(lambda now, before: seen.append(now.shape) or now.new_zeros(1, 2, *now.shape[-2:]))
    assert flow.methods == ("whole",)
    flow.estimate(torch.zeros(1, 3, 1100, 1100), torch.zeros(1, 3, 1100, 1100), "whole")
    assert seen == [(1, 3, 1100, 1100)]
