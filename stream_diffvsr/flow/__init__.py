"""Optical flow: where each pixel of the current frame was in the previous frame."""

from .estimators import (
    FLOW_MODELS,
    BundledFlow,
    CallableFlow,
    DisFlow,
    FlowEstimator,
    NoFlow,
    RaftFlow,
    open_flow,
)

__all__ = [
    "FLOW_MODELS",
    "BundledFlow",
    "CallableFlow",
    "DisFlow",
    "FlowEstimator",
    "NoFlow",
    "RaftFlow",
    "open_flow",
]
