"""The calls that the method makes of its networks, and PyTorch's way to answer them.

A runtime is another class with the same calls. U-Net and ControlNet are one call, so that what one adds to
the other never leaves the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...flow import FlowEstimator
from ...flow.warp import centred
from ...runtimes.torch.precision import in_float32, upcast_attention
from ...tensors import SCALE
from ...tiling import Tile
from ...upscaler import OnStep, Placement
from . import bands
from .control import Control, Residuals
from .plan import Plan
from .vae import TemporalAutoencoderTiny, reduce_like


@dataclass(frozen=True, eq=False)
class Guidance:
    """What the previous frame tells a prediction."""

    embedding: Any
    """Of the warped frame, as the runtime's `embed` gave it: at LQ size in its last two axes."""
    trust: Tensor | None = None
    """(1, 1, h, w) in [0, 1]: where to believe it; None: everywhere."""
    scale: float = 1.0
    keep: bool = False
    """Whether a later step may use what the ControlNet says now."""
    again: bool = False
    """Whether to use what was kept in an earlier step."""

    def cut(self, tile: Tile) -> Guidance:
        """The part for a tile of the latents."""
        trust = None if self.trust is None else tile.cut(self.trust)
        return replace(self, embedding=tile.cut(self.embedding), trust=trust)


class Networks(Protocol):
    """The calls, bound to one frame's size, memory plan and number format.

    Pictures are float32, (1, ., height, width), on the device that the caller has them on; what `embed` and
    `features` return belongs to the runtime.
    """

    stage: str
    """The stage at work: where memory ran out, if it did."""
    latent_channels: int

    def flow(self, current: Tensor, previous: Tensor, scale: float) -> Tensor:
        """Two LQ frames -> backward flow (1, 2, 4h, 4w), estimated at `scale` of that size."""
        ...

    def embed(self, warped: Tensor) -> Any:
        """Warped frame (1, 3, 4h, 4w) -> what the ControlNet takes for its picture."""
        ...

    def predict(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, guidance: Guidance | None, slot: int
    ) -> Tensor:
        """Latents and LQ frame (1, C + 3, h, w) -> the prediction (1, C, h, w).

        `slot` names the prompt, for residuals that are used again.
        """
        ...

    def features(self, warped: Tensor) -> Any:
        """Warped frame (1, 3, 4h, 4w) -> its features, for the decoder."""
        ...

    def decode(self, latents: Tensor, features: Any, trust: Tensor | None) -> Tensor:
        """Latents (1, C, h, w) -> (1, 3, 4h, 4w), model range; `trust` (1, 1, 4h, 4w) fades features."""
        ...


@dataclass(eq=False)
class TorchNetworks:
    """The networks of a checkpoint in PyTorch."""

    flow: FlowEstimator
    unet: nn.Module
    controlnet: Control
    vae: TemporalAutoencoderTiny
    centred_flow: bool = False
    """Whether estimates undo the shift of `warp`; flow that callers hand in is used as it is."""

    def prepare(self) -> None:
        """Convert the networks in place to the form in which they run fastest with the same numbers."""
        # Weights outlive the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            upcast_attention(self.unet, self.controlnet)
            # Convolutions take channels last: else each call brings pictures and weights into that order.
            # The larger networks come so where they were copied, and else stay in their mapped files.
            nn.Module.to(self.vae, memory_format=torch.channels_last)

    def stages(self) -> dict[str, nn.Module]:
        """The networks by stage."""
        return {"flow": self.flow, "unet": self.unet, "controlnet": self.controlnet, "vae": self.vae}

    @contextmanager
    def calls(
        self,
        plan: Plan,
        own: torch.dtype,
        dtype: torch.dtype,
        placement: Placement,
        need: Callable[[str], int] = lambda stage: 0,
    ) -> Generator[TorchCalls, None, None]:
        """The calls for one frame, with networks that are held in `own` cast to `dtype` meanwhile.

        `need` tells the bytes of a stage, where the placement has to know.
        """
        calls = TorchCalls(self, plan, dtype, placement, need, latent_channels=self.vae.latent_channels)
        if dtype == own:
            yield calls
            return
        with in_float32([self.unet, self.controlnet, self.vae], own):
            yield calls


@dataclass(eq=False)
class TorchCalls:
    """`Networks` in PyTorch, for one attempt at one frame."""

    networks: TorchNetworks
    plan: Plan
    dtype: torch.dtype
    placement: Placement
    need: Callable[[str], int]
    stage: str = "frame"
    latent_channels: int = 0
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _kept: dict[int, Residuals] = field(default_factory=dict)

    def _enter(self, stage: str, *networks: str) -> torch.device:
        """Have the networks of a stage brought to their device, where they are not there already."""
        if self.stage != stage:
            self.stage = stage
            room = 0 if self.placement.fixed else self.need(stage)
            self._device = [self.placement.acquire(name, room) for name in networks or (stage,)][-1]
        return self._device

    def get_ready(self, size: tuple[int, int], guided: bool, on_step: OnStep) -> None:
        """Do what takes long before the first frame of an LQ size; PyTorch needs nothing."""

    def flow(self, current: Tensor, previous: Tensor, scale: float) -> Tensor:
        device, estimator = self._enter("flow"), self.networks.flow
        flow = estimator.between(current.to(device), previous.to(device), SCALE * scale, self.plan.flow)
        if scale != 1:
            size = tuple(SCALE * side for side in current.shape[-2:])
            flow = F.interpolate(flow, size=size, mode="bilinear", align_corners=False) / scale
        return centred(flow) if self.networks.centred_flow and estimator.any_size else flow

    def embed(self, warped: Tensor) -> Tensor:
        device = self._enter("unet", "controlnet", "unet")
        return bands.embed(self.networks.controlnet, warped.to(device, self.dtype), self.plan.rows)

    def predict(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, guidance: Guidance | None, slot: int
    ) -> Tensor:
        device, home = self._enter("unet", "controlnet", "unet"), x.device
        x, prompt = x.to(device, self.dtype), prompt.to(device, self.dtype)
        timestep = timestep.to(device)
        residuals = self._residuals(x, timestep, prompt, guidance, slot)
        return self._unet(x, timestep, prompt, residuals).float().to(home)

    def _unet(self, x: Tensor, timestep: Tensor, prompt: Tensor, residuals: Residuals | None) -> Tensor:
        down, middle = residuals or (None, None)
        return self.networks.unet(
            x,
            timestep,
            encoder_hidden_states=prompt,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    def _control(self, x: Tensor, timestep: Tensor, prompt: Tensor, guidance: Guidance) -> Residuals:
        return self.networks.controlnet(x, timestep, prompt, guidance.embedding, guidance.scale)

    def _residuals(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, guidance: Guidance | None, slot: int
    ) -> Residuals | None:
        """What the ControlNet adds: nothing without guidance, kept ones, or new ones."""
        if guidance is None:
            return None
        if guidance.again and slot in self._kept:
            return self._kept[slot]
        self._kept.pop(slot, None)
        residuals = _fade(self._control(x, timestep, prompt, guidance), guidance.trust)
        if guidance.keep:
            self._kept[slot] = residuals
        return residuals

    def features(self, warped: Tensor) -> list[Tensor]:
        self._kept.clear()
        return bands.features(self.networks.vae, warped.to(self._enter("vae"), self.dtype), self.plan.rows)

    def decode(self, latents: Tensor, features: list[Tensor] | None, trust: Tensor | None) -> Tensor:
        self._kept.clear()
        latents = latents.to(self._enter("vae"), self.dtype)
        trust = None if trust is None else trust.to(latents.device)
        return bands.decode(self.networks.vae, latents, features, trust, self.plan.rows)


def _fade(residuals: Residuals, trust: Tensor | None) -> Residuals:
    """What the ControlNet adds, times the trust reduced to each level's size."""
    if trust is None:
        return residuals
    levels, middle = residuals

    def faded(level: Tensor) -> Tensor:
        share = reduce_like(trust, level)
        assert share is not None
        return level * share

    return [faded(level) for level in levels], faded(middle)
