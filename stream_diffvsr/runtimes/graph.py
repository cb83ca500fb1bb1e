"""Graphs: networks that are exported from PyTorch and run by another library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import IncompatibleInputError

VERSION = "1"
"""Version of the graphs' inputs and outputs; files that were built for another version are not used."""

Call = Callable[..., list[Tensor]]
"""A function that runs a graph on its inputs, in order; the outputs are in new memory on the same device."""

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of a graph's inputs, in order."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A network to export; the graph will accept pictures (tensors with 4 axes) of any height and width."""

    name: str
    network: nn.Module
    """The network, which accepts and returns only tensors; it returns several results as a tuple."""
    inputs: tuple[Tensor, ...]
    """Example inputs."""
    form: str = ""
    """The sizes to which the graph applies, if the network's operations depend on the size."""
    profile: tuple[Shapes, Shapes] | None = None
    """The smallest and the largest shapes of the inputs, if the runtime needs them in advance."""

    @property
    def size(self) -> int:
        """The size of the weights in bytes."""
        return sum(value.nbytes for value in self.network.state_dict().values())

    def key(self) -> dict[str, str]:
        """Return everything that an export depends on."""
        versions = {name: version(name) for name in ("torch", "diffusers")}
        own = {"graph": self.name, "version": VERSION, "form": self.form, "weights": _digest(self.network)}
        return {**own, **versions}

    def export(self) -> Any:
        """Return torch's ExportedProgram. Raises `IncompatibleInputError` if the torch version is too old."""
        if not hasattr(torch.export.Dim, "AUTO"):
            raise IncompatibleInputError(
                f"runtimes other than torch need torch 2.6 or newer; {torch.__version__} is installed"
            )
        free = torch.export.Dim.AUTO
        shapes = tuple({2: free, 3: free} if x.ndim == 4 else {} for x in self.inputs)
        with torch.no_grad():
            return torch.export.export(
                _Flat(self.network), self.inputs, dynamic_shapes=(shapes,), strict=False
            )


class Runtime(Protocol):
    """A library that runs graphs."""

    name: str
    dtype: torch.dtype
    """Number format of the graphs' inputs and outputs."""
    number_format: str
    """Number format of the computation, as readable text."""
    needs_profile: bool
    """Whether graphs must have a `profile`."""

    @property
    def details(self) -> str:
        """The settings that affect the results: version, device and threads."""
        ...

    def open(self, graph: Graph) -> Call:
        """Return a function that runs the graph; the graph is built first unless it is already stored."""
        ...


class _Flat(nn.Module):
    """Wraps a network so that a single description of dynamic shapes covers all its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.network(*inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)


def _digest(network: nn.Module) -> str:
    """Return a digest of a few values from each of a network's weights; training would change it."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        rows: Sequence[Tensor] = [value] if value.ndim == 0 else [value[0], value[len(value) // 2], value[-1]]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        for row in rows:
            digest.update(row.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
