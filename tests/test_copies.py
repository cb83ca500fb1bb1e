"""Copies to and from devices, and that a frame never makes the host wait before its end."""

from __future__ import annotations

import pytest
import torch
from samples import moving

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, load_pipeline
from stream_diffvsr.bench.networks import untrained_flow
from stream_diffvsr.copies import Download, upload
from stream_diffvsr.flow import open_flow
from stream_diffvsr.frame import Frame
from stream_diffvsr.memory.plan import Plan
from stream_diffvsr.placement import FixedPlacement

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_there_and_back(device):
    x = torch.arange(12.0).reshape(3, 4).T
    there = upload(x, torch.device(device))
    assert there.device.type == device
    assert torch.equal(Download(there).wait(), x)


@pytest.mark.parametrize("flow", ["bundled", "raft_small"])
@pytest.mark.parametrize("plan", [Plan(), Plan(rows=64, tile=64, overlap=16)], ids=str)
def test_a_frame_is_given_to_the_device_without_waiting(checkpoint, flow, plan):
    """On the meta device, where there are no numbers: any look at one raises."""
    meta = torch.device("meta")
    pipe = load_pipeline(checkpoint, device="cpu", flow=open_flow(flow, untrained_flow))
    for network in pipe.stages.values():
        network.to(meta)
    pipe.device, pipe.placement = meta, FixedPlacement(meta)
    clip = moving(2, 32, 40).to(meta)
    state = StreamDiffVSRState(frame_index=1)
    # Not through the constructor, which looks whether the numbers are finite.
    object.__setattr__(state, "previous_lq", clip[:1])
    object.__setattr__(state, "previous_hq", torch.empty(1, 3, 128, 160, device=meta))
    options = UpscaleOptions(num_inference_steps=2)
    frame = Frame(clip[1:], state, options, plan, torch.float32, latents=None, flow=None, compile_mode="off")
    with torch.no_grad():
        hq, _ = pipe._upscale(frame)
    assert hq.device == meta and hq.shape == (1, 3, 128, 160)
