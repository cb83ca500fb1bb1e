"""The trained parameters: low-rank changes to fixed weights, or copies of the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..families.diffvsr import lora
from ..families.diffvsr.networks import TorchNetworks
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..files import read_tensors, save_tensors
from .options import TrainOptions

WEIGHTS = "diffusion_pytorch_model.safetensors"


class LowRank(nn.Module):
    """Changes W to W + B A, where B starts at 0; the result is exactly the weight of the merged layer."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        inside, ones = weight.shape[1:], [1] * (weight.ndim - 2)
        spread = inside.numel() ** -0.5
        first = (torch.rand((rank, *inside), generator=generator) * 2 - 1) * spread
        self.a = nn.Parameter(first.to(weight.device))
        self.b = nn.Parameter(torch.zeros((len(weight), rank, *ones), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + lora.low_rank_product((self.a, self.b), weight.shape)


class Tuned:
    """A base model, trainable networks with the same layers, and their trained parameters by name.

    The base is never changed; weights that are not trained are shared with it.
    """

    def __init__(self, base: StreamDiffVSRPipeline, options: TrainOptions) -> None:
        self.base, self.options = base, options
        self._layers: list[nn.Module] = []
        self.parts = ("unet", "controlnet", *(("vae",) if options.decoder else ()))
        with torch.inference_mode(False):
            own: dict[str, Any] = {part: self._copy(part) for part in self.parts}
            self.networks: TorchNetworks = replace(base.torch_networks, **own)
            learn = self._low_rank if options.what == "lora" else self._whole
            self.parameters: Mapping[str, nn.Parameter] = learn()
        if options.checkpointing:
            for network in (self.networks.unet, self.networks.controlnet.body):
                network.enable_gradient_checkpointing()  # type: ignore[operator]
                network.train()  # older versions of diffusers require it; there is no dropout

    def _copy(self, part: str) -> nn.Module:
        """Copy the layers of a network, and also its weights if all of them are trained."""
        network = getattr(self.base.torch_networks, part)
        weights = network.parameters() if self.options.what == "full" else ()
        return lora.copy_with(network, {id(x): nn.Parameter(x.detach().clone(), False) for x in weights})

    def _learns(self, name: str) -> bool:
        return name.startswith(self.parts) and (
            not name.startswith("vae.") or name.startswith("vae.decoder.")
        )

    def _low_rank(self) -> dict[str, nn.Parameter]:
        generator, found = torch.Generator().manual_seed(self.options.seed), dict[str, nn.Parameter]()
        for name, layer in list(lora.layers(self.networks)):
            if self._learns(name):
                change = LowRank(layer.weight, self.options.rank, generator)
                parametrize.register_parametrization(layer, "weight", change)
                self._layers.append(layer)
                found |= {f"{name}.a": change.a, f"{name}.b": change.b}
        return found

    def fill_cache(self) -> None:
        """Compute each changed weight once, so that gradient checkpointing reuses it when recomputing."""
        for layer in self._layers:
            _ = layer.weight

    def _whole(self) -> dict[str, nn.Parameter]:
        named = (
            (f"{part}.{name}", weight)
            for part in self.parts
            for name, weight in getattr(self.networks, part).named_parameters()
        )
        return {name: weight.requires_grad_() for name, weight in named if self._learns(name)}

    def pipe(self, saved: Path) -> StreamDiffVSRPipeline:
        """Return the current model for measurement; a LoRA is read from `saved`, as written by `save`."""
        if self.options.what == "lora":
            return self.base.with_loras((saved, 1.0))
        return self.base.around(self.networks)

    def save(self, path: Path, told: Mapping[str, str]) -> None:
        """Write the LoRA or, in full training, all trained weights."""
        if self.options.what == "full":
            tensors = {name: x.detach().cpu().contiguous() for name, x in self.parameters.items()}
            save_tensors(path, tensors, told)
            return
        names = [name.removesuffix(".a") for name in self.parameters if name.endswith(".a")]
        changes = {name: (self.parameters[f"{name}.a"], self.parameters[f"{name}.b"]) for name in names}
        rank = str(self.options.rank)
        lora.write_lora(path, changes, {**told, "base": self.base.model, "rank": rank, "alpha": rank})

    def save_folder(self, output: Path, saved: Path, folder: Path, told: Mapping[str, str]) -> None:
        """Write a checkpoint with the weights in `saved` and everything else from the base's `folder`."""
        skip = shutil.ignore_patterns("*.safetensors.index*", "diffusion_pytorch_model*", ".*")
        shutil.copytree(folder, output, ignore=skip, copy_function=shutil.copyfile, dirs_exist_ok=True)
        best: dict[str, Any] = dict(read_tensors(saved)[0])
        for part in ("unet", "controlnet", "vae"):
            named = getattr(self.networks, part).state_dict()
            tensors = {
                lora.diffusers_name(part, name): best.get(f"{part}.{name}", x).detach().cpu().contiguous()
                for name, x in named.items()
            }
            save_tensors(output / part / WEIGHTS, tensors, {"format": "pt"})
        (output / "training.json").write_text(json.dumps(dict(told), indent=1) + "\n", encoding="utf-8")
