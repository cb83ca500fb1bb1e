"""SwiftVR, which restores the latents of a clip of frames in a single transformer step.

    lq frames -> bilinear, padded -> encoder, 4 frames at a time -> latents z
    z, and a few of the previous clip -> transformer (windows, a fixed prompt) -> velocity v
    z - v -> decoder, picture by picture -> hq

No noise is used. The decoder lags 3 frames behind: latents 0 to n decode to frames 0 to 4n. With protocol
"file", a scene's first clip has 28 frames and later clips have 24; the last clip is padded at the front to 7
latents, with zeros or with latents of the previous clip. With protocol "session", every clip has 24 frames,
except the last, which may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import IncompatibleInputError
from ...tensors import from_pixels, padded_size
from ...upscaler import Info, OnStep, State
from ..wan.chunks import ChunkSession, ChunkUpscaler, result_size
from ..wan.taehv import Memory as Past
from .options import CLIP, GROUP, SwiftVROptions
from .state import AHEAD, FAMILY, Memory
from .transformer import denoise

MULTIPLE = 32
"""Sides are padded to multiples of this, the side of a token: 2 latent pixels of 16 pixels each."""


class SwiftVR(ChunkUpscaler):
    """A loaded SwiftVR model."""

    Options = SwiftVROptions
    Memory = Memory
    remedy = "use smaller frames, a smaller scale or a smaller clip_len"
    fixed = ("scale", "stretch", "protocol", "clip_len")

    def __init__(
        self,
        *,
        networks: Mapping[str, nn.Module],
        prompt: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        model: str,
    ) -> None:
        """Wrap loaded `networks` (encoder, transformer, decoder) and a `prompt`, (1, tokens, width)."""
        super().__init__(networks=networks, prompt=prompt, device=device, dtype=dtype, model=model)
        # For the largest `clip_len`; smaller clips read fewer frames and look less far ahead.
        self.info = Info(
            family=FAMILY,
            model=model,
            number_format=self.number_format,
            scales=None,
            first=CLIP + GROUP,
            chunk=CLIP,
            look_ahead=CLIP + GROUP - 1,  # a clip's frames attend to each other
        )

    def session(
        self,
        options: SwiftVROptions | None = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> ChunkSession:
        """Begin a scene at frame `state.index`, or continue one; see `ChunkSession`.

        By default, frame 28 of a scene completes the first 25 results; after that, every 24 frames complete
        24 more. `noise` must be None.
        """
        if noise is not None:
            raise IncompatibleInputError("SwiftVR uses no noise, so noise must be None")
        return super().session(options, state, on_step)

    def whole(self, memory: Memory, options: SwiftVROptions) -> int:
        extra = GROUP if options.protocol == "file" and not memory.latents else 0
        return memory.ahead + options.clip_len + extra

    def filled(self, frames: list[Tensor], memory: Memory, options: SwiftVROptions) -> list[Tensor]:
        """Repeat the last frame until the number of new frames is one more than a multiple of 4.

        A sequence can end only with such a number of new frames.
        """
        new = len(frames) - memory.ahead
        frames = [*frames, *[frames[-1]] * ((1 - new) % GROUP)]
        whole, new = self.whole(memory, options), len(frames) - memory.ahead
        if len(frames) >= whole:
            return frames[:whole]
        if options.protocol == "session" and new > 1:
            return frames[:-1]
        return frames

    def _chunk(
        self,
        frames: Sequence[Tensor],
        memory: Memory,
        options: SwiftVROptions,
        on_step: OnStep,
        noise: Tensor | None,
    ) -> tuple[list[Tensor], Memory]:
        """Compute a chunk.

        If the number of its new frames is one more than a multiple of 4, the scene ends here and its last
        frame stands for 4.
        """
        new = list(frames[memory.ahead :])
        last = len(new) % GROUP == 1
        z, encoder = self._encode(new + new[-1:] * (-len(new) % GROUP), memory, options, on_step)
        count = z.shape[2]
        before = _before(z, memory.lq, options, last)
        restored = denoise(
            self._acquire("transformer", new[0], options),
            torch.cat([before, z], 2),
            self.prompt.to(z.device),
            partial(on_step, "denoise"),
        )[:, :, -count:]
        hq, decoder = self._decode(restored.to(self.dtype), new[0], memory, options, on_step)
        lq = z[:, :, max(count - options.kept, 0) :].clone()
        return hq, Memory(memory.start, memory.latents + count, encoder, decoder, lq)

    def _encode(
        self, frames: Sequence[Tensor], memory: Memory, options: SwiftVROptions, on_step: OnStep
    ) -> tuple[Tensor, Past]:
        """Encode 4n frames to (1, C, n, H/16, W/16); also return the encoder's new memory."""
        network, past, latents = self._acquire("encoder", frames[0], options), dict(memory.encoder), []
        size = result_size(frames[0], options)
        for at in range(0, len(frames), GROUP):
            four = torch.cat([prepared(lq, size) for lq in frames[at : at + GROUP]])
            latents.append(network(four.to(self.dtype), past))
            on_step("encode", len(latents), len(frames) // GROUP)
        return torch.stack(latents, 2), past

    def _decode(
        self, latents: Tensor, lq: Tensor, memory: Memory, options: SwiftVROptions, on_step: OnStep
    ) -> tuple[list[Tensor], Past]:
        """Decode the latents to cropped pictures; also return the decoder's new memory."""
        network, past, hq = self._acquire("decoder", lq, options), dict(memory.decoder), []
        height, width = result_size(lq, options)
        total = GROUP * latents.shape[2] - AHEAD * (not memory.latents)
        for latent in latents.unbind(2):
            # The first 3 pictures of a scene's first latent would precede the scene, so they are skipped.
            for picture in islice(network(latent, past), 0 if past else AHEAD, None):
                picture = picture[..., :height, :width].to(self.device, torch.float32)
                hq.append(self._checked(from_pixels(picture)))
                on_step("decode", len(hq), total)
        return hq, past


def prepared(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a frame to its output size, convert it to [0, 1], and pad it with black to multiples of 32."""
    if size != (lq.shape[-2], lq.shape[-1]):
        lq = F.interpolate(lq, size=size, mode="bilinear", align_corners=False)
    height, width = padded_size(*size, MULTIPLE)
    return F.pad(lq / 2 + 0.5, (0, width - size[1], 0, height - size[0]))


def _before(z: Tensor, past: Tensor | None, options: SwiftVROptions, last: bool) -> Tensor:
    """Return the latents, (1, C, n, h, w), that precede a chunk's own latents in the transformer."""
    fills = last and options.protocol == "file"
    count = options.clip_len // GROUP + 1 - z.shape[2] if fills else options.context
    past = z[:, :, :0] if past is None else past
    past = past[:, :, max(past.shape[2] - count, 0) :]
    return F.pad(past, (0, 0, 0, 0, count - past.shape[2], 0)) if fills else past
