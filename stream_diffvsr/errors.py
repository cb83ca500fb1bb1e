"""The engine's exception hierarchy.

StreamDiffVSRError
├── ModelNotFoundError         a checkpoint, or a part of one, is missing
├── CheckpointError            a checkpoint file is damaged or belongs to another model
├── IncompatibleInputError     a frame, state or option is unsuitable (also a ValueError)
├── VRAMError                  no plan fits in memory
└── VideoError                 a picture or video file cannot be read or written
"""

from __future__ import annotations

from pathlib import Path


class StreamDiffVSRError(Exception):
    """Base class of all errors that the engine raises deliberately."""


class ModelNotFoundError(StreamDiffVSRError):
    """A checkpoint, or one of its parts, is missing."""

    def __init__(self, component: str, expected_path: Path | str, remedy: str = "") -> None:
        self.component = component
        self.expected_path = Path(expected_path)
        super().__init__(f"{component} not found: expected {expected_path}. {remedy}".strip())


class CheckpointError(StreamDiffVSRError):
    """A checkpoint file is damaged or belongs to another model."""


class IncompatibleInputError(StreamDiffVSRError, ValueError):
    """An argument is unsuitable; the message states what was given and what is needed."""


class VRAMError(StreamDiffVSRError):
    """Every memory plan that was tried ran out of memory or needs more than is available."""

    def __init__(self, required_mb: int, available_mb: int, suggestion: str) -> None:
        self.required_mb = required_mb
        self.available_mb = available_mb
        self.suggestion = suggestion
        super().__init__(
            f"out of memory: about {required_mb} MB are needed, but {available_mb} MB are free; {suggestion}"
        )


class VideoError(StreamDiffVSRError):
    """A picture or video cannot be read or written."""
