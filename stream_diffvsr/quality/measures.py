"""Quality measures for single frames and for pairs of consecutive frames.

Convention: pictures are RGB, (1, 3, H, W) float32 in [0, 1]; flow is backward, (1, 2, H, W), in pixels.
Measures that the piq library offers are computed with it, using the settings customary in the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import IncompatibleInputError
from ..flow import DisFlow
from ..tensors import from_pixels

LUMA = (0.299, 0.587, 0.114)
"""BT.601 weights, which are commonly used in the field to measure luminance."""


@dataclass(frozen=True)
class Measures:
    """The measures of one frame; those that involve the previous frame are NaN for the first frame."""

    psnr_y: float
    """Peak signal-to-noise ratio of luminance, in dB; higher is better."""
    psnr_rgb: float
    ssim_y: float
    """Structural similarity (Wang et al. 2004) with an 11x11 Gaussian window of sigma 1.5; 1 is best."""
    ssim_rgb: float
    gmsd: float
    """Gradient magnitude similarity deviation (Xue et al. 2014); 0 is best."""
    vif: float
    """Visual information fidelity in the pixel domain (Sheikh and Bovik 2006); 1 is best."""
    sharpness: float
    """Mean magnitude of the luminance's gradient, relative to that of the truth; 1 means equal sharpness."""
    colour_error: float
    """Root mean square error of Cb and Cr after a Gaussian blur of sigma 4, scaled to 255; reveals tints."""
    warping_error: float = math.nan
    """Mean squared difference from the previous frame moved along the truth's flow, in pixels that are not
    occluded (Lai et al. 2018); lower means steadier. See `warping_error`."""
    tof: float = math.nan
    """Mean absolute difference of the result's flow from the truth's, in pixels (tOF, Chu et al. 2020)."""


NAMES = tuple(field.name for field in fields(Measures))


def measure(pairs: Iterable[tuple[Tensor, Tensor]], border: int = 0) -> Iterator[Measures]:
    """Yield the measures of each pair (result, truth).

    Measures of single pictures ignore `border` pixels at each edge. Raises `IncompatibleInputError` if a
    result and its truth differ in size or are too small.
    """
    before: tuple[Tensor, Tensor] | None = None
    for one, other in pairs:
        check_pair(one, other, border)
        yield Measures(**picture_measures(one, other, border), **temporal_measures(one, other, before))
        before = one, other


def protocol(border: int) -> str:
    """Describe how the measures are computed, so that others can reproduce them."""
    import cv2

    versions = f"torch {torch.__version__}, piq {_import_piq().__version__}, OpenCV {cv2.__version__}"
    return (
        f"luminance and chroma by BT.601; {border} pixels at each edge ignored, except in measures over "
        f"time; SSIM with an 11x11 window, without downsampling; motion estimated by DIS (medium); {versions}"
    )


def check_pair(result: Tensor, truth: Tensor, border: int) -> None:
    """Reject frames whose sizes differ, and a border that leaves too little to compare."""
    (height, width), size = truth.shape[-2:], f"{result.shape[-1]}x{result.shape[-2]}"
    if result.shape != truth.shape:
        raise IncompatibleInputError(
            f"the result must have the same size as the original, {width}x{height}, not {size}"
        )
    if min(height, width) - 2 * border < SMALLEST:
        raise IncompatibleInputError(
            f"frames must be at least {SMALLEST} pixels wide and high, not counting {border} pixels at each "
            f"edge, but they are {size}"
        )


SMALLEST = 41
"""Smallest side, in pixels, into which VIF's largest window fits."""


def picture_measures(result: Tensor, truth: Tensor, border: int) -> dict[str, float]:
    """Return the measures that depend on this frame alone."""
    piq = _import_piq()
    inside = slice(border, -border or None)
    a, b = (x[..., inside, inside].clamp(0, 1) for x in (result, truth))
    return {
        "psnr_y": psnr(luma(a), luma(b)),
        "psnr_rgb": psnr(a, b),
        "ssim_y": float(piq.ssim(luma(a), luma(b), downsample=False)),
        "ssim_rgb": float(piq.ssim(a, b, downsample=False)),
        "gmsd": float(piq.gmsd(a, b)),
        "vif": float(piq.vif_p(a, b)),
        "sharpness": steepness(luma(a)) / max(steepness(luma(b)), 1e-12),
        "colour_error": 255 * float((blurred(chroma(a)) - blurred(chroma(b))).square().mean().sqrt()),
    }


def luma(picture: Tensor) -> Tensor:
    """Return the BT.601 luminance, (1, 1, H, W) in [0, 1]."""
    weights = torch.tensor(LUMA, device=picture.device)[:, None, None]
    return (picture * weights).sum(1, keepdim=True)


def chroma(picture: Tensor) -> Tensor:
    """Return BT.601 Cb and Cr, (1, 2, H, W) in [-0.5, 0.5]."""
    y = luma(picture)
    return torch.cat([(picture[:, 2:] - y) / 1.772, (picture[:, :1] - y) / 1.402], 1)


def steepness(picture: Tensor) -> float:
    """Return the gradient's mean magnitude per pixel, computed from forward differences."""
    across, down = (picture.diff(dim=dim) for dim in (-1, -2))
    return float((across[..., :-1, :].square() + down[..., :-1].square()).sqrt().mean())


def blurred(picture: Tensor, sigma: int = 4) -> Tensor:
    """Apply a Gaussian blur, with the edge pixels repeated outside the picture."""
    places = torch.arange(-3 * sigma, 3 * sigma + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-places.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(picture.shape[1], 1, 1, -1)
    padded = F.pad(picture, (3 * sigma,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=picture.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=picture.shape[1])


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB for a value range of 1, or infinity for equal pictures."""
    error = float(F.mse_loss(a, b))
    return -10 * math.log10(error) if error else math.inf


def temporal_measures(
    result: Tensor, truth: Tensor, before: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    """Return the measures of a frame and its predecessor, or an empty dict for the first frame."""
    if before is None:
        return {}
    flow = estimate(truth, before[1])
    seen = visible(flow, estimate(before[1], truth))
    return {
        "warping_error": warping_error(result, before[0], flow, seen),
        "tof": float((estimate(result, before[0]) - flow).abs().mean()),
    }


def estimate(current: Tensor, previous: Tensor) -> Tensor:
    """Return the backward flow, estimated with DIS."""
    return DisFlow()(from_pixels(current), from_pixels(previous))


def warping_error(current: Tensor, previous: Tensor, flow: Tensor, seen: Tensor) -> float:
    """Return the mean squared difference between `current` and `previous` warped by `flow`, where `seen`."""
    squared = (current - sample_zero_outside(previous, flow)).square().mean(1, keepdim=True)
    return float((squared * seen).sum() / seen.sum().clamp(min=1))


def visible(flow: Tensor, reverse: Tensor) -> Tensor:
    """Return 1 where `flow` stays inside the picture and `reverse` leads back to the same pixel, else 0.

    The round-trip test follows Sundaram et al. 2010.
    """
    back = sample_zero_outside(reverse, flow)
    limit = 0.01 * (flow.square().sum(1, keepdim=True) + back.square().sum(1, keepdim=True)) + 0.5
    same = (flow + back).square().sum(1, keepdim=True) < limit
    return (same & (sample_zero_outside(torch.ones_like(flow[:, :1]), flow) > 0.999)).float()


def sample_zero_outside(picture: Tensor, flow: Tensor) -> Tensor:
    """Sample `picture` bilinearly at p + flow(p), with 0 outside.

    Unlike in `warp`, zero flow is the identity.
    """
    height, width = picture.shape[-2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _import_piq() -> ModuleType:
    try:
        import piq
    except ImportError as error:
        raise ModuleNotFoundError(
            "measuring quality needs piq: pip install 'stream-diffvsr[quality]'"
        ) from error
    return piq
