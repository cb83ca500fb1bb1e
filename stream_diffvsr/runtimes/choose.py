"""Select a runtime by name."""

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
    """Return the named runtime for tensors on `device`, or None for `torch` and `auto` (resolved later).

    Raises `IncompatibleInputError` or `ModuleNotFoundError`, each with advice on what to do.
    """
    if name not in RUNTIMES:
        raise IncompatibleInputError(f"runtime must be one of {', '.join(RUNTIMES)}, not {name!r}")
    if name in ("torch", "auto"):
        if provider != "auto":
            raise IncompatibleInputError(f"runtime {name} needs provider auto, not {provider!r}")
        return None
    if quantize != "none":
        raise IncompatibleInputError(f"runtime {name} needs quantize none, not {quantize!r}")
    if name == "onnx":
        return ONNX(provider, device, resolve_dtype(dtype, device))
    if device.type != "cpu":
        raise IncompatibleInputError(
            f"runtime openvino needs device cpu, not {device}; for an Intel GPU or NPU, set provider instead"
        )
    return OpenVINO(provider, resolve_dtype(dtype, device))
