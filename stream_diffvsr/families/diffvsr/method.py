"""Stream-DiffVSR, one frame at a time. Read this file first.

lq ──x4──► lq_up ─┐
previous lq ─x4───┴► flow ──► warp(previous hq) ──► warped ──┬─────────────────┐
                                                             ▼                 ▼
noise(seed, frame index), lq ──► denoise: U-Net + ControlNet ──► latents ──► decode with TPM ──► hq
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...copies import upload
from ...devices import repeatable
from ...errors import CheckpointError, IncompatibleInputError
from ...flow import FlowEstimator
from ...flow.warp import centred, warp
from ...placement import FixedPlacement, Placement
from ...runtimes.torch import compilation, quantized
from ...runtimes.torch.precision import in_float32
from ...tensors import SCALE, check_frame, check_shape, is_finite, pad_to, padded_size
from . import bands as banded
from . import lookahead
from .choose import Planner, record
from .control import Control
from .denoise import Denoiser, OnStep, Prompt, Schedule, latent_tiles, noise
from .estimate import Widths, estimate
from .fallback import beside_stages, memory_of, within_memory
from .frame import Frame, FrameResult, ignore
from .graphs import LoopGraph
from .options import UpscaleOptions
from .plan import Plan
from .prepare import prepare
from .prompt import PromptEmbeddings
from .prompted import keys_and_values
from .state import StreamDiffVSRState
from .vae import TemporalAutoencoderTiny

log = logging.getLogger(__name__)

OVERFLOWED = "float32_since"
"""In a state's metadata: the first frame that half precision could not hold."""


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
        centred_flow: bool = False,
    ) -> None:
        """`centred_flow`: estimates undo the shift of `warp`; flow that callers hand in is taken as it is."""
        self.stages: dict[str, nn.Module] = {"flow": flow, "unet": unet, "controlnet": control, "vae": vae}
        self.placement: Placement = FixedPlacement(device)
        self.prompts = prompts
        self.scheduler_config = scheduler_config
        self.device = device
        self.dtype = dtype
        self.model = model
        self.centred_flow = centred_flow
        self.graph = LoopGraph.on(device)
        self._prepared: dict[Any, tuple[Schedule, list[Prompt]]] = {}
        self.number_format = str(dtype).removeprefix("torch.")
        prepare(unet, control, vae)
        self._widths = Widths.of(unet, control, vae, flow.name)

    def quantize(self, kind: str) -> None:
        """Have the linear layers of U-Net and ControlNet in 'int8' or 'fp8' from now on, an approximation.

        To be called before the first frame, if at all. Raises `IncompatibleInputError` and
        `ModuleNotFoundError` as `models.quantized.check`.
        """
        quantized.check(kind, self.device)
        if kind != "none":
            quantized.quantize(kind, self.stages["unet"], self.control)
            self.number_format += f", linear layers {kind}"

    @property
    def flow(self) -> FlowEstimator:
        return self.stages["flow"]  # type: ignore[return-value]

    @property
    def vae(self) -> TemporalAutoencoderTiny:
        return self.stages["vae"]  # type: ignore[return-value]

    @property
    def control(self) -> Control:
        return self.stages["controlnet"]  # type: ignore[return-value]

    @property
    def planner(self) -> Planner:
        """Tells what a frame of some size needs, and how it would be computed."""
        return Planner(self._widths, self.flow.methods, self.dtype, self.device)

    @torch.no_grad()
    def process_frame(
        self,
        lq: Tensor,
        state: StreamDiffVSRState | None = None,
        options: UpscaleOptions | None = None,
        latents: Tensor | None = None,
        flow: Tensor | lookahead.Begun | None = None,
        on_step: OnStep | None = None,
    ) -> FrameResult:
        """Upscale one frame by 4.

        `lq` (1, 3, h, w) float32 in model range; `latents` (1, 4, h', w') instead of the seeded noise, at
        the size padded to multiples of 4; `flow` (1, 2, 4h, 4w) pixels instead of an estimate, which then
        guides even where the pipe estimates none, or what `begin_flow` returned.

        Where memory runs out, `memory_plan` 'auto' repeats the frame with a lower plan, which the state then
        records. A frame of half precision that is not finite is repeated in float32. Both are logged.
        Raises `IncompatibleInputError`, and `VRAMError` where no plan suffices.
        """
        state, options = state or StreamDiffVSRState(), options or UpscaleOptions()
        return beside_stages(
            lambda: self._result(self._accept(lq, state, options, latents, flow), on_step),
            device=self.device,
            need=lambda: self.planner.least(lq.shape[-2:], options),
        )

    def _result(self, frame: Frame, on_step: OnStep | None) -> FrameResult:
        hq, frame = self._finite(frame if on_step is None else replace(frame, on_step=on_step))
        return FrameResult(hq, self._next_state(frame, hq))

    def _upscale(self, frame: Frame) -> tuple[Tensor, Frame]:
        """The figure above: hq, and the frame with the flow it was made with."""
        with repeatable(), compilation.compiled(self.stages.values(), frame.compile_mode):
            with memory_of("flow"):
                flow = self._flow(frame)
                warped = None if flow is None else self._warp_previous(frame, flow)
            with memory_of("unet"):
                latents = self._denoise(frame, warped)
            with memory_of("vae"):
                hq = self._decode(frame, latents, warped)
        height, width = (SCALE * side for side in frame.lq.shape[-2:])
        return hq[..., :height, :width], replace(frame, flow=flow)

    def stream(
        self,
        frames: Iterable[Tensor],
        options: UpscaleOptions | None = None,
        state: StreamDiffVSRState | None = None,
        on_step: OnStep | None = None,
        look_ahead: bool = False,
    ) -> Iterator[FrameResult]:
        """Upscale frame after frame; the next one is asked for only when the last result was taken.

        With `look_ahead` it is asked for before a frame is begun, and its flow estimated meanwhile: the
        same results, a frame of delay, and memory for both at once. Frames must not share memory then.
        """
        flow = None
        for lq, following in lookahead.with_next(frames, look_ahead):
            coming = None if following is None else self.begin_flow(following, lq, state, options)
            result = self.process_frame(lq, state, options, flow=flow, on_step=on_step)
            state, flow = result.state, coming
            yield result

    @torch.no_grad()
    def begin_flow(
        self,
        lq: Tensor,
        previous: Tensor,
        state: StreamDiffVSRState | None,
        options: UpscaleOptions | None = None,
    ) -> lookahead.Begun | None:
        """Have the device estimate the flow from `previous` to `lq`, beside what it is given next.

        `state` is the one that `previous` will be upscaled with. The result is the `flow` to give with `lq`,
        and neither frame may be changed until then. None: it is left to the frame's own turn, as where a
        sequence starts, memory is short, a host places the networks, or the estimate fails, which then shows
        in that turn.
        """
        options = options or UpscaleOptions()
        if state is None or not state.has_previous or not self._can_look_ahead(options):
            return None
        try:
            size = lq.shape[-2:]
            plan = self.planner.plan(size, state.metadata, options)
            held = ["unet"] if self.graph.holds_memory else []
            if lq.shape != previous.shape or not self.planner.has_room(size, options, plan, "flow", *held):
                return None
            estimate = partial(self._estimate_flow, options=options, method=plan.flow)
            frames = upload(lq, self.device), upload(previous, self.device)
            with repeatable():
                return lookahead.begin(estimate, *frames, method=plan.flow)
        except Exception as error:
            log.debug("the next frame's flow is left to its turn: %s", error)
            return None

    def _can_look_ahead(self, options: UpscaleOptions) -> bool:
        fixed = isinstance(self.placement, FixedPlacement)
        return fixed and self.flow.estimates and options.flow_every == 1

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

    def _accept(
        self,
        lq: Tensor,
        state: StreamDiffVSRState,
        options: UpscaleOptions,
        latents: Tensor | None,
        flow: Tensor | lookahead.Begun | None,
    ) -> Frame:
        """Refuse what does not fit, say where the settings are not the state's, and take up its plan."""
        check_frame(lq)
        if options.flow_scale != 1 and not self.flow.any_size:
            raise IncompatibleInputError("flow_scale 1 with a callable as flow", str(options.flow_scale))
        state.check_fits(lq, self.model)
        height, width = lq.shape[-2:]
        if latents is not None:
            check_shape(latents, (1, 4, *padded_size(height, width)), "latents")
        plan = self.planner.plan(lq.shape[-2:], state.metadata, options)
        if isinstance(flow, lookahead.Begun):
            # Memory that ran out since then may have changed how flow is estimated.
            flow = flow.join() if flow.method == plan.flow else None
        elif flow is not None:
            check_shape(flow, (1, 2, SCALE * height, SCALE * width), "flow")
        settings = self._settings(options)
        if differences := state.differences(settings):
            log.warning("not an exact continuation of frame %d: %s", state.frame_index, differences)
        return Frame(
            lq=upload(lq, self.device),
            state=state.to(self.device),
            options=options,
            plan=plan,
            dtype=self.dtype,
            latents=latents,
            flow=state.flow if flow is None and options.flow_every > 1 else flow,
            compile_mode=settings["compilation"],
        )

    def _acquire(self, frame: Frame, *stages: str) -> torch.device:
        """Have the networks of stages that work together brought to their device."""
        needs = estimate(self._widths, frame.lq.shape[-2:], frame.options, frame.dtype, frame.plan)
        room = needs["frames"] + max(needs[stage] for stage in stages)
        return [self.placement.acquire(stage, room) for stage in stages][-1]

    def _finite(self, frame: Frame) -> tuple[Tensor, Frame]:
        """The frame within memory; in float32 if it is not finite in half precision."""
        hq, frame = self._within_memory(frame)
        if is_finite(hq):
            return hq, frame
        if frame.dtype == torch.float32:
            raise CheckpointError(
                f"frame {frame.state.frame_index} came out with values that are not finite, in float32 too: "
                "the weights are damaged, or the previous frame was far out of range."
            )
        del hq
        if OVERFLOWED not in frame.state.metadata:
            name = str(frame.dtype).removeprefix("torch.")
            log.warning(
                "frame %d is not finite in %s: it, and others like it, are repeated in float32",
                frame.state.frame_index,
                name,
            )
        self.graph.give_up()  # it has the addresses of the weights as they were
        with in_float32([self.stages[name] for name in ("unet", "controlnet", "vae")], frame.dtype):
            return self._finite(replace(frame, dtype=torch.float32, compile_mode=compilation.OFF))

    def _within_memory(self, frame: Frame) -> tuple[Tensor, Frame]:
        """The frame, with a lower plan where memory runs out: the same noise, the same flow."""
        planner = self.planner
        (hq, frame), plan = within_memory(
            lambda plan: self._upscale(replace(frame, plan=plan)),
            frame.plan,
            lower=lambda plan, stage: self._lower(plan, stage, frame.options),
            need=lambda plan: planner.need(frame.lq.shape[-2:], frame.options, plan),
            device=self.device,
        )
        return hq, replace(frame, plan=plan)

    def _lower(self, plan: Plan, stage: str, options: UpscaleOptions) -> Plan | None:
        """What to try when memory ran out: the same again where a graph held some of it."""
        return plan if self.graph.give_up() else self.planner.lower(plan, stage, options)

    def _flow(self, frame: Frame) -> Tensor | None:
        """Motion since the previous frame, (1, 2, 4h, 4w); None where a sequence starts."""
        if frame.state.previous_hq is None:
            return None
        if frame.flow is not None or not self.flow.estimates:
            return frame.flow
        assert frame.state.previous_lq is not None
        device = self._acquire(frame, "flow")
        frames = frame.lq.to(device), frame.state.previous_lq.to(device)
        flow = self._estimate_flow(*frames, options=frame.options, method=frame.plan.flow)
        frame.on_step("flow", 1, 1)
        return flow

    def _warp_previous(self, frame: Frame, flow: Tensor) -> Tensor:
        """The previous hq moved onto now, padded for the networks."""
        assert frame.state.previous_hq is not None
        warped = warp(frame.state.previous_hq, flow.to(self.device))
        return pad_to(warped, *(SCALE * side for side in padded_size(*frame.lq.shape[-2:])))

    def _estimate_flow(self, lq: Tensor, previous: Tensor, *, options: UpscaleOptions, method: str) -> Tensor:
        """Flow between two LQ frames, for the 4x size, estimated at `flow_scale` of it."""
        scale = options.flow_scale
        flow = self.flow.between(lq, previous, SCALE * scale, method)
        if scale != 1:
            size = tuple(SCALE * side for side in lq.shape[-2:])
            flow = F.interpolate(flow, size=size, mode="bilinear", align_corners=False) / scale
        return centred(flow) if self.centred_flow and self.flow.any_size else flow

    def _denoise(self, frame: Frame, warped: Tensor | None) -> Tensor:
        """Latents (1, 4, h', w') at the size padded for the networks, float32."""
        options, plan = frame.options, frame.plan
        device = self._acquire(frame, "controlnet", "unet")
        height, width = padded_size(*frame.lq.shape[-2:])
        lq = pad_to(frame.lq, height, width).to(device)
        latents = frame.latents
        if latents is None:
            latents = noise(options.seed, frame.state.frame_index, height, width)
        schedule, prompts = self._prepare(options, device, frame.dtype)
        embedding = None
        if warped is not None and any(schedule.control_scales(options)):
            embedding = banded.embed(self.control, warped.to(device, frame.dtype), plan.rows)
            frame.on_step("control", 1, 1)
        tiles = latent_tiles(height, width, plan.tile, plan.overlap)
        denoiser = Denoiser(self.stages["unet"], self.control, prompts, schedule, options, tiles)
        start = upload(latents, device) * schedule.scheduler.init_noise_sigma
        if embedding is None or not self._may_record(frame):
            return denoiser(start, lq, embedding, frame.on_step)
        # A recording outlives the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return self._denoise_by_graph(denoiser, (start, lq, embedding), frame)

    def _denoise_by_graph(
        self, denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Tensor], frame: Frame
    ) -> Tensor:
        key, steps = (denoiser.schedule, denoiser.options), len(denoiser.schedule.timesteps)
        repeated = self.graph.repeat(key, inputs)
        if repeated is not None:
            frame.on_step("denoise", steps, steps)
            return repeated
        result = denoiser(*inputs, frame.on_step)
        room = partial(self.planner.has_room, frame.lq.shape[-2:], frame.options, frame.plan, "unet")
        self.graph.learn(key, partial(denoiser, on_step=ignore), inputs, result, room)
        return result

    def _may_record(self, frame: Frame) -> bool:
        """Whether the loop may become a graph: it is asked for, in one piece, and weights stay in place."""
        fixed = isinstance(self.placement, FixedPlacement)
        return self.graph.records and frame.compile_mode == "max" and fixed and frame.plan.tile is None

    def _decode(self, frame: Frame, latents: Tensor, warped: Tensor | None) -> Tensor:
        """The picture (1, 3, 4h', 4w'), float32, on the pipe's device."""
        device, rows = self._acquire(frame, "vae"), frame.plan.rows
        features = None
        if warped is not None and frame.options.use_tpm:
            features = banded.features(self.vae, warped.to(device, frame.dtype), rows)
            frame.on_step("features", 1, 1)
        hq = banded.decode(self.vae, latents.to(device, frame.dtype), features, rows)
        frame.on_step("decode", 1, 1)
        return hq.to(self.device, torch.float32)

    def _prepare(
        self, options: UpscaleOptions, device: torch.device, dtype: torch.dtype
    ) -> tuple[Schedule, list[Prompt]]:
        """What depends on the options alone, kept for the run; the networks must be on their device."""
        key = (options, device, dtype)
        if key not in self._prepared:
            texts = [options.negative_prompt, options.prompt] if options.guided else [options.prompt]
            embeddings = [self.prompts.get(text).to(device, dtype) for text in texts]
            networks = self.stages["unet"], self.control
            prompts = [Prompt(*(keys_and_values(each, x) for each in networks)) for x in embeddings]
            self._prepared = {key: (Schedule.prepare(self.scheduler_config, options, device), prompts)}
        return self._prepared[key]

    def _next_state(self, frame: Frame, hq: Tensor) -> StreamDiffVSRState:
        metadata = {**frame.state.metadata, "model": self.model, **self._settings(frame.options)}
        metadata |= record(frame.plan, frame.lq.shape[-2:])
        if frame.dtype != self.dtype:
            metadata.setdefault(OVERFLOWED, str(frame.state.frame_index))
        return replace(
            frame.state,
            # Own memory: neither the caller's frame nor the padded picture is kept alive through a view.
            previous_hq=hq.contiguous(),
            previous_lq=frame.lq.clone(),
            flow=self._flow_for_next(frame),
            frame_index=frame.state.frame_index + 1,
            metadata=metadata,
        )

    def _flow_for_next(self, frame: Frame) -> Tensor | None:
        """The flow of this frame, where the next one takes it again."""
        again = frame.state.frame_index % frame.options.flow_every != 0
        return frame.flow.clone().to(self.device) if again and frame.flow is not None else None

    def _settings(self, options: UpscaleOptions) -> dict[str, str]:
        """What is in force, for the state's metadata."""
        return {
            "options": options.to_json(),
            "dtype": self.number_format,
            "flow": self.flow.name,
            "compilation": compilation.in_force(options.compile_mode, self.device),
        }
