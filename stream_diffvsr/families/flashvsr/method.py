"""FlashVSR, which upscales frames in chunks and denoises a chunk's latents in a single transformer step.

    lq frames -> scaled, padded -> projection ---- tokens ----+
    noise, by latent ----------------------------> transformer (windows; keys of earlier chunks) -> latents
    latents, lq frames -> decoder, picture by picture -> colour of the lq frames -> hq

A scene's first chunk reads 25 frames and returns 21 (6 latents, which attend to each other); every later
chunk reads and returns 8 more (2 latents, which also attend to the previous 6). The projection is 4 frames
ahead of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import IncompatibleInputError
from ...fidelity import adain
from ...tensors import check_finite, pad_to, padded_size
from ...upscaler import Info, OnStep, State
from ..wan.chunks import ChunkSession, ChunkUpscaler, result_size
from ..wan.state import frames_before
from ..wan.taehv import Memory as DecoderMemory
from .attention import Selection, gathered
from .decoders import decode_full
from .options import FlashVSROptions
from .pictures import enlarge, groups
from .projection import FRAMES, Past
from .state import AHEAD, CHUNK, FAMILY, FIRST, LATENTS, Memory
from .transformer import denoise

MULTIPLE = 128
"""Sides are padded to multiples of this, the side of a window: 8 tokens x 2 latent pixels x 8 pixels."""


class FlashVSR(ChunkUpscaler):
    """A loaded FlashVSR model."""

    Options = FlashVSROptions

    Memory = Memory
    remedy = "use smaller frames, a smaller scale or a smaller kv_ratio"
    fixed = ("scale", "stretch", "decoder")

    def __init__(
        self,
        *,
        networks: Mapping[str, nn.Module],
        prompt: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        model: str,
    ) -> None:
        """Wrap loaded networks.

        `networks` contains transformer, projection, and tiny, full or both; `prompt` is (1, tokens, width).
        """
        super().__init__(networks=networks, prompt=prompt, device=device, dtype=dtype, model=model)
        transformer: Any = networks["transformer"]
        self.channels: int = transformer.config.in_channels
        self.info = Info(
            family=FAMILY,
            model=model,
            number_format=self.number_format,
            scales=None,
            first=FIRST,
            chunk=CHUNK,
            look_ahead=FIRST - 1,  # a scene's first 6 latents attend to each other
        )

    def attend_by(self, name: str) -> Any:
        if name != "sdpa":
            raise IncompatibleInputError(f"FlashVSR supports attention auto or sdpa, not {name!r}")
        return gathered

    def session(
        self,
        options: FlashVSROptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> ChunkSession:
        """Begin a scene at frame `state.index`, or continue one; see `ChunkSession`.

        Frame 25 of a scene completes the first 21 results; after that, every 8 frames complete 8 more.
        `noise` (1, 16, latents, H/8, W/8) replaces the seeded noise of the scene's latents; H and W are the
        height and width of the result, padded to multiples of 128.
        """
        options = options or FlashVSROptions()
        if options.decoder not in self.networks:
            have = [name for name in ("tiny", "full") if name in self.networks]
            raise IncompatibleInputError(
                f"the model's folder contains the decoder {' and '.join(map(repr, have))}, "
                f"not {options.decoder!r}"
            )
        if noise is not None:
            if noise.ndim != 5 or noise.shape[:2] != (1, self.channels) or not noise.is_floating_point():
                shape = f"(1, {self.channels}, latents, height / 8, width / 8)"
                raise IncompatibleInputError(f"noise must have the shape {shape}, not {tuple(noise.shape)}")
            check_finite(noise, "noise")
        return super().session(options, state, on_step, noise)

    def whole(self, memory: Memory, options: FlashVSROptions) -> int:
        return memory.frames

    def filled(self, frames: list[Tensor], memory: Memory, options: FlashVSROptions) -> list[Tensor]:
        return [*frames, *[frames[-1]] * (memory.frames - len(frames))]

    def _chunk(
        self,
        frames: Sequence[Tensor],
        memory: Memory,
        options: FlashVSROptions,
        on_step: OnStep,
        noise: Tensor | None,
    ) -> tuple[list[Tensor], Memory]:
        height, width = padded_size(*result_size(frames[0], options), MULTIPLE)
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
            offload=self.offloaded or options.memory_plan == "offload",
            on_block=partial(on_step, "denoise"),
        )
        hq, decoder = self._decode(latents, frames, memory, options, on_step)
        return hq, Memory(memory.start, memory.latents + count, projection, pairs, decoder)

    def _project(
        self, frames: Sequence[Tensor], memory: Memory, options: FlashVSROptions, on_step: OnStep
    ) -> tuple[Tensor, Past]:
        """Compute the tokens (latents, H/16, W/16, width) of frames that the projection has not yet seen."""
        network, past, tokens = self._acquire("projection", frames[0], options), memory.projection, []
        if memory.latents:
            pushes = groups(frames[AHEAD:])
        else:
            _, past = network(self._four(frames[:1], options), past)  # only fills its memory
            pushes = groups(frames[1:])
        for index, push in enumerate(pushes):
            latent, past = network(self._four(push, options), past)
            tokens.append(latent)
            on_step("project", index + 1, len(pushes))
        return torch.stack(tokens), past

    def _noise(
        self, given: Tensor | None, memory: Memory, count: int, size: tuple[int, int], seed: int
    ) -> Tensor:
        """Return noise (1, 16, count, H/8, W/8) float32; a latent's first frame determines its seed."""
        height, width = size[0] // 8, size[1] // 8
        end = memory.latents + count
        if given is not None:
            if given.shape[2] < end or tuple(given.shape[3:]) != (height, width):
                needed = f"noise needs at least {end} latents of {height} x {width}"
                raise IncompatibleInputError(f"{needed}, but its shape is {tuple(given.shape)}")
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
        """Decode the latents to cropped, colour-corrected pictures; also return the decoder's new memory."""
        network: Any = self._acquire(options.decoder, frames[0], options)
        decoder, hq = dict(memory.decoder), []
        shown = groups(frames[:CHUNK]) if memory.latents else [frames[:1], *groups(frames[1:-AHEAD])]
        total = sum(map(len, shown))
        for latent, group in zip(latents.to(self.dtype).split(1, 2), shown, strict=True):
            if options.decoder == "tiny":
                # A scene's first latent stands for one frame, but this decoder returns four pictures.
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
        """Crop a picture, in float32 on the upscaler's device, and match its colours to the LQ frame's."""
        height, width = result_size(lq, options)
        hq = picture[..., :height, :width].to(self.device, torch.float32)
        if options.colour_fix == "adain":
            hq = adain(hq, enlarge(lq, (height, width))).clamp(-1, 1)
        return self._checked(hq)

    def _four(self, frames: Sequence[Tensor], options: FlashVSROptions) -> Tensor:
        """Enlarge, pad and stack a push's frames as (4, 3, H, W); a single frame is repeated to make four."""
        size = result_size(frames[0], options)
        padded = padded_size(*size, MULTIPLE)
        large = [pad_to(enlarge(lq, size), *padded).to(self.dtype) for lq in frames]
        return torch.cat(large * (FRAMES // len(frames)))
