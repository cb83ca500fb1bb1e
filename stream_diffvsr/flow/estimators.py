"""Flow estimators with a common interface.

Convention: `forward(current, previous)` accepts two frames (1, 3, H, W), float32, in model range, and returns
backward flow (1, 2, H, W), float32, in pixels, with channel 0 = dx. A pixel p of the current frame was at
p + flow(p) in the previous frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import IncompatibleInputError
from ..tensors import check_shape, pad_to, padded_size, to_pixels, upsample
from ..tiling import tiles
from . import raft
from .bundled import REDUCTION, FlowNetwork, enlarged_and_reduced

RAFT_MULTIPLE, RAFT_MINIMUM = 8, 128
"""RAFT needs sides that are multiples of 8 and, because of its four correlation levels, at least 128."""

TILE, TILE_OVERLAP = 1024, 256
"""Side and overlap of the tiles for tiled flow, in pixels of the frames between which flow is estimated."""

LUMA = (0.299, 0.587, 0.114)


class FlowEstimator(nn.Module):
    """Base class of all estimators; each is a module, even if it has no weights, and can move to a device."""

    name = "none"
    any_size = True
    """Whether the estimator also accepts frames smaller than the output."""
    countable: tuple[str, ...] = ()
    """The `methods` whose memory can be counted on the meta device, because it does not depend on values."""
    bytes_per_pixel = 0.0
    """Memory that the other methods need, in bytes per pixel of a frame."""
    methods: tuple[str, ...] = ("whole",)
    """Supported methods, in order of decreasing memory use: 'whole', 'linear' (same numbers as 'whole') and
    'tiled' (different numbers)."""

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        raise NotImplementedError

    def estimate(self, current: Tensor, previous: Tensor, method: str) -> Tensor:
        """Estimate flow as `forward` does, using one of `methods`."""
        return self(current, previous)

    def between(self, lq: Tensor, previous: Tensor, scale: float, method: str) -> Tensor:
        """Call `estimate` on two LQ frames enlarged by `scale`."""
        return self.estimate(upsample(lq, scale), upsample(previous, scale), method)

    @property
    def estimates(self) -> bool:
        """Whether flow is estimated; if not, every frame is treated as a first frame."""
        return True


class NoFlow(FlowEstimator):
    """Estimates no motion, so that the previous frame does not guide the current frame."""

    @property
    def estimates(self) -> bool:
        return False


class TileableFlow(FlowEstimator):
    """Base class of estimators that look only at each pixel's surroundings and so can run in tiles."""

    methods = ("whole", "tiled")

    def estimate(self, current: Tensor, previous: Tensor, method: str) -> Tensor:
        if method != "tiled":
            return self(current, previous)
        flow = current.new_zeros((1, 2, *current.shape[-2:]))
        height, width = current.shape[-2:]
        for tile in tiles(height, width, TILE, TILE_OVERLAP):
            tile.add(self.estimate_tile(tile.cut(current), tile.cut(previous)), flow)
        return flow

    def estimate_tile(self, current: Tensor, previous: Tensor) -> Tensor:
        """Return the flow of one tile."""
        return self(current, previous)


class RaftFlow(TileableFlow):
    """torchvision's RAFT with 12 updates, always computed in float32."""

    methods = ("whole", "linear", "tiled")
    countable = ("whole",)

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network.eval().float()
        self.name = name
        self.bytes_per_pixel = {"raft_small": 145.0}.get(name, 350.0)  # measured

    def forward(self, current: Tensor, previous: Tensor, *, linear: bool = False) -> Tensor:
        height, width = current.shape[-2:]
        size = padded_size(max(height, RAFT_MINIMUM), max(width, RAFT_MINIMUM), RAFT_MULTIPLE)
        flow = raft.estimate(self.network, pad_to(current, *size), pad_to(previous, *size), linear=linear)
        return flow[..., :height, :width]

    def estimate(self, current: Tensor, previous: Tensor, method: str) -> Tensor:
        if method == "linear":
            return self(current, previous, linear=True)
        return super().estimate(current, previous, method)

    def estimate_tile(self, current: Tensor, previous: Tensor) -> Tensor:
        return self(current, previous, linear=True)


class DisFlow(TileableFlow):
    """OpenCV's Dense Inverse Search on 8-bit luminance, which is fast on a CPU and needs no weights."""

    name = "dis"
    bytes_per_pixel = 60.0

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        cv2 = _import_cv2()
        estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        height, width = current.shape[-2:]
        size = max(height, RAFT_MINIMUM), max(width, RAFT_MINIMUM)
        flow = estimator.calc(_luma(pad_to(current, *size)), _luma(pad_to(previous, *size)), None)
        return torch.from_numpy(flow).permute(2, 0, 1)[None, :, :height, :width].to(current)


class BundledFlow(TileableFlow):
    """nano's own small network, always computed in float32; it needs neither OpenCV nor a download."""

    name = "bundled"
    countable = ("whole", "tiled")

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        # Convolutions are faster with channels last; the numbers differ only by rounding.
        self.network = network.eval().float()
        self.network.to(memory_format=torch.channels_last)

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        height, width = current.shape[-2:]
        size = padded_size(height, width, REDUCTION)
        small = (F.avg_pool2d(pad_to(frame, *size), REDUCTION) for frame in (current, previous))
        return self._of_reduced(*small)[..., :height, :width]

    def between(self, lq: Tensor, previous: Tensor, scale: float, method: str) -> Tensor:
        """Skip enlarging frames that would only be shrunk again; the result differs only by rounding."""
        if scale != REDUCTION or method != "whole":
            return super().between(lq, previous, scale, method)
        return self._of_reduced(enlarged_and_reduced(lq), enlarged_and_reduced(previous))

    def _of_reduced(self, current: Tensor, previous: Tensor) -> Tensor:
        flow = REDUCTION * self.network(current, previous)
        return F.interpolate(flow, scale_factor=REDUCTION, mode="bilinear", align_corners=False)


class CallableFlow(FlowEstimator):
    """Calls a user's function with (current, previous) at the output's size, and checks its result."""

    any_size = False

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.name = getattr(function, "__qualname__", type(function).__name__)

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        flow = self.function(current, previous)
        check_shape(flow, (1, 2, *current.shape[-2:]), "flow from the given callable")
        return flow.to(current.device)


def _luma(frame: Tensor) -> Any:
    weights = torch.tensor(LUMA, device=frame.device)[:, None, None]
    luma = (to_pixels(frame[0]) * weights).sum(0)
    return (luma * 255).round().to(torch.uint8).cpu().numpy()


def _import_cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ModuleNotFoundError(
            "flow 'dis' needs OpenCV: pip install opencv-python-headless, or choose another flow"
        ) from error
    return cv2


FLOW_MODELS = ("raft_large", "raft_small", "bundled", "dis", "none")
"""Names that `open_flow` accepts in addition to callables; callers resolve 'auto' to one of these."""


def open_flow(
    flow: str | Callable[[Tensor, Tensor], Tensor], open_network: Callable[[str], Any]
) -> FlowEstimator:
    """Return the estimator named `flow`, or wrap a callable; `open_network` loads a network by name."""
    if isinstance(flow, FlowEstimator):
        return flow
    if callable(flow):
        return CallableFlow(flow)
    if flow in ("raft_large", "raft_small"):
        return RaftFlow(open_network(flow), flow)
    if flow == "bundled":
        return BundledFlow(open_network(flow))
    if flow == "dis":
        _import_cv2()
        return DisFlow()
    if flow == "none":
        return NoFlow()
    raise IncompatibleInputError(
        f"flow must be one of auto, {', '.join(FLOW_MODELS)}, or a callable, not {flow!r}"
    )
