"""Stream-DiffVSR, one frame at a time. Read this file first.

lq ──x4──► lq_up ─┐
previous lq ─x4───┴► flow ──► warp(previous hq) ──► warped ──┬─────────────────┐
                                                             ▼                 ▼
noise(seed, frame index), lq ──► denoise: U-Net + ControlNet ──► latents ──► decode with TPM ──► hq
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .denoise import Denoiser, OnStep, Schedule, noise
from .errors import IncompatibleInputError
from .flow import FlowEstimator
from .models.control import Control
from .models.prompt import PromptEmbeddings
from .models.temporal_vae import TemporalAutoencoderTiny
from .options import UpscaleOptions
from .state import StreamDiffVSRState
from .tensors import SCALE, check_frame, check_shape, pad_to, padded_size
from .warp import warp

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FrameResult:
    """One upscaled frame, and what the next one needs."""

    hq: Tensor
    """(1, 3, 4h, 4w) float32, model range, not clamped; `to_pixels` makes a picture of it."""
    state: StreamDiffVSRState


class Placement(Protocol):
    """Decides where a network runs; asked before each stage."""

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        """Bring the network of `stage` to a device with room for its activations; return the device."""
        ...


@dataclass(frozen=True)
class FixedPlacement:
    """Everything stays on one device."""

    device: torch.device

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        return self.device


class StreamDiffVSRPipeline:
    """The networks of one checkpoint, and the computation of a frame.

    It keeps nothing about any video: what a sequence remembers is the state, handed in and out.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        control: Control,
        vae: TemporalAutoencoderTiny,
        flow: FlowEstimator,
        prompts: PromptEmbeddings,
        scheduler_config: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        model: str,
    ) -> None:
        self.stages: dict[str, nn.Module] = {"flow": flow, "unet": unet, "controlnet": control, "vae": vae}
        self.placement: Placement = FixedPlacement(device)
        self.prompts = prompts
        self.scheduler_config = scheduler_config
        self.device = device
        self.dtype = dtype
        self.model = model
        self._prepared: dict[tuple[UpscaleOptions, torch.device], tuple[Schedule, Tensor]] = {}

    @property
    def flow(self) -> FlowEstimator:
        return self.stages["flow"]  # type: ignore[return-value]

    @property
    def vae(self) -> TemporalAutoencoderTiny:
        return self.stages["vae"]  # type: ignore[return-value]

    @property
    def control(self) -> Control:
        return self.stages["controlnet"]  # type: ignore[return-value]

    @torch.no_grad()
    def process_frame(
        self,
        lq: Tensor,
        state: StreamDiffVSRState | None = None,
        options: UpscaleOptions | None = None,
        latents: Tensor | None = None,
        flow: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> FrameResult:
        """Upscale one frame by 4.

        `lq` (1, 3, h, w) float32 in model range; `latents` (1, 4, h', w') instead of the seeded noise, at
        the size padded to multiples of 4; `flow` (1, 2, 4h, 4w) pixels instead of an estimate, which then
        guides even where the pipe estimates none. Raises `IncompatibleInputError`.
        """
        options, on_step = options or UpscaleOptions(), on_step or _ignore
        state = self._accept(lq, state or StreamDiffVSRState(), options)
        self._check_given(lq, latents, flow)
        lq = lq.to(self.device)
        warped = self._warp_previous(lq, state.to(self.device), options, flow, on_step)
        latents = self._denoise(lq, warped, state.frame_index, options, latents, on_step)
        hq = self._decode(latents, warped, options, on_step)[
            ..., : SCALE * lq.shape[-2], : SCALE * lq.shape[-1]
        ]
        return FrameResult(hq, self._next_state(lq, hq, state, options))

    def stream(
        self,
        frames: Iterable[Tensor],
        options: UpscaleOptions | None = None,
        state: StreamDiffVSRState | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[FrameResult]:
        """Upscale frame after frame; the next one is asked for only when the last result was taken."""
        for lq in frames:
            result = self.process_frame(lq, state, options, on_step=on_step)
            state = result.state
            yield result

    def __call__(
        self,
        frames: Tensor,
        options: UpscaleOptions | None = None,
        state: StreamDiffVSRState | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, StreamDiffVSRState]:
        """Upscale a batch, (N, 3, h, w) -> (N, 3, 4h, 4w) float32 on the CPU; the batch is time."""
        if not isinstance(frames, Tensor) or frames.ndim != 4:
            got = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise IncompatibleInputError("frames (N, 3, h, w)", str(got))
        state = state or StreamDiffVSRState()
        count, _, height, width = frames.shape
        hq = torch.empty((count, 3, SCALE * height, SCALE * width))
        for index, result in enumerate(self.stream(frames.unsqueeze(1), options, state, on_step)):
            hq[index] = result.hq[0]
            state = result.state
        return hq, state

    def _accept(self, lq: Tensor, state: StreamDiffVSRState, options: UpscaleOptions) -> StreamDiffVSRState:
        """Refuse a frame or a state that does not fit; say where the settings are not the state's."""
        check_frame(lq)
        if options.flow_scale != 1 and not self.flow.any_size:
            raise IncompatibleInputError("flow_scale 1 with a callable as flow", str(options.flow_scale))
        model = state.metadata.get("model", self.model)
        if model != self.model:
            raise IncompatibleInputError(f"a state of model {self.model}", f"one of model {model}")
        if state.previous_lq is not None and state.previous_lq.shape != lq.shape:
            height, width = state.previous_lq.shape[-2:]
            got = f"one of {lq.shape[-1]}x{lq.shape[-2]}; start a new state for another size"
            raise IncompatibleInputError(f"a frame of {width}x{height}, as the state has,", got)
        _warn_if_changed(state, self._settings(options))
        return state

    def _check_given(self, lq: Tensor, latents: Tensor | None, flow: Tensor | None) -> None:
        height, width = lq.shape[-2:]
        if latents is not None:
            check_shape(latents, (1, 4, *padded_size(height, width)), "latents")
        if flow is not None:
            check_shape(flow, (1, 2, SCALE * height, SCALE * width), "flow")

    def _warp_previous(
        self,
        lq: Tensor,
        state: StreamDiffVSRState,
        options: UpscaleOptions,
        flow: Tensor | None,
        on_step: OnStep,
    ) -> Tensor | None:
        """The previous hq moved onto now, padded for the networks; None where a sequence starts."""
        if state.previous_hq is None or state.previous_lq is None:
            return None
        if flow is None and not self.flow.estimates:
            return None
        if flow is None:
            flow = self._estimate_flow(lq, state.previous_lq, options)
            on_step("flow", 1, 1)
        warped = warp(state.previous_hq, flow.to(self.device))
        return pad_to(warped, *padded_size(*warped.shape[-2:], SCALE * SCALE))

    def _estimate_flow(self, lq: Tensor, previous_lq: Tensor, options: UpscaleOptions) -> Tensor:
        """Flow between two LQ frames, for the 4x size, estimated at `flow_scale` of it."""
        scale = options.flow_scale
        height, width = lq.shape[-2:]
        self.placement.acquire("flow", 0)
        flow = self.flow(_resize(lq, SCALE * scale), _resize(previous_lq, SCALE * scale))
        if scale == 1:
            return flow
        size = (SCALE * height, SCALE * width)
        return F.interpolate(flow, size=size, mode="bilinear", align_corners=False) / scale

    def _denoise(
        self,
        lq: Tensor,
        warped: Tensor | None,
        frame_index: int,
        options: UpscaleOptions,
        latents: Tensor | None,
        on_step: OnStep,
    ) -> Tensor:
        lq = pad_to(lq, *padded_size(*lq.shape[-2:]))
        if latents is None:
            latents = noise(options.seed, frame_index, *lq.shape[-2:])
        schedule, prompt = self._prepare(options)
        self.placement.acquire("controlnet", 0)
        self.placement.acquire("unet", 0)
        embedding = None
        if warped is not None and any(schedule.control_scales(options)):
            embedding = self.control.embed(warped.to(self.dtype))
            on_step("control", 1, 1)
        denoiser = Denoiser(self.stages["unet"], self.control, prompt, schedule, options)
        return denoiser(latents.to(self.device) * schedule.scheduler.init_noise_sigma, lq, embedding, on_step)

    def _decode(
        self, latents: Tensor, warped: Tensor | None, options: UpscaleOptions, on_step: OnStep
    ) -> Tensor:
        self.placement.acquire("vae", 0)
        features = None
        if warped is not None and options.use_tpm:
            features = self.vae.features(warped.to(self.dtype))
            on_step("features", 1, 1)
        hq = self.vae.decode(latents.to(self.dtype), features).float()
        on_step("decode", 1, 1)
        return hq

    def _prepare(self, options: UpscaleOptions) -> tuple[Schedule, Tensor]:
        """What depends on the options alone, kept for the run: timesteps and prompt embeddings."""
        key = (options, self.device)
        if key not in self._prepared:
            texts = [options.negative_prompt, options.prompt] if options.guided else [options.prompt]
            prompt = torch.cat([self.prompts.get(text) for text in texts])
            schedule = Schedule.prepare(self.scheduler_config, options, self.device)
            self._prepared = {key: (schedule, prompt.to(self.device, self.dtype))}
        return self._prepared[key]

    def _next_state(
        self, lq: Tensor, hq: Tensor, state: StreamDiffVSRState, options: UpscaleOptions
    ) -> StreamDiffVSRState:
        return replace(
            state,
            # Own memory: neither the caller's frame nor the padded picture is kept alive through a view.
            previous_hq=hq.contiguous(),
            previous_lq=lq.clone(),
            frame_index=state.frame_index + 1,
            metadata={**state.metadata, "model": self.model, **self._settings(options)},
        )

    def _settings(self, options: UpscaleOptions) -> dict[str, str]:
        """What is in force, for the state's metadata."""
        return {
            "options": options.to_json(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "flow": self.flow.name,
        }


def _ignore(stage: str, done: int, total: int) -> None:
    pass


def _resize(lq: Tensor, scale: float) -> Tensor:
    """Bicubic as the reference upsamples; at scale 1 the frame itself."""
    return lq if scale == 1 else F.interpolate(lq, scale_factor=scale, mode="bicubic", align_corners=False)


def _warn_if_changed(state: StreamDiffVSRState, settings: dict[str, str]) -> None:
    """Log once what makes a run no exact continuation; the next state then has the new settings."""
    if not state.has_previous:
        return
    changed = {
        key: state.metadata[key]
        for key in settings
        if state.metadata.get(key, settings[key]) != settings[key]
    }
    if "options" in changed:
        before, now = json.loads(changed.pop("options")), json.loads(settings["options"])
        changed |= {key: before.get(key) for key in now if before.get(key) != now[key]}
        settings = {**settings, **{key: str(value) for key, value in now.items()}}
    if changed:
        differences = ", ".join(f"{key} was {before}, is {settings[key]}" for key, before in changed.items())
        log.warning("not an exact continuation of frame %d: %s", state.frame_index, differences)
