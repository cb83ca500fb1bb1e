"""Estimates against the tensors of real networks: of every width, at every plan, without computing anything.

The networks run on torch's meta device, where tensors have shapes and storages but no numbers, so that the
released architecture takes a second and no memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from live_tensors import LiveTensors
from torch import nn

from stream_diffvsr import UpscaleOptions, estimate_memory, load_pipeline, nano
from stream_diffvsr.bench.networks import CONFIGS, untrained_flow
from stream_diffvsr.families.diffvsr import bands as banded
from stream_diffvsr.families.diffvsr.build import empty, from_config
from stream_diffvsr.families.diffvsr.control import Control
from stream_diffvsr.families.diffvsr.denoise import Denoiser, Prompt, Schedule, latent_tiles
from stream_diffvsr.families.diffvsr.estimate import RELEASED, Widths, estimate
from stream_diffvsr.families.diffvsr.folded import fold
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.families.diffvsr.vae import TemporalAutoencoderTiny
from stream_diffvsr.flow import open_flow

NETWORKS = ("unet", "controlnet", "vae")
OPTIONS = UpscaleOptions(num_inference_steps=1)


@dataclass(frozen=True)
class Networks:
    """Of one checkpoint, without weights."""

    widths: Widths
    unet: nn.Module
    control: Control
    vae: TemporalAutoencoderTiny
    prompt_width: int

    @classmethod
    def build(cls, configs: dict) -> Networks:
        unet, controlnet, vae = (empty(lambda n=n: from_config(n, configs[n])) for n in NETWORKS)
        fold(unet, vae)
        control = Control(controlnet)
        widths = Widths.of(unet, control, vae, "none")
        return cls(widths, unet, control, vae, configs["unet"]["cross_attention_dim"])

    def parameters(self):
        return [p for network in (self.unet, self.control, self.vae) for p in network.parameters()]


@pytest.fixture(scope="module", params=["released", "nano"])
def networks(request) -> Networks:
    if request.param == "released":
        return Networks.build(CONFIGS)
    folder = Path(nano.__file__).parent
    return Networks.build({n: json.loads((folder / n / "config.json").read_text()) for n in NETWORKS})


def live_bytes(networks: Networks, height: int, width: int, plan: Plan) -> dict[str, int]:
    """The most that the tensors of each stage take at once; what goes in is not counted."""
    unet, control, vae = networks.unet, networks.control, networks.vae
    schedule = Schedule.prepare(CONFIGS["scheduler"], OPTIONS, torch.device("cpu"))
    tiles = latent_tiles(height, width, plan.tile, plan.overlap)
    with torch.no_grad(), torch.device("meta"):
        warped, lq = torch.empty(1, 3, 4 * height, 4 * width), torch.empty(1, 3, height, width)
        latents, prompt = torch.empty(1, 4, height, width), torch.empty(1, 77, networks.prompt_width)
        known = [*networks.parameters(), warped, lq, latents, prompt]
        with LiveTensors(known) as controlnet:
            embedding = banded.embed(control, warped, plan.rows) if plan.rows else control.embed(warped)
            x, part = (tiles[0].cut(whole) for whole in (torch.cat([latents, lq], 1), embedding))
            control(x, schedule.timesteps[0][1], prompt, part, 1.0)
        with LiveTensors(known) as denoise:
            denoiser = Denoiser(unet, control, [Prompt(prompt, prompt)], schedule, OPTIONS, tiles)
            denoiser(latents, lq, embedding.clone(), lambda *_: None)
        with LiveTensors(known) as decode:
            if plan.rows:
                banded.decode(vae, latents, banded.features(vae, warped, plan.rows), plan.rows)
            else:
                vae.decode(latents, vae.features(warped))
    return {"controlnet": controlnet.peak, "unet": denoise.peak, "vae": decode.peak}


@pytest.mark.parametrize(
    ("size", "plan"),
    [
        ((180, 320), Plan()),
        ((180, 320), Plan(rows=128)),
        ((180, 320), Plan(rows=64)),
        ((180, 320), Plan(rows=128, tile=512)),
        ((104, 128), Plan(rows=64, tile=256)),
    ],
    ids=lambda value: f"{value[1]}x{value[0]}" if isinstance(value, tuple) else str(value),
)
def test_estimates_are_what_the_tensors_of_each_stage_take(networks, size, plan):
    needs = estimate(networks.widths, size, OPTIONS, torch.float32, plan)
    for stage, live in live_bytes(networks, *size, plan).items():
        assert needs[stage] == pytest.approx(live, rel=0.06), stage


def test_widths_are_those_of_the_released_networks_as_they_run(networks):
    if networks.widths.unet == RELEASED.unet:
        assert networks.widths == replace(RELEASED, flow="none")


def test_widths_of_a_folder_are_those_of_its_pipe():
    widths = load_pipeline("nano", device="cpu").planner.widths
    needs = estimate(widths, (30, 40), OPTIONS, torch.float32, Plan())
    assert estimate_memory(30, 40, OPTIONS, torch.float32, "nano") == needs


@pytest.mark.parametrize("name", ["raft_large", "raft_small", "bundled"])
@pytest.mark.parametrize("size", [(44, 80), (88, 160)])
def test_estimates_of_flow_are_what_its_tensors_take(name, size):
    flow = open_flow(name, untrained_flow).to("meta")
    with torch.no_grad(), torch.device("meta"):
        frames = torch.empty(2, 1, 3, *(4 * side for side in size))
        with LiveTensors([*flow.parameters(), *flow.buffers(), frames]) as live:
            flow.estimate(*frames, "whole")
    need = estimate(replace(RELEASED, flow=name), size, OPTIONS, torch.float32, Plan())["flow"]
    assert need == pytest.approx(live.peak, rel=0.06)
