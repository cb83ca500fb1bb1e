"""Still and animated pictures: read as RGB and alpha, written in the format their name says.

Pillow does the work; PyAV where Pillow would cut 16 bits to 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import VideoError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".ppm", ".tga")
"""Files that count as pictures in a folder."""
WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".tga")
ALPHA_SUFFIXES = (".png", ".webp", ".tif", ".tiff")
DEEP_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats that hold alpha, and 16 bits, when we write them."""
ANIMATED = ("GIF", "WEBP", "PNG")
DEFAULT_MILLISECONDS = 100
"""What viewers use for an animation's frame without a duration."""
SAVE_OPTIONS = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True, "exact": True},
    ".tif": {"compression": "tiff_lzw"},
    ".tiff": {"compression": "tiff_lzw"},
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, upright."""

    rgb: Tensor
    """(1, 3, h, w) float32 in [0, 1]."""
    alpha: Tensor | None = None
    """(1, 1, h, w) float32 in [0, 1]."""
    bits: int = 8
    profile: dict[str, Any] = field(default_factory=dict)
    """What Pillow's `save` takes along: the ICC profile, the resolution."""


def list_folder(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order: frame2 before frame10. Raises `VideoError`."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
    if not files:
        raise VideoError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return sorted(files, key=lambda file: natural_key(file.name))


def writable_name(name: str) -> str:
    """The name under which a picture is written: its own, or as PNG where we do not write its format."""
    path = Path(name)
    return name if path.suffix.lower() in WRITABLE else f"{path.stem}.png"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts digits by their value and the rest as text."""
    parts = re.split(r"(\d+)", name.lower())
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts if part]


def is_picture(path: Path) -> bool:
    """Whether a file is a still picture, by its content."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            # Pillow knows an MPEG stream by its first bytes, and cannot read it.
            return image.format != "MPEG" and getattr(image, "n_frames", 1) == 1
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return False


def is_animated(path: Path) -> bool:
    """Whether a file is an animated GIF, WebP or PNG."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return False


def read(path: Path) -> Picture:
    """A still picture as RGB and alpha; EXIF rotation is applied. Raises `VideoError`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if getattr(image, "format", "") in ("PNG", "TIFF") and sample_bits(image, path) == 16:
                return _read_deep(path, image)
            image.load()
            return from_pillow(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} cannot be read as a picture ({error}): it is damaged.") from error


def sample_bits(image: Any, path: Path) -> int:
    """Bits of a sample in the file, which Pillow's mode does not tell for colour."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    bits = image.tag_v2.get(258, 8)
    return max(bits) if isinstance(bits, tuple) else bits


def _read_deep(path: Path, image: Any) -> Picture:
    """A 16-bit picture through PyAV, with the colours and alpha that it has."""
    from PIL import ExifTags

    from .colour import Colour, frame_to_rgb
    from .read import open_container
    from .streams import upright

    with open_container(path) as container:
        frame = next(container.decode(video=0))
    rgb, alpha = frame_to_rgb(frame, Colour(full_range=True))
    matrix = EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    rgb, alpha = upright(rgb, matrix), None if alpha is None else upright(alpha, matrix)
    return Picture(rgb, alpha, 16, _profile(image))


EXIF_TURNS = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""EXIF orientation -> where a pixel goes, as `upright` takes it."""


def from_pillow(image: Any) -> Picture:
    """A Pillow image of any mode -> RGB and alpha; raises `ValueError` for a mode without a known range."""
    profile = _profile(image)
    if image.mode in ("I", "I;16", "I;16L", "I;16B"):
        grey = torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)[None, None]
        return Picture(grey.clamp(0, 1).expand(-1, 3, -1, -1).contiguous(), None, 16, profile)
    if image.mode == "F":
        raise ValueError("its floating-point samples have no known range; convert it to 16 bits")
    if image.has_transparency_data:
        pixels = _tensor(image.convert("RGBA"))
        return Picture(pixels[:, :3].contiguous(), pixels[:, 3:].contiguous(), 8, profile)
    return Picture(_tensor(image.convert("RGB")), None, 8, profile)


def _profile(image: Any) -> dict[str, Any]:
    """A profile describes the file's own colours: it stays only where they are RGB already."""
    kept = ("icc_profile", "dpi") if image.mode in ("RGB", "RGBA", "P", "PA") else ("dpi",)
    return {key: image.info[key] for key in kept if image.info.get(key)}


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).float().movedim(-1, 0)[None] / 255


def write(path: Path, picture: Picture) -> None:
    """Write a picture in the format of the name; it appears only when it is whole.

    16 bits and alpha are kept where the format holds them. Raises `VideoError` for an unknown format.
    """
    from ..files import atomic

    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise VideoError(f"{path.name} names no picture format that is written: {', '.join(WRITABLE)}.")
    alpha = picture.alpha if suffix in ALPHA_SUFFIXES else None
    pixels = picture.rgb if alpha is None else torch.cat([picture.rgb, alpha], dim=1)
    deep = picture.bits > 8 and suffix in DEEP_SUFFIXES
    top = 65535 if deep else 255
    values = (pixels[0].movedim(0, -1) * top).round().clamp(0, top).cpu().numpy()
    with atomic(path) as file:
        if deep:
            file.write(_encode_deep(values.astype(np.uint16), suffix))
        else:
            _save(file, values.astype(np.uint8), suffix, picture.profile)


def _save(file: Any, values: np.ndarray, suffix: str, profile: dict[str, Any]) -> None:
    from PIL import Image

    formats = Image.registered_extensions()
    Image.fromarray(values).save(file, format=formats[suffix], **profile, **SAVE_OPTIONS.get(suffix, {}))


def _encode_deep(values: np.ndarray, suffix: str) -> bytes:
    """16-bit RGB or RGBA (H, W, C) as the bytes of a PNG or TIFF file."""
    import av

    name = "rgb48" if values.shape[-1] == 3 else "rgba64"
    codec, name = ("png", f"{name}be") if suffix == ".png" else ("tiff", f"{name}le")
    height, width = values.shape[:2]
    frame: Any = av.VideoFrame(width, height, name)
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(height, -1)
    packed = values.astype(">u2" if suffix == ".png" else "<u2").reshape(height, -1).view(np.uint8)
    rows[:, : packed.shape[1]] = packed
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, name
    encoder.time_base = Fraction(1, 25)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def describe_animation(path: Path) -> tuple[int, tuple[int, int], int, bool]:
    """Frames, (width, height), length in milliseconds, and whether there is transparency."""
    count = length = 0
    size, transparent = (0, 0), False
    for picture, milliseconds in read_animation(path):
        count, length = count + 1, length + milliseconds
        size = (picture.rgb.shape[-1], picture.rgb.shape[-2])
        transparent |= picture.alpha is not None and bool((picture.alpha < 1).any())
    return count, size, length, transparent


def read_animation(path: Path) -> Iterator[tuple[Picture, int]]:
    """Each frame of an animated picture as shown, with its milliseconds. Raises `VideoError`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            for number in range(image.n_frames):
                image.seek(number)
                duration = round(float(image.info.get("duration", 0))) or DEFAULT_MILLISECONDS
                yield from_pillow(image), duration
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise VideoError(f"{path} cannot be read as an animation ({error}): it is damaged.") from error
