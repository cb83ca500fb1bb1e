"""Measure the time taken by frames and by the networks that compute them."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..devices import synchronize
from ..families.diffvsr.options import UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..families.diffvsr.state import StreamDiffVSRState
from ..tensors import upsample
from ..upscaler import Session, Upscaler

STAGES = {"flow": "flow", "controlnet": "control", "unet": "denoise", "vae": "decode"}
"""Stage names for Stream-DiffVSR's networks; other networks keep their names. All other time is `rest`."""


@dataclass(frozen=True)
class Result:
    """Medians over the measured frames; `stages` is in milliseconds per frame."""

    width: int
    height: int
    frames: int
    """The number of measured frames, or of chunks if a model processes several frames at once."""
    milliseconds: float
    """Milliseconds per frame."""
    first_frame: float
    """Milliseconds until the first result, before any warm-up."""
    stages: dict[str, float] = field(default_factory=dict)
    peak_mb: float = 0.0
    """The peak memory so far: the process's resident memory on a CPU, or the allocator's memory on CUDA."""
    operations: dict[str, float] = field(default_factory=dict)
    """Billions of operations in matrix products and convolutions in one extra frame, by stage."""
    plain_ratio: float | None = None
    """The median ratio of plain time to our time in interleaved pairs; None if the plain path was not run."""

    @property
    def fps(self) -> float:
        return 1000 / self.milliseconds

    @property
    def rates(self) -> dict[str, float]:
        """Billions of operations per second, by stage and for the whole frame."""
        times = {**self.stages, "frame": self.milliseconds}
        counts = {**self.operations, "frame": sum(self.operations.values())}
        return {name: 1000 * count / times[name] for name, count in counts.items() if times[name]}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fps": self.fps, "rates": self.rates}


class Clock:
    """Adds up the milliseconds spent inside a model's networks, or anything else that `read` measures."""

    def __init__(self, device: torch.device, read: Callable[[], float] | None = None) -> None:
        self.device = device
        self.now = read or self._time
        self.spent: dict[str, float] = {}
        self._depth = 0
        self._since = 0.0

    def _time(self) -> float:
        """Return the time in milliseconds, after waiting for the device."""
        synchronize(self.device)
        return time.perf_counter() * 1000

    @contextmanager
    def watching(self, model: Upscaler) -> Generator[Clock, None, None]:
        """Reset the totals, and time the model's networks within this context."""
        self.spent = {STAGES.get(name, name): 0.0 for name in model.networks}
        handles = [
            handle
            for name, network in model.networks.items()
            for part in _parts(model, name, network)
            for handle in self._watch(STAGES.get(name, name), part)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, stage: str, part: nn.Module) -> Iterator[Any]:
        yield part.register_forward_pre_hook(lambda *_: self._enter())
        yield part.register_forward_hook(lambda *_: self._leave(stage), always_call=True)

    def _enter(self) -> None:
        if self._depth == 0:
            self._since = self.now()
        self._depth += 1

    def _leave(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.spent[name] += self.now() - self._since


def _parts(model: Upscaler, name: str, network: nn.Module) -> Iterable[nn.Module]:
    """Return modules that cover a network's computation; of nested ones, only the outermost is measured."""
    if not isinstance(model, StreamDiffVSRPipeline):
        return network.modules()
    # No module inside a compiled block, where a hook would cause recompilation.
    if name == "vae":
        return (*network.encoder.layers, *network.decoder.layers)  # type: ignore[union-attr]
    return (network, *network.children())


def moving_picture(count: int, height: int, width: int) -> list[Tensor]:
    """Return LQ frames that show a smooth, drifting random pattern."""
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
    """Upscale a moving picture: two warm-up frames, then `frames` measured frames.

    With `plain`, both pipelines upscale each frame, taking turns to go first, and the ratio is computed for
    each pair, so it remains valid even if the machine's speed drifts. The plain pipeline runs eagerly,
    exactly and in float32, whatever the settings of `pipe`.
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
    """Run a frame with both pipelines; return our time, the plain time or NaN, and our new state."""
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
    """Return the state without its recorded settings, so that other settings cause no warning."""
    settings = ("options", "compilation", "dtype", "runtime")
    return replace(state, metadata={key: text for key, text in state.metadata.items() if key not in settings})


def _stages(
    clock: Clock, pipe: StreamDiffVSRPipeline, lq: Tensor, state: Any, options: UpscaleOptions
) -> dict[str, float]:
    """Time the stages by running the frame again; timing the networks adds a little time."""
    with clock.watching(pipe):
        total, _ = _time(clock, pipe, lq, state, options)
    return {**clock.spent, "rest": total - sum(clock.spent.values())}


def count_operations(
    pipe: StreamDiffVSRPipeline, lq: Tensor, state: StreamDiffVSRState, options: UpscaleOptions
) -> dict[str, float]:
    """Count the operations of one frame in billions, by stage; a multiply-add counts as two operations."""
    pipe = copy.copy(pipe)
    pipe.built = None  # another runtime does the same work, but torch's counter cannot see it
    eager = replace(options, compile_mode="off")
    return _operations(pipe, lambda: pipe.process_frame(lq, _unsettled(state), eager))


def _operations(model: Upscaler, call: Callable[[], object]) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    packed = {torch.ops.mkldnn._linear_pointwise: _of_packed} if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=packed) as counter:
        clock = Clock(model.device, lambda: counter.get_total_flops() / 1e9)
        with clock.watching(model):
            call()
    return clock.spent


def _of_packed(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    """Return the number of operations in a packed linear layer, from the shapes of its inputs."""
    return 2 * math.prod(x) * weight[0]


def measure_sequence(
    model: Upscaler,
    height: int,
    width: int,
    rounds: int,
    options: Any,
    on_round: Callable[[], None] = lambda: None,
) -> Result:
    """Upscale a moving test picture with a model of any family; it may process several frames at once.

    The first two chunks warm up the model, and the next `rounds` chunks are measured.
    """
    clock, session = Clock(model.device), model.session(options)
    frames = cycle(moving_picture(8, height, width))
    more = partial(_next_results, session, frames)
    start = clock.now()
    more()
    first = clock.now() - start
    more()
    times = []
    for _ in range(rounds):
        start = clock.now()
        count = more()
        times.append((clock.now() - start) / count)
        on_round()
    with clock.watching(model):
        start = clock.now()
        count = more()
        total = clock.now() - start
    stages = {name: spent / count for name, spent in clock.spent.items()}
    operations = _operations(model, more)
    return Result(
        width=width,
        height=height,
        frames=rounds,
        milliseconds=statistics.median(times),
        first_frame=first,
        stages={**stages, "rest": total / count - sum(stages.values())},
        peak_mb=peak_memory(model.device),
        operations={name: each / count for name, each in operations.items()},
    )


def _next_results(session: Session, frames: Iterator[Tensor]) -> int:
    """Push frames until there are results, and return the number of results."""
    while True:
        if results := session.push(next(frames)):
            return len(results)


def best_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the device's best rates for a 'convolution' and a 'linear' layer, in 1e9 operations per second.

    A plain matrix product would be less meaningful: on AMD processors with AVX-512, torch's matrix product
    takes twice as long as the same linear layer with packed weights.
    """
    large = device.type == "cuda"
    drawn = partial(torch.randn, device=device, dtype=dtype)
    found = {"convolution": 0.0, "linear": 0.0}
    with torch.no_grad():
        for channels, side in ((512, 256), (256, 512)) if large else ((256, 64), (64, 128)):
            x, weight = drawn((1, channels, side, side)), drawn((channels, channels, 3, 3))
            x, weight = (each.to(memory_format=torch.channels_last) for each in (x, weight))
            rate = _rate(device, 18 * (channels * side) ** 2, lambda x=x, w=weight: F.conv2d(x, w, padding=1))
            found["convolution"] = max(found["convolution"], rate)
        side = 8192 if large else 1024
        x, weight = (drawn((side, side)) for _ in range(2))
        calls: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight)]
        if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
        found["linear"] = max(_rate(device, 2 * side**3, call) for call in calls)
    return found


def _rate(device: torch.device, operations: int, call: Callable[[], object]) -> float:
    clock, times = Clock(device), []
    for _ in range(8):
        start = clock.now()
        call()
        times.append(clock.now() - start)
    return operations / 1e6 / min(times)


def peak_memory(device: torch.device) -> float:
    """Return the highest memory use so far, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows does not have this module
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
