"""A network as a graph, exported from PyTorch and run by another library."""

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
"""Version of the graphs' inputs and outputs; files built for another version are not used."""

Call = Callable[..., list[Tensor]]
"""Runs a graph on its inputs, in order; returns its outputs in new memory, on the inputs' device."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A network to export; its pictures (tensors of 4 axes) may later have any height and width."""

    name: str
    network: nn.Module
    """Accepts and returns only tensors; several results are returned as a tuple."""
    inputs: tuple[Tensor, ...]
    """Example inputs."""
    form: str = ""
    """The sizes that it applies to, if the network's operations depend on the size."""

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
        """Return torch's ExportedProgram; raise `IncompatibleInputError` if this torch is too old."""
        if not hasattr(torch.export.Dim, "AUTO"):
            raise IncompatibleInputError(
                f"runtimes other than torch need torch 2.6 or newer, not {torch.__version__}"
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
    """Number format of the computation itself, as readable text."""

    @property
    def details(self) -> str:
        """The settings that affect the numbers: version, device, threads."""
        ...

    def open(self, graph: Graph) -> Call:
        """Return a graph that is ready to run, building it first unless a stored one exists."""
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
    """Return a digest of a few values of each of a network's weights, enough to detect any training."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        rows: Sequence[Tensor] = [value] if value.ndim == 0 else [value[0], value[len(value) // 2], value[-1]]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        for row in rows:
            digest.update(row.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
