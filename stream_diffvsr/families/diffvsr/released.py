"""The released architecture, used to estimate its memory needs before the weights are downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...flow import FlowEstimator, open_flow
from ...flow.open import open_bundled
from ...weights.networks import empty
from .components import NETWORKS, from_config
from .control import Control
from .counted import Needs
from .networks import TorchNetworks
from .plan import Planner

_SHARED = {
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
    "only_cross_attention": [True, True, True, False],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "in_channels": 7,
    "use_linear_projection": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {**_SHARED, "out_channels": 4, "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"]},
    "controlnet": {**_SHARED, "conditioning_embedding_out_channels": [64, 128, 256]},
    "vae": {
        "latent_channels": 4,
        "block_out_channels": [64, 64, 64],
        "num_encoder_blocks": [1, 3, 3],
        "num_decoder_blocks": [3, 3, 1],
    },
    "scheduler": {
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    },
}
"""Configurations of the released networks, as far as they are known (the SD x4 family's widths)."""


def released_planner(flow: str, dtype: torch.dtype, device: torch.device) -> Planner:
    """Return a planner for the released networks, installed or not; `flow` 'auto' means 'raft_large'."""
    estimator = open_flow("raft_large" if flow == "auto" else flow, untrained_flow)
    needs = Needs(without_weights(CONFIGS, estimator, dtype), CONFIGS["scheduler"], dtype, device)
    return Planner(needs, needs.most, estimator.methods, device)


def without_weights(
    configs: dict[str, dict[str, Any]], flow: FlowEstimator, dtype: torch.dtype
) -> TorchNetworks:
    """Build the configured networks on the meta device, and prepare them to run."""
    unet, controlnet, vae = (empty(lambda n=name: from_config(n, configs[n])) for name in NETWORKS)
    for network in (unet, controlnet, vae):
        nn.Module.to(network, dtype)  # diffusers' own `to` warns about casts
    networks = TorchNetworks(flow, unet, Control(controlnet), vae)
    networks.prepare()
    return networks


def untrained_flow(name: str) -> nn.Module:
    """Return a flow network with random weights, to estimate costs without downloading the trained one."""
    if name == "bundled":
        return open_bundled()
    from torchvision.models import optical_flow

    return getattr(optical_flow, name)(weights=None, progress=False)
