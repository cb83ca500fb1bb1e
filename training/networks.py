"""The networks of nano: their configurations and initial weights.

Together, they start as an interpolation: the U-Net passes the LQ picture through as latents, and the decoder
enlarges it bilinearly. Training therefore only has to learn what interpolation lacks, and on the first step
no random weights affect the result.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from stream_diffvsr.families.diffvsr.vae import TemporalAutoencoderTiny, TemporalBlock

# With one group and a large epsilon, group normalisation is almost a fixed scale: it preserves brightness,
# and treats a tile like the whole picture.
NORM_EPS = 100.0

WIDTHS = (24, 32, 48)
PROMPT_WIDTH = 16

SHARED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": WIDTHS,
    "cross_attention_dim": PROMPT_WIDTH,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "in_channels": 7,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": NORM_EPS,
    "norm_num_groups": 1,
    "only_cross_attention": True,
    "use_linear_projection": True,
}

UNET = {
    **SHARED,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}

CONTROLNET = {**SHARED, "conditioning_channels": 3, "conditioning_embedding_out_channels": (8, 16, 24)}

VAE: dict[str, Any] = {
    "act_fn": "relu",
    "block_out_channels": [32, 32, 32],
    "decoder_block_out_channels": [32, 32, 32],
    "encoder_block_out_channels": [32, 32, 32],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    # No blocks at full size, where a block costs most and improves the result least.
    "num_decoder_blocks": [5, 1, 0],
    "num_encoder_blocks": [0, 1, 5],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}

# The networks predict the clean latents themselves, and the last of the four steps starts almost
# without noise, so that a small network need not cancel noise exactly.
SCHEDULER: dict[str, Any] = {
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "sample",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
}


class Nano(nn.Module):
    """All weights of the checkpoint in one module, so that a training run fits in one file."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET)
        self.controlnet = ControlNetModel(**CONTROLNET)
        self.vae = TemporalAutoencoderTiny(VAE)
        self.prompt = nn.Parameter(torch.randn(1, 77, PROMPT_WIDTH), requires_grad=False)
        start_unet(self.unet)
        start_control(self.controlnet)
        start_vae(self.vae)


def scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**SCHEDULER, **changes})


@torch.no_grad()
def start_norms(network: nn.Module) -> None:
    """Initialise group normalisation as the identity minus a mean, and attention to have no effect."""
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm) and module.eps == NORM_EPS:
            module.weight.fill_(NORM_EPS**0.5)
        if name.endswith("proj_out"):
            module.weight.zero_()
            module.bias.zero_()


@torch.no_grad()
def start_unet(unet: UNet2DConditionModel) -> None:
    """Initialise the U-Net to output the LQ picture in three channels, through the outermost skip connection.

    Each colour is carried by a pair of channels of opposite sign: the mean of a pair is zero, so that
    normalisation removes nothing, and silu(v) - silu(-v) = v exactly. The weights of the noisy latents start
    at zero, so that noise has no effect until training finds a use for the latents.
    """
    start_norms(unet)
    last = unet.up_blocks[-1].resnets[-1]
    for zeroed in (last.conv2.weight, last.conv2.bias, unet.conv_out.bias):
        zeroed.zero_()
    unet.conv_out.weight.mul_(0.1)
    unet.conv_out.weight[:3].zero_()
    unet.conv_in.weight[:, :4].zero_()
    for pair in range(6):
        colour, sign = pair // 2, 1.0 - 2.0 * (pair % 2)
        for line in (
            unet.conv_in.weight[pair],
            unet.conv_in.bias[pair],
            last.conv_shortcut.weight[pair],
            last.conv_shortcut.bias[pair],
        ):
            line.zero_()
        unet.conv_in.weight[pair, 4 + colour, 1, 1] = sign
        last.conv_shortcut.weight[pair, WIDTHS[0] + pair] = 1.0
        unet.conv_out.weight[colour, pair, 1, 1] = sign


CORRECTION = 0.4
"""Share of the way that an untrained ControlNet moves the LQ frame towards the warped previous result."""


@torch.no_grad()
def start_control(controlnet: ControlNetModel) -> None:
    """Initialise the first residual as a share of (warped frame reduced to a quarter) - (LQ frame).

    The other residuals start at 0. The first is added to the channels that carry the LQ frame through the
    U-Net, so it moves the latents towards the previous result: guidance starts as a filter along the motion.
    """
    start_norms(controlnet)
    embedding = controlnet.controlnet_cond_embedding
    forward, level = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.0, 1.0, 0.0])
    smooth = torch.tensor([0.25, 0.5, 0.25])
    # Three half steps align the reduced picture's pixels with the centres of the LQ frame's pixels.
    lines = [forward, forward, forward, level, smooth]
    for conv, line in zip([embedding.conv_in, *embedding.blocks], lines, strict=True):
        pass_pairs(conv, torch.outer(line, line), first=conv is embedding.conv_in)
    pass_pairs(embedding.conv_out, torch.outer(level, level))
    controlnet.conv_in.weight[:6] = 0
    controlnet.conv_in.bias[:6] = 0
    first = controlnet.controlnet_down_blocks[0]
    for pair in range(6):
        controlnet.conv_in.weight[pair, 4 + pair // 2, 1, 1] = 2.0 * (pair % 2) - 1.0
        first.weight[pair, pair] = CORRECTION


def pass_pairs(conv: nn.Conv2d, kernel: Tensor, first: bool = False) -> None:
    """Make a convolution pass three colours through, each as a pair of channels of opposite sign."""
    conv.weight[:6] = 0
    assert conv.bias is not None
    conv.bias[:6] = 0
    for pair in range(6):
        colour, sign = pair // 2, 1.0 - 2.0 * (pair % 2)
        if first:
            conv.weight[pair, colour] = sign * kernel
        else:
            conv.weight[pair, 2 * colour] = sign * kernel
            conv.weight[pair, 2 * colour + 1] = -sign * kernel


@torch.no_grad()
def start_vae(vae: TemporalAutoencoderTiny) -> None:
    """Initialise the decoder as bilinear enlargement (nearest x2, then a 1-2-1 filter, twice)."""
    for module in vae.modules():
        if isinstance(module, TemporalBlock):
            module.conv[4].weight.zero_()
            module.conv[4].bias.zero_()
            module.temporal_processor[2].weight.mul_(0.1)
    convs = [layer for layer in vae.decoder.layers if isinstance(layer, nn.Conv2d)]
    for pair in range(6):
        colour, sign = pair // 2, 1.0 - 2.0 * (pair % 2)
        convs[0].weight[pair].zero_()
        convs[0].bias[pair].zero_()
        convs[0].weight[pair, colour, 1, 1] = sign
        for conv in convs[1:-1]:
            conv.weight[pair].zero_()
            conv.weight[pair, pair] = smoothing()
    convs[-1].weight.mul_(0.1)
    convs[-1].bias.fill_(0.5)
    for pair in range(6):
        convs[-1].weight[:, pair].zero_()
        convs[-1].weight[pair // 2, pair, 1, 1] = 0.5 - 1.0 * (pair % 2)


def smoothing() -> Tensor:
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    return torch.outer(line, line)
