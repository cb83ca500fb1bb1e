"""The pack under ComfyUI's memory management, in a process of its own. Prints what happened as JSON.

    cd ComfyUI && python .../tests/comfy_memory.py [--cpu | --lowvram | --novram | --highvram]

On a GPU the figures are bytes that torch has allocated there.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))
sys.path.insert(1, str(Path(__file__).parent))

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_management as mm  # noqa: E402
import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from node_pack import load_pack, part  # noqa: E402

SIDE = 64


def allocated() -> int:
    """Bytes in use on ComfyUI's device, without the workspaces of cuBLAS; 0 on a CPU."""
    gc.collect()
    device = mm.get_torch_device()
    if device.type != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()  # 8 to 32 MiB, held for as long as the process lives
    return torch.cuda.memory_allocated(device)


def placed(pipe) -> dict[str, str]:
    """Where each network lies."""
    return {
        name: next((weight.device.type for weight in network.parameters()), "none")
        for name, network in pipe.stages.items()
    }


def ours(pipe) -> int:
    """How many of our patchers ComfyUI holds as loaded."""
    patchers = set(map(id, pipe.placement._patchers.values()))
    return sum(id(loaded.model) in patchers for loaded in mm.current_loaded_models)


def other_model() -> ModelPatcher:
    """Another node's model: small, since all of the memory is asked for beside it."""
    network = torch.nn.Linear(8, 8)
    return ModelPatcher(network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


@torch.inference_mode()
def main() -> None:
    if os.environ.get("STAGES_APART"):
        mm.vram_state = mm.VRAMState.LOW_VRAM  # so that a CPU shows what --lowvram does
    pack = load_pack()
    nodes = pack.NODE_CLASS_MAPPINGS
    report: dict = {"start": allocated()}
    (pipe,) = nodes["StreamDiffVSR_Loader"]().execute("nano", "auto", "auto", "dis")
    upscale = nodes["StreamDiffVSR_Upscale"]()
    images = torch.rand(2, SIDE, SIDE, 3)

    report["loaded"], report["places_before"] = allocated(), placed(pipe)
    first, state = upscale.execute(pipe, images, num_inference_steps=2)
    report["after_run"], report["places_after_run"], report["patchers"] = (
        allocated(),
        placed(pipe),
        ours(pipe),
    )

    device = mm.get_torch_device()
    if device.type == "cuda":
        mm.load_models_gpu([other_model()], memory_required=mm.get_total_memory(device))
    else:
        mm.free_memory(1e30, device)
    report["evicted"], report["places_evicted"], report["patchers_evicted"] = (
        allocated(),
        placed(pipe),
        ours(pipe),
    )

    again, _ = upscale.execute(pipe, images, num_inference_steps=2)
    onward, _ = upscale.execute(pipe, images, state, num_inference_steps=2)
    report["equal_after_return"] = torch.equal(first, again)
    report["returned"], report["patchers_returned"] = allocated(), ours(pipe)
    report["continued"] = tuple(onward.shape) == (2, 4 * SIDE, 4 * SIDE, 3)

    mm.unload_all_models()
    report["unloaded"] = allocated()
    del pipe
    gc.collect()
    mm.cleanup_models_gc()
    report["shared_left"] = len(part(pack, "nodes.load")._open)
    report["end"] = allocated()
    report["models_left"] = len([m for m in mm.current_loaded_models if m.model is not None])
    print(json.dumps(report))


main()
