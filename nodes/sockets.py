"""Socket types, and the widgets that several nodes share. Names and order are an API: they never change."""

from __future__ import annotations

from typing import Any

PIPE = "STREAM_DIFFVSR_PIPE"
STATE = "STREAM_DIFFVSR_STATE"
SETTINGS = "STREAM_DIFFVSR_SETTINGS"

CATEGORY = "StreamDiffVSR"
ADVANCED = "StreamDiffVSR/Advanced"

Widget = tuple[Any, dict[str, Any]]

PIPE_IN: Widget = (PIPE, {"tooltip": "The model, from Stream-DiffVSR Loader."})
STATE_IN: Widget = (
    STATE,
    {"tooltip": "What the frames before left behind; continues their sequence. Unlinked: a new sequence."},
)
SETTINGS_IN: Widget = (
    SETTINGS,
    {"tooltip": "Everything this node has no widget for, from Stream-DiffVSR Settings. Unlinked: defaults."},
)
STEPS: Widget = (
    "INT",
    {
        "default": 4,
        "min": 1,
        "max": 50,
        "tooltip": "Denoising steps per frame. The model was made for 4; more is slower and seldom better.",
    },
)
SEED: Widget = (
    "INT",
    {
        "default": 0,
        "min": 0,
        "max": 2**64 - 1,
        "control_after_generate": "fixed",
        "tooltip": "Frame n gets its noise from seed + n, counted in the whole video, so that a video done "
        "in parts equals one done at once.",
    },
)
STATE_OUT = "What the next frames need: link it to the node that goes on, or save it."
