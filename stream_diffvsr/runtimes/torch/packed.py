"""Reorder the weights of linear layers once into the layout that is fastest for oneDNN.

The results differ only by rounding. Packing helps where torch's float32 matrix products reach only half of
the processor's speed: on AMD processors, MKL does not use AVX-512, but oneDNN does. (On Zen 5, a U-Net step
at the released model's widths runs 1.31 times as fast; on Zen 3, which lacks AVX-512, there is no gain.)
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
"""Minimum number of weights in a packed layer; in smaller layers, the call costs more than it saves."""


@lru_cache
def is_faster_here() -> bool:
    """Whether packed layers are faster on this processor."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return there and torch.backends.mkl.is_available() and _is_amd() and _has_avx512()


@contextmanager
def packed(networks: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Pack large float32 layers for the duration of the context, on CPUs where that is faster.

    Packed weights are kept alongside the stored weights for as long as the layer exists; they are
    packed again if the stored weights change. Packing itself does not change the stored weights.
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
    """Return how many bytes of packed weights are already kept, and how many the next frame will add."""
    return _kept.bytes_beside((layer for network in networks for layer in _layers(network)), 1)


def _layers(network: nn.Module) -> Iterator[nn.Linear]:
    """Yield the large linear layers of transformer blocks; the inputs of other layers have only one row."""
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
    if layer.weight.is_inference():  # changes to such weights cannot be detected
        return nn.Linear.forward(layer, x)
    return torch.ops.mkldnn._linear_pointwise(x, _kept(layer), layer.bias, "none", [], "")


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _is_amd() -> bool:
    """Whether this is an AMD processor, according to Linux or Windows."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AuthenticAMD" in platform.processor()


_kept = Derived(_reordered)
