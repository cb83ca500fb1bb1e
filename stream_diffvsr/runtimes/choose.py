"""A runtime by its name."""

from __future__ import annotations

import torch

from ..devices import resolve_dtype
from ..errors import IncompatibleInputError
from .graph import Runtime
from .onnx import ONNX
from .openvino import OpenVINO

RUNTIMES = ("torch", "openvino", "onnx", "auto")
PROVIDERS = ("auto", "cpu", "gpu", "npu", "cuda", "tensorrt")


def open_runtime(
    name: str, provider: str, device: torch.device, dtype: str | torch.dtype, quantize: str
) -> Runtime | None:
    """The runtime of that name for tensors on `device`; None is PyTorch, or `auto` before it has chosen.

    Raises `IncompatibleInputError` and `ModuleNotFoundError` with what to do.
    """
    if name not in RUNTIMES:
        raise IncompatibleInputError(f"runtime as one of {', '.join(RUNTIMES)}", repr(name))
    if name in ("torch", "auto"):
        if provider != "auto":
            raise IncompatibleInputError(f"provider auto with runtime {name}", repr(provider))
        return None
    if quantize != "none":
        raise IncompatibleInputError(f"quantize none with runtime {name}", repr(quantize))
    if name == "onnx":
        return ONNX(provider, device, resolve_dtype(dtype, device))
    if device.type != "cpu":
        raise IncompatibleInputError(
            "device cpu with runtime openvino, which takes frames there", str(device)
        )
    return OpenVINO(provider, resolve_dtype(dtype, device))
