"""From a checkpoint folder to a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import resolve_device, resolve_dtype
from ..errors import CheckpointError, ModelNotFoundError
from ..files import fingerprint, read_json
from ..flow import open_flow
from ..models.build import fill
from ..models.control import Control
from ..models.prompt import PromptEmbeddings
from ..models.temporal_vae import TemporalAutoencoderTiny
from ..pipeline import StreamDiffVSRPipeline

NANO = Path(__file__).parent.parent / "nano"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORKS = ("unet", "controlnet", "vae")
SCHEDULER_CONFIG = Path("scheduler", "scheduler_config.json")


def load_pipeline(
    source: str | Path = "nano",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    flow: str | Callable[[Tensor, Tensor], Tensor] = "auto",
) -> StreamDiffVSRPipeline:
    """Open a checkpoint and make it ready to run.

    `source`: 'nano' (bundled), 'v1' (the released weights) or a checkpoint folder. `dtype` is that of
    the networks; frames, flow, warp, state and scheduler arithmetic are float32 always. Raises
    `ModelNotFoundError`, `CheckpointError` or `IncompatibleInputError`.
    """
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    folder = find(source)
    check_parts(folder)
    with torch.inference_mode(False):
        networks = {name: open_network(folder, name, chosen_device, chosen_dtype) for name in NETWORKS}
        estimator = open_flow(default_flow(folder) if flow == "auto" else flow).to(chosen_device)
    return StreamDiffVSRPipeline(
        unet=networks["unet"],
        control=Control(networks["controlnet"]),
        vae=networks["vae"],  # type: ignore[arg-type]
        flow=estimator,
        prompts=PromptEmbeddings(folder, user_cache()),
        scheduler_config=read_json(folder / SCHEDULER_CONFIG),
        device=chosen_device,
        dtype=chosen_dtype,
        model=fingerprint(folder / name / WEIGHTS for name in NETWORKS),
    )


def find(source: str | Path) -> Path:
    """The folder of a source."""
    if source == "nano":
        return NANO
    folder = Path(source)
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"checkpoint {str(source)!r}", folder.absolute(), "Name a folder, 'nano' or 'v1'."
        )
    return folder


def check_parts(folder: Path) -> None:
    """Raise `ModelNotFoundError` for the first file that a complete checkpoint has and this has not."""
    parts = [Path(name, file) for name in NETWORKS for file in ("config.json", WEIGHTS)]
    for part in [*parts, SCHEDULER_CONFIG]:
        if not (folder / part).is_file():
            raise ModelNotFoundError(
                f"checkpoint part {part.parent}", folder / part, "Download the folder again."
            )


def open_network(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One network of a checkpoint, filled strictly."""
    config = read_json(folder / name / "config.json")
    path = folder / name / "config.json"
    if name == "unet" and config.get("num_class_embeds"):
        raise CheckpointError(
            f"{path} describes a plain Stable Diffusion x4 upscaler (num_class_embeds "
            f"{config['num_class_embeds']}), not Stream-DiffVSR's U-Net: point to the Stream-DiffVSR folder."
        )
    try:
        return fill(lambda: build(name, config), folder / name / WEIGHTS, device, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no {name} that can be built ({error}).") from error


def build(name: str, config: dict[str, Any]) -> Any:
    """A network from its configuration."""
    if name == "vae":
        return TemporalAutoencoderTiny(config)
    from diffusers import ControlNetModel, UNet2DConditionModel

    if name == "unet":
        return UNet2DConditionModel.from_config(config)
    if config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise ValueError("its picture must be in RGB order")
    return ControlNetModel.from_config(config)


def default_flow(folder: Path) -> str:
    """The estimator that a checkpoint names for itself, else RAFT large, as the reference has."""
    index = folder / "model_index.json"
    return read_json(index).get("flow", "raft_large") if index.is_file() else "raft_large"


def user_cache() -> Path:
    """Where small derived files go when a checkpoint's own folder is read-only."""
    return Path.home() / ".cache" / "stream-diffvsr"
