"""Linear layers with weights reordered once into the layout that oneDNN multiplies fastest.

The numbers are the same but for rounding. It pays where torch's float32 products run at half the processor's
rate: MKL does not use AVX-512 on AMD's processors, and oneDNN does. (Zen 5: 1.31 times a U-Net step of the
released widths; Zen 3, which has no AVX-512: nothing.)
"""

from __future__ import annotations

import platform
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .derived import Derived

SMALLEST = 256 * 256
"""Weights of a layer: below, a call costs more than it saves."""


@lru_cache
def is_faster_here() -> bool:
    """Whether this is a processor on which packed layers are faster."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return there and torch.backends.mkl.is_available() and _is_amd() and _has_avx512()


@contextmanager
def packed(networks: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Run the large float32 layers on a CPU packed while the context lasts, where that pays.

    What is packed is kept beside the stored weights as long as the layer lives, and made anew when these
    change; everybody else sees the layers as they were.
    """
    layers = [layer for network in networks for layer in _layers(network)]
    try:
        for layer in layers:
            layer.forward = partial(_run, layer)  # type: ignore[method-assign,assignment]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def bytes_beside(networks: Iterable[nn.Module]) -> tuple[int, int]:
    """Bytes of what is packed, and of what the next frame will pack."""
    return _kept.bytes_beside((layer for network in networks for layer in _layers(network)), 1)


def _layers(network: nn.Module) -> Iterator[nn.Linear]:
    """Those of transformer blocks; the others are called with a single row."""
    for name, layer in network.named_modules() if is_faster_here() else ():
        if type(layer) is nn.Linear and ".attentions." in name and "forward" not in vars(layer):
            weight = layer.weight
            if (
                weight.numel() >= SMALLEST
                and weight.dtype == torch.float32
                and weight.device.type in ("cpu", "meta")
            ):
                yield layer


def _run(layer: nn.Linear, x: Tensor) -> Tensor:
    if layer.weight.is_inference():  # such weights do not tell when they change
        return nn.Linear.forward(layer, x)
    return torch.ops.mkldnn._linear_pointwise(x, _kept(layer), layer.bias, "none", [], "")


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _is_amd() -> bool:
    """By what Linux and Windows say of the processor."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AuthenticAMD" in platform.processor()


_kept = Derived(_reordered)
