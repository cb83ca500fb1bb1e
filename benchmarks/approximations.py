"""Measure how much accuracy each approximation costs and how much time it saves, on a real clip.

    python benchmarks/approximations.py VIDEO [--model nano] [--frames 8] [--shrink 2] [--json FILE]

Every row is compared with `exact` on the same frames. Each setting continues from its own results, so that
errors add up as they would in a video. Processor time is measured, with all settings alternating per frame.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from stream_diffvsr import UpscaleOptions, from_pixels, load_pipeline, to_pixels
from stream_diffvsr.devices import synchronize
from stream_diffvsr.families.diffvsr.options import PRESETS

ROWS = {
    **{f"preset {name}": fields for name, fields in PRESETS.items()},
    "control_every 2": {"control_every": 2},
    "control_every 4": {"control_every": 4},
    "flow_scale 0.5": {"flow_scale": 0.5},
    "flow_scale 0.25": {"flow_scale": 0.25},
    "3 steps": {"num_inference_steps": 3},
    "2 steps": {"num_inference_steps": 2},
    "1 step": {"num_inference_steps": 1},
}


def frames_of(video: Path, count: int, shrink: float) -> list[torch.Tensor]:
    """Return the first frames of a file as LQ frames, reduced by averaging."""
    import av

    with av.open(str(video)) as container:
        decoded = itertools.islice(container.decode(video=0), count)
        pixels = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded]
    frames = [from_pixels(each.permute(2, 0, 1)[None].float() / 255) for each in pixels]
    size = [round(side / shrink) for side in frames[0].shape[-2:]]
    return [F.interpolate(frame, size=size, mode="area") for frame in frames]


def now(device: torch.device) -> float:
    """Return a time in seconds; on a CPU, processor time, which other programs do not affect."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def rows_of(load: Callable[..., Any]) -> dict[str, tuple[Any, UpscaleOptions]]:
    """Return a pipeline and options for each row; int8 is included if torchao is installed."""
    pipe = load()
    rows = {name: (pipe, UpscaleOptions(**fields)) for name, fields in ROWS.items()}
    if importlib.util.find_spec("torchao"):
        rows["quantize int8"] = load(quantize="int8"), UpscaleOptions()
    return rows


def compare(
    rows: dict[str, tuple[Any, UpscaleOptions]], frames: list[torch.Tensor]
) -> list[dict[str, float | str]]:
    """Return the error and the time of each row."""
    states, times = dict.fromkeys(rows), []
    errors, largest = {name: [] for name in rows}, {name: [] for name in rows}
    for lq in frames:
        took, results = {}, {}
        for name, (pipe, options) in rows.items():
            start = now(pipe.device)
            result = pipe.process_frame(lq, states[name], options)
            took[name] = now(pipe.device) - start
            states[name], results[name] = result.state, to_pixels(result.hq)
        times.append(took)
        for name in rows:
            difference = results[name] - results["preset exact"]
            errors[name].append(float(difference.square().mean()))
            largest[name].append(float(difference.abs().max()))
    return [
        {
            "setting": name,
            "psnr": -10 * torch.log10(torch.tensor(statistics.mean(errors[name]))).item(),
            "largest": max(largest[name]),
            "time": sum(took[name] for took in times[1:]) / sum(took["preset exact"] for took in times[1:]),
        }
        for name in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flow", default="auto")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--shrink", type=float, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    frames = frames_of(args.video, args.frames, args.shrink)
    load = partial(load_pipeline, args.model, device=args.device, flow=args.flow)
    rows = compare(rows_of(load), frames)
    print("| setting | PSNR against exact | largest difference of [0, 1] | time, exact = 1 |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        psnr = "same" if row["largest"] == 0 else f"{row['psnr']:.1f} dB"
        print(f"| {row['setting']} | {psnr} | {row['largest']:.3f} | {row['time']:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
