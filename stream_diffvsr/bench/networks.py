"""Pipelines to measure: any checkpoint, released architectures with random weights, and a reference run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..devices import resolve_device, resolve_dtype
from ..errors import IncompatibleInputError
from ..families.diffvsr.components import NETWORKS, from_config
from ..families.diffvsr.control import Control, Residuals
from ..families.diffvsr.networks import TorchNetworks
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..families.diffvsr.released import CONFIGS, untrained_flow
from ..families.flashvsr import checkpoint as flashvsr
from ..families.flashvsr.method import FlashVSR
from ..families.swiftvr import checkpoint as swiftvr
from ..families.swiftvr.method import SwiftVR
from ..flow import open_flow
from ..load import load_pipeline
from ..tensors import SCALE
from ..upscaler import Upscaler
from ..weights.networks import empty

RANDOM, RANDOM_FLASHVSR, RANDOM_SWIFTVR = "random", "random-flashvsr", "random-swiftvr"
"""Names of released architectures with random weights, which run as fast as with trained weights."""

TOKENS, TEXT = 512, 4096
"""The size of a prompt's embedding in FlashVSR and SwiftVR, which are based on Wan."""

FLASHVSR = {
    "transformer": {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "text_embedding.0.weight": (1536, TEXT),
        "time_embedding.0.weight": (1536, 256),
        "blocks.0.ffn.0.weight": (8960, 1536),
    },
    "projection": {"conv1.weight": (2048,), "conv2.weight": (3072,), "linear_layers.0.weight": (1536,)},
    "tiny": {
        f"decoder.{index}.weight": (width,) for index, width in ((1, 512), (10, 256), (16, 128), (22, 128))
    },
}
"""The published shapes from which all other shapes follow."""

SWIFTVR = {
    **{f"encoder.{index}.weight": (width,) for index, width in ((0, 64), (17, 48))},
    **{f"decoder.{index}.weight": (width, 48) for index, width in ((1, 512), (8, 256), (14, 128), (20, 64))},
}

SWIFTVR_TRANSFORMER = {
    "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48, "out_channels": 48,
    "ffn_dim": 14336, "freq_dim": 256, "text_dim": TEXT,
}  # fmt: skip

BLOCKS = 30
"""The number of blocks in the transformers of FlashVSR and SwiftVR."""


class RandomPrompts:
    """Random embeddings to replace those read from a folder."""

    def get(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(prompt))
        return torch.randn((1, 77, CONFIGS["unet"]["cross_attention_dim"]), generator=generator)


def open_measured(
    model: str | Path, device: str, dtype: str, flow: str, attention: str = "auto", blocks: int = BLOCKS
) -> Upscaler:
    """Open the model to measure; `blocks` is the transformer depth of random-flashvsr and random-swiftvr."""
    if model not in (RANDOM, RANDOM_FLASHVSR, RANDOM_SWIFTVR):
        return load_pipeline(model, device=device, dtype=dtype, flow=flow, attention=attention)
    chosen = resolve_device(device)
    number = resolve_dtype(dtype, chosen)
    if model != RANDOM:
        wan = _random_wan(str(model), chosen, number, blocks)
        wan.use_attention(attention)
        return wan
    nets = {name: random_network(name, CONFIGS[name], chosen, number) for name in NETWORKS}
    return StreamDiffVSRPipeline(
        unet=nets["unet"],
        control=Control(nets["controlnet"]),
        vae=nets["vae"],
        flow=open_flow("raft_large" if flow == "auto" else flow, untrained_flow).to(chosen),
        prompts=RandomPrompts(),  # type: ignore[arg-type]
        scheduler_config=CONFIGS["scheduler"],
        device=chosen,
        dtype=number,
        model=RANDOM,
    )


def open_diffvsr(model: str | Path, device: str, dtype: str, flow: str) -> StreamDiffVSRPipeline:
    """Open a Stream-DiffVSR model to measure; raise `IncompatibleInputError` for any other family."""
    pipe = open_measured(model, device, dtype, flow)
    if not isinstance(pipe, StreamDiffVSRPipeline):
        raise IncompatibleInputError(f"this needs a Stream-DiffVSR model, not {model}")
    return pipe


def wan_networks(model: str, blocks: int = BLOCKS) -> dict[str, nn.Module]:
    """Build the networks of FlashVSR v1.1 with its tiny decoder, or of SwiftVR, without weights."""
    if model == RANDOM_SWIFTVR:
        return swiftvr.build(SWIFTVR, {**SWIFTVR_TRANSFORMER, "num_layers": blocks})
    named = {f"blocks.{index}.": () for index in range(blocks)}
    shapes = {**FLASHVSR, "transformer": {**FLASHVSR["transformer"], **named}}
    return flashvsr.build(shapes, "v1.1")  # type: ignore[arg-type]


def _random_wan(model: str, device: torch.device, dtype: torch.dtype, blocks: int) -> FlashVSR | SwiftVR:
    networks = {name: randomized(each, device, dtype) for name, each in wan_networks(model, blocks).items()}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn((1, TOKENS, TEXT), generator=generator).to(device, dtype)
    cls = SwiftVR if model == RANDOM_SWIFTVR else FlashVSR
    return cls(networks=networks, prompt=prompt, device=device, dtype=dtype, model=model)


def random_network(name: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Build a checkpoint's network with random weights of typical magnitude; this takes only seconds."""
    return randomized(empty(lambda: from_config(name, config)), device, dtype)


def randomized(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Give random weights to a network that was built without any."""
    # Drawn once and repeated, since the values of the weights do not affect speed.
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    weights = {key: _random(drawn, value) for key, value in network.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    return network.to(device).eval().requires_grad_(False)


def _random(drawn: Tensor, like: Tensor) -> Tensor:
    """Return ones for the scale of a norm or mixture, otherwise random weights that keep sums near 1."""
    if like.ndim < 2:
        return drawn.new_ones(like.shape)
    # The product is a new tensor: a slice of the repeated one would keep all of it in memory.
    values = drawn.repeat(-(-like.numel() // drawn.numel()))[: like.numel()] * like[0].numel() ** -0.5
    if like.ndim != 4:
        return values.reshape(like.shape)
    # In the memory layout that the pipeline uses, so that gigabytes are not copied again.
    outside, inside, height, width = like.shape
    return values.reshape(outside, height, width, inside).permute(0, 3, 1, 2)


class PlainControl(Control):
    """The ControlNet as the reference runs it, embedding the warped picture again in every step."""

    def __init__(self, control: Control) -> None:
        nn.Module.__init__(self)
        self.embedding, self.body = control.embedding, control.body

    def embed(self, warped: Tensor) -> Tensor:
        # Only reshape to the size of the embeddings; the real work is repeated in each step.
        return F.pixel_unshuffle(warped, SCALE)

    def forward(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, embedding: Tensor, scale: float
    ) -> Residuals:
        warped = F.pixel_shuffle(embedding, SCALE)
        return super().forward(x, timestep, prompt, self.embedding(warped), scale)


def reference_way(pipe: StreamDiffVSRPipeline) -> StreamDiffVSRPipeline:
    """Return a pipeline that runs these weights as the reference does: in float32, without precomputation."""
    stages = {name: copy.deepcopy(network) for name, network in pipe.stages.items() if name != "flow"}
    for network in stages.values():
        network.float()
        nn.Module.to(network, memory_format=torch.contiguous_format)
    other = copy.copy(pipe)
    control = PlainControl(stages["controlnet"])  # type: ignore[arg-type]
    other.torch_networks = TorchNetworks(pipe.flow, stages["unet"], control, stages["vae"])  # type: ignore[arg-type]
    other.dtype, other.number_format = torch.float32, "float32"
    return other
