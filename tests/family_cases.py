"""A tiny model of every family, as files that the loader opens."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from samples import shift_flow
from spandrel.architectures.SPAN import SPAN
from torch import Tensor

from stream_diffvsr import StreamDiffVSRPipeline, load_pipeline
from stream_diffvsr.families.diffvsr import lora

TESTS = Path(__file__).parent


def image_model(folder: Path) -> Path:
    """A 2x model with random weights, in a file."""
    torch.manual_seed(0)
    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2)
    torch.save(network.state_dict(), folder / "span.pth")
    return folder / "span.pth"


def copied(checkpoint: str, name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(TESTS / checkpoint / "checkpoint", folder / name))


def random_lora(path: Path, pipe: StreamDiffVSRPipeline, seed: int = 0, names: str = "", **told: str) -> Path:
    """A LoRA of rank 3 with random numbers in every layer whose name matches."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    changes = {}
    for name, layer in lora.layers(pipe.torch_networks):
        if re.search(names, name):
            shape = layer.weight.shape
            changes[name] = random(3, *shape[1:]), random(shape[0], 3, *[1] * (len(shape) - 2))
    lora.write_lora(path, changes, {"base": pipe.model, "rank": "3", "alpha": "6", **told})
    return path


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
    """Tiny models under the names of those that the examples download, and a LoRA, in ComfyUI's `models`."""
    for family in ("flashvsr", "swiftvr"):
        CASES[family].make(models / "StreamDiffVSR")
    folder = models / "upscale_models"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=4)
    save_file(network.state_dict(), folder / "RealESRGAN_x4plus.safetensors")
    (models / "loras").mkdir()
    random_lora(models / "loras" / "old_film.safetensors", load_pipeline("nano", device="cpu"))
