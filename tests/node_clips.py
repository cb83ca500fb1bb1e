"""Small clips with sound, written and read back with PyAV."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SOUND_RATE = 24000


def pattern(index: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8, moved on with `index`."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + 2 * index) / 5 + colour) * np.cos((y + index) / 7) for colour in range(3)]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def make_clip(
    path: Path,
    frames: int,
    width: int = 48,
    height: int = 32,
    rate: int = 12,
    draw: Callable[[int, int, int], np.ndarray] = pattern,
    crf: int = 23,
) -> Path:
    """A moving picture with a tone, H.264 and AAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(rate), options={"crf": str(crf)})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="mono")
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(draw(index, width, height), format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode())
        container.mux(audio.encode(tone(SOUND_RATE * frames // rate)))
        container.mux(audio.encode())
    return path


def tone(samples: int) -> av.AudioFrame:
    """A quiet 440 Hz."""
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / SOUND_RATE)
    frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = SOUND_RATE, 0
    return frame


def frames_of(path: Path) -> np.ndarray:
    """Every frame of a video, (N, H, W, 3) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
