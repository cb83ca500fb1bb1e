"""Stream-DiffVSR: 4x video super-resolution, one frame at a time, with exact continuation.

from stream_diffvsr import load_pipeline, from_pixels, to_pixels

pipe = load_pipeline("nano")
for result in pipe.stream(frames):        # each (1, 3, h, w) float32 in [-1, 1]
    picture = to_pixels(result.hq)        # (1, 3, 4h, 4w) in [0, 1]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        CheckpointError,
        IncompatibleInputError,
        ModelNotFoundError,
        StreamDiffVSRError,
        VideoError,
        VRAMError,
    )
    from .families.diffvsr.options import UpscaleOptions
    from .families.diffvsr.pipeline import FrameResult, StreamDiffVSRPipeline
    from .families.diffvsr.state import StreamDiffVSRState
    from .load import estimate_memory, find_checkpoints, load_pipeline
    from .tensors import from_pixels, to_pixels

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "FrameResult",
    "IncompatibleInputError",
    "ModelNotFoundError",
    "StreamDiffVSRError",
    "StreamDiffVSRPipeline",
    "StreamDiffVSRState",
    "UpscaleOptions",
    "VRAMError",
    "VideoError",
    "estimate_memory",
    "find_checkpoints",
    "from_pixels",
    "load_pipeline",
    "to_pixels",
]

_HOMES = {
    "FrameResult": "families.diffvsr.pipeline",
    "StreamDiffVSRPipeline": "families.diffvsr.pipeline",
    "StreamDiffVSRState": "families.diffvsr.state",
    "UpscaleOptions": "families.diffvsr.options",
    "estimate_memory": "load",
    "find_checkpoints": "load",
    "from_pixels": "tensors",
    "load_pipeline": "load",
    "to_pixels": "tensors",
}
"""The module of each public name; all other names are in errors."""


def __getattr__(name: str) -> Any:
    """Import a public name on first access, since hosts import the package long before they use it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value
