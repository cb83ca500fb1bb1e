"""Degrades good frames to look like a user's footage, in steps drawn at random for each sequence.

    - blur: {chance: 0.5, sigma: [0.3, 1.2]}
    - reduce: {method: [bicubic, area]}
    - video: {chance: 0.9, codec: [h264, hevc, mpeg2], quality: [22, 34]}

A single number is used as is; two numbers define a range to draw from, and a list of words a set to choose
from. All random draws use the same generator, so a given seed always produces the same frames.
`docs/training.md` has a table of steps.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import IncompatibleInputError
from ..tensors import SCALE

Recipe = Sequence[tuple[str, Mapping[str, Any]]]
Rng = np.random.Generator


def blur(x: Tensor, rng: Rng, *, sigma: float) -> Tensor:
    """Blur with a Gaussian; `sigma` is in pixels of the picture at this step."""
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(x, [2 * round(3 * sigma) + 1] * 2, [max(sigma, 0.01)] * 2)


def reduce(x: Tensor, rng: Rng, *, method: str) -> Tensor:
    """Reduce to a quarter of the width and height."""
    if method == "area":
        return F.avg_pool2d(x, SCALE)
    size = [side // SCALE for side in x.shape[-2:]]
    return F.interpolate(x, size=size, mode=method, antialias=True)


def noise(x: Tensor, rng: Rng, *, sigma: float) -> Tensor:
    """Add sensor noise, independent for each pixel; `sigma` is for pixel values from 0 to 255."""
    return x + torch.from_numpy(rng.normal(0, sigma / 255, x.shape).astype(np.float32))


def grain(x: Tensor, rng: Rng, *, sigma: float, size: float) -> Tensor:
    """Add film grain, in grey clumps `size` pixels wide that are strongest in mid-tones.

    `sigma` is for pixel values from 0 to 255.
    """
    shape = (len(x), 1, *x.shape[-2:])
    clumps = blur(torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32)), rng, sigma=size)
    luma = x.mean(1, keepdim=True).clamp(0, 1)
    return x + clumps / clumps.std() * sigma / 255 * 4 * luma * (1 - luma)


def chroma_bleed(x: Tensor, rng: Rng, *, shift: float, sigma: float) -> Tensor:
    """Blur colours by `sigma` pixels along the rows and shift them right by `shift` pixels, as on VHS."""
    luma = (x * x.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
    reach = round(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(sigma, 0.01)) ** 2)
    late = round(shift)
    colours = F.pad(x - luma, (reach + max(late, 0), reach + max(-late, 0), 0, 0), mode="replicate")
    colours = colours[..., max(-late, 0) : colours.shape[-1] - max(late, 0)]
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    return luma + F.conv2d(colours, kernel, groups=3)


def interlace(x: Tensor, rng: Rng) -> Tensor:
    """Imitate interlacing: take every second row from the next frame."""
    woven = x.clone()
    woven[:-1, :, 1::2] = x[1:, :, 1::2]
    return woven


def jpeg(x: Tensor, rng: Rng, *, quality: float) -> Tensor:
    """Compress each frame as a JPEG; `quality` is from 1 to 100."""
    from PIL import Image

    def packed(frame: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=round(quality))
        return np.asarray(Image.open(file))

    return _from_bytes(np.stack([packed(frame) for frame in _to_bytes(x)]))


CODECS = {"h264": "libx264", "hevc": "libx265", "mpeg2": "mpeg2video"}


def video(x: Tensor, rng: Rng, *, codec: str, quality: float) -> Tensor:
    """Compress with a video codec; `quality` works like H.264's crf, from 18 (good) to 40 (bad)."""
    import av

    height, width = x.shape[-2:]
    # The x265 in PyAV's wheels writes out of bounds if the width is below 64 pixels.
    right = max(width % 2, 64 - width) if codec == "hevc" else width % 2
    x = F.pad(x, (0, right, 0, height % 2), mode="replicate")
    options = {"crf": f"{quality:.1f}", "preset": "veryfast"}
    if codec == "hevc":
        options["x265-params"] = "log-level=none:pools=none:frame-threads=1"
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(CODECS[codec], rate=25, options=options if codec != "mpeg2" else {})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = (
            x.shape[-1],
            x.shape[-2],
            "yuv420p",
            1,
        )
        if codec == "mpeg2":  # its quantiser ranges from 2 to 31
            stream.qmin = stream.qmax = int(min(max((quality - 14) / 1.5, 2), 31))
        for frame in _to_bytes(x):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return _from_bytes(np.stack(frames))[..., :height, :width]


def _to_bytes(x: Tensor) -> np.ndarray:
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _from_bytes(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


STEPS: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, tuple[float, float] | tuple[str, ...]]]] = {
    "blur": (blur, {"sigma": (0.0, 20.0)}),
    "reduce": (reduce, {"method": ("bicubic", "bilinear", "area")}),
    "noise": (noise, {"sigma": (0.0, 100.0)}),
    "grain": (grain, {"sigma": (0.0, 100.0), "size": (0.0, 10.0)}),
    "chroma_bleed": (chroma_bleed, {"shift": (-8.0, 8.0), "sigma": (0.0, 10.0)}),
    "interlace": (interlace, {}),
    "jpeg": (jpeg, {"quality": (1.0, 100.0)}),
    "video": (video, {"codec": tuple(CODECS), "quality": (0.0, 51.0)}),
}
"""The function of each step, and the limits or words allowed for its parameters."""

PRESETS: Mapping[str, Recipe] = {
    "clean": [("reduce", {"method": ["bicubic", "area", "bilinear"]})],
    "compressed": [
        ("blur", {"chance": 0.4, "sigma": [0.3, 1.5]}),
        ("reduce", {"method": ["bicubic", "area", "bilinear"]}),
        ("noise", {"chance": 0.3, "sigma": [0.5, 4]}),
        ("video", {"chance": 0.95, "codec": ["h264", "hevc", "mpeg2"], "quality": [22, 35]}),
    ],
    "old-film": [
        ("blur", {"chance": 0.8, "sigma": [0.5, 3]}),
        ("reduce", {"method": ["bicubic", "area", "bilinear"]}),
        ("grain", {"chance": 0.8, "sigma": [2, 14], "size": [0.3, 1.2]}),
        ("chroma_bleed", {"chance": 0.3, "shift": [-2, 2], "sigma": [0.5, 3]}),
        ("interlace", {"chance": 0.1}),
        ("video", {"chance": 0.7, "codec": ["h264", "mpeg2"], "quality": [18, 30]}),
    ],
    "anime": [
        ("blur", {"chance": 0.5, "sigma": [0.3, 2]}),
        ("reduce", {"method": ["bicubic", "area", "bilinear"]}),
        ("jpeg", {"chance": 0.1, "quality": [60, 95]}),
        ("video", {"chance": 0.7, "codec": ["h264", "hevc", "mpeg2"], "quality": [18, 32]}),
    ],
}  # fmt: skip


def open_recipe(name: str) -> Recipe:
    """Return a preset by name, or read a YAML file; raise `IncompatibleInputError` if it is invalid."""
    if name in PRESETS:
        return PRESETS[name]
    import yaml

    try:
        listed = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = f"the degradation must be one of {', '.join(PRESETS)}, or a YAML file, not {name} ({error})"
        raise IncompatibleInputError(said.replace("\n", " ")) from error
    if not isinstance(listed, list):
        raise IncompatibleInputError(f"the degradation file {name} must be a list of steps")
    steps = [step if isinstance(step, dict) else {step: None} for step in listed]
    return check_steps(
        [next(iter(step.items()), ("", None)) if len(step) == 1 else ("", None) for step in steps]
    )


def check_steps(steps: Sequence[tuple[Any, Any]]) -> Recipe:
    """Check steps and their settings, and return them; raise `IncompatibleInputError` if any is invalid."""
    for name, given in steps:
        if name not in STEPS or not isinstance(given or {}, dict):
            raise IncompatibleInputError(
                f"unknown degradation step {name!r}: {given!r}; the known steps are {', '.join(STEPS)}"
            )
        known = {**STEPS[name][1], "chance": (0.0, 1.0)}
        missing = STEPS[name][1].keys() - (given or {}).keys()
        for key in [*(given or {}), *missing]:
            value = (given or {}).get(key)
            if not _fits(value, known.get(key, ())):
                if key not in known:
                    raise IncompatibleInputError(f"{name} has no setting {key}, only {', '.join(known)}")
                raise IncompatibleInputError(f"{name}: {key} must be within {known[key]}, not {value!r}")
    if [name for name, _ in steps].count("reduce") != 1:
        raise IncompatibleInputError(
            "a degradation needs exactly one 'reduce' step, not " + ", ".join(map(str, dict(steps)))
        )
    return [(name, given or {}) for name, given in steps]


def _fits(value: Any, known: Sequence[Any]) -> bool:
    """Whether a value, or each value of a list, is within the limits or among the words in `known`."""
    values = value if isinstance(value, list) else [value]
    if not known or not values or isinstance(known[0], str):
        return bool(known and values) and all(each in known for each in values)
    numbers = all(isinstance(each, (int, float)) and known[0] <= each <= known[1] for each in values)
    return numbers and (not isinstance(value, list) or (len(value) == 2 and value[0] <= value[1]))


def degrade(truth: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Degrade a sequence, (T, 3, 4h, 4w) in [0, 1], to (T, 3, h, w), rounded to multiples of 1 / 255."""
    x = truth
    for name, given in recipe:
        drawn = {key: _draw(value, rng) for key, value in given.items()}
        if rng.random() < drawn.pop("chance", 1.0):
            x = STEPS[name][0](x, rng, **drawn)
    return (x.clamp(0, 1) * 255).round() / 255


def _draw(value: Any, rng: Rng) -> Any:
    if not isinstance(value, list):
        return value
    return str(rng.choice(value)) if isinstance(value[0], str) else float(rng.uniform(*value))
