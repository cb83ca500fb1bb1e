"""What is done to networks once, before their first frame."""

from __future__ import annotations

import torch
from torch import nn

from ...runtimes.torch.precision import upcast_attention
from .control import Control
from .folded import fold
from .prompted import take_out
from .vae import TemporalAutoencoderTiny


def prepare(unet: nn.Module, control: Control, vae: TemporalAutoencoderTiny) -> None:
    """Bring the networks, in place, into the form in which they run best with the same numbers."""
    # Weights outlive the caller's inference mode.
    with torch.inference_mode(False), torch.no_grad():
        upcast_attention(unet, control)
        fold(unet, vae)
        take_out(unet)
        take_out(control.body)
        # Convolutions take channels last: else each call brings pictures and weights into that order. The
        # larger networks come so where they were copied (build.py), and else stay in their mapped files.
        nn.Module.to(vae, memory_format=torch.channels_last)
