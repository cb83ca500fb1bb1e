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
"""Of the graphs' inputs and outputs: files built for another one are not used."""

Call = Callable[..., list[Tensor]]
"""Takes a graph's inputs in order, gives its outputs in memory of their own, on the device they came from."""


@dataclass(frozen=True, eq=False)
class Graph:
    """What is to be exported. Pictures, that is tensors of 4 axes, may have any height and width later."""

    name: str
    network: nn.Module
    """Takes and gives tensors only, several as a tuple."""
    inputs: tuple[Tensor, ...]
    """Examples."""
    form: str = ""
    """Which sizes it is for, where a network decides by size what it does."""

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(value.nbytes for value in self.network.state_dict().values())

    def key(self) -> dict[str, str]:
        """All that an export depends on."""
        versions = {name: version(name) for name in ("torch", "diffusers")}
        own = {"graph": self.name, "version": VERSION, "form": self.form, "weights": _digest(self.network)}
        return {**own, **versions}

    def export(self) -> Any:
        """torch's ExportedProgram; raises `IncompatibleInputError` where this torch is too old."""
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
    """Runs graphs."""

    name: str
    dtype: torch.dtype
    """Of the numbers that graphs take and give."""
    number_format: str
    """Of the numbers inside, for people."""

    @property
    def details(self) -> str:
        """What its numbers depend on: version, device, threads."""
        ...

    def open(self, graph: Graph) -> Call:
        """A graph ready to run; built first if none is kept."""
        ...


class _Flat(nn.Module):
    """A network with its inputs as one tuple, so that one description of shapes fits all."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.network(*inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)


def _digest(network: nn.Module) -> str:
    """Names a network's weights by some of the numbers of each: enough to see any training of them."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        rows: Sequence[Tensor] = [value] if value.ndim == 0 else [value[0], value[len(value) // 2], value[-1]]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        for row in rows:
            digest.update(row.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
