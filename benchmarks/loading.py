"""Measure the memory and time that loading takes, on a checkpoint of released size with random weights.

    python benchmarks/loading.py write FOLDER [--dtype float16]      4.1 GB in float32, 2.1 GB in float16
    python benchmarks/loading.py measure FOLDER [--dtype float32]    dtype of the networks in memory

`measure` loads twice, each time in a fresh process: first without the embedding of the empty prompt, so that
the text encoder runs, then with it. Memory is the anonymous memory (without the file cache) added after
imports, sampled every few milliseconds. Time also excludes imports, and is reported beside the time it takes
to read the same files once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NETWORKS = ("unet", "controlnet", "vae")

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 7,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "act_fn": "silu",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "only_cross_attention": [True, True, True, False],
    "block_out_channels": [256, 512, 512, 1024],
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
    "use_linear_projection": True,
    "num_class_embeds": None,
}
NOT_IN_CONTROLNET = ("_class_name", "sample_size", "out_channels", "center_input_sample", "up_block_types")
CONTROLNET = {
    **{key: value for key, value in UNET.items() if key not in NOT_IN_CONTROLNET},
    "_class_name": "ControlNetModel",
    "conditioning_embedding_out_channels": [64, 128, 256],
}
VAE = {
    "_class_name": "TemporalAutoencoderTiny",
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64],
    "num_encoder_blocks": [1, 3, 3],
    "num_decoder_blocks": [3, 3, 1],
    "latent_channels": 4,
    "scaling_factor": 1.0,
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "!",
    "added_tokens_decoder": {
        "0": {"content": "!"},
        "49406": {"content": "<|startoftext|>"},
        "49407": {"content": "<|endoftext|>"},
    },
}
CONFIGS = {"unet": UNET, "controlnet": CONTROLNET, "vae": VAE, "text_encoder": TEXT_ENCODER}


def write(folder: Path, dtype: str) -> None:
    """Write a checkpoint folder in the released layout."""
    for name, config in CONFIGS.items():
        write_network(folder / name, name, config, dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "tokenizer" / "tokenizer_config.json", TOKENIZER)
    write_json(folder / "model_index.json", {"_class_name": "StreamDiffVSRPipeline"})


def write_network(folder: Path, name: str, config: dict[str, Any], dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    from stream_diffvsr.families.diffvsr.components import STEMS, Component, build
    from stream_diffvsr.weights.networks import shapes_of

    write_json(folder / "config.json", config)
    shapes = shapes_of(build(Component(name, config, folder / "config.json", folder, ())))
    generator = torch.Generator().manual_seed(0)
    # Small values, so that nothing overflows in float16, not even in the text encoder.
    weights = {
        key: (torch.randn(shape, generator=generator) * 0.02).to(getattr(torch, dtype))
        for key, shape in shapes.items()
    }
    stem = STEMS.get(name, ("diffusion_pytorch_model",))[0]
    save_file(weights, folder / f"{stem}.safetensors", {"format": "pt"})
    count = sum(weight.numel() for weight in weights.values())
    print(f"{name}: {count:,} parameters in {len(weights)} tensors")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def measure(folder: Path, dtype: str, device: str) -> None:
    """Load in two fresh processes, without and with the embedding, and print the figures of each."""
    (folder / "prompt_embeddings.safetensors").unlink(missing_ok=True)
    for label in ("text encoder used", "embedding there"):
        command = [sys.executable, __file__, "once", str(folder), "--dtype", dtype, "--device", device]
        print(
            f"{label}: {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}"
        )


def once(folder: Path, dtype: str, device: str) -> None:
    """Load in this process, and print memory and time as JSON."""
    import accelerate  # noqa: F401
    import diffusers
    import transformers

    from stream_diffvsr import load_pipeline

    # Both packages import their parts lazily, on first access.
    _ = diffusers.UNet2DConditionModel, diffusers.ControlNetModel, diffusers.DDIMScheduler
    _ = transformers.CLIPTextModel
    files = [path for name in NETWORKS for path in (folder / name).glob("*.safetensors")]
    reading = read(files)
    before = anonymous()
    with peak_of_anonymous() as peak:
        start = time.perf_counter()
        pipe = load_pipeline(folder, device=device, dtype=dtype, flow="none")
        loading = time.perf_counter() - start
    sizes = {
        name: sum(weight.numel() * weight.element_size() for weight in pipe.stages[name].parameters())
        for name in NETWORKS
    }
    mb = 1e6
    print(
        json.dumps(
            {
                "networks_mb": round(sum(sizes.values()) / mb),
                "largest_network_mb": round(max(sizes.values()) / mb),
                "files_mb": round(sum(path.stat().st_size for path in files) / mb),
                "peak_anonymous_mb": round((peak[0] - before) / mb),
                "kept_anonymous_mb": round((anonymous() - before) / mb),
                "reading_s": round(reading, 2),
                "loading_s": round(loading, 2),
                "limit_s": round(1.5 * reading + 2, 2),
            }
        )
    )


def read(files: list[Path]) -> float:
    """Return the seconds it takes to read the files once from the system's cache."""
    for _ in range(2):
        start = time.perf_counter()
        buffer = bytearray(1 << 22)
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        seconds = time.perf_counter() - start
    return seconds


def anonymous() -> int:
    """Return this process's anonymous memory in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_of_anonymous() -> Iterator[list[int]]:
    """Yield a list whose only item is the peak of anonymous memory during the block, in bytes."""
    peak, end = [anonymous()], threading.Event()

    def watch() -> None:
        while not end.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        end.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["write", "measure", "once"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args()
    if args.action == "write":
        write(args.folder, args.dtype)
    else:
        {"measure": measure, "once": once}[args.action](args.folder, args.dtype, args.device)


if __name__ == "__main__":
    main()
