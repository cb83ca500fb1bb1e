"""What a frame needs, predicted from sizes and widths alone.

Every network here needs memory in proportion to the pixels. The proportions below count the numbers that are
held at a stage's worst moment, in multiples of a width; they come from recording all tensors of the real
networks, and a test counts them again. `benchmarks/memory.py` compares the sums with measured peaks.

What is predicted is memory in use. glibc keeps what was freed in holes between what is not, a different
amount in every run, so that a process on a CPU takes up to twice as much: `choose.py` leaves room for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...flow.estimators import TILE as FLOW_TILE
from ...tensors import SCALE, padded_size
from .folded import fold, parts_of
from .options import UpscaleOptions
from .plan import Plan, asked_for
from .vae import TemporalBlock

FRAMES = 3
"""Pictures of output size beside the networks: the previous hq, the warped one, and one of the caller's."""

LATENTS, STEP = 13, 17
"""Numbers per LQ pixel beside the U-Net, its input, the latents and the prediction of the whole frame; and
what the update of the latents takes beyond them, when the U-Net is done."""

LIBRARIES = 85 * 2**20
"""What the libraries take when they first compute: code, threads, workspaces."""

FLOW_BYTES = {"raft_large": 350, "raft_small": 145, "dis": 60, "bundled": 42}
"""Bytes per pixel of the estimated frames, without RAFT's volume; 0 for those not named."""

FLOW_PARAMETERS = {"raft_large": 5_257_536, "raft_small": 990_162, "bundled": 100_951}

FLOW_METHODS = {
    "raft_large": ("whole", "linear", "tiled"),
    "raft_small": ("whole", "linear", "tiled"),
    "bundled": ("whole", "tiled"),
}


@dataclass(frozen=True)
class Widths:
    """What of a model decides about its memory."""

    unet: int
    """Channels at latent size."""
    unet_layers: int
    embedding: int
    """Channels of the ControlNet's embedding at output size."""
    encoder: int
    encoder_block: bool
    """Whether there is a temporal block at output size."""
    decoder: int
    decoder_block: bool
    weights: Mapping[str, int]
    """Parameters by stage, those of folded layers beside the ones they were made from."""
    flow: str
    """Name of the flow estimator."""

    @classmethod
    def of(cls, unet: Any, controlnet: Any, vae: Any, flow: str) -> Widths:
        """From the networks as they run, folded; they may be empty."""
        layers: Any = (list(parts_of(network.layers)) for network in (vae.encoder, vae.decoder))
        encoder, decoder = layers
        networks = {"unet": unet, "controlnet": controlnet, "vae": vae}
        embedding = getattr(controlnet, "controlnet_cond_embedding", None) or controlnet.embedding
        return cls(
            unet=unet.config["block_out_channels"][0],
            unet_layers=unet.config["layers_per_block"],
            embedding=embedding.conv_in.out_channels,
            encoder=encoder[0].out_channels,
            encoder_block=isinstance(encoder[1], TemporalBlock),
            decoder=decoder[-1].in_channels,
            decoder_block=isinstance(decoder[-2], TemporalBlock),
            weights={
                name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()
            },
            flow=flow,
        )


RELEASED = Widths(
    unet=256,
    unet_layers=2,
    embedding=64,
    encoder=64,
    encoder_block=True,
    decoder=64,
    decoder_block=True,
    weights={"unet": 497_541_892, "controlnet": 207_699_264, "vae": 2_183_573},
    flow="raft_large",
)
"""The released networks, so that their needs can be told before they are there."""


def estimate_memory(
    height: int,
    width: int,
    options: UpscaleOptions | None = None,
    dtype: torch.dtype = torch.float16,
    model: str | Path = "v1",
) -> dict[str, int]:
    """Bytes by stage for an LQ frame of `height` x `width`.

    Keys: 'weights', 'frames', the activations of 'flow', 'controlnet', 'unet' and 'vae', and 'peak', which is
    what all of it takes at the worst moment. With `memory_plan` 'auto' it is the need with nothing split.
    `model`: 'v1', 'nano' or a checkpoint folder.
    """
    options = options or UpscaleOptions()
    widths = RELEASED if model == "v1" else _read(model)
    plan = asked_for(options, FLOW_METHODS.get(widths.flow, ("whole",)))
    return estimate(widths, (height, width), options, dtype, plan)


def estimate(
    widths: Widths, size: Sequence[int], options: UpscaleOptions, dtype: torch.dtype, plan: Plan
) -> dict[str, int]:
    """`estimate_memory` for known widths, an LQ size (height, width) and one plan."""
    height, width = padded_size(*size)
    stages = {
        "flow": _flow(widths.flow, SCALE**2 * height * width * options.flow_scale**2, plan.flow),
        "controlnet": _controlnet(widths, height, width, plan) * dtype.itemsize,
        "unet": _unet(widths, height, width, plan) * dtype.itemsize,
        "vae": _vae(widths, height, width, plan) * dtype.itemsize,
    }
    flow_weights = FLOW_PARAMETERS.get(widths.flow, 0) * torch.float32.itemsize
    fixed = {
        "weights": sum(widths.weights.values()) * dtype.itemsize + flow_weights,
        "frames": FRAMES * 3 * torch.float32.itemsize * SCALE**2 * height * width,
    }
    needs = {name: round(count) for name, count in {**fixed, **stages}.items()}
    together = LIBRARIES + needs["weights"] + needs["frames"]
    return {**needs, "peak": together + max(needs[name] for name in stages)}


def _flow(name: str, pixels: float, method: str) -> float:
    """Bytes; the volume holds the match of every pixel with every other at an eighth of the size."""
    if method == "tiled":
        pixels = min(pixels, FLOW_TILE**2)
    pyramid = 4 / 3 * (pixels / 64) ** 2 * torch.float32.itemsize
    volume = pyramid if method == "whole" and name.startswith("raft") else 0
    return FLOW_BYTES.get(name, 0) * pixels + volume


def _controlnet(widths: Widths, height: int, width: int, plan: Plan) -> float:
    """Numbers: the embedding at output size, or afterwards the network on it.

    At output size, two pictures of the embedding's width live at once: what goes into an activation and
    what comes out. Bands see 3 LQ rows more on either side, and keep the embedding's finished rows.
    """
    seen = min(height, (plan.rows or height * SCALE) / SCALE + 6)
    finished = widths.unet * height * width * (plan.rows is not None)
    embedding = 2 * SCALE**2 * widths.embedding * seen * width + finished
    network = (8.15 * widths.unet_layers - 2) * widths.unet * _at_once(height, width, plan)
    return max(embedding, network + (widths.unet + LATENTS) * height * width)


def _unet(widths: Widths, height: int, width: int, plan: Plan) -> float:
    """Numbers, with the ControlNet's residuals and embedding, which are there meanwhile.

    At the worst moment, in the last upward block, there are the skip connections of the first level, the
    joined input, and the activation that the first norm makes of it.
    """
    residuals = 1.94 * widths.unet_layers + 0.96
    network = (6.4 + 4.7 * widths.unet_layers + residuals) * widths.unet * _at_once(height, width, plan)
    return max(network, STEP * height * width) + (widths.unet + LATENTS) * height * width


def _at_once(height: int, width: int, plan: Plan) -> int:
    """LQ pixels that the U-Net sees at once."""
    side = (plan.tile or SCALE * max(height, width)) // SCALE
    return min(height, side) * min(width, side)


def _vae(widths: Widths, height: int, width: int, plan: Plan) -> float:
    """Numbers: the features of the warped frame, or afterwards the decoder's."""
    encoder = _encoder(widths.encoder_block, height, plan.rows) * widths.encoder
    decoder = _decoder(widths.decoder_block, height, plan.rows) * widths.decoder
    return max(encoder, decoder) * height * width


def _encoder(block: bool, height: int, rows: int | None) -> float:
    """Numbers per LQ pixel and channel.

    A block holds 4 pictures: its input, an activation, the convolution of it, and the next activation. At
    output size each has 16 pixels per LQ pixel, at half of it 4: there the widest part is where nothing
    but folded convolutions stands at output size. In bands, the pictures are a band and its neighbourhood
    high; beside them stand the finished ones of half and of a quarter of the size, 4 + 1.
    """
    size, seen = (SCALE**2, (rows or 0) + 16) if block else (SCALE, 2 * (rows or 0) + 16)
    whole = 4 * size
    return whole if rows is None else min(whole, 5.3 + (4 if block else 3) * size * seen / (SCALE * height))


def _decoder(block: bool, height: int, rows: int | None) -> float:
    """Numbers per LQ pixel and channel.

    Beside all of it stand the warped frame's pooled features, the largest of them an LQ pixel's size or a
    quarter. A block with TPM holds 5 pictures: input, update, enlarged mixture, its share, and a sum; and
    pooled maps. In bands, beside them stand the input of the last part, at half of the size where its block
    is at full size (4), else at a quarter (1), and the result. Before that, pooled maps are mixed: the
    sequence of both frames, what the TPM makes of it, and halves of that.
    """
    features, whole = (1.94, 81) if block else (0.56, 20.4)
    if rows is None:
        return features + whole
    share = (rows + (12 if block else 24)) / (SCALE * height)
    parts = max(6.2 + 80 * share, 13.4) if block else max(3 + 20 * share, 4.5)
    return features + min(whole, parts)


def _read(model: str | Path) -> Widths:
    """The widths of a checkpoint, from its configurations; no weights are read."""
    from ...weights.find import resolve
    from .build import build
    from .check import default_flow
    from .parts import open_part

    folder = resolve(model, [])
    assert folder is not None  # only 'v1' may be absent
    networks: Any = (build(open_part(folder, name)) for name in ("unet", "controlnet", "vae"))
    unet, controlnet, vae = networks
    fold(unet, vae)
    return Widths.of(unet, controlnet, vae, default_flow(folder))
