"""Linear layers in 8-bit whole numbers, by torchao: an approximation, and only where it is asked for."""

from __future__ import annotations

import torch
from torch import nn

QUANTIZATIONS = ("none", "int8")


def quantize(*networks: nn.Module) -> None:
    """Quantise the linear layers of attentions in place: weights by row, what goes in by position.

    Convolutions, which are most of the work, stay as they are. Raises `ModuleNotFoundError` without torchao.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ModuleNotFoundError(
            "quantize 'int8' needs torchao: pip install torchao, or leave quantize at 'none'"
        ) from error
    # Weights outlive the caller's inference mode.
    with torch.inference_mode(False), torch.no_grad():
        for network in networks:
            quantize_(network, Int8DynamicActivationInt8WeightConfig(), _runs_in_every_step)


def _runs_in_every_step(layer: nn.Module, name: str) -> bool:
    """Not for the prompt's keys and values, which are computed once (prompted.py)."""
    return isinstance(layer, nn.Linear) and ".attentions." in name and not name.endswith(".linear")
