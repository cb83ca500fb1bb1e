"""Plans: their order, their record, what they are predicted to need, and that exact ones are exact."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import moving
from torch.nn import functional as F

from stream_diffvsr import (
    IncompatibleInputError,
    StreamDiffVSRState,
    UpscaleOptions,
    estimate_memory,
    from_pixels,
    load_pipeline,
    to_pixels,
)
from stream_diffvsr.families.diffvsr import bands as banded
from stream_diffvsr.families.diffvsr import plan as choosing
from stream_diffvsr.families.diffvsr.plan import Plan, Planner
from stream_diffvsr.families.diffvsr.released import released_planner
from stream_diffvsr.families.diffvsr.vae import TemporalAutoencoderTiny
from stream_diffvsr.jobs import report as reporting
from stream_diffvsr.jobs.job import VideoJob
from stream_diffvsr.jobs.report import cost_lines, report_time

RAFT_METHODS = ("whole", "linear", "tiled")
OUTPUTS = [
    (1080, 1920),
    *(pytest.param(size, marks=pytest.mark.long) for size in ((1440, 2560), (2160, 3840), (4320, 7680))),
]
AUTO = UpscaleOptions()

VARIANTS = [([1, 3, 3], [3, 3, 1]), ([0, 1, 5], [5, 1, 0]), ([2, 0, 1], [1, 0, 2])]
"""Blocks per stage of encoder and decoder: the released networks', nano's, and more than one at full size."""


@settings(max_examples=10)
@given(st.sampled_from(VARIANTS), st.integers(2, 9), st.integers(2, 5), st.sampled_from([4, 16, 20, 64, 128]))
def test_bands_give_the_whole_frames_numbers(depths, height, width, rows):
    config = {"latent_channels": 4, "block_out_channels": [6, 6, 6]}
    vae = TemporalAutoencoderTiny(
        {**config, "num_encoder_blocks": depths[0], "num_decoder_blocks": depths[1]}
    )
    warped, latents = torch.randn(1, 3, 16 * height, 16 * width), torch.randn(1, 4, 4 * height, 4 * width)
    with torch.no_grad():
        features = vae.features(warped)
        for got, expected in zip(banded.features(vae, warped, rows), features, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        for given_features in (features, None):
            whole = vae.decode(latents, given_features)
            torch.testing.assert_close(
                banded.decode(vae, latents, given_features, None, rows), whole, atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("rows", [8, 32])
def test_banded_control_embedding(pipe, rows):
    warped = torch.randn(1, 3, 112, 48)
    with torch.no_grad():
        got, expected = banded.embed(pipe.control, warped, rows), pipe.control.embed(warped)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_order_of_plans():
    plans, plan = [], Plan()
    while plan is not None:
        plans.append(plan)
        plan = plan.next_plan("unet", RAFT_METHODS, 1024)
    assert [(p.flow, p.rows, p.tile) for p in plans] == [
        ("whole", None, None),
        ("linear", None, None),
        ("linear", 128, None),
        ("linear", 128, 1024),
        ("linear", 128, 512),
        ("linear", 128, 256),
    ]


@given(
    st.sampled_from(RAFT_METHODS),
    st.none() | st.integers(1, 125).map(lambda n: 4 * n),
    st.none() | st.integers(130, 2000),
)
def test_plans_survive_their_record(flow, rows, tile):
    plan = Plan(flow, rows, tile)
    assert Plan.from_json(plan.to_json()) == plan


@given(st.integers(512, 1024), st.integers(0, 511))
def test_smaller_tiles_overlap_by_less_than_half(tile, overlap):
    plan: Plan | None = Plan("linear", 128, tile, min(overlap, (tile - 1) // 2))
    while plan is not None:
        assert plan.overlap * 2 < plan.tile
        assert Plan.from_json(plan.to_json()) == plan
        plan = plan.next_plan("unet", RAFT_METHODS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}x",
        '{"flow": "no"}',
        '{"rows": "8"}',
        '{"rows": 5}',
        '{"tile": 1, "overlap": 0}',
        '{"tile": 64, "overlap": 40}',
    ],
)
def test_a_damaged_record_is_refused(text):
    with pytest.raises(IncompatibleInputError):
        Plan.from_json(text)


@lru_cache
def planner(dtype: torch.dtype = torch.float16) -> Planner:
    return released_planner("auto", dtype, torch.device("cpu"))


def need(size, plan) -> int:
    return planner().bytes_needed(size, AUTO, plan)


@pytest.mark.parametrize("output", OUTPUTS)
def test_lower_plans_need_less(output):
    size = output[0] // 4, output[1] // 4
    plans = [Plan(), Plan("linear"), Plan("linear", 128), Plan("linear", 128, 512), Plan("linear", 128, 256)]
    needs = [need(size, plan) for plan in [*plans, Plan("tiled", 128, 256)]]
    assert needs == sorted(needs, reverse=True) and needs[0] > 2 * needs[-1]


@pytest.mark.parametrize("output", OUTPUTS)
def test_auto_takes_the_first_plan_that_fits(output, monkeypatch, caplog):
    size = output[0] // 4, output[1] // 4
    for plan in (
        Plan(),
        Plan("linear"),
        Plan("linear", 128),
        Plan("linear", 128, 512),
        Plan("linear", 128, 256),
    ):
        free = math.ceil(need(size, plan) / choosing.CPU_SHARE)
        monkeypatch.setattr(choosing, "free_memory", lambda device, free=free: free)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            chosen = planner().plan(size, {}, AUTO)
        assert need(size, chosen) <= need(size, plan) and chosen.exact >= plan.exact
        (line,) = caplog.records
        assert line.message.startswith(f"memory plan: {chosen}")
        assert ("no exact plan fits" in line.message) == (not chosen.exact)


def test_an_accelerator_never_begins_with_tiles(monkeypatch):
    monkeypatch.setattr(choosing, "free_memory", lambda device: 1)
    there = replace(planner(), device=torch.device("cuda"))
    assert there.plan((135, 240), {}, AUTO) == Plan("linear", 128)
    assert planner().plan((135, 240), {}, AUTO) == Plan("tiled", 128, 256)


def test_a_recorded_plan_holds_for_its_size_only(monkeypatch):
    monkeypatch.setattr(choosing, "free_memory", lambda device: 2**60)
    recorded = choosing.plan_details(Plan("linear", 128), (90, 160))
    assert planner().plan((90, 160), recorded, AUTO) == Plan("linear", 128)
    assert planner().plan((90, 161), recorded, AUTO) == Plan()
    assert planner().plan((90, 160), recorded, UpscaleOptions(memory_plan="whole")) == Plan()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.long)])
def test_estimates_have_each_stage_and_their_sum(dtype):
    needs = estimate_memory(270, 480, AUTO, dtype)
    assert set(needs) == {"weights", "frames", "flow", "controlnet", "unet", "vae", "peak"}
    assert needs["weights"] < needs["peak"] < sum(needs.values())
    # RAFT's volume at 1080p is the reference's first limit.
    assert needs["flow"] > 5 * 2**30
    assert estimate_memory(270, 480, UpscaleOptions(memory_plan="banded"), dtype)["flow"] < 2**30


def test_estimates_read_a_checkpoint(checkpoint):
    small, large = (estimate_memory(size, size, AUTO, torch.float32, checkpoint) for size in (96, 192))
    assert small["weights"] == large["weights"] < 2**25
    assert large["unet"] == pytest.approx(4 * small["unet"], rel=2e-2)


def test_report_has_plan_memory_disk_and_time(pipe, tmp_path):
    frame, plan = moving(1), Plan(rows=128)
    job = VideoJob(source=tmp_path, output=tmp_path / "not" / "yet" / "out.mp4", options=AUTO)
    needs = pipe.planner.needs(frame.shape[-2:], AUTO, plan)
    lines = list(cost_lines(job, frame.shape[-2:], 100, plan=str(plan), needs=needs, device=pipe.device))
    assert [line.partition(":")[0] for line in lines] == ["size", "plan", "memory", "disk"]
    assert lines[0] == "size: 16x12 to 64x48, 100 frames" and "free" in lines[3]
    assert lines[1] == "plan: convolutions in bands of 128 rows"
    state = StreamDiffVSRState(metadata=choosing.plan_details(plan, frame.shape[-2:]))
    assert report_time(pipe, frame, AUTO, state, 100).startswith("time: ")


@pytest.mark.parametrize("output", OUTPUTS)
def test_plans_of_the_released_networks_are_told_without_them(output, tmp_path, monkeypatch):
    """With 24 GB: each size has a plan that fits, and the line about memory says what it takes."""
    for module in (choosing, reporting):
        monkeypatch.setattr(module, "free_memory", lambda device: 24 * 2**30)
    size = output[0] // 4, output[1] // 4
    job = VideoJob(source=tmp_path, output=tmp_path / "out.mp4", options=AUTO)
    for dtype in (torch.float16, torch.float32):
        plan = planner(dtype).plan(size, {}, AUTO)
        needs = planner(dtype).needs(size, AUTO, plan)
        lines = list(cost_lines(job, size, None, plan=str(plan), needs=needs, device=torch.device("cpu")))
        said = float(lines[2].removeprefix("memory: about ").partition(" ")[0])
        assert 2 < said < 24 and lines[1] == f"plan: {plan}"
        assert plan.exact or size == (1080, 1920)


def test_tiles_on_nano_leave_no_seams():
    """Hardly another distance to the truth than the whole frame's, and no more difference at borders."""
    nano = load_pipeline("nano", device="cpu")
    truth = to_pixels(moving(2, 288, 384, seed=4) + 0.2 * torch.randn(1, 3, 288, 384))
    lq = from_pixels(F.avg_pool2d(truth, 4))
    results = []
    for options in (UpscaleOptions(memory_plan="banded"), UpscaleOptions(memory_plan="tiled", tile_size=256)):
        *_, last = nano.stream(lq.split(1), options)
        results.append(to_pixels(last.hq))
    whole, tiled = results
    psnr = [-10 * math.log10(float((result - truth[1:]).square().mean())) for result in results]
    assert abs(psnr[0] - psnr[1]) < 0.5
    difference = (whole - tiled).abs().mean((0, 1))
    border = torch.zeros_like(difference, dtype=torch.bool)
    # Tiles of 256 begin at 0, 128 across and 0, 32 down, and end 256 later.
    for edge in (128, 256):
        border[:, edge - 8 : edge + 8] = True
    for edge in (32, 256):
        border[edge - 8 : edge + 8] = True
    assert 0 < difference[border].mean() <= 2 * difference[~border].mean()
