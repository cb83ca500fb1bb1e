"""Compute one frame; retry with less memory if it runs out, and in float32 if half precision overflows."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...devices import repeatable
from ...errors import CheckpointError, VRAMError
from ...memory import free_memory, is_out_of_memory, release_caches
from ...runtimes.torch import compilation, folded, packed
from ...tensors import is_finite
from .method import Frame, upscale
from .networks import TorchCalls
from .plan import Plan

if TYPE_CHECKING:
    from .options import UpscaleOptions
    from .pipeline import StreamDiffVSRPipeline

log = logging.getLogger(__name__)

OVERFLOWED = "float32_since"
"""Key in a state's details for the index of the first frame that overflowed in half precision."""

MEGABYTE = 2**20

REMEDIES = {
    "flow": "set flow_scale to 0.5 or 0.25, or choose flow 'dis'",
    "unet": "use smaller frames, a smaller tile_size or dtype float16",
    "vae": "use smaller frames or dtype float16",
}


def attempt(pipe: StreamDiffVSRPipeline, frame: Frame, compile_mode: str) -> tuple[Tensor, Plan, torch.dtype]:
    """Return the frame's hq in newly allocated memory, and the memory plan and number format that worked.

    If memory runs out and the plan is 'auto', the frame is recomputed with the same noise and flow, but with
    a plan that needs less memory. A frame that is not finite in half precision is recomputed in float32. Both
    are logged. Raises `VRAMError` if no plan is left, and `CheckpointError` if the frame is not finite in
    float32 either.
    """
    plan, dtype, index = frame.plan, pipe.dtype, frame.state.frame_index
    tried: list[str] = []
    while True:
        calls: TorchCalls | None = None
        stage, message = "frame", ""
        try:
            mode = compile_mode if dtype == pipe.dtype else compilation.OFF
            need = pipe.stage_bytes(frame, plan)
            networks = (pipe.built or pipe.torch_networks).calls(
                plan, pipe.dtype, dtype, pipe.placement, need
            )
            eager = (
                () if pipe.built or mode != compilation.OFF or dtype != pipe.dtype else pipe.stages.values()
            )
            with (
                repeatable(),
                compilation.compiled(pipe.stages.values(), mode),
                packed.packed(eager),
                folded.folded(eager),
                networks as calls,
            ):
                calls.get_ready(frame.size, frame.flow is not None or frame.estimates, frame.on_step)
                here = replace(frame.to(pipe.device), plan=plan)
                hq = upscale(here, calls, *pipe.prepared(frame.options, dtype))
            calls.stage = "frame"
            if is_finite(hq):
                # Cloned, since a view would keep the padded picture alive.
                return hq.clone(), plan, dtype
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            stage, message = calls.stage if calls else "frame", str(error).strip().partition("\n")[0]
        # The error has now been freed, along with the tensors that its traceback referred to.
        hq = here = calls = None
        if not message:
            if dtype == torch.float32:
                raise CheckpointError(
                    f"frame {index} contains NaN or infinite values even in float32: the weights are "
                    "damaged, or the previous frame was far outside the valid range."
                )
            if OVERFLOWED not in frame.state.provenance.details:
                name = str(dtype).removeprefix("torch.")
                log.warning(
                    "frame %d overflowed in %s; it and any later frame that overflows are recomputed in "
                    "float32",
                    index,
                    name,
                )
            dtype = torch.float32
            continue
        release_caches(pipe.device)
        if stage == "frame":
            raise MemoryError(message)
        tried.append(str(plan))
        lower = pipe.planner.next_plan(plan, stage, frame.options)
        if lower is None:
            raise _no_memory(
                pipe.planner.bytes_needed(frame.size, frame.options, plan),
                pipe.device,
                f"memory ran out in {stage}; plans tried: {'; '.join(tried)}; {REMEDIES[stage]}, or use "
                "memory_plan 'auto'",
            )
        log.warning(
            "out of memory in %s (%s); this and later frames are computed with %s", stage, message, lower
        )
        plan = lower


def outside_the_networks(
    pipe: StreamDiffVSRPipeline, lq: Tensor, options: UpscaleOptions, message: str
) -> VRAMError:
    """Return the error to raise if memory runs out outside the networks, where no plan can help.

    This can happen while a frame is moved to the device, or while a result is checked and kept for the next
    frame.
    """
    release_caches(pipe.device)
    return _no_memory(
        pipe.planner.minimum_bytes(lq.shape[-2:], options),
        pipe.device,
        f"memory ran out outside the networks ({message}), where memory_plan cannot help; "
        "use smaller frames or close other programs",
    )


def _no_memory(needed: int, device: torch.device, suggestion: str) -> VRAMError:
    return VRAMError(needed // MEGABYTE, free_memory(device) // MEGABYTE, suggestion)
