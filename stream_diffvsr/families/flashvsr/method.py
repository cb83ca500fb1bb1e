"""FlashVSR: a chunk of frames becomes a few latents of noise, which one step of a transformer makes clean.

    lq frames -> scaled, padded -> projection ---- tokens ----+
    noise, by latent ----------------------------> transformer (windows; keys of earlier chunks) -> latents
    latents, lq frames -> decoder, picture by picture -> colour of the lq frames -> hq

A scene's first chunk takes 25 frames and gives 21 (6 latents, which see each other); every later one takes 8
more and gives 8 (2 latents, which see the 6 before). The projection looks 4 frames ahead of the decoder.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...devices import repeatable
from ...errors import CheckpointError, IncompatibleInputError, VRAMError
from ...memory import LiveTensors, free_memory, is_out_of_memory, release_caches
from ...tensors import is_finite, pad_to, padded_size
from ...upscaler import FixedPlacement, Info, OnStep, Placement, Provenance, State, Upscaled, ignore, stream
from .attention import Selection
from .decoders import Memory as DecoderMemory
from .decoders import decode_full
from .options import FlashVSROptions
from .pictures import adain, enlarge, groups, scaled
from .projection import FRAMES, Past
from .session import FlashVSRSession
from .state import AHEAD, CHUNK, FIRST, LATENTS, Memory, frames_before
from .transformer import denoise

log = logging.getLogger(__name__)

MULTIPLE = 128
"""Sides that the networks see: 8 tokens of 2 latent pixels of 8 pixels."""

MEGABYTE = 2**20


class FlashVSR:
    """A loaded FlashVSR."""

    Options = FlashVSROptions

    def __init__(
        self,
        *,
        networks: Mapping[str, nn.Module],
        prompt: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        model: str,
    ) -> None:
        """`networks`: transformer, projection, and tiny, full or both; `prompt`: (1, tokens, width)."""
        self.networks, self.prompt, self.device, self.dtype = networks, prompt, device, dtype
        self.placement: Placement = FixedPlacement(device)
        transformer: Any = networks["transformer"]
        self.channels: int = transformer.config.in_channels
        self.info = Info(
            family="flashvsr",
            model=model,
            number_format=str(dtype).removeprefix("torch."),
            scales=None,
            first=FIRST,
            chunk=CHUNK,
            look_ahead=FIRST - 1,  # a scene's first 6 latents see each other
        )
        self._offloaded = False
        self._needs = lru_cache(maxsize=64)(self._count)

    def session(
        self,
        options: FlashVSROptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> FlashVSRSession:
        """Begin a scene at frame `state.index`, or continue one; see `FlashVSRSession`.

        `noise`: (1, 16, latents, H/8, W/8) for the scene's latents instead of the seeded one, H and W being
        those of the result, padded to multiples of 128.
        """
        options = options or FlashVSROptions()
        if options.decoder not in self.networks:
            have = [name for name in ("tiny", "full") if name in self.networks]
            expected = f"decoder {' or '.join(map(repr, have))}, as the model's folder has no other"
            raise IncompatibleInputError(expected, repr(options.decoder))
        return FlashVSRSession(self, options, state, on_step or ignore, noise)

    def stream(
        self,
        frames: Iterable[Tensor],
        options: FlashVSROptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Upscaled]:
        """Upscale frame after frame, lazily; see `upscaler.stream`."""
        return stream(self.session(options, state, on_step, noise), frames)

    def provenance(self, size: tuple[int, int], options: FlashVSROptions | None = None) -> Provenance:
        """How frames are made now; no memory plan changes them."""
        settings = asdict(options or FlashVSROptions())
        del settings["memory_plan"]
        return Provenance(self.info.model, self.info.number_format, self.info.runtime, settings)

    def bytes_needed(self, size: tuple[int, int], options: FlashVSROptions | None = None) -> int:
        """Bytes that LQ frames of `size` (height, width) take beside the weights.

        Counted over the first two chunks on the meta device, without the selection of windows, which only
        the frames tell: everything is selected there, so that this is an upper bound.
        """
        return self._needs(tuple(size), options or FlashVSROptions())

    @torch.no_grad()
    def chunk(
        self,
        frames: Sequence[Tensor],
        memory: Memory,
        options: FlashVSROptions,
        on_step: OnStep,
        noise: Tensor | None,
    ) -> tuple[list[Tensor], Memory]:
        """The results of `memory.frames` LQ frames, and what is remembered; with less memory where it ends.

        Nothing that is handed in is changed, whatever happens.
        """
        if options.memory_plan == "offload":
            self._offload()
        compute = partial(self._chunk, frames, memory, options, on_step, noise)
        while True:
            try:
                with repeatable():
                    return compute()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).strip().partition("\n")[0]
            # Here the error is gone, and with it the tensors that its traceback held.
            release_caches(self.device)
            if options.memory_plan == "whole" or not self._offload():
                need = self.bytes_needed((frames[0].shape[-2], frames[0].shape[-1]), options)
                remedy = f"it ran out ({message}); use smaller frames, a smaller scale or a smaller kv_ratio"
                raise VRAMError(need // MEGABYTE, free_memory(self.device) // MEGABYTE, remedy)
            log.warning("out of memory (%s): the transformer's blocks wait in system memory now", message)

    def _chunk(
        self,
        frames: Sequence[Tensor],
        memory: Memory,
        options: FlashVSROptions,
        on_step: OnStep,
        noise: Tensor | None,
    ) -> tuple[list[Tensor], Memory]:
        height, width = padded_size(*scaled(frames[0], options.scale), MULTIPLE)
        count = 2 if memory.latents else LATENTS
        tokens, projection = self._project(frames, memory, options, on_step)
        start = self._noise(noise, memory, count, (height, width), options.seed)
        latents, pairs = denoise(
            self._acquire("transformer", frames[0], options),
            start.to(tokens.device),
            tokens,
            self.prompt.to(tokens.device),
            position=memory.latents,
            selection=Selection.of(height, width, options.sparse_ratio, options.local_range),
            past=memory.pairs,
            kept=options.kv_ratio,
            on_block=partial(on_step, "denoise"),
        )
        hq, decoder = self._decode(latents, frames, memory, options, on_step)
        return hq, Memory(memory.start, memory.latents + count, projection, pairs, decoder)

    def _project(
        self, frames: Sequence[Tensor], memory: Memory, options: FlashVSROptions, on_step: OnStep
    ) -> tuple[Tensor, Past]:
        """Tokens (latents, H/16, W/16, width) of the frames not yet seen."""
        network, past, tokens = self._acquire("projection", frames[0], options), memory.projection, []
        if memory.latents:
            pushes = groups(frames[AHEAD:])
        else:
            _, past = network(self._four(frames[:1], options), past)  # fills the memory only
            pushes = groups(frames[1:])
        for index, push in enumerate(pushes):
            latent, past = network(self._four(push, options), past)
            tokens.append(latent)
            on_step("project", index + 1, len(pushes))
        return torch.stack(tokens), past

    def _noise(
        self, given: Tensor | None, memory: Memory, count: int, size: tuple[int, int], seed: int
    ) -> Tensor:
        """(1, 16, count, H/8, W/8) float32: that of a latent is drawn by the frame that it begins with."""
        height, width = size[0] // 8, size[1] // 8
        end = memory.latents + count
        if given is not None:
            if given.shape[2] < end or tuple(given.shape[3:]) != (height, width):
                expected = f"noise of at least {end} latents of {height} x {width}"
                raise IncompatibleInputError(expected, str(tuple(given.shape)))
            return given[:, :, memory.latents : end].float()
        drawn = []
        for latent in range(memory.latents, end):
            number = (seed + memory.start + frames_before(latent)) % 2**64
            generator = torch.Generator().manual_seed(number)
            drawn.append(torch.randn((1, self.channels, height, width), generator=generator))
        return torch.stack(drawn, 2)

    def _decode(
        self,
        latents: Tensor,
        frames: Sequence[Tensor],
        memory: Memory,
        options: FlashVSROptions,
        on_step: OnStep,
    ) -> tuple[list[Tensor], DecoderMemory]:
        """The pictures of the latents, cut and coloured, and the decoder's memory after them."""
        network: Any = self._acquire(options.decoder, frames[0], options)
        decoder, hq = dict(memory.decoder), []
        shown = groups(frames[:CHUNK]) if memory.latents else [frames[:1], *groups(frames[1:-AHEAD])]
        total = sum(map(len, shown))
        for latent, group in zip(latents.to(self.dtype).split(1, 2), shown, strict=True):
            if options.decoder == "tiny":
                # A scene's first latent is one frame, and this decoder makes four of it.
                pictures = islice(
                    network(latent, self._four(group, options), decoder), FRAMES - len(group), None
                )
            else:
                pictures = decode_full(network, latent, decoder)
            for lq, picture in zip(group, pictures, strict=True):
                hq.append(self._finished(picture, lq, options))
                on_step("decode", len(hq), total)
        return hq, decoder

    def _finished(self, picture: Tensor, lq: Tensor, options: FlashVSROptions) -> Tensor:
        """A picture without its padding, in the colours of its LQ frame, float32 on the upscaler's device."""
        height, width = scaled(lq, options.scale)
        hq = picture[..., :height, :width].to(self.device, torch.float32)
        if options.colour_fix == "adain":
            hq = adain(hq, enlarge(lq, options.scale))
        if not hq.is_meta and not is_finite(hq):
            raise CheckpointError(
                f"a frame came out with values that are not finite in {self.info.number_format}: "
                "use bfloat16 or float32; where that does not help, the weights are damaged."
            )
        return hq.contiguous()

    def _four(self, frames: Sequence[Tensor], options: FlashVSROptions) -> Tensor:
        """A push as the networks see it, (4, 3, H, W); a single frame stands for four."""
        large = [enlarge(lq, options.scale) for lq in frames] * (FRAMES // len(frames))
        size = padded_size(large[0].shape[-2], large[0].shape[-1], MULTIPLE)
        return torch.cat([pad_to(each, *size).to(self.dtype) for each in large])

    def _acquire(self, stage: str, lq: Tensor, options: FlashVSROptions) -> Any:
        """A network, brought to the device."""
        if not self.placement.fixed:
            self.placement.acquire(stage, self.bytes_needed((lq.shape[-2], lq.shape[-1]), options))
        return self.networks[stage]

    def _offload(self) -> bool:
        """Have the transformer's blocks wait in system memory; whether that changed anything."""
        if self._offloaded or not self.placement.fixed or self.device.type != "cuda":
            return False
        from diffusers.hooks import apply_group_offloading

        transformer: Any = self.networks["transformer"]
        for block in transformer.blocks:
            apply_group_offloading(
                block, self.device, torch.device("cpu"), "block_level", num_blocks_per_group=1
            )
        self._offloaded = True
        return True

    def _count(self, size: tuple[int, int], options: FlashVSROptions) -> int:
        empty = FlashVSR(
            networks={name: _on_meta(network) for name, network in self.networks.items()},
            prompt=torch.empty_like(self.prompt, device="meta"),
            device=torch.device("meta"),
            dtype=self.dtype,
            model=self.info.model,
        )
        memory = Memory()
        with torch.no_grad(), LiveTensors([]) as live:
            for _ in range(2):
                frames = [torch.empty((1, 3, *size), device="meta") for _ in range(memory.frames)]
                _, memory = empty._chunk(frames, memory, options, ignore, None)
        return live.peak


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy without weights."""
    shallow = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in network.parameters()}
    return copy.deepcopy(network, shallow)
