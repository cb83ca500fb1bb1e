"""Where networks run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Placement(Protocol):
    """Decides where a network runs; asked before each stage."""

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        """Bring the network of `stage` to a device with room for its activations; return the device."""
        ...


@dataclass(frozen=True)
class FixedPlacement:
    """Everything stays on one device."""

    device: torch.device

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        return self.device
