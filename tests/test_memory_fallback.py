"""Memory that runs out: the frame is repeated one level lower, with the numbers of that level."""

from __future__ import annotations

import logging
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import moving, shift_flow
from torch.utils._python_dispatch import TorchDispatchMode

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, VRAMError, load_pipeline
from stream_diffvsr.families.diffvsr import attempts, method
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.flow.estimators import TileableFlow
from stream_diffvsr.memory import is_out_of_memory
from stream_diffvsr.upscaler import FixedPlacement

AUTO = UpscaleOptions(num_inference_steps=2, seed=3)
HEIGHT, WIDTH = 12, 72

LEVELS = [
    Plan(),
    Plan("linear"),
    Plan("linear", 128),
    Plan("linear", 128, 512),
    Plan("linear", 128, 256),
]


class Shift(TileableFlow):
    """A cheap estimator that has all methods of RAFT."""

    name, methods = "shift", ("whole", "linear", "tiled")

    def forward(self, current, previous):
        return shift_flow(current, previous)


class Leaky(FixedPlacement):
    """Memory that runs out when given stages begin, so many times."""

    def __init__(self, stages, times):
        super().__init__(torch.device("cpu"), fixed=False)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "left", times)

    def acquire(self, stage, activation_bytes):
        assert activation_bytes > 0
        if stage in self.stages and self.left:
            object.__setattr__(self, "left", self.left - 1)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.99 GiB")
        return super().acquire(stage, activation_bytes)


@pytest.fixture(scope="module")
def engine(checkpoint):
    return load_pipeline(checkpoint, device="cpu", flow=Shift())


@pytest.fixture
def pipe(engine):
    yield engine
    engine.placement = FixedPlacement(torch.device("cpu"))


@pytest.fixture(scope="module")
def clip():
    return moving(3, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def second(engine, clip):
    """The state after one frame, and what the next frame is at each level run directly."""
    state = engine.process_frame(clip[:1], with_plan(LEVELS[0]), AUTO).state
    return state, {plan: engine.process_frame(clip[1:2], with_plan(plan, state), AUTO).hq for plan in LEVELS}


def with_plan(plan: Plan, state: StreamDiffVSRState | None = None) -> StreamDiffVSRState:
    state = state or StreamDiffVSRState()
    return replace(state, metadata={**state.metadata, "plan": plan.to_json(), "size": f"{WIDTH}x{HEIGHT}"})


def test_levels_agree_but_for_tiles_smaller_than_the_frame(second):
    _, results = second
    differences = [float((results[plan] - results[LEVELS[0]]).abs().max()) for plan in LEVELS]
    assert max(differences[:4]) <= 1e-5 < differences[4]
    assert [plan.exact for plan in LEVELS] == [True, True, True, False, False]


@pytest.mark.parametrize("times", range(1, 5))
@pytest.mark.parametrize("stage", ["controlnet", "unet", "vae"])
def test_each_failure_takes_one_level(pipe, clip, second, stage, times, caplog):
    state, results = second
    pipe.placement = Leaky([stage], times)
    with caplog.at_level(logging.WARNING):
        result = pipe.process_frame(clip[1:2], state, AUTO)
    assert Plan.from_json(result.state.metadata["plan"]) == LEVELS[times]
    assert torch.equal(result.hq, results[LEVELS[times]])
    assert sum("out of memory" in record.message for record in caplog.records) == times


def test_tiled_flow_is_the_last_resort_of_flow_alone(pipe, clip, second):
    state, results = second
    pipe.placement = Leaky(["flow"], 3)
    result = pipe.process_frame(clip[1:2], state, AUTO)
    assert Plan.from_json(result.state.metadata["plan"]) == Plan("tiled", 128)
    # The frame is smaller than a tile, so here the numbers stay.
    assert torch.equal(result.hq, results[LEVELS[2]])


@settings(max_examples=8)
@given(failures=st.sets(st.integers(0, 30), min_size=1, max_size=4))
def test_memory_that_runs_out_between_steps(engine, clip, second, failures):
    """Between any two parts of the frame, any number of times."""
    state, results = second
    calls = iter(range(10**6))

    def on_step(stage, done, total):
        if next(calls) in failures:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")

    assert_that_of_its_level(engine.process_frame(clip[1:2], state, AUTO, on_step=on_step), results)


class Operations(TorchDispatchMode):
    """Counts torch's operations, of all attempts together, and lets memory run out in some of them."""

    def __init__(self, failures=()):
        super().__init__()
        self.failures, self.count = failures, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count in self.failures:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.99 GiB")
        return func(*args, **(kwargs or {}))


def inside(engine, mode: Operations):
    """The stages of a frame run within `mode`; what is before and after them does not."""

    def upscale(*arguments):
        with mode:
            return method.upscale(*arguments)

    return patch.object(attempts, "upscale", upscale)


@settings(max_examples=4)
@given(places=st.sets(st.floats(0, 1), min_size=1, max_size=3))
def test_memory_that_runs_out_in_any_operation(engine, clip, second, places):
    """In the midst of a network, a band, a warp or an update: up to three times."""
    state, results = second
    with inside(engine, counted := Operations()):
        engine.process_frame(clip[1:2], state, AUTO)
    assert counted.count > 500
    failures = {1 + int(place * (counted.count - 1)) for place in places}
    with inside(engine, mode := Operations(failures)):
        result = engine.process_frame(clip[1:2], state, AUTO)
    assert mode.count > max(failures)
    assert Plan.from_json(result.state.metadata["plan"]) != LEVELS[0]
    assert_that_of_its_level(result, results)


def assert_that_of_its_level(result, results):
    """Bit for bit what its plan gives when it is run directly."""
    plan = Plan.from_json(result.state.metadata["plan"])
    # The frame is smaller than a tile of flow, and this estimator's methods agree.
    direct = plan if plan in results else replace(plan, flow="linear")
    assert torch.equal(result.hq, results[direct])


class BesideStages(Operations):
    """The same, of operations outside of the stages only."""

    inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.inside:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def process(self, engine, lq, state):
        def upscale(*arguments):
            self.inside = True
            try:
                return method.upscale(*arguments)
            finally:
                self.inside = False

        with patch.object(attempts, "upscale", upscale), self:
            return engine.process_frame(lq, state, AUTO)


def test_memory_that_runs_out_beside_the_stages_is_a_vram_error(engine, clip, second):
    """While the frame is taken in, its result looked at, and the next state made."""
    state, results = second
    counted = BesideStages()
    assert torch.equal(counted.process(engine, clip[1:2], state).hq, results[LEVELS[0]])
    assert counted.count > 5
    for number in (1, 3, counted.count // 2, counted.count - 1, counted.count):
        with pytest.raises(VRAMError, match=r"outside the networks.*smaller frames") as caught:
            BesideStages({number}).process(engine, clip[1:2], state)
        assert caught.value.required_mb > 0 and caught.value.__context__ is None
    assert torch.equal(engine.process_frame(clip[1:2], state, AUTO).hq, results[LEVELS[0]])


def test_an_interrupt_beside_the_stages_passes(engine, clip, second):
    class Interrupting(BesideStages):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise KeyboardInterrupt("out of memory")

    with pytest.raises(KeyboardInterrupt), Interrupting():
        engine.process_frame(clip[1:2], second[0], AUTO)


def test_the_level_is_kept_and_said_once(pipe, clip, second, caplog):
    state, _ = second
    pipe.placement = Leaky(["vae"], 2)
    with caplog.at_level(logging.INFO):
        first = pipe.process_frame(clip[1:2], state, AUTO).state
        said = len(caplog.records)
        last = pipe.process_frame(clip[2:3], first, AUTO).state
    assert len(caplog.records) == said
    assert last.metadata["plan"] == first.metadata["plan"] == LEVELS[2].to_json()


def test_continuing_takes_up_the_level(pipe, clip, second, tmp_path):
    state, _ = second
    state = with_plan(LEVELS[4], state)
    expected = [result.hq for result in pipe.stream(clip[1:].split(1), AUTO, state)]
    half = pipe.process_frame(clip[1:2], state, AUTO).state
    half.save(tmp_path / "s.safetensors")
    again = pipe.process_frame(clip[2:3], StreamDiffVSRState.load(tmp_path / "s.safetensors"), AUTO)
    assert torch.equal(again.hq, expected[1])
    assert Plan.from_json(again.state.metadata["plan"]) == LEVELS[4]


@pytest.mark.parametrize("stage", ["flow", "unet", "vae"])
def test_no_level_left_names_what_was_tried_and_a_setting(pipe, clip, second, stage):
    state, _ = second
    pipe.placement = Leaky([stage], 99)
    with pytest.raises(VRAMError) as caught:
        pipe.process_frame(clip[1:2], state, AUTO)
    assert (
        "tried: whole frames;" in caught.value.suggestion and "bands of 128 rows" in caught.value.suggestion
    )
    assert caught.value.required_mb > 0 and caught.value.available_mb > 0
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", ["whole", "banded", "tiled"])
def test_a_named_plan_never_changes(pipe, clip, second, name):
    state, _ = second
    pipe.placement = Leaky(["unet"], 1)
    with pytest.raises(VRAMError, match="memory_plan 'auto'"):
        pipe.process_frame(clip[1:2], state, replace(AUTO, memory_plan=name))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, type("Interrupted", (Exception,), {})])
def test_other_errors_pass_unchanged(pipe, clip, second, error):
    state, _ = second

    def on_step(stage, done, total):
        raise error("out of memory")

    with pytest.raises(error):
        pipe.process_frame(clip[1:2], state, AUTO, on_step=on_step)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_forms_of_running_out(error, is_it):
    assert is_out_of_memory(error) is is_it


def test_a_real_allocation_failure_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
