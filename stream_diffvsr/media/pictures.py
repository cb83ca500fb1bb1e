"""Read still and animated pictures as RGB and alpha, and write pictures in the format given by the suffix.

PyAV is used where Pillow would reduce 16 bits to 8; Pillow is used everywhere else.
"""

from __future__ import annotations

import io
import logging
import mmap
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import VideoError
from ..files import atomic
from .colour import Colour, frame_to_rgb
from .containers import check_readable, open_container
from .streams import upright

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".ppm", ".tga"),
    *(".avif", ".jfif", ".heic", ".heif"),
)
"""Suffixes of the files in a folder that are read as pictures."""
WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".tga")
ALPHA_SUFFIXES = (".png", ".webp", ".tif", ".tiff")
DEEP_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats that can be written with alpha, and formats that can be written with 16 bits per sample."""
EXIF_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROFILE_WORDS = {
    "exif": "its EXIF data, which .jpg, .png and .webp can store",
    "text": "its text metadata, which only .png can store",
}
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
VIDEOS = {"MPEG", "FLI"}
"""Video formats that Pillow supports."""
TGA_SUFFIXES = (".tga", ".icb", ".vda", ".vst")
"""TGA files are recognised only by these suffixes, because some video streams begin with the same bytes."""
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
"""Brands in the first bytes of a file that identify it as HEIC."""
IMAGE_LENGTH = 257
"""TIFF's tag for the number of rows."""
DEFAULT_MILLISECONDS = 100
"""The duration that viewers assume for an animation frame that does not specify one."""
SAVE_OPTIONS = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True, "exact": True},
    ".tif": {"compression": "tiff_lzw"},
    ".tiff": {"compression": "tiff_lzw"},
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, turned upright."""

    rgb: Tensor
    """(1, 3, h, w) float32 in [0, 1]."""
    alpha: Tensor | None = None
    """(1, 1, h, w) float32 in [0, 1]."""
    bits: int = 8
    profile: dict[str, Any] = field(default_factory=dict)
    """Metadata to keep: the ICC profile, the resolution, EXIF data and a PNG file's text metadata."""


def list_folder(folder: Path) -> list[Path]:
    """Return the pictures in a folder in natural order (frame2 before frame10). Raises `VideoError`."""
    named = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
    files = [f for f in named if not f.is_dir()]
    for file in files:
        if not file.is_file():
            check_readable(file)
    if not files:
        raise VideoError(f"{folder} contains no pictures (files ending in {', '.join(SUFFIXES)}).")
    return sorted(files, key=lambda file: natural_key(file.name))


def say_left_out(folder: Path) -> None:
    """Log the suffixes of the files in a folder that are skipped because they cannot be read as pictures."""
    others = {
        f.suffix.lower() or f.name for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")
    }
    if left_out := sorted(others - set(SUFFIXES)):
        log.warning(
            "skipping %s files in %s: they cannot be read as pictures",
            ", ".join(left_out),
            folder,
        )


def writable_name(name: str) -> str:
    """Return a picture's output name: `name`, but with the suffix .png if its format cannot be written."""
    path = Path(name)
    return name if path.suffix.lower() in WRITABLE else f"{path.stem}.png"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares numbers by value and everything else as lower-case text."""
    parts = re.split(r"(\d+)", name.lower())
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts if part]


def damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that Pillow raises for damaged files, including files that claim to be huge."""
    from PIL.Image import DecompressionBombError

    known = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, struct.error, zlib.error)
    return (DecompressionBombError, AssertionError, AttributeError, ArithmeticError, RuntimeError, *known)


def open_picture(path: Path) -> Image.Image:
    """Open a file as a Pillow image without loading its pixels.

    Raises `VideoError` for a HEIC picture if the pillow-heif package is missing, and for a picture with too
    many pixels.
    """
    from PIL import Image

    with path.open("rb") as file:
        head = file.read(64)
    if head[4:8] == b"ftyp" and any(brand in head[8:] for brand in HEIC_BRANDS):
        try:
            from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
        except ImportError as error:
            raise VideoError(
                f"{path} is a HEIC picture, which requires the pillow-heif package: pip install pillow-heif, "
                "or save it as JPEG."
            ) from error
        register_heif_opener()
    Image.init()
    others = VIDEOS if path.suffix.lower() in TGA_SUFFIXES else VIDEOS | {"TGA"}
    try:
        with warnings.catch_warnings():
            # Pillow warns above its pixel limit, but raises an exception only above twice that limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path, formats=sorted(set(Image.ID) - others))
    except Image.DecompressionBombError as error:
        raise VideoError(
            f"{path} has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels that a picture may have: "
            "cut it into parts, or make it smaller."
        ) from error


def is_picture(path: Path) -> bool:
    """Whether a file is a still picture, possibly with several pages, judging by its content."""
    try:
        with open_picture(path) as image:
            if _animated(image):
                return False
            return image.format != "JPEG" or path.suffix.lower() in SUFFIXES or not _is_jpeg_stream(path)
    except damage():
        return False


def is_animated(path: Path) -> bool:
    """Whether a file is an animated GIF, WebP, PNG or AVIF."""
    try:
        with open_picture(path) as image:
            return _animated(image)
    except damage():
        return False


def _animated(image: Image.Image) -> bool:
    return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1


def _is_jpeg_stream(path: Path) -> bool:
    """Whether another JPEG picture follows the first one, which makes the file a stream of pictures."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = 2
        while data[place : place + 1] == b"\xff" and data[place : place + 2] != b"\xff\xda":
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        end = data.find(b"\xff\xd9", place)
        following = data.find(b"\xff", end + 2)
        return 0 <= end < following and data[following : following + 3] == b"\xff\xd8\xff"


def size_of(path: Path) -> tuple[int, int]:
    """Return a picture's width and height as displayed, without reading its pixels. Raises `VideoError`."""
    try:
        with open_picture(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except damage() as error:
        raise VideoError(
            f"{path} cannot be read as a picture ({str(error) or type(error).__name__}): it is damaged."
        ) from error


def read(path: Path) -> Picture:
    """Read a still picture as RGB and alpha, and apply its EXIF rotation. Raises `VideoError`."""
    from PIL import ImageOps

    try:
        with open_picture(path) as image:
            if image.format in ("TIFF", *ANIMATED) and (count := getattr(image, "n_frames", 1)) > 1:
                kind = "pages" if image.format == "TIFF" else "frames"
                log.warning("%s has %d %s, but only the first is read", path, count, kind)
            if image.format == "JPEG" and _is_jpeg_stream(path):
                log.warning(
                    "%s contains more JPEG pictures after the first, but only the first is read", path
                )
            if getattr(image, "format", "") in ("PNG", "TIFF") and sample_bits(image, path) == 16:
                return _read_deep(path, image)
            # Pillow leaves the missing rows of a TIFF file black. Pillow's `height` is that of the
            # rotated picture, so the tag is read instead.
            height = getattr(image, "tag_v2", {}).get(IMAGE_LENGTH, 0)
            if image.tile and (rows := max(tile[1][3] for tile in image.tile)) < height:
                raise ValueError(f"it contains only {rows} of {height} rows")
            image.load()
            return replace(from_pillow(ImageOps.exif_transpose(image)), profile=_profile(image))
    except damage() as error:
        raise VideoError(
            f"{path} cannot be read as a picture ({str(error) or type(error).__name__}): it is damaged."
        ) from error


def sample_bits(image: Any, path: Path) -> int:
    """Return the file's bits per sample, which Pillow's mode does not show for colour pictures."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    bits = image.tag_v2.get(258, 8)
    return max(bits) if isinstance(bits, tuple) else bits


def _read_deep(path: Path, image: Any) -> Picture:
    """Read a 16-bit picture with PyAV, which keeps all bits of its colours and alpha."""
    # Specify the format, or FFmpeg would treat a file name with a per cent sign as a numbered series.
    with open_container(path, f"{image.format.lower()}_pipe") as container:
        frame = next(container.decode(video=0))
    rgb, alpha = frame_to_rgb(frame, Colour(full_range=True))
    matrix = EXIF_TURNS.get(image.getexif().get(ORIENTATION, 1))
    rgb, alpha = upright(rgb, matrix), None if alpha is None else upright(alpha, matrix)
    return Picture(rgb, alpha, 16, _profile(image))


ORIENTATION = 0x0112
"""EXIF's tag for the orientation."""
EXIF_WORDS = {0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298}
"""EXIF tags for description, camera make, camera model, software, date, artist and copyright."""
EXIF_FOLDERS = (0x8769, 0x8825)
"""Tags of the EXIF directories that describe how (Exif) and where (GPS) the picture was taken."""
EXIF_OF_PIXELS = {0x9101, 0x9102, 0x927C, 0xA001, 0xA002, 0xA003, 0xA005}
"""Tags for the layout, size and colours of the original pixels, and for the camera maker's notes, which
contain offsets into the old file."""
EXIF_TURNS = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""EXIF orientation -> display matrix for `upright`."""


def from_pillow(image: Image.Image) -> Picture:
    """Convert a Pillow image to RGB and alpha; raises `ValueError` for floating-point samples."""
    profile = _profile(image)
    if image.mode in ("I", "I;16", "I;16L", "I;16B"):
        grey = torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)[None, None]
        return Picture(grey.clamp(0, 1).expand(-1, 3, -1, -1).contiguous(), None, 16, profile)
    if image.mode == "F":
        raise ValueError("the range of its floating-point samples is unknown; convert it to 16 bits")
    if image.has_transparency_data:
        pixels = _tensor(image.convert("RGBA"))
        return Picture(pixels[:, :3].contiguous(), pixels[:, 3:].contiguous(), 8, profile)
    return Picture(_tensor(_in_rgb(image)), None, 8, profile)


def _in_rgb(image: Image.Image) -> Any:
    """Convert to RGB; CMYK, grey and Lab are converted to sRGB with the image's ICC profile if it has one."""
    icc = image.info.get("icc_profile")
    if not icc or image.mode not in ("CMYK", "L", "LAB"):
        return image.convert("RGB")
    from PIL import ImageCms

    try:
        return ImageCms.profileToProfile(
            image, io.BytesIO(icc), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, *damage()) as error:
        log.warning("a picture's colour profile was not applied: %s", error)
        return image.convert("RGB")


def _profile(image: Image.Image) -> dict[str, Any]:
    """Return the metadata to keep.

    An ICC profile describes the colours in the file, so it is kept only if these are RGB.
    """
    kept = ("icc_profile", "dpi") if image.mode in ("RGB", "RGBA", "P", "PA") else ("dpi",)
    found = {key: image.info[key] for key in kept if image.info.get(key)}
    texts = getattr(image, "text", {}) if image.format == "PNG" else {}
    # Some texts repeat the EXIF data, including the rotation, which has already been applied.
    texts = {key: text for key, text in texts.items() if not key.startswith(("Raw profile", "XML:com.adobe"))}
    return found | {key: value for key, value in (("exif", _exif(image)), ("text", texts)) if value}


def _exif(image: Any) -> bytes:
    """Return the EXIF data, possibly empty, without the tags that describe the original pixels."""
    from PIL import Image

    try:
        found, kept = image.getexif(), Image.Exif()
        for tag in EXIF_WORDS & found.keys():
            kept[tag] = found[tag]
        for tag in EXIF_FOLDERS:
            if words := {k: v for k, v in found.get_ifd(tag).items() if k not in EXIF_OF_PIXELS}:
                kept[tag] = words
        return kept.tobytes() if len(kept) else b""
    except damage() as error:
        log.warning("leaving out the damaged EXIF data of %s (%s)", image.filename, error)
        return b""


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).float().movedim(-1, 0)[None] / 255


def write(path: Path, picture: Picture) -> None:
    """Write a picture in the format given by its suffix; the file appears only when complete.

    16-bit depth and alpha are kept if the format supports them. Raises `VideoError` for an unknown suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise VideoError(
            f"{path.name} is not in a supported picture format: its name must end in {', '.join(WRITABLE)}."
        )
    alpha = picture.alpha if suffix in ALPHA_SUFFIXES else None
    pixels = picture.rgb if alpha is None else torch.cat([picture.rgb, alpha], dim=1)
    deep = picture.bits > 8 and suffix in DEEP_SUFFIXES
    top = 65535 if deep else 255
    values = (pixels[0].movedim(0, -1) * top).round().clamp(0, top).cpu().numpy()
    profile, lost = kept_in(picture.profile, suffix)
    if lost:
        log.warning("writing %s without %s", path.name, " and ".join(lost))
    with atomic(path) as file:
        if deep:
            write_deep = _with_png_profile if suffix == ".png" else _with_tiff_profile
            file.write(write_deep(_encode_deep(values.astype(np.uint16), suffix), profile))
        else:
            _save(file, values.astype(np.uint8), suffix, profile)


def kept_in(profile: dict[str, Any], suffix: str) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata that a format can store, and descriptions of the metadata that it cannot."""
    takes = {"icc_profile", "dpi"}
    takes |= {"text"} if suffix == ".png" else set()
    takes |= {"exif"} if suffix in EXIF_SUFFIXES else set()
    lost = [words for key, words in PROFILE_WORDS.items() if key in profile.keys() - takes]
    return {key: value for key, value in profile.items() if key in takes}, lost


def _save(file: Any, values: np.ndarray, suffix: str, profile: dict[str, Any]) -> None:
    from PIL import Image

    texts = {"pnginfo": _png_texts(profile)} if suffix == ".png" else {}
    others = {key: value for key, value in profile.items() if key != "text"}
    formats, options = Image.registered_extensions(), SAVE_OPTIONS.get(suffix, {})
    Image.fromarray(values).save(file, format=formats[suffix], **others, **texts, **options)


def _png_texts(profile: dict[str, Any]) -> Any:
    """Return a PNG file's text metadata as Pillow's `PngInfo`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in profile.get("text", {}).items():
        info.add_text(key, text, zip=len(text) > 1000)
    return info


def _encode_deep(values: np.ndarray, suffix: str) -> bytes:
    """Encode 16-bit RGB or RGBA (H, W, C) as the bytes of a PNG or TIFF file."""
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


def _with_png_profile(data: bytes, profile: dict[str, Any]) -> bytes:
    """Insert texts, EXIF data, the ICC profile and the resolution as chunks after a PNG file's header."""
    chunks = [chunk[:2] for chunk in _png_texts(profile).chunks]
    if exif := profile.get("exif"):
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    if icc := profile.get("icc_profile"):
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    if dpi := profile.get("dpi"):
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(float(side) / 0.0254) for side in dpi), 1)))
    packed = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    # PyAV writes its own pHYs chunk with the pixel aspect ratio.
    rest, own = data[33:], data.find(b"pHYs")
    if profile.get("dpi") and own > 0:
        rest = data[33 : own - 4] + data[own + 17 :]
    return data[:33] + packed + rest


def _with_tiff_profile(data: bytes, profile: dict[str, Any]) -> bytes:
    """Add the ICC profile and the resolution to a little-endian TIFF file, in a new directory at its end."""
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = {
        struct.unpack_from("<H", data, start + 2 + 12 * number)[0]: data[start + 2 + 12 * number :][:12]
        for number in range(count)
    }
    data += b"\0" * (len(data) % 2)
    if icc := profile.get("icc_profile"):
        entries[34675] = struct.pack("<HHII", 34675, 7, len(icc), len(data))
        data += icc + b"\0" * (len(icc) % 2)
    if dpi := profile.get("dpi"):
        for tag, side in zip((282, 283), dpi, strict=True):
            entries[tag] = struct.pack("<HHII", tag, 5, 1, len(data))
            data += struct.pack("<II", round(float(side) * 1000), 1000)
        entries[296] = struct.pack("<HHIHH", 296, 3, 1, 2, 0)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory + bytes(4)


def describe_animation(path: Path) -> tuple[int, tuple[int, int], int, bool]:
    """Return an animation's frame count, (width, height), length in ms, and whether it has transparency."""
    count = length = 0
    size, transparent = (0, 0), False
    for picture, milliseconds in read_animation(path):
        count, length = count + 1, length + milliseconds
        size = (picture.rgb.shape[-1], picture.rgb.shape[-2])
        transparent |= picture.alpha is not None and bool((picture.alpha < 1).any())
    return count, size, length, transparent


def read_animation(path: Path) -> Iterator[tuple[Picture, int]]:
    """Yield each frame of an animated picture and its duration in milliseconds. Raises `VideoError`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            for number in range(image.n_frames):
                image.seek(number)
                image.load()  # for WebP and AVIF, this sets the frame's duration
                duration = round(float(image.info.get("duration", 0))) or DEFAULT_MILLISECONDS
                yield from_pillow(image), duration
    except damage() as error:
        raise VideoError(
            f"{path} cannot be read as an animation ({str(error) or type(error).__name__}): it is damaged."
        ) from error
