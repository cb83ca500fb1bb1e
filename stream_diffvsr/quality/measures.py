"""Quality measures for single frames and for pairs of consecutive frames.

Convention: pictures are RGB, (1, 3, H, W) float32 in [0, 1]; flow is backward, (1, 2, H, W), in pixels.
The piq library computes all measures that it offers, with the settings usual in the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import IncompatibleInputError
from ..flow import DisFlow
from ..tensors import from_pixels
from .networks import Networks, import_piq

LUMA = (0.299, 0.587, 0.114)
"""BT.601 weights, which are commonly used in the field to measure luminance."""


@dataclass(frozen=True)
class Measures:
    """The measures of one frame.

    Measures that involve the previous frame are NaN for the first frame; measures whose weights or unguided
    result were not given are always NaN.
    """

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
    lpips: float = math.nan
    """Distance of features of VGG-16 (LPIPS, Zhang et al. 2018); 0 is best."""
    dists: float = math.nan
    """Distance of structure and texture in features of VGG-16 (DISTS, Ding et al. 2020); 0 is best."""
    warping_error: float = math.nan
    """Mean squared difference from the previous frame moved along the truth's flow, in pixels that are not
    occluded (Lai et al. 2018); lower means steadier. See `warping_error`."""
    tof: float = math.nan
    """Mean absolute difference of the result's flow from the truth's, in pixels (tOF, Chu et al. 2020)."""
    tof_raft: float = math.nan
    """The same with the flow of RAFT instead of DIS, as in StableVSR (Rota et al. 2024), which prints ten
    times this value. As there, RAFT (torchvision's raft_large, 12 updates) is given pictures in [0, 1]."""
    tlpips: float = math.nan
    """|LPIPS(truth, previous truth) - LPIPS(result, previous result)| (tLPIPS, Chu et al. 2020). StableVSR
    prints a thousand times this value, and uses AlexNet where piq uses VGG-16: do not mix the two."""
    ghosts: float = math.nan
    """Number of regions in which guidance brings back the previous frame. See `ghosts`."""


NAMES = tuple(field.name for field in fields(Measures))


def measure(
    frames: Iterable[Sequence[Tensor]], border: int = 0, networks: Networks | None = None
) -> Iterator[Measures]:
    """Yield the measures of each frame, given as (result, truth) or as (result, truth, unguided result).

    Measures of single pictures ignore `border` pixels at each edge. Raises `IncompatibleInputError` if a
    result and its truth differ in size or are too small.
    """
    before: Sequence[Tensor] | None = None
    for each in frames:
        for result in (each[0], *each[2:]):
            check_pair(result, each[1], border)
        yield Measures(
            **picture_measures(each[0], each[1], border, networks),
            **temporal_measures(each, before, networks),
        )
        before = each


def protocol(border: int, networks: Networks | None = None) -> dict[str, str]:
    """Describe how each measure is computed, so that others can reproduce it."""
    import cv2

    piq, torch_ = f"piq {import_piq().__version__}", f"torch {torch.__version__}"
    inside, whole = f"{border} pixels at each edge ignored", "whole frames"
    luminance, window = "BT.601 luminance", "11x11 window, without downsampling"
    dis = f"DIS flow (medium), OpenCV {cv2.__version__}"
    files = networks.files if networks else {}
    vgg, raft = files.get("vgg16"), files.get("raft_large")
    return {
        "psnr_y": f"{luminance}; {inside}; {torch_}",
        "psnr_rgb": f"RGB; {inside}; {torch_}",
        "ssim_y": f"{luminance}, {window}; {inside}; {piq}",
        "ssim_rgb": f"RGB, {window}; {inside}; {piq}",
        "gmsd": f"{inside}; {piq}",
        "vif": f"VIFp; {inside}; {piq}",
        "sharpness": f"gradient of BT.601 luminance; {inside}; {torch_}",
        "colour_error": f"BT.601 chroma on a scale of 0 to 255, blurred with sigma 4; {inside}; {torch_}",
        "lpips": f"{vgg}, {files.get('lpips')}; {inside}; {piq}",
        "dists": f"{vgg}, {files.get('dists')}, shorter side at most 256; {inside}; {piq}",
        "warping_error": f"squared error, values from 0 to 1; {dis}, from the original; {whole}; {torch_}",
        "tof": f"pixels; {dis}; {whole}; {torch_}",
        "tof_raft": f"pixels; flow by {raft}, 12 updates, pictures in [0, 1]; {whole}; {torch_}",
        "tlpips": f"{vgg}, {files.get('lpips')}; {whole}; {piq}",
        "ghosts": f"regions per frame, {LEAST} pixels or more; {dis}, from the original; {whole}; {torch_}",
    }


def check_pair(result: Tensor, truth: Tensor, border: int) -> None:
    """Reject frames that differ in size or are too small, not counting the border."""
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


def picture_measures(
    result: Tensor, truth: Tensor, border: int, networks: Networks | None = None
) -> dict[str, float]:
    """Return the measures that depend on this frame alone."""
    piq = import_piq()
    inside = slice(border, -border or None)
    a, b = (x[..., inside, inside].clamp(0, 1) for x in (result, truth))
    learned = {"lpips": networks.lpips, "dists": networks.dists} if networks else {}
    return {
        **{name: float(network(a, b)) for name, network in learned.items()},
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


def blurred(picture: Tensor, sigma: float = 4) -> Tensor:
    """Apply a Gaussian blur, with the edge pixels repeated outside the picture."""
    reach = math.ceil(3 * sigma)
    places = torch.arange(-reach, reach + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-places.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(picture.shape[1], 1, 1, -1)
    padded = F.pad(picture, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=picture.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=picture.shape[1])


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB for a value range of 1, or infinity for equal pictures."""
    error = float(F.mse_loss(a, b))
    return -10 * math.log10(error) if error else math.inf


def temporal_measures(
    frame: Sequence[Tensor], before: Sequence[Tensor] | None, networks: Networks | None = None
) -> dict[str, float]:
    """Return the measures of a frame and its predecessor, or an empty dict for the first frame.

    `frame` and `before` are tuples of pictures, as in `measure`.
    """
    if before is None:
        return {}
    result, truth, *unguided = frame
    flow = estimate(truth, before[1])
    seen = visible(flow, estimate(before[1], truth))
    values = {
        "warping_error": warping_error(result, before[0], flow, seen),
        "tof": float((estimate(result, before[0]) - flow).abs().mean()),
    }
    if networks:
        flows, changes = (
            [network(now, previous) for now, previous in ((result, before[0]), (truth, before[1]))]
            for network in (networks.flow, networks.lpips)
        )
        values["tof_raft"] = float((flows[0] - flows[1]).abs().mean())
        values["tlpips"] = float((changes[0] - changes[1]).abs())
    if unguided:
        values["ghosts"] = ghosts(result, truth, unguided[0], before[0], flow)
    return values


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

    Unlike `warp`, this returns the picture unchanged for zero flow.
    """
    height, width = picture.shape[-2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


WORSE, LEAST, ALIKE = 6 / 255, 60, 0.4
"""A ghost's error added by guidance, its number of pixels, and its correlation, all as minima."""


def ghosts(result: Tensor, truth: Tensor, unguided: Tensor, previous: Tensor, flow: Tensor) -> int:
    """Count regions in which guidance makes the frame worse by making it more like the `previous` result.

    Such a region has at least 60 connected pixels where the absolute luminance error, blurred with sigma
    1.5, exceeds that of the `unguided` result by more than 6/255. Within the region, result - unguided has a
    correlation above 0.4 with previous - unguided; the previous result is either left in place or moved
    along the truth's `flow`. The measure is this project's own; pictures are (1, 3, H, W) in [0, 1], and
    `flow` is (1, 2, H, W) in pixels.
    """
    import cv2

    now, true, plain = (luma(x) for x in (result, truth, unguided))
    worse = blurred((now - true).abs() - (plain - true).abs(), 1.5)[0, 0] > WORSE
    count, labels, figures, _ = cv2.connectedComponentsWithStats(worse.byte().cpu().numpy())
    regions = torch.from_numpy(labels).to(worse.device)
    sources = [luma(x) - plain for x in (previous, sample_zero_outside(previous, flow))]

    def alike(region: Tensor, source: Tensor) -> bool:
        pair = torch.stack([(now - plain)[0, 0, region], source[0, 0, region]])
        return float(torch.corrcoef(pair)[0, 1]) > ALIKE

    large = [regions == index for index in range(1, count) if figures[index, cv2.CC_STAT_AREA] >= LEAST]
    return sum(any(alike(region, source) for source in sources) for region in large)
