"""A tiny model of every family, as files that the loader opens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from samples import shift_flow
from spandrel.architectures.SPAN import SPAN

TESTS = Path(__file__).parent


def image_model(folder: Path) -> Path:
    """A 2x model with random weights, in a file."""
    torch.manual_seed(0)
    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2)
    torch.save(network.state_dict(), folder / "span.pth")
    return folder / "span.pth"


def copied(checkpoint: str, name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(TESTS / checkpoint / "checkpoint", folder / name))


@dataclass(frozen=True)
class Case:
    """A family's tiny model."""

    make: Callable[[Path], Path]
    """Its files, in a folder."""
    options: dict[str, Any]
    loading: dict[str, Any] = field(default_factory=dict)


CASES = {
    "diffvsr": Case(copied("golden", "tiny"), {"num_inference_steps": 1}, {"flow": shift_flow}),
    "flashvsr": Case(copied("golden_flashvsr", "FlashVSR-v1.1"), {"scale": 1.0, "seed": 5}),
    "swiftvr": Case(copied("golden_swiftvr", "swiftvr"), {"scale": 1.0}),
    "image": Case(image_model, {"steady": 0.6}),
}


def stand_ins(models: Path) -> None:
    """Tiny models under the names of those that the examples download, in ComfyUI's folder `models`."""
    for family in ("flashvsr", "swiftvr"):
        CASES[family].make(models / "StreamDiffVSR")
    folder = models / "upscale_models"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=4)
    save_file(network.state_dict(), folder / "RealESRGAN_x4plus.safetensors")
