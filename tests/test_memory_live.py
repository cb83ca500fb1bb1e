"""What a frame is told to need, against the tensors of real networks that really compute."""

from __future__ import annotations

import pytest
import torch
from samples import moving

from stream_diffvsr import UpscaleOptions, estimate_memory, load_pipeline
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.families.diffvsr.released import released_planner
from stream_diffvsr.memory import LiveTensors, on_meta
from stream_diffvsr.upscaler import State

ONE = UpscaleOptions(num_inference_steps=1)


@pytest.fixture(scope="module")
def nano():
    return load_pipeline("nano", device="cpu", dtype="float32")


@pytest.mark.parametrize("plan", [Plan(), Plan(rows=128), Plan(rows=64, tile=256)], ids=str)
@pytest.mark.parametrize("size", [(90, 160), (61, 83)])
def test_counts_are_what_the_tensors_of_a_frame_take(nano, size, plan):
    """All stages of a guided frame as it runs, above what was there before it."""
    from stream_diffvsr.families.diffvsr.plan import plan_details
    from stream_diffvsr.upscaler import Provenance

    clip = moving(2, *size)
    start = State(provenance=Provenance(details=plan_details(plan, size)))
    state = nano.process_frame(clip[:1], start, ONE).state
    known = [p for network in nano.stages.values() for p in network.parameters()]
    with LiveTensors([*known, clip, *state.tensors.values()]) as live:
        nano.process_frame(clip[1:], state, ONE)
    needs = nano.needs(size, ONE, plan)
    largest = max(needs[stage] for stage in ("flow", "controlnet", "unet", "vae"))
    # Beside the stages stand the warped frame, flow and the new state.
    assert 0.94 * largest <= live.peak <= 1.06 * (largest + needs["frames"])


LARGE = pytest.param("raft_large", marks=pytest.mark.long)


@pytest.mark.parametrize("name", [LARGE, "raft_small", "bundled"])
def test_flow_is_counted_with_its_volume(name):
    planner = released_planner(name, torch.float32, torch.device("cpu"))
    small, large = (planner.needs((side, side), ONE, Plan())["flow"] for side in (40, 80))
    volume = 4 / 3 * (80 * 80 / 4) ** 2 * 4 * (name != "bundled")
    assert 4 * small <= large + volume and large > volume


@pytest.mark.parametrize("flow", [LARGE, "none"])
def test_the_bound_is_above_every_count(nano, flow):
    for planner in (released_planner(flow, torch.float32, torch.device("cpu")), nano.planner):
        for size in [(8, 8), (90, 160), (270, 480)]:
            assert planner.most(size) >= planner.bytes_needed(size, ONE, Plan())


def test_a_copy_on_meta_shares_nothing(nano):
    network = nano.vae
    before = {key: value.clone() for key, value in network.state_dict().items()}
    copied = on_meta(network)
    assert all(weight.is_meta for weight in copied.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_counts_of_a_folder_are_those_of_its_pipe():
    nano = load_pipeline("nano", device="cpu", dtype="float32")
    assert estimate_memory(30, 40, ONE, torch.float32, "nano") == nano.needs((30, 40), ONE, Plan())
