"""From a checkpoint folder to a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .devices import resolve_device, resolve_dtype
from .families.diffvsr.build import Shapes, build, fill, shapes_of
from .families.diffvsr.check import (
    check_networks,
    check_text,
    default_flow,
    has_centred_flow,
    remembered_shapes,
)
from .families.diffvsr.control import Control
from .families.diffvsr.method import StreamDiffVSRPipeline
from .families.diffvsr.parts import SCHEDULER_CONFIG, Part
from .families.diffvsr.prompt import PromptEmbeddings
from .files import fingerprint, read_json
from .flow import open_flow
from .flow.open import open_flow_network
from .runtimes.torch import quantized
from .weights.download import OnProgress, download
from .weights.find import models_folders, resolve
from .weights.folders import user_cache


def load_pipeline(
    source: str | Path = "nano",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    flow: str | Callable[[Tensor, Tensor], Tensor] = "auto",
    quantize: str = "none",
    extra_folders: Iterable[str | Path] = (),
    on_progress: OnProgress | None = None,
) -> StreamDiffVSRPipeline:
    """Open a checkpoint and make it ready to run.

    `source`: 'nano' (bundled), 'v1' (the released weights, found on this machine or downloaded), the
    name of a checkpoint that `find_checkpoints(extra_folders)` lists, or a checkpoint folder. `dtype` is
    that of the networks; frames, flow, warp, state and scheduler arithmetic are float32 always.
    `quantize` 'int8' and 'fp8' approximate linear layers in 8 bits (they need torchao, 'fp8' also a GPU that
    has it); 'none' leaves them as they are.
    `on_progress(done_bytes, total_bytes)` is called during a download; an exception from it ends the
    download, which goes on from there next time. Raises `ModelNotFoundError`, `CheckpointError` or
    `IncompatibleInputError`.
    """
    chosen_device = resolve_device(device)
    quantized.check(quantize, chosen_device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    folders = list(extra_folders)
    folder = resolve(source, folders) or download(folders, on_progress=on_progress)
    networks, prompts, parts = _Networks(), PromptEmbeddings(folder, user_cache()), []
    with torch.inference_mode(False):
        parts = check_networks(folder, networks.shapes)
        check_text(folder, remembered_shapes)
        # Before the networks, so that the text encoder is gone when they come.
        prompts.get("")
        filled = {part.name: fill(networks[part.name], part, chosen_device, chosen_dtype) for part in parts}
        chosen_flow = default_flow(folder) if flow == "auto" else flow
        raft_folders = [folder, folder.parent, *models_folders(folders)]
        estimator = open_flow(chosen_flow, partial(open_flow_network, folders=raft_folders)).to(chosen_device)
    pipe = StreamDiffVSRPipeline(
        unet=filled["unet"],
        control=Control(filled["controlnet"]),
        vae=filled["vae"],  # type: ignore[arg-type]
        flow=estimator,
        prompts=prompts,
        scheduler_config=read_json(folder / SCHEDULER_CONFIG),
        device=chosen_device,
        dtype=chosen_dtype,
        model=fingerprint(file for part in parts for file in part.files),
        centred_flow=has_centred_flow(folder),
    )
    pipe.quantize(quantize)
    return pipe


class _Networks(dict[str, torch.nn.Module]):
    """Networks built without weights: first to compare them with their files, then to be filled."""

    def shapes(self, part: Part) -> Shapes:
        self[part.name] = build(part)
        return shapes_of(self[part.name])
