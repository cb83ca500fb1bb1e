"""Stream-DiffVSR as an `Upscaler`: sessions, single frames, and the provenance recorded in states."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import upscaler
from ...errors import IncompatibleInputError
from ...flow import FlowEstimator
from ...memory import is_out_of_memory
from ...runtimes.graph import Runtime
from ...runtimes.torch import compilation, quantized
from ...tensors import MINIMUM_SIDE, SCALE, check_frame, check_shape, padded_size
from ...upscaler import FixedPlacement, Info, OnStep, Placement, Provenance, State, Upscaled, ignore_progress
from . import lora
from .attempts import OVERFLOWED, attempt, outside_the_networks
from .built import BuiltNetworks
from .components import Traits
from .control import Control
from .counted import Needs
from .denoise import Schedule
from .method import Frame
from .networks import TorchNetworks
from .options import UpscaleOptions
from .plan import Plan, Planner, plan_details
from .prompt import PromptEmbeddings
from .state import FAMILY, StreamDiffVSRState
from .vae import TemporalAutoencoderTiny

log = logging.getLogger(__name__)

RELEASED = Traits()

KEPT = 8
"""Number of option sets whose schedule and prompt embeddings are cached."""


@dataclass(frozen=True, eq=False)
class FrameResult(Upscaled):
    """One upscaled frame, and the state that the next frame needs."""

    state: StreamDiffVSRState


class StreamDiffVSRPipeline:
    """The networks of one checkpoint. Data about videos is kept only in states, never in the pipeline.

    One thread at a time computes a frame while other threads wait; several sequences may be interleaved.
    """

    Options = UpscaleOptions

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
        traits: Traits = RELEASED,
    ) -> None:
        self.torch_networks = TorchNetworks(flow, unet, control, vae, traits.centred_flow)
        self.torch_networks.prepare()
        self.built: BuiltNetworks | None = None
        self.placement: Placement = FixedPlacement(device)
        self.prompts, self.scheduler_config = prompts, scheduler_config
        self.device, self.dtype, self.model, self.traits = device, dtype, model, traits
        self.base: StreamDiffVSRPipeline | None = None
        self.loras: tuple[lora.Lora, ...] = ()
        self.number_format = str(dtype).removeprefix("torch.")
        self.needs = Needs(self.torch_networks, scheduler_config, dtype, device)
        self._prepared: dict[object, tuple[Schedule, list[Tensor]]] = {}
        self._lock = threading.Lock()

    def quantize(self, kind: str) -> None:
        """Switch the linear layers of the U-Net and the ControlNet to 'int8' or 'fp8', an approximation.

        Call this before processing the first frame. Raises `IncompatibleInputError` and
        `ModuleNotFoundError` as `quantized.check_quantize` does.
        """
        quantized.check_quantize(kind, self.device)
        if kind != "none":
            quantized.quantize(kind, self.torch_networks.unet, self.torch_networks.controlnet)
            self.number_format += f", linear layers {kind}"

    def with_loras(self, *loras: tuple[str | Path, float]) -> StreamDiffVSRPipeline:
        """Return a pipeline with these LoRAs, (path, strength) pairs, in addition to those already merged.

        It shares all unchanged layers with this pipeline, which is not modified. Raises the errors of
        `read_lora` and `merge_loras`, and `IncompatibleInputError` if layers are quantised or run in another
        runtime.
        """
        if self.built is not None or self.number_format != str(self.dtype).removeprefix("torch."):
            raise IncompatibleInputError(
                "LoRAs must be added before quantize and runtime are set; this model already uses "
                f"{self.runtime} with {self.number_format}",
            )
        base = self.base or self
        told = (lora.read_lora(path, strength) for path, strength in loras)
        every = (*self.loras, *(each for each in told if each.strength))
        other = base.around(lora.merge_loras(base.torch_networks, base.model, every))
        other.base, other.loras, other.model = base, every, lora.merged_fingerprint(base.model, every)
        return other

    def around(self, networks: TorchNetworks) -> StreamDiffVSRPipeline:
        """Return a copy of this pipeline that uses `networks`, which differ only in their weights."""
        other = copy.copy(self)
        other.torch_networks = networks
        other.needs = Needs(networks, self.scheduler_config, self.dtype, self.device)
        return other

    def on(self, runtime: Runtime) -> StreamDiffVSRPipeline:
        """Return a pipeline that shares everything with this one but runs its networks in `runtime`.

        Raises `IncompatibleInputError` if the networks are not in the number format that the runtime needs.
        """
        if self.dtype != runtime.dtype or self.number_format != str(self.dtype).removeprefix("torch."):
            wanted = str(runtime.dtype).removeprefix("torch.")
            raise IncompatibleInputError(
                f"runtime {runtime.name} needs a model loaded in {wanted}, not {self.number_format}"
            )
        other = copy.copy(self)
        other.built = BuiltNetworks(self.torch_networks, runtime)
        other.number_format = runtime.number_format
        return other

    @property
    def runtime(self) -> str:
        """Name of the library that runs the networks: torch, openvino or onnx."""
        return "torch" if self.built is None else self.built.runtime.name

    @property
    def runtime_details(self) -> str:
        """Details of the runtime that, besides the weights, affect its results; '' for PyTorch."""
        return "" if self.built is None else self.built.runtime.details

    @property
    def info(self) -> Info:
        return Info(FAMILY, self.model, self.number_format, self.runtime, (float(SCALE),), MINIMUM_SIDE)

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The networks by stage: flow, unet, controlnet, vae."""
        return self.torch_networks.stages()

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self.stages

    @property
    def flow(self) -> FlowEstimator:
        return self.torch_networks.flow

    @property
    def vae(self) -> TemporalAutoencoderTiny:
        return self.torch_networks.vae

    @property
    def control(self) -> Control:
        return self.torch_networks.controlnet

    @property
    def planner(self) -> Planner:
        """A planner that estimates a frame's memory needs and chooses how to compute the frame."""
        return Planner(self.needs, self.needs.most, self.flow.methods, self.device)

    def bytes_needed(self, size: tuple[int, int], options: UpscaleOptions | None = None) -> int:
        """Return how many bytes an LQ frame (height, width), if not split, needs besides the weights."""
        return self.planner.bytes_needed(size, options or UpscaleOptions(), Plan())

    def provenance(self, size: tuple[int, int], options: UpscaleOptions | None = None) -> Provenance:
        options = options or UpscaleOptions()
        return self._provenance(options, self.planner.plan(size, {}, options), size, {})

    def session(
        self,
        options: UpscaleOptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> Sequence:
        """Start a sequence, or continue from `state`; the first N frames use `noise` (N, C, h', w')."""
        return Sequence(self, options or UpscaleOptions(), StreamDiffVSRState.of(state), on_step, noise)

    def stream(
        self,
        frames: Iterable[Tensor],
        options: UpscaleOptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[FrameResult]:
        """Upscale frames one by one, requesting each only after the previous result has been consumed."""
        for result in upscaler.stream(self.session(options, state, on_step, noise), frames):
            assert isinstance(result, FrameResult)
            yield result

    def __call__(
        self,
        frames: Tensor,
        options: UpscaleOptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, StreamDiffVSRState]:
        """Upscale consecutive frames (N, 3, h, w).

        Returns the results, (N, 3, 4h, 4w) float32 on the CPU, and the state after the last frame.
        """
        if not isinstance(frames, Tensor) or frames.ndim != 4:
            got = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise IncompatibleInputError(f"frames must have the shape (N, 3, h, w), not {got}")
        last = StreamDiffVSRState.of(state)
        count, _, height, width = frames.shape
        hq = torch.empty((count, 3, SCALE * height, SCALE * width))
        for index, result in enumerate(self.stream(frames.unsqueeze(1), options, last, on_step)):
            hq[index] = result.hq[0]
            last = result.state
        return hq, last

    def process_frame(
        self,
        lq: Tensor,
        state: State | None = None,
        options: UpscaleOptions | None = None,
        latents: Tensor | None = None,
        flow: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> FrameResult:
        """Upscale one frame by a factor of 4.

        `lq` is (1, 3, h, w) float32 in model range. `latents` (1, C, h', w'), at the size padded to multiples
        of 4, replace the seeded noise. `flow` (1, 2, 4h, 4w) in pixels replaces the estimate; it is used
        even if the pipeline does not estimate flow.

        If memory runs out and `memory_plan` is 'auto', the frame is recomputed with a plan that needs less
        memory; the state records that plan. A frame that overflows in half precision is recomputed in
        float32. Both are logged. Raises `IncompatibleInputError`, and `VRAMError` if no plan fits.
        """
        options, before = options or UpscaleOptions(), StreamDiffVSRState.of(state)
        try:
            with self._lock, torch.no_grad():
                return self._process(lq, before, options, latents, flow, on_step or ignore_progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).strip().partition("\n")[0]
        # The error has now been freed, along with the tensors that its traceback referred to.
        raise outside_the_networks(self, lq, options, message)

    def _process(
        self,
        lq: Tensor,
        before: StreamDiffVSRState,
        options: UpscaleOptions,
        latents: Tensor | None,
        flow: Tensor | None,
        on_step: OnStep,
    ) -> FrameResult:
        frame = self._accept(lq, before, options, latents, flow, on_step)
        hq, plan, dtype = attempt(self, frame, self._compile_mode(options))
        details = dict(before.provenance.details)
        if dtype != self.dtype:
            details.setdefault(OVERFLOWED, str(before.frame_index))
        after = StreamDiffVSRState(
            previous_hq=hq,
            previous_lq=lq.to(self.device, copy=True),
            frame_index=before.frame_index + 1,
            provenance=self._provenance(options, plan, frame.size, details),
        )
        return FrameResult(before.frame_index, hq, after)

    def _accept(
        self,
        lq: Tensor,
        state: StreamDiffVSRState,
        options: UpscaleOptions,
        latents: Tensor | None,
        flow: Tensor | None,
        on_step: OnStep,
    ) -> Frame:
        """Check that the inputs fit, log which settings changed, and choose the memory plan."""
        check_frame(lq)
        if options.flow_scale != 1 and not self.flow.any_size:
            raise IncompatibleInputError(
                f"flow_scale must be 1, not {options.flow_scale}, if flow is a callable"
            )
        state.check_fits(lq, self.model)
        height, width = lq.shape[-2:]
        if latents is not None:
            check_shape(latents, (1, self.vae.latent_channels, *padded_size(height, width)), "latents")
        if flow is not None:
            check_shape(flow, (1, 2, SCALE * height, SCALE * width), "flow")
        details = state.provenance.details
        plan = self.planner.plan((height, width), details, options)
        if state.has_previous:
            now = self._provenance(options, plan, (height, width), {})
            if changes := state.provenance.differences(now):
                log.warning(
                    "settings changed since frame %d (%s); the result will not match that of an "
                    "uninterrupted run",
                    state.frame_index,
                    changes,
                )
        masked = (options.occlusion or self.traits.occlusion) == "mask"
        return Frame(lq, state, options, plan, latents, flow, self.flow.estimates, masked, on_step)

    def _provenance(
        self, options: UpscaleOptions, plan: Plan, size: tuple[int, int], details: Mapping[str, str]
    ) -> Provenance:
        now = {"flow": self.flow.name, "compilation": self._compile_mode(options)}
        if self.built is not None:
            now[self.runtime] = self.runtime_details
        if self.loras:
            now["loras"] = "; ".join(map(str, self.loras))
        return Provenance(
            self.model,
            self.number_format,
            self.runtime,
            asdict(options),
            {**details, **now, **plan_details(plan, size)},
            parts="" if plan == Plan(overlap=plan.overlap) else str(plan),
        )

    def _compile_mode(self, options: UpscaleOptions) -> str:
        if self.built is not None:
            return compilation.OFF
        return compilation.effective_mode(options.compile_mode, self.device)

    def stage_bytes(self, frame: Frame, plan: Plan) -> Callable[[str], int]:
        """Return a function that tells how many bytes a stage needs in addition to the weights.

        Placements that move networks use it to decide how much memory to free.
        """

        def need(stage: str) -> int:
            needs = self.needs(frame.size, frame.options, plan)
            return needs["frames"] + (
                max(needs["controlnet"], needs["unet"]) if stage == "unet" else needs[stage]
            )

        return need

    def prepared(self, options: UpscaleOptions, dtype: torch.dtype) -> tuple[Schedule, list[Tensor]]:
        """Return the schedule and prompt embeddings for these options; the most recent ones are cached."""
        steps, spacing = options.num_inference_steps or self.traits.steps, options.timestep_spacing
        texts = (options.negative_prompt, options.prompt) if options.guided else (options.prompt,)
        key = (steps, spacing, texts, self.device, dtype)
        if key not in self._prepared:
            if len(self._prepared) >= KEPT:
                self._prepared.pop(next(iter(self._prepared)))
            schedule = Schedule.prepare(self.scheduler_config, steps, spacing, self.device)
            self._prepared[key] = schedule, [self.prompts.get(text).to(self.device, dtype) for text in texts]
        return self._prepared[key]


class Sequence:
    """A `Session` of Stream-DiffVSR; every frame is a chunk whose result is returned immediately."""

    def __init__(
        self,
        pipe: StreamDiffVSRPipeline,
        options: UpscaleOptions,
        state: StreamDiffVSRState,
        on_step: OnStep | None,
        noise: Tensor | None,
    ) -> None:
        self._state = state
        self._frame = partial(pipe.process_frame, options=options, on_step=on_step)
        self._noise = [] if noise is None else list(noise.split(1))

    def push(self, lq: Tensor) -> list[Upscaled]:
        """Upscale the next frame (1, 3, h, w) and return a list that contains only its result."""
        result = self._frame(lq, self._state, latents=self._noise[0] if self._noise else None)
        self._noise, self._state = self._noise[1:], result.state
        return [result]

    def finish(self) -> list[Upscaled]:
        """Return an empty list, since no results are ever pending."""
        return []

    def state(self) -> StreamDiffVSRState:
        """Return the state after the last frame."""
        return self._state
