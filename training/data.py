"""Training pictures: generated scenes and freely licensed photographs.

Everything is drawn from one numpy generator, so the same seed always produces the same data. Pictures are
uint8 RGB arrays until they become a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import skimage
import torch
from torch import Tensor
from torch.nn import functional as F

cv2.setNumThreads(1)

# CC0, in the public domain or free of known restrictions; training/README.md names their sources.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg",
    "text.png",
)  # fmt: skip
# Sampling weights other than 1: photographs with faces, fur and objects teach the network most.
WEIGHTS = {"astronaut.png": 4, "chelsea.png": 3, "coffee.png": 3, "rocket.jpg": 2, "camera.png": 2,
           "clock_motion.png": 0.5, "cell.png": 0.5, "retina.jpg": 0.5, "text.png": 0.5}  # fmt: skip

FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
)
LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;!?&%+-()  "))


def photographs() -> tuple[list[np.ndarray], np.ndarray]:
    """Return the photographs from the scikit-image package, and the probability of choosing each."""
    folder = Path(skimage.__file__).parent / "data"
    pictures = [cv2.imread(str(folder / name), cv2.IMREAD_COLOR)[..., ::-1].copy() for name in PHOTOGRAPHS]
    weights = np.array([WEIGHTS.get(name, 1.0) for name in PHOTOGRAPHS])
    return pictures, weights / weights.sum()


def noise_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return noise with mean 0 and standard deviation 1, like cloth, stone or clouds.

    Its spectrum falls as a power of frequency.
    """
    y, x = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    stretch = rng.uniform(0.3, 3)
    radius = np.sqrt((x * stretch) ** 2 + (y / stretch) ** 2) + 1 / size
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / radius ** rng.uniform(0.4, 1.8)
    field = np.fft.irfft2(spectrum, (size, size))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def pattern_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return stripes, checks or dots in -1..1: fine regular detail, which is prone to aliasing."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(6), np.log(60)))
    u = np.cos(angle) * x + np.sin(angle) * y
    v = -np.sin(angle) * x + np.cos(angle) * y
    wave = np.sin(2 * np.pi * u / period)
    if rng.random() < 0.5:
        wave = wave * np.sin(2 * np.pi * v / (period * rng.uniform(0.5, 2)))
    if rng.random() < 0.6:
        wave = np.tanh(wave * rng.uniform(2, 10))
    return wave.astype(np.float32)


def colour(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    picked = palette[rng.integers(len(palette))].astype(np.float32)
    return np.clip(picked + rng.normal(0, 12, 3), 0, 255).astype(np.float32)


def fill(rng: np.random.Generator, size: int, palette: np.ndarray) -> np.ndarray:
    """Return a surface: a colour, usually with shading and a texture."""
    surface = np.ones((size, size, 1), np.float32) * colour(rng, palette)
    if rng.random() < 0.6:
        y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
        slope = rng.normal(0, 40, 2)
        surface += (slope[0] * y + slope[1] * x).astype(np.float32)[..., None]
    kind = rng.random()
    if kind < 0.5:
        surface += noise_texture(rng, size)[..., None] * rng.uniform(2, 30)
    elif kind < 0.7:
        mix = (pattern_texture(rng, size)[..., None] + 1) / 2
        surface = surface * (1 - mix) + colour(rng, palette) * mix
    return surface


def shape_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a mask (0..255) of a filled ellipse, polygon, stroke or word, antialiased by OpenCV."""
    mask = np.zeros((size, size), np.uint8)
    centre = rng.integers(0, size, 2)
    radius = min(size / 2.5, 10 / (rng.random() + 1e-3) ** 0.8)
    kind = rng.random()
    if kind < 0.35:
        axes = (int(radius * rng.uniform(0.3, 1)) + 1, int(radius) + 1)
        cv2.ellipse(mask, tuple(map(int, centre)), axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA)
    elif kind < 0.75:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        reach = radius * rng.uniform(0.4, 1.3, len(angles))
        points = centre + np.stack([np.cos(angles) * reach, np.sin(angles) * reach], 1)
        cv2.fillPoly(mask, [points.astype(np.int32)], 255, cv2.LINE_AA)
    elif kind < 0.88:
        points = centre + np.cumsum(rng.normal(0, radius, (rng.integers(2, 7), 2)), 0)
        cv2.polylines(mask, [points.astype(np.int32)], False, 255, int(rng.integers(1, 9)), cv2.LINE_AA)
    else:
        word = "".join(rng.choice(LETTERS, rng.integers(2, 14)))
        cv2.putText(mask, word, tuple(map(int, centre - [size // 5, 0])), FONTS[rng.integers(len(FONTS))],
                    rng.uniform(0.5, 3), 255, int(rng.integers(1, 6)), cv2.LINE_AA)  # fmt: skip
    return mask


def paint(
    canvas: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    surfaces: list[np.ndarray],
    palette: np.ndarray,
) -> None:
    """Paint a shape onto the canvas in place, processing only its bounding box."""
    x, y, width, height = cv2.boundingRect(mask)
    box = np.s_[y : y + height, x : x + width]
    top = colour(rng, palette)
    if rng.random() < 0.5:
        shade = rng.uniform(0.6, 1.3), rng.normal(0, 15)
        top = surfaces[rng.integers(len(surfaces))][box] * np.float32(shade[0]) + np.float32(shade[1])
    canvas[box] += (top - canvas[box]) * (mask[box].astype(np.float32)[..., None] / 255)


def scene(rng: np.random.Generator, palette: np.ndarray, size: int = 1024) -> np.ndarray:
    """Return a picture of overlapping shapes, the far ones sometimes blurred, drawn at twice the size."""
    surfaces = [fill(rng, size, palette) for _ in range(6)]
    canvas = surfaces[0].copy()
    count = int(rng.integers(60, 400))
    soft = rng.integers(0, count) if rng.random() < 0.5 else -1
    for index in range(count):
        paint(canvas, shape_mask(rng, size), rng, surfaces, palette)
        if index == soft:
            canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(1, 8))
    small = cv2.resize(canvas, (size // 2, size // 2), interpolation=cv2.INTER_AREA)
    return np.clip(small, 0, 255).astype(np.uint8)


class Pictures:
    """The photographs and generated scenes from which crops are taken."""

    def __init__(self, seed: int, scenes: int, cache: Path | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.photographs, self.weights = photographs()
        self.palettes = [picture.reshape(-1, 3) for picture in self.photographs]
        if cache is not None and cache.exists():
            self.scenes = list(np.load(cache))
            return
        self.scenes = [scene(rng, self.palettes[rng.choice(len(self.palettes), p=self.weights)])
                       for _ in range(scenes)]  # fmt: skip
        if cache is not None:
            np.save(cache, np.stack(self.scenes))

    def keep(self, names: Sequence[str]) -> None:
        """Keep only these photographs, with equal weights."""
        self.photographs = [self.photographs[PHOTOGRAPHS.index(name)] for name in names]
        self.weights = np.full(len(names), 1 / len(names))

    def pick(self, rng: np.random.Generator, photograph_share: float = 0.6) -> np.ndarray:
        if rng.random() < photograph_share:
            return self.photographs[rng.choice(len(self.photographs), p=self.weights)]
        return self.scenes[rng.integers(len(self.scenes))]


def crop(rng: np.random.Generator, picture: np.ndarray, size: int) -> np.ndarray:
    """Return a square of the picture; if it has almost no detail, try again, up to three times in all."""
    for _ in range(3):
        piece = square(rng, picture, size)
        if piece[::4, ::4].std() > 12:
            break
    return piece


def square(rng: np.random.Generator, picture: np.ndarray, size: int) -> np.ndarray:
    """Return a square of the picture, randomly turned, mirrored, and reduced by up to 2.5 to sharpen it."""
    height, width = picture.shape[:2]
    side = int(min(size * max(1.0, rng.uniform(0.6, 2.5)), height, width))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    piece = picture[top : top + side, left : left + side]
    if side != size:
        method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
        piece = cv2.resize(piece, (size, size), interpolation=method)
    piece = np.rot90(piece, rng.integers(4))
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def recolour(rng: np.random.Generator, pictures: np.ndarray) -> np.ndarray:
    """Vary gain, offset, gamma and channel order alike for all frames; uint8 (..., 3) -> float32 0..1."""
    values = pictures.astype(np.float32) / 255
    values = values[..., rng.permutation(3)] if rng.random() < 0.3 else values
    values = values ** np.exp(rng.normal(0, 0.25))
    tint = np.exp(rng.normal(0, 0.08, 3)).astype(np.float32)
    values = (values - 0.5) * rng.uniform(0.6, 1.15) * tint + 0.5 + rng.uniform(-0.15, 0.15)
    return np.clip(values, 0, 1).astype(np.float32)


def reduce(truth: Tensor, rng: np.random.Generator) -> Tensor:
    """Reduce frames (N, 3, H, W) in 0..1 to a quarter of their size, mostly by antialiased bicubic."""
    kind, size = rng.random(), (truth.shape[-2] // 4, truth.shape[-1] // 4)
    if kind > 0.95:
        blurred = F.interpolate(truth, scale_factor=0.8, mode="bicubic", antialias=True)
        return F.interpolate(blurred, size=size, mode="bicubic", antialias=True)
    if kind > 0.88:
        return F.avg_pool2d(truth, 4)
    if kind > 0.82:
        return F.interpolate(truth, size=size, mode="bilinear", antialias=True)
    return F.interpolate(truth, size=size, mode="bicubic", antialias=True)


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]


def spoil(lq: Tensor, rng: np.random.Generator, share: float) -> Tensor:
    """Round LQ frames of a sequence to 8 bits; with probability `share`, compress them; rarely, add noise."""
    if rng.random() < share * 0.3:
        lq = lq + torch.from_numpy(rng.normal(0, rng.uniform(0.002, 0.02), lq.shape).astype(np.float32))
    frames = (lq.clamp(0, 1) * 255).round().byte()
    if rng.random() < share:
        arrays, quality = frames.permute(0, 2, 3, 1).numpy(), int(rng.integers(35, 96))
        frames = torch.from_numpy(np.stack([jpeg(a, quality) for a in arrays])).permute(0, 3, 1, 2)
    return frames.float() / 255


def to_model(values: Tensor) -> Tensor:
    return values * 2 - 1


def still_batch(
    pool: Pictures, rng: np.random.Generator, count: int, size: int, spoiled: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Return LQ pictures (N,3,s/4,s/4) and the true ones (N,3,s,s), in model range."""
    lqs, truths = [], []
    for _ in range(count):
        picture = recolour(rng, crop(rng, pool.pick(rng), size))
        truth = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
        lqs.append(spoil(reduce(truth, rng), rng, spoiled))
        truths.append(truth)
    return to_model(torch.cat(lqs)), to_model(torch.cat(truths))
