"""Small generated media files for the video tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

WIDTH, HEIGHT = 32, 24
TICKS = Fraction(1, 12800)
STEP = 512
SRT = """1
00:00:00,100 --> 00:00:00,400
hello there

2
00:00:00,500 --> 00:00:00,700
and goodbye

"""


def picture(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A frame with a moving box on a gradient, (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    left = index % (width - 8)
    base[4:12, left : left + 8] = (230, 40, 60)
    return base


def write_video(
    path: Path,
    frames: int = 8,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    audio: int = 0,
    audio_packets: int = 16,
    audio_codec: str = "aac",
    subtitles: bool = False,
    rotation: int = 0,
    colour: tuple[int, int, int, int] | None = None,
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    metadata: dict[str, str] | None = None,
    chapters: Sequence[dict[str, Any]] = (),
    ticks: Fraction = TICKS,
    draw=picture,
) -> Path:
    """A file; `times` in 1/12800 s, `ticks` the encoder's, `colour` matrix, range, primaries, transfer."""
    words = {"movflags": "use_metadata_tags"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=words) as out:
        out.metadata.update(metadata or {})
        video = out.add_stream(codec, rate=25, options=options or {})
        video.width, video.height, video.pix_fmt = *size, pix_fmt
        video.codec_context.time_base = ticks
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        if colour:
            context = video.codec_context
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = colour
        if rotation:
            needs(video, "set_display_rotation")
            video.set_display_rotation(rotation)
        sounds = [out.add_stream(audio_codec, rate=48000, layout="stereo") for _ in range(audio)]
        text = add_subtitles(out) if subtitles else None
        if chapters:
            needs(out, "set_chapters")
            out.set_chapters(list(chapters))
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(index, *size), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts = times[index] if times else index * STEP
            frame.time_base = TICKS
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for number, sound in enumerate(sounds):
            write_sound(out, sound, audio_packets, 50 * (number + 1))
        if text is not None:
            write_subtitles(out, text)
    return path


def needs(thing: Any, name: str) -> None:
    """Older PyAV reads what it cannot write: the file cannot be made for the test there."""
    if not hasattr(thing, name):
        pytest.skip(f"PyAV {av.__version__} has no {name}")


def write_sound(out: Any, stream: Any, packets: int, pitch: float) -> None:
    size = stream.codec_context.frame_size or 1024
    for index in range(packets):
        wave = np.sin((np.arange(size) + index * size) / pitch).astype(np.float32) * 0.3
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, index * size, Fraction(1, 48000)
        resampler = av.AudioResampler(stream.codec_context.format, "stereo", 48000)
        for even in resampler.resample(frame):
            out.mux(stream.encode(even))
    out.mux(stream.encode(None))


def add_subtitles(out: Any) -> Any:
    """A subtitle stream in the container's text form."""
    if out.format.name == "mp4":
        needs(out, "add_mux_stream")
        return out.add_mux_stream("mov_text", time_base=Fraction(1, 1000))
    with av.open(io.BytesIO(SRT.encode()), format="srt") as text:
        return out.add_stream_from_template(text.streams[0], opaque=True)


def write_subtitles(out: Any, stream: Any) -> None:
    with av.open(io.BytesIO(SRT.encode()), format="srt") as text:
        for packet in text.demux():
            if packet.pts is None:
                continue
            data = bytes(packet)
            if out.format.name == "mp4":
                data = len(data).to_bytes(2, "big") + data
            copy = av.Packet(data)
            copy.pts = copy.dts = packet.pts
            copy.duration, copy.time_base, copy.stream = packet.duration, packet.time_base, stream
            out.mux(copy)


def frames_of(path: Path, stream: int | None = None) -> list[tuple[Fraction, np.ndarray]]:
    """Every decoded frame with its time in seconds, as RGB of 16 bits."""
    with av.open(str(path)) as container:
        chosen = container.streams.video[0] if stream is None else container.streams[stream]
        return [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb48le"))
            for frame in container.decode(chosen)
        ]


def packets_of(path: Path, kind: str) -> list[list[bytes]]:
    """The packets of each stream of a kind."""
    with av.open(str(path)) as container:
        found = {stream.index: [] for stream in container.streams if stream.type == kind}
        if not found:
            return []
        for packet in container.demux(*[container.streams[index] for index in found]):
            if packet.size:
                found[packet.stream.index].append(bytes(packet))
    return list(found.values())
