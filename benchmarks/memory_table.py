"""Make the table of docs/memory.md: the memory each model needs, counted without computing anything.

    python benchmarks/memory_table.py [--write]

Frames are upscaled by 4. Networks have their real sizes and are on torch's meta device. For the plan
'offload', only the largest block of the transformer is counted, since its blocks are loaded one at a time.
GB: 2^30 bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from operations import real_flashvsr, real_swiftvr, weights
from table import write

from stream_diffvsr import UpscaleOptions
from stream_diffvsr.load import estimate_memory

SIZES = {"854x480": (120, 214), "1280x720": (180, 320), "1920x1080": (270, 480), "2560x1440": (360, 640)}
"""LQ sizes (height, width) by output size."""


def diffvsr(model: str, dtype: torch.dtype, plan: str) -> Callable[[int, int], int]:
    options = UpscaleOptions(memory_plan=plan, num_inference_steps=1)
    return lambda height, width: estimate_memory(height, width, options, dtype, model)["peak"]


def chunked(model: Any, offload: bool) -> Callable[[int, int], int]:
    held = dict(model.networks)
    blocks = held.pop("transformer").blocks if offload else []
    largest = max((sum(weight.nbytes for weight in block.parameters()) for block in blocks), default=0)
    options = model.Options(memory_plan="offload" if offload else "whole")
    return lambda height, width: model.bytes_needed((height, width), options) + weights(held) + largest


def rows() -> Iterator[tuple[str, str, str, Callable[[int, int], int]]]:
    """Yield model, number format, plan, and a function from LQ height and width to bytes."""
    half, full = torch.float16, torch.float32
    for model in ("nano", "v1"):
        for dtype in (half, full):
            for plan in ("whole", "banded", "tiled"):
                yield model, str(dtype).removeprefix("torch."), plan, diffvsr(model, dtype, plan)
    for name, real in (("flashvsr-v1.1, tiny decoder", real_flashvsr), ("swiftvr", real_swiftvr)):
        model = real(torch.bfloat16)
        for plan in ("whole", "offload"):
            yield name, "bfloat16", plan, chunked(model, plan == "offload")


def table() -> Iterator[str]:
    yield "| model | number format | plan | " + " | ".join(SIZES) + " |"
    yield "|---" * (3 + len(SIZES)) + "|"
    for *names, needed in rows():
        cells = [f"{needed(*size) / 2**30:.1f} GB" for size in SIZES.values()]
        yield "| " + " | ".join([*names, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/memory.md")
    lines = []
    args = parser.parse_args()
    for line in table():
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write("memory.md", "counted memory", "\n".join(lines))


if __name__ == "__main__":
    main()
