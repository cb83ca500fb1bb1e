"""Copies to and from devices, and that a frame never makes the host wait before its end."""

from __future__ import annotations

import pytest
import torch
from samples import moving
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, load_pipeline
from stream_diffvsr.bench.networks import untrained_flow
from stream_diffvsr.copies import Download, upload
from stream_diffvsr.families.diffvsr.frame import Frame
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.flow import open_flow
from stream_diffvsr.placement import FixedPlacement


class CopiesFromCpu(TorchDispatchMode):
    """Notes the shape of everything but single numbers that goes from the CPU to the meta device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_meta and x.ndim:
                self.shapes += [tuple(y.shape) for y in given if y.ndim and not y.is_meta]
        return result


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
    """On the meta device, where any look at a number raises; copies to it would wait on a GPU."""
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
        pipe._upscale(frame)  # what is prepared once for a run
        with CopiesFromCpu() as copies:
            hq, _ = pipe._upscale(frame)
    assert hq.device == meta and hq.shape == (1, 3, 128, 160)
    noise, *weights = copies.shapes
    assert noise == (1, 4, 32, 40)
    # Those of tiles, which are uploaded as the noise is.
    assert (weights == []) == (plan.tile is None)
    assert all(shape == (16, 16) for shape in weights)
