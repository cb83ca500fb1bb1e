"""The network calls that the method makes, and their implementation in PyTorch.

Every other runtime implements the same calls. The U-Net and the ControlNet share one call, so that the
ControlNet's residuals never leave the runtime.
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
    """How the previous frame guides a prediction."""

    embedding: Any
    """Embedding of the warped frame, as returned by the runtime's `embed`; its last two axes have LQ size."""
    trust: Tensor | None = None
    """Weight of the guidance at each pixel, (1, 1, h, w) in [0, 1]; None means 1 everywhere."""
    scale: float = 1.0
    keep: bool = False
    """Whether to keep the ControlNet's residuals for later steps."""
    again: bool = False
    """Whether to reuse the residuals that an earlier step kept."""

    def cut(self, tile: Tile) -> Guidance:
        """Return the guidance for one tile of the latents."""
        trust = None if self.trust is None else tile.cut(self.trust)
        return replace(self, embedding=tile.cut(self.embedding), trust=trust)


class Networks(Protocol):
    """The network calls, bound to one frame's size, memory plan and number format.

    Pictures are float32, (1, channels, height, width), on the caller's device. The types that `embed` and
    `features` return depend on the runtime.
    """

    stage: str
    """The current stage, or the one in which memory ran out."""
    latent_channels: int

    def flow(self, current: Tensor, previous: Tensor, scale: float) -> Tensor:
        """Return backward flow (1, 2, 4h, 4w) between two LQ frames, estimated at `scale` times that size."""
        ...

    def embed(self, warped: Tensor) -> Any:
        """Embed the warped frame (1, 3, 4h, 4w) for the ControlNet."""
        ...

    def predict(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, guidance: Guidance | None, slot: int
    ) -> Tensor:
        """Return the prediction (1, C, h, w) from the latents and LQ frame in `x` (1, C + 3, h, w).

        `slot` is the prompt's index, which identifies the residuals kept for reuse.
        """
        ...

    def features(self, warped: Tensor) -> Any:
        """Return features of the warped frame (1, 3, 4h, 4w) for the decoder."""
        ...

    def decode(self, latents: Tensor, features: Any, trust: Tensor | None) -> Tensor:
        """Decode latents (1, C, h, w) to (1, 3, 4h, 4w) in model range.

        `trust` (1, 1, 4h, 4w) scales the contribution of the features.
        """
        ...


@dataclass(eq=False)
class TorchNetworks:
    """The networks of a checkpoint in PyTorch."""

    flow: FlowEstimator
    unet: nn.Module
    controlnet: Control
    vae: TemporalAutoencoderTiny
    centred_flow: bool = False
    """Whether estimated flow compensates for the shift of `warp`; flow passed by callers is never changed."""

    def prepare(self) -> None:
        """Convert the networks in place to the form in which they run fastest without changing results."""
        # The weights outlive the caller's inference mode, so they must not be inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            upcast_attention(self.unet, self.controlnet)
            # Convolutions need channels last: otherwise each call would reorder pictures and weights.
            # The larger networks have that order if they were copied, and otherwise stay in mapped files.
            nn.Module.to(self.vae, memory_format=torch.channels_last)

    def stages(self) -> dict[str, nn.Module]:
        """Return the networks, keyed by stage."""
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
        """Yield the calls for one frame; the networks have dtype `own` and are temporarily cast to `dtype`.

        `need` returns how many bytes a stage needs; it is called only if the placement moves networks.
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
        """Move the networks of a stage to their device when the stage begins, and return that device."""
        if self.stage != stage:
            self.stage = stage
            room = 0 if self.placement.fixed else self.need(stage)
            self._device = [self.placement.acquire(name, room) for name in networks or (stage,)][-1]
        return self._device

    def get_ready(self, size: tuple[int, int], guided: bool, on_step: OnStep) -> None:
        """Do any slow preparation for an LQ size before its first frame; PyTorch needs none."""

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
        """Return the ControlNet's residuals, kept or newly computed, or None if there is no guidance."""
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
    """Multiply the ControlNet's residuals by the trust, reduced to each level's size."""
    if trust is None:
        return residuals
    levels, middle = residuals

    def faded(level: Tensor) -> Tensor:
        share = reduce_like(trust, level)
        assert share is not None
        return level * share

    return [faded(level) for level in levels], faded(middle)
