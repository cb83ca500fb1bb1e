"""8-bit linear layers, provided by torchao: an approximation that is used only on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import IncompatibleInputError

QUANTIZATIONS = ("none", "int8", "fp8")

SMALLEST = 1e-4
"""Lower bound for a tensor's largest value when its fp8 scale is computed."""

FP8_CAPABILITY = (8, 9)
"""Lowest compute capability of NVIDIA GPUs that can multiply 8-bit floats (Ada, Hopper and newer)."""


def check_quantize(kind: str, device: torch.device) -> None:
    """Check that a kind of quantisation can be used here.

    Raises `IncompatibleInputError` for a name that is not in `QUANTIZATIONS` and for 'fp8' on a device that
    does not support it, and `ModuleNotFoundError` without torchao.
    """
    if kind not in QUANTIZATIONS:
        raise IncompatibleInputError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, not {kind!r}")
    if kind != "none":
        _configuration(kind)
    if kind == "fp8" and not multiplies_fp8(device):
        raise IncompatibleInputError(
            "quantize 'fp8' needs an NVIDIA GPU with compute capability 8.9 or higher, not "
            f"{device}; leave quantize at 'none', or use 'int8'",
        )


def quantize(kind: str, *networks: nn.Module) -> None:
    """Quantise the linear layers of attention modules in place, both their weights and their inputs.

    'int8' uses one scale per row of weights and per position; 'fp8' (e4m3) uses one scale per tensor.
    Convolutions, which account for most of the work, are not quantised.
    """
    from torchao.quantization import quantize_

    # The weights outlive the caller's inference mode, so they must not become inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        for network in networks:
            quantize_(network, _configuration(kind), _runs_in_every_step)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has hardware support for multiplying 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def _configuration(kind: str) -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise ModuleNotFoundError(
            f"quantize '{kind}' needs torchao: pip install torchao, or leave quantize at 'none'"
        ) from error
    if kind == "fp8":
        # The bound prevents a division by zero if all values of a tensor are zero.
        return quantization.Float8DynamicActivationFloat8WeightConfig(activation_value_lb=SMALLEST)
    return quantization.Int8DynamicActivationInt8WeightConfig()


def _runs_in_every_step(layer: nn.Module, name: str) -> bool:
    """Whether to quantise a layer; layers for the prompt's keys and values run only once and are excluded."""
    return isinstance(layer, nn.Linear) and ".attentions." in name and not name.endswith(".linear")
