"""Lossless temporary files for videos that exist only in memory."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..stream_diffvsr.files import atomic
from . import host, layout

log = logging.getLogger(__name__)


def from_bytes(content: bytes) -> Path:
    """Write the bytes of a video file to the temp folder, and return its path."""
    return temp_file(hashlib.sha256(content).hexdigest()[:16], lambda file: file.write(content))


def from_components(components: Any) -> Path:
    """Write frames (N, H, W, C) in [0, 1], with their frame rate and sound, to one file; return its path.

    The frames are encoded as FFV1 with 16 bits per channel, and the sound as FLAC. The same content always
    produces the same bytes, so a cancelled job can be resumed.
    """
    images, audio = components.images, components.audio
    layout.check_images(images)
    if images.shape[-1] > layout.COLOURS:
        log.warning(
            "the video's alpha channel is dropped: to keep it, link the frames to Stream-DiffVSR Upscale"
        )
    rate = Fraction(components.frame_rate).limit_denominator(100_000)
    digest = hashlib.sha256(f"{rate} {tuple(images.shape)}".encode())
    for image in images:
        digest.update(image.cpu().contiguous().numpy())
    if audio is not None:
        digest.update(f"{audio['sample_rate']} {tuple(audio['waveform'].shape)}".encode())
        digest.update(audio["waveform"].cpu().contiguous().numpy())
    return temp_file(digest.hexdigest()[:16], lambda file: encode(file, images, rate, audio))


def temp_file(name: str, write: Any) -> Path:
    """Return a temporary file that is named after its content, writing it first if it does not exist."""
    path = host.folder("temp") / f"stream_diffvsr_{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with atomic(path) as file:
            write(file)
    return path


def encode(file: io.BufferedIOBase, images: torch.Tensor, rate: Fraction, audio: Any) -> None:
    """Write the frames and the sound, cut off where the frames end, as ComfyUI's Save Video does."""
    import av

    from ..stream_diffvsr.media.codecs import CODECS, Encoding, open_encoder
    from ..stream_diffvsr.media.colour import RGB, Colour, planes_to_frame, rgb_to_planes

    (count, height, width, _), pix_fmt = images.shape, "gbrp16le"
    colour, options = Colour(RGB, full_range=True), CODECS["ffv1"].options
    encoding = Encoding("ffv1", pix_fmt, options, width, height, rate, 1 / rate, colour, None)
    with av.open(file, "w", format="nut", container_options={"fflags": "+bitexact"}) as out:
        video = open_encoder(out, encoding)
        sound = out.add_stream("flac", rate=int(audio["sample_rate"])) if audio else None
        if sound is not None:
            seconds = Fraction(count) / rate
            for packet in sound_packets(sound, audio, math.ceil(seconds * int(audio["sample_rate"]))):
                out.mux(packet)
        for index, image in enumerate(images):
            host.check_interrupt()
            rgb = layout.to_frame(image[..., : layout.COLOURS]).cpu().clamp(0, 1)
            frame = planes_to_frame(rgb_to_planes(rgb, pix_fmt, colour), pix_fmt)
            frame.pts, frame.duration, frame.time_base = index, 1, 1 / rate
            frame.colorspace, frame.color_range = RGB, 2
            out.mux(video.encode(frame))
        out.mux(video.encode(None))


def sound_packets(stream: Any, audio: Any, samples: int) -> Iterator[Any]:
    """Yield the first `samples` samples of ComfyUI audio, (1, channels, n) in [-1, 1], as 24-bit FLAC."""
    import av

    from ..stream_diffvsr.media.ways import LAYOUTS

    wave = audio["waveform"][0, :, :samples].float().clamp(-1, 1)
    context = stream.codec_context
    context.layout, context.format = LAYOUTS[len(wave) - 1], "s32"
    values = (wave.double() * (2**23 - 1)).round().to(torch.int32) << 8
    frame = av.AudioFrame.from_ndarray(
        values.T.reshape(1, -1).contiguous().cpu().numpy(), format="s32", layout=LAYOUTS[len(wave) - 1]
    )
    frame.sample_rate, frame.pts = int(audio["sample_rate"]), 0
    frame.time_base = Fraction(1, frame.sample_rate)
    fifo = av.AudioFifo()
    fifo.write(frame)
    context.open()
    for part in [*fifo.read_many(context.frame_size or 4096, partial=True), None]:
        yield from (packet for packet in stream.encode(part) if packet.size)  # FLAC's last packet is empty
