"""Export a training checkpoint as a folder that the engine can open:

python -m training.export training/runs/temporal.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from training.evaluate import load
from training.networks import CONTROLNET, SCHEDULER, UNET, VAE

NANO = Path(__file__).parents[1] / "stream_diffvsr" / "nano"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The oldest version whose classes support all these settings.
WRITTEN_FOR = {"_diffusers_version": "0.30.0"}

INDEX = {
    "_class_name": "StreamDiffVSRPipeline",
    **WRITTEN_FOR,
    "centred_flow": True,
    "controlnet": ["diffusers", "ControlNetModel"],
    "feature_extractor": [None, None],
    "flow": "bundled",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["temporal_autoencoder.autoencoder_tiny", "TemporalAutoencoderTiny"],
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(folder: Path, network: nn.Module) -> None:
    weights = {name: value.detach().half().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def prompt_key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def export(checkpoint: Path, folder: Path) -> None:
    model = load(checkpoint)
    parts = {"unet": ("UNet2DConditionModel", UNET), "controlnet": ("ControlNetModel", CONTROLNET),
             "vae": ("TemporalAutoencoderTiny", VAE)}  # fmt: skip
    for name, (kind, config) in parts.items():
        write_json(folder / name / "config.json", {"_class_name": kind, **WRITTEN_FOR, **config})
        write_weights(folder / name, getattr(model, name))
    write_json(folder / "scheduler" / "scheduler_config.json",
               {"_class_name": "DDIMScheduler", **WRITTEN_FOR, **SCHEDULER})  # fmt: skip
    write_json(folder / "model_index.json", INDEX)
    save_file({prompt_key(""): model.prompt.detach().contiguous()}, folder / "prompt_embeddings.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, default=NANO)
    args = parser.parse_args()
    torch.set_num_threads(2)
    export(args.checkpoint, args.folder)
    size = sum(file.stat().st_size for file in args.folder.rglob("*.safetensors"))
    print(f"{args.folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
