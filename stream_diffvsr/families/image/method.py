"""A single-image model as an `Upscaler`, which works frame by frame, and in tiles if memory runs out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor

from ...devices import repeatable
from ...errors import CheckpointError, IncompatibleInputError, VRAMError
from ...flow.bundled import FlowNetwork
from ...memory import count_bytes, free_memory, is_out_of_memory, on_meta, release_caches
from ...tensors import MINIMUM_SIDE, check_frame, check_shape, is_finite
from ...upscaler import (
    FixedPlacement,
    Info,
    OnStep,
    Placement,
    Provenance,
    State,
    Upscaled,
    ignore_progress,
    stream,
)
from .network import ImageNetwork
from .options import ImageOptions
from .steady import steadied

log = logging.getLogger(__name__)

FAMILY = "image"

HQ, LQ = "previous_hq", "previous_lq"

TILES = "tiles"
"""Key in a state's details; its value is the side of the tiles in output pixels, or 'whole'."""

WHOLE = "whole"
LADDER = (2048, 1024, 512, 256)
"""Tile sides in output pixels, tried in this order when memory runs out."""

ROUGH = 512
"""Assumed number of values per pixel of the frame and of its result, for models whose memory needs
cannot be counted: enough for a few feature maps of 64 channels at once, doubled as a margin."""

MEGABYTE = 2**20


class ImageModel:
    """A loaded single-image model, which keeps no data about any video."""

    Options = ImageOptions

    def __init__(
        self, network: ImageNetwork, flow: FlowNetwork, device: torch.device, dtype: torch.dtype, model: str
    ) -> None:
        self.network, self.flow, self.device, self.dtype = network, flow, device, dtype
        self.networks = {"image": network, "flow": flow}
        self.placement: Placement = FixedPlacement(device)
        # Frames below the model's own minimum are padded, so the minimum is the same as for all families.
        self.info = Info(
            FAMILY,
            model,
            str(dtype).removeprefix("torch."),
            scales=(float(network.scale),),
            minimum=MINIMUM_SIDE,
        )
        self._lock = threading.Lock()
        self._needs = lru_cache(maxsize=64)(self._count)

    def session(
        self,
        options: ImageOptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> ImageSession:
        """Start a sequence, or continue from `state`; `noise` must be None for these models."""
        if noise is not None:
            raise IncompatibleInputError("single-image models use no noise, so noise must be None")
        return ImageSession(self, options or ImageOptions(), state or State(), on_step or ignore_progress)

    def stream(
        self,
        frames: Iterable[Tensor],
        options: ImageOptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Upscaled]:
        """Upscale frames lazily, one after another; see `upscaler.stream`."""
        return stream(self.session(options, state, on_step, noise), frames)

    def provenance(self, size: tuple[int, int], options: ImageOptions | None = None) -> Provenance:
        """Describe how frames would be produced with the current settings.

        Frames are produced in tiles if `tile_size` is set, otherwise as a whole.
        """
        options = options or ImageOptions()
        return self._provenance(options, options.tile_size)

    def bytes_needed(self, size: tuple[int, int], options: ImageOptions | None = None) -> int:
        """Return how many bytes an LQ frame of `size` (height, width) needs in addition to the weights.

        The bytes are counted on the meta device or, if the model's code does not run there, estimated as
        `ROUGH` values per pixel of the frame and of its result.
        """
        options = options or ImageOptions()
        return self._needs(tuple(size), options.tile_size, options.tile_overlap, options.steady > 0)

    def process(
        self, lq: Tensor, before: State, options: ImageOptions, on_step: OnStep
    ) -> tuple[Upscaled, State]:
        """Upscale one frame (1, 3, h, w), given the state before it; return its result and the new state.

        Inputs are never modified, even if an error occurs. If memory runs out and no `tile_size` is given,
        this frame and later ones are computed in tiles, which is logged and recorded in the state. Raises
        `IncompatibleInputError`, `VRAMError` if no tile is small enough, and `CheckpointError` if the result
        is not finite.
        """
        with self._lock, torch.no_grad():
            tile = self._accept(lq, before, options)
            while True:
                try:
                    with repeatable():
                        hq, kept = self._compute(lq, before, options, tile, on_step)
                    break
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    message = str(error).strip().partition("\n")[0]
                # The error has now been freed, along with the tensors that its traceback referred to.
                tile = self._smaller(tile, lq, options, message)
        after = State(FAMILY, before.index + 1, kept, self._provenance(options, tile))
        return Upscaled(before.index, hq), after

    def _accept(self, lq: Tensor, before: State, options: ImageOptions) -> int | None:
        """Check that the inputs fit, log changed settings, and return the tile size to use."""
        check_frame(lq)
        if before.family not in ("", FAMILY) or set(before.tensors) not in (set(), {HQ, LQ}):
            raise IncompatibleInputError(
                f"the state belongs to {before.family or 'another family'}, not to single-image models"
            )
        old, recorded = before.provenance, before.provenance.details.get(TILES, WHOLE)
        if old.model not in ("", self.info.model):
            raise IncompatibleInputError(
                f"the state belongs to model {old.model}, not to this one ({self.info.model})"
            )
        if before.has_previous:
            was, now = (f"{x.shape[-1]}x{x.shape[-2]}" for x in (before.tensors[LQ], lq))
            if was != now:
                raise IncompatibleInputError(f"the state is for frames of {was}, not {now}")
            large = (self.network.scale * side for side in lq.shape[-2:])
            check_shape(before.tensors[HQ], (1, 3, *large), HQ)
        fallen = int(recorded) if options.tile_size is None and recorded.isdecimal() else None
        tile = options.tile_size or fallen
        if changes := old.differences(self._provenance(options, tile)):
            log.warning("this is not an exact continuation of frame %d: %s", before.index, changes)
        return tile

    def _compute(
        self, lq: Tensor, before: State, options: ImageOptions, tile: int | None, on_step: OnStep
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the frame's hq and the tensors that the next frame needs, all on the upscaler's device."""
        size = lq.shape[-2], lq.shape[-1]
        device = self._acquire("image", size, options)
        lq = lq.to(device)
        hq = self.network.upscale(lq, tile, options.tile_overlap, on_step)
        if before.has_previous and options.steady > 0:
            device = self._acquire("flow", size, options)
            previous = before.to(device).tensors
            hq = steadied(
                hq.to(device), lq.to(device), (previous[HQ], previous[LQ]), self.flow, options.steady
            )
            on_step("steady", 1, 1)
        hq = hq.to(self.device)
        if not is_finite(hq):
            raise CheckpointError(
                f"the result contains NaN or infinite values in {self.info.number_format}: use float32; "
                "if that does not help, the weights are damaged."
            )
        kept = {HQ: hq, LQ: lq.to(self.device, copy=True)}
        return hq, kept if options.steady > 0 else {}

    def _acquire(self, stage: str, size: tuple[int, int], options: ImageOptions) -> torch.device:
        """Move a network to the device where it runs, and return that device."""
        if self.placement.fixed:
            return self.device
        return self.placement.acquire(stage, self.bytes_needed(size, options))

    def _smaller(self, tile: int | None, lq: Tensor, options: ImageOptions, message: str) -> int:
        """Return the next smaller tile size after memory ran out; raise `VRAMError` if none is allowed."""
        release_caches(self.device)
        longest = max(lq.shape[-2:]) * self.network.scale
        lower = [each for each in LADDER if each < (tile or longest)]
        if options.tile_size is not None or not lower:
            need = self.bytes_needed((lq.shape[-2], lq.shape[-1]), options)
            remedy = f"memory ran out ({message}); use smaller frames, a smaller tile_size or dtype float16"
            raise VRAMError(need // MEGABYTE, free_memory(self.device) // MEGABYTE, remedy)
        log.warning(
            "out of memory (%s): computing this and all later frames with tile_size %d, "
            "which is an approximation",
            message,
            lower[0],
        )
        return lower[0]

    def _provenance(self, options: ImageOptions, tile: int | None) -> Provenance:
        return Provenance(
            self.info.model,
            self.info.number_format,
            self.info.runtime,
            asdict(options),
            {TILES: str(tile or WHOLE)},
            parts=f"tiles of {tile}" if tile else "",
        )

    def _count(self, size: tuple[int, int], tile: int | None, overlap: int, steady: bool) -> int:
        network, flow = on_meta(self.network), on_meta(self.flow)

        def frame() -> Tensor:
            lq = torch.empty((1, 3, *size))
            hq = network.upscale(lq, tile, overlap, ignore_progress)
            before = torch.empty_like(hq), torch.empty_like(lq)
            return steadied(hq, lq, before, flow, 1.0) if steady else hq

        try:
            return count_bytes(frame, [*network.state_dict().values(), *flow.state_dict().values()])
        except Exception as error:  # some models read values, which do not exist on the meta device
            log.debug("cannot calculate how much memory this model needs: %r", error)
            scale = self.network.scale
            height, width = (min(side, (tile or side * scale) // scale + 1) for side in size)
            return ROUGH * self.dtype.itemsize * height * width * (1 + scale**2)


class ImageSession:
    """A `Session` of a single-image model; every frame is a chunk whose result is returned immediately."""

    def __init__(self, upscaler: ImageModel, options: ImageOptions, state: State, on_step: OnStep) -> None:
        self._upscaler, self._options, self._state, self._on_step = upscaler, options, state, on_step

    def push(self, lq: Tensor) -> list[Upscaled]:
        """Upscale the next frame (1, 3, h, w) and return a list that contains only its result."""
        result, self._state = self._upscaler.process(lq, self._state, self._options, self._on_step)
        return [result]

    def finish(self) -> list[Upscaled]:
        """Return an empty list, since no results are ever pending."""
        return []

    def state(self) -> State:
        """Return the state after the last frame: with `steady` 0, just a frame number and no pictures."""
        return self._state
