"""Socket types and shared widgets. Their names and order are part of the public API and never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..stream_diffvsr.errors import IncompatibleInputError
from ..stream_diffvsr.families.diffvsr.options import UpscaleOptions
from ..stream_diffvsr.options import widgets

PIPE = "STREAM_DIFFVSR_PIPE"
STATE = "STREAM_DIFFVSR_STATE"
SETTINGS = "STREAM_DIFFVSR_SETTINGS"

SINCE = "frames_since"
"""Key of the tensor with the frames since the last chunk boundary, (N, 3, h, w); absent at a boundary."""

CATEGORY = "StreamDiffVSR"
ADVANCED = "StreamDiffVSR/Advanced"

Widget = tuple[Any, dict[str, Any]]


def check_values(widgets: Mapping[str, Widget], values: Mapping[str, Any]) -> None:
    """Reject values that a widget does not offer; None means that the input is linked.

    ComfyUI does not check the inputs of nodes that have their own validation. Nodes raise errors instead of
    returning them as text, which ComfyUI would repeat for every input.
    """
    for name, value in values.items():
        kind, about = widgets[name]
        low, high = about.get("min", value), about.get("max", value)
        if value is None:
            continue
        # The page may send 1 or "0.5" for a choice of 1.0 or 0.5.
        if isinstance(kind, list) and value not in kind and str(value) not in map(str, kind):
            raise IncompatibleInputError(f"{name} must be one of {', '.join(map(str, kind))}, not {value!r}")
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise IncompatibleInputError(f"{name} must be from {low} to {high}, not {value}")


PIPE_IN: Widget = (PIPE, {"tooltip": "The model, from Stream-DiffVSR Loader."})
STATE_IN: Widget = (
    STATE,
    {
        "tooltip": "State after the previous frames. Leave unconnected to start a new sequence.",
        "advanced": True,
    },
)
SETTINGS_IN: Widget = (
    SETTINGS,
    {
        "tooltip": "Further options from a Stream-DiffVSR Settings node. Leave unconnected for the defaults.",
        "advanced": True,
    },
)
STATE_OUT = "State after the last frame: link it to the node that continues the sequence, or save it."

_made = widgets(UpscaleOptions, ("num_inference_steps", "seed"))
STEPS: Widget = _made["num_inference_steps"]
SEED: Widget = (_made["seed"][0], {**_made["seed"][1], "control_after_generate": "fixed"})
