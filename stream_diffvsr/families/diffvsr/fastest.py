"""Find the fastest exact runtime on this machine by trying each, and remember the result."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import StreamDiffVSRError
from ...files import keep_json
from ...runtimes.choose import open_runtime
from ...weights.folders import user_cache
from .options import UpscaleOptions
from .pipeline import StreamDiffVSRPipeline

log = logging.getLogger(__name__)

SIDE, ROUNDS = 64, 3
"""Side of the timed LQ frames, and number of runs; the best time counts, since disturbances only add time."""

EXACT = 1e-4
"""Maximum difference from PyTorch's result, in model range, for a runtime to count as exact."""


def with_runtime(
    pipe: StreamDiffVSRPipeline, name: str, provider: str, dtype: str | torch.dtype, quantize: str
) -> StreamDiffVSRPipeline:
    """Return `pipe` with its networks run by the given runtime (arguments as for `load_pipeline`)."""
    if name == "auto":
        return fastest(pipe)
    runtime = open_runtime(name, provider, pipe.device, dtype, quantize)
    return pipe if runtime is None else pipe.on(runtime)


def fastest(pipe: StreamDiffVSRPipeline) -> StreamDiffVSRPipeline:
    """Return `pipe` with the fastest runtime on this machine, and log the choice.

    The first time, graphs are built and a few small frames are timed. On a GPU or in half precision, PyTorch
    is always chosen, since no other runtime has been tried there yet.
    """
    if pipe.device.type != "cpu" or pipe.number_format != "float32":
        return pipe
    pipes = {"torch": pipe, **_others(pipe)}
    key = {name: each.runtime_details for name, each in pipes.items()}
    key |= {"model": pipe.model, "torch": f"{torch.__version__}, {torch.get_num_threads()} threads"}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = user_cache() / f"fastest-{name}.json"
    known = _read(path, pipes)
    times = known or _measure(pipes)
    chosen = min(times, key=lambda name: times[name])
    told = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in times.items())
    log.info(
        "using runtime %s, the fastest exact one here (times for a %dx%d frame: %s)", chosen, SIDE, SIDE, told
    )
    if not known:
        keep_json(path, times)
    return pipes[chosen]


def _others(pipe: StreamDiffVSRPipeline) -> dict[str, StreamDiffVSRPipeline]:
    found = {}
    for name in ("openvino", "onnx"):
        try:
            runtime = open_runtime(name, "cpu", pipe.device, torch.float32, "none")
        except (ImportError, StreamDiffVSRError):
            continue
        assert runtime is not None
        found[name] = pipe.on(runtime)
    return found


def _measure(pipes: Mapping[str, StreamDiffVSRPipeline]) -> dict[str, float]:
    """Return the seconds per guided frame for each runtime whose result is the same as PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    frames = list((torch.rand((2, 3, SIDE, SIDE), generator=generator) * 2 - 1).split(1))
    states = {name: pipe.process_frame(frames[0]).state for name, pipe in pipes.items()}
    times: dict[str, float] = {}
    results: dict[str, Tensor] = {}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            start = time.perf_counter()
            results[name] = pipe.process_frame(frames[1], states[name], UpscaleOptions()).hq
            times[name] = min(times.get(name, float("inf")), time.perf_counter() - start)
    own = results["torch"]
    return {name: times[name] for name, hq in results.items() if (hq - own).abs().max() <= EXACT}


def _read(path: Path, pipes: Mapping[str, object]) -> dict[str, float]:
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(seconds) for name, seconds in times.items() if name in pipes}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
