"""From a checkpoint folder to a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .devices import resolve_device, resolve_dtype
from .families.diffvsr.build import build, fill
from .families.diffvsr.check import (
    check_networks,
    check_text,
    default_flow,
    remembered_shapes,
    traits,
)
from .families.diffvsr.control import Control
from .families.diffvsr.counted import Needs
from .families.diffvsr.download import OnProgress, download
from .families.diffvsr.find import models_folders, resolve
from .families.diffvsr.options import UpscaleOptions
from .families.diffvsr.parts import NETWORKS, SCHEDULER_CONFIG, Part, open_part
from .families.diffvsr.pipeline import StreamDiffVSRPipeline
from .families.diffvsr.plan import requested_plan
from .families.diffvsr.prompt import PromptEmbeddings
from .families.diffvsr.released import CONFIGS, untrained_flow, without_weights
from .files import fingerprint, read_json
from .flow import open_flow
from .flow.open import open_flow_network
from .runtimes.torch import quantized
from .weights.folders import user_cache
from .weights.networks import Shapes, shapes_of


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
        traits=traits(folder),
    )
    pipe.quantize(quantize)
    return pipe


class _Networks(dict[str, torch.nn.Module]):
    """Networks built without weights: first to compare them with their files, then to be filled."""

    def shapes(self, part: Part) -> Shapes:
        self[part.name] = build(part)
        return shapes_of(self[part.name])


def estimate_memory(
    height: int,
    width: int,
    options: UpscaleOptions | None = None,
    dtype: torch.dtype = torch.float16,
    model: str | Path = "v1",
) -> dict[str, int]:
    """Bytes by stage for an LQ frame of `height` x `width`, counted without reading any weights.

    Keys: 'weights', 'frames', the activations of 'flow', 'controlnet', 'unet' and 'vae', and 'peak', which is
    what all of it takes at the worst moment. With `memory_plan` 'auto' it is the need with nothing split.
    `model`: 'v1', 'nano' or a checkpoint folder.
    """
    options = options or UpscaleOptions()
    configs, flow = CONFIGS, "raft_large"
    if model != "v1":
        folder = resolve(model, [])
        assert folder is not None  # only 'v1' may be absent
        configs = {name: open_part(folder, name).config for name in NETWORKS}
        configs["scheduler"], flow = read_json(folder / SCHEDULER_CONFIG), default_flow(folder)
    estimator = open_flow(flow, untrained_flow)
    needs = Needs(without_weights(configs, estimator, dtype), configs["scheduler"], dtype)
    return needs((height, width), options, requested_plan(options, estimator.methods))
