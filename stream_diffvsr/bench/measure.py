"""Times of frames and of the networks in them."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import synchronize
from ..families.diffvsr.options import UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..families.diffvsr.state import StreamDiffVSRState
from ..tensors import upsample

STAGES = {"flow": "flow", "controlnet": "control", "unet": "denoise", "vae": "decode"}
"""Networks of a pipeline, and what their time is called; the remainder is `rest`."""


@dataclass(frozen=True)
class Result:
    """Medians over the measured frames; `stages` in milliseconds."""

    width: int
    height: int
    frames: int
    milliseconds: float
    first_frame: float
    """Milliseconds of the first frame, everything cold."""
    stages: dict[str, float] = field(default_factory=dict)
    peak_mb: float = 0.0
    """Resident memory of the process on a CPU, the allocator's on CUDA; its highest so far."""
    operations: dict[str, float] = field(default_factory=dict)
    """Of matrix products and convolutions in one guided frame, by stage, in 1e9."""
    plain_ratio: float | None = None
    """Median over interleaved pairs of plain time / time; None where the plain path was not run."""

    @property
    def fps(self) -> float:
        return 1000 / self.milliseconds

    @property
    def rates(self) -> dict[str, float]:
        """Operations per second in 1e9, by stage and for the frame."""
        times = {**self.stages, "frame": self.milliseconds}
        counts = {**self.operations, "frame": sum(self.operations.values())}
        return {name: 1000 * count / times[name] for name, count in counts.items() if times[name]}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fps": self.fps, "rates": self.rates}


class Clock:
    """Adds up what is spent inside the networks of a pipeline: milliseconds, or whatever `read` counts."""

    def __init__(self, device: torch.device, read: Callable[[], float] | None = None) -> None:
        self.device = device
        self.now = read or self._time
        self.spent: dict[str, float] = dict.fromkeys(STAGES.values(), 0.0)
        self._depth = 0
        self._since = 0.0

    def _time(self) -> float:
        """Milliseconds, after the device has caught up."""
        synchronize(self.device)
        return time.perf_counter() * 1000

    @contextmanager
    def watching(self, pipe: StreamDiffVSRPipeline) -> Generator[Clock, None, None]:
        """Count what runs inside the pipeline's networks while the block lasts."""
        handles = [handle for stage, network in pipe.stages.items() for handle in self._watch(stage, network)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, stage: str, network: nn.Module) -> Iterator[Any]:
        # The autoencoder is not called as a whole, so that its layers are watched; the outermost call counts.
        # Nothing inside a compiled block is: a hook there would have it compiled anew.
        vae = (*network.encoder.layers, *network.decoder.layers) if stage == "vae" else ()  # type: ignore[union-attr]
        for part in vae or (network, *network.children()):
            yield part.register_forward_pre_hook(lambda *_: self._enter())
            yield part.register_forward_hook(
                lambda *_, name=STAGES[stage]: self._leave(name), always_call=True
            )

    def _enter(self) -> None:
        if self._depth == 0:
            self._since = self.now()
        self._depth += 1

    def _leave(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.spent[name] += self.now() - self._since


def moving_picture(count: int, height: int, width: int) -> list[Tensor]:
    """A smooth random pattern that drifts, as LQ frames."""
    generator = torch.Generator().manual_seed(0)
    wide = upsample(torch.rand((1, 3, height // 4 + 2, width // 4 + count + 2), generator=generator) * 2 - 1)
    return [wide[..., :height, index : index + width].clamp(-1, 1).contiguous() for index in range(count)]


def measure(
    pipe: StreamDiffVSRPipeline,
    height: int,
    width: int,
    frames: int,
    options: UpscaleOptions,
    plain: StreamDiffVSRPipeline | None = None,
    on_frame: Callable[[], None] = lambda: None,
) -> Result:
    """Upscale a moving picture: two frames to warm up, then `frames` that count.

    With `plain`, each frame is upscaled by both, in turns that alternate, and their ratio is taken pair
    by pair: so it holds although the machine's speed drifts. The plain one is eager, exact and in
    float32, whatever ours is.
    """
    lqs = moving_picture(frames + 2, height, width)
    clock = Clock(pipe.device)
    first, state = _time(clock, pipe, lqs[0], None, options)
    on_frame()
    times, ratios, stages = [], [], []
    for index, lq in enumerate(lqs[1:]):
        ours, theirs, after = _time_pair(clock, pipe, plain, lq, state, options, ours_first=index % 2 == 0)
        if index:
            times.append(ours)
            ratios += [theirs / ours] if plain else []
            stages.append(_stages(clock, pipe, lq, state, options))
        state = after
        on_frame()
    return Result(
        width=width,
        height=height,
        frames=frames,
        milliseconds=statistics.median(times),
        first_frame=first,
        stages={name: statistics.median(each[name] for each in stages) for name in stages[0]},
        peak_mb=peak_memory(pipe.device),
        operations=count_operations(pipe, lqs[-1], state, options),
        plain_ratio=statistics.median(ratios) if ratios else None,
    )


def _time_pair(
    clock: Clock,
    pipe: StreamDiffVSRPipeline,
    plain: StreamDiffVSRPipeline | None,
    lq: Tensor,
    state: StreamDiffVSRState,
    options: UpscaleOptions,
    ours_first: bool,
) -> tuple[float, float, StreamDiffVSRState]:
    """One frame by both, in that order: our time, the plain one's (NaN without it), our state after it."""
    theirs, reference = math.nan, UpscaleOptions(num_inference_steps=options.num_inference_steps)
    if plain is not None and not ours_first:
        theirs, _ = _time(clock, plain, lq, _unsettled(state), reference)
    ours, after = _time(clock, pipe, lq, state, options)
    if plain is not None and ours_first:
        theirs, _ = _time(clock, plain, lq, _unsettled(state), reference)
    return ours, theirs, after


def _time(
    clock: Clock, pipe: StreamDiffVSRPipeline, lq: Tensor, state: Any, options: UpscaleOptions
) -> tuple[float, StreamDiffVSRState]:
    start = clock.now()
    result = pipe.process_frame(lq, state, options)
    return clock.now() - start, result.state


def _unsettled(state: StreamDiffVSRState) -> StreamDiffVSRState:
    """The state without the settings that it was made with, to go on with others in silence."""
    settings = ("options", "compilation", "dtype", "runtime")
    return replace(state, metadata={key: text for key, text in state.metadata.items() if key not in settings})


def _stages(
    clock: Clock, pipe: StreamDiffVSRPipeline, lq: Tensor, state: Any, options: UpscaleOptions
) -> dict[str, float]:
    """The same frame once more with the clock in its networks, which costs a little itself."""
    clock.spent = dict.fromkeys(clock.spent, 0.0)
    with clock.watching(pipe):
        total, _ = _time(clock, pipe, lq, state, options)
    return {**clock.spent, "rest": total - sum(clock.spent.values())}


def count_operations(
    pipe: StreamDiffVSRPipeline, lq: Tensor, state: StreamDiffVSRState, options: UpscaleOptions
) -> dict[str, float]:
    """1e9 operations of one frame by stage; two for each multiplication that is added to a sum."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe = copy.copy(pipe)
    pipe.built = None  # what another runtime does is the same work, unseen by torch's counter

    with FlopCounterMode(display=False) as counter:
        clock = Clock(pipe.device, lambda: counter.get_total_flops() / 1e9)
        with clock.watching(pipe):
            pipe.process_frame(lq, _unsettled(state), replace(options, compile_mode="off"))
    return clock.spent


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """1e9 operations per second of a large matrix product: what the device can give at most."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    clock, times = Clock(device), []
    for _ in range(6):
        start = clock.now()
        torch.mm(a, b)
        times.append(clock.now() - start)
    return 2 * side**3 / 1e6 / min(times)


def peak_memory(device: torch.device) -> float:
    """Highest use so far, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows has no such count
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
