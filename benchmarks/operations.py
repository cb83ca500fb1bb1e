"""Make the table of docs/models.md: the cost of a frame in each family, counted without computing anything.

    python benchmarks/operations.py [--write]

Frames are upscaled by 4, and come late enough in a sequence that the model's memory is full. Networks have
their real sizes and are on torch's meta device; a multiply-add counts as two operations. FlashVSR's sparse
attention is counted by a formula, since the windows it attends to depend on the picture. Memory is that of
16-bit networks and everything kept beside them, with nothing split or offloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from spandrel import MAIN_REGISTRY, ImageModelDescriptor
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
from table import write
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stream_diffvsr.families.diffvsr.components import NETWORKS, SCHEDULER_CONFIG, open_component
from stream_diffvsr.families.diffvsr.denoise import Schedule, denoise, latent_tiles
from stream_diffvsr.families.diffvsr.networks import Guidance, TorchCalls
from stream_diffvsr.families.diffvsr.options import UpscaleOptions
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.families.diffvsr.released import CONFIGS, untrained_flow, without_weights
from stream_diffvsr.families.flashvsr import checkpoint as flashvsr
from stream_diffvsr.families.flashvsr.attention import TOKENS, Selection
from stream_diffvsr.families.flashvsr.method import MULTIPLE, FlashVSR
from stream_diffvsr.families.flashvsr.options import FlashVSROptions
from stream_diffvsr.families.image.method import ImageModel
from stream_diffvsr.families.image.network import ImageNetwork
from stream_diffvsr.families.swiftvr import checkpoint as swiftvr
from stream_diffvsr.families.swiftvr.method import SwiftVR
from stream_diffvsr.files import read_json
from stream_diffvsr.flow import open_flow
from stream_diffvsr.flow.open import open_bundled
from stream_diffvsr.load import estimate_memory
from stream_diffvsr.memory import on_meta
from stream_diffvsr.tensors import SCALE, padded_size
from stream_diffvsr.upscaler import FixedPlacement, ignore_progress
from stream_diffvsr.weights.folders import NANO

SIZES = {"1280x720": (180, 320), "1920x1080": (270, 480), "2560x1440": (360, 640)}
"""LQ sizes (height, width) by output size."""
META = torch.device("meta")
TESTS = Path(__file__).parents[1] / "tests"
Row = Callable[[int, int], tuple[float, float]]
"""A function from LQ height and width to operations per frame and bytes."""


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def weights(networks: dict[str, nn.Module]) -> int:
    return sum(each.nbytes for network in networks.values() for each in network.parameters())


def diffvsr(configs: dict[str, dict[str, Any]], flow: str, steps: int, model: str) -> Row:
    """Return a row for a guided frame: flow, the warped frame's embedding, denoising steps, and decoder."""
    networks = without_weights(configs, open_flow(flow, untrained_flow), torch.float16)
    networks.flow.to(META)
    schedule = Schedule.prepare(configs["scheduler"], steps, None, torch.device("cpu"))

    def row(height: int, width: int) -> tuple[float, float]:
        calls = TorchCalls(networks, Plan(), torch.float16, FixedPlacement(META), lambda stage: 0)
        padded = padded_size(height, width)
        lq, latents, warped = (
            torch.empty(1, channels, *(scale * side for side in padded), device=META)
            for channels, scale in ((3, 1), (networks.vae.latent_channels, 1), (3, SCALE))
        )
        prompt = torch.empty(1, 77, configs["unet"]["cross_attention_dim"], device=META)
        options = UpscaleOptions(num_inference_steps=steps)

        def frame() -> None:
            calls.flow(lq[..., :height, :width], lq[..., :height, :width], 1.0)
            given = {
                "prompts": [prompt],
                "schedule": schedule,
                "options": options,
                "on_step": ignore_progress,
            }
            tiles = latent_tiles(*padded, None, 0)
            denoise(calls, latents, lq, Guidance(calls.embed(warped)), tiles=tiles, **given)
            calls.decode(latents, calls.features(warped), None)

        bytes_ = estimate_memory(height, width, options, torch.float16, model)["peak"]
        return counted(frame), bytes_

    return row


def chunks(model: Any, beside: Callable[[int, int], float]) -> Row:
    """Return a row for a scene's second chunk; `beside` returns operations that torch does not count."""

    def row(height: int, width: int) -> tuple[float, float]:
        options = model.Options()

        def chunk(memory: Any) -> tuple[int, int, Any]:
            """Return the number of operations, the number of frames, and the model's memory after them."""
            frames = [torch.empty(1, 3, height, width, device=META)] * model.whole(memory, options)
            with FlopCounterMode(display=False) as counter:
                hq, after = model.chunk(frames, memory, options, ignore_progress)
            return counter.get_total_flops(), len(hq), after

        *_, memory = chunk(model.Memory())
        operations, count, _ = chunk(memory)
        need = model.bytes_needed((height, width)) + weights(model.networks)
        return (operations + beside(height, width)) / count, need

    return row


def real(cls: type, networks: dict[str, nn.Module], dtype: torch.dtype) -> Any:
    """Return an upscaler with the given networks and an empty prompt embedding on the meta device."""
    networks = {name: each.to(dtype).requires_grad_(False) for name, each in networks.items()}
    prompt = torch.empty((1, 512, 4096), device=META, dtype=dtype)
    return cls(networks=networks, prompt=prompt, device=META, dtype=dtype, model="")


def real_flashvsr(dtype: torch.dtype = torch.bfloat16) -> FlashVSR:
    """Return FlashVSR v1.1 with its tiny decoder."""
    shapes = json.loads((TESTS / "golden_flashvsr" / "real_shapes.json").read_text())
    shapes = {part: {key: tuple(shape) for key, shape in each.items()} for part, each in shapes.items()}
    model = real(FlashVSR, flashvsr.build(shapes, "v1.1"), dtype)
    model.networks.pop("full")
    return model


def real_swiftvr(dtype: torch.dtype = torch.bfloat16) -> SwiftVR:
    """Return SwiftVR in its published size."""
    golden = TESTS / "golden_swiftvr"
    files = json.loads((golden / "state_dict_manifest.json").read_text())["files"]
    autoencoder = {key: tuple(shape) for key, shape in files["reae.safetensors"]["tensors"].items()}
    networks = swiftvr.build(autoencoder, json.loads((golden / "real_transformer_config.json").read_text()))
    return real(SwiftVR, networks, dtype)


def flashvsr_row(sparse_ratio: float) -> Row:
    model: Any = real_flashvsr()
    config, options = model.networks["transformer"].config, FlashVSROptions()
    head, heads = config.attention_head_dim, config.num_attention_heads

    def attention(height: int, width: int) -> float:
        """Return the operations of a chunk: each pair of latents attends to itself and to earlier pairs."""
        size = padded_size(SCALE * height, SCALE * width, MULTIPLE)
        selection = Selection.of(*size, sparse_ratio, options.local_range)
        entries = min(selection.count, (options.kv_ratio + 1) * int(selection.near.sum()))
        return 4 * TOKENS**2 * head * heads * config.num_layers * entries

    return chunks(model, attention)


def image_row(network: nn.Module) -> Row:
    descriptor = MAIN_REGISTRY.load(network.state_dict())
    assert isinstance(descriptor, ImageModelDescriptor)
    whole = on_meta(ImageNetwork(descriptor).half().requires_grad_(False))
    model = ImageModel(whole, on_meta(open_bundled()), META, torch.float16, "")

    def row(height: int, width: int) -> tuple[float, float]:
        frame = torch.empty(1, 3, height, width, device=META)
        operations = counted(lambda: whole.upscale(frame, None, 0, ignore_progress))
        return operations, model.bytes_needed((height, width)) + weights(model.networks)

    return row


def table() -> Iterator[str]:
    nano = {name: dict(open_component(NANO, name).config) for name in NETWORKS}
    nano["scheduler"] = read_json(NANO / SCHEDULER_CONFIG)
    rows = {
        "Stream-DiffVSR nano, 1 step": diffvsr(nano, "bundled", 1, "nano"),
        "Stream-DiffVSR v1, 4 steps": diffvsr(CONFIGS, "raft_large", 4, "v1"),
        "FlashVSR, tiny decoder": flashvsr_row(2.0),
        "FlashVSR, tiny decoder, `--preset fast`": flashvsr_row(1.5),
        "SwiftVR": chunks(real_swiftvr(), lambda height, width: 0),
        "image: Compact 64x16, 4x": image_row(Compact(num_feat=64, num_conv=16, upscale=4)),
        "image: ESRGAN 64x23, 4x": image_row(ESRGAN(scale=4, num_filters=64, num_blocks=23)),
    }
    yield "| | " + " | ".join(SIZES) + " |"
    yield "|---" * (1 + len(SIZES)) + "|"
    for name, row in rows.items():
        cells = [row(*size) for size in SIZES.values()]
        told = [f"{operations / 1e12:.2f} T, {bytes_ / 2**30:.1f} GB" for operations, bytes_ in cells]
        yield f"| {name} | " + " | ".join(told) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    args, lines = parser.parse_args(), []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write("models.md", "counted operations", "\n".join(lines))


if __name__ == "__main__":
    main()
