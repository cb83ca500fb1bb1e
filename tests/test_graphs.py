"""The denoising loop recorded and repeated; on a CPU by a stand-in, on the terms of a CUDA graph."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from samples import moving, shift_flow

from stream_diffvsr import UpscaleOptions, load_pipeline
from stream_diffvsr.families.diffvsr import method as pipeline
from stream_diffvsr.families.diffvsr.graphs import LoopGraph
from stream_diffvsr.runtimes.torch import compilation

MAX = UpscaleOptions(num_inference_steps=2, compile_mode="max")


class Rerun:
    """What a CUDA graph does: the recorded loop again, from the recorded inputs into the recorded output."""

    made = 0

    def __init__(self, loop, inputs):
        Rerun.made += 1
        self.inputs = [x.clone() for x in inputs]
        self.loop = loop
        self.output = loop(*self.inputs)
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.output.copy_(self.loop(*self.inputs))


@pytest.fixture
def recorder(checkpoint, monkeypatch):
    """A pipe whose loop is recorded as on a GPU, without compiling anything."""
    monkeypatch.setattr(compilation, "in_force", lambda mode, device: mode)
    monkeypatch.setattr(compilation, "compiled", lambda networks, mode: nullcontext())
    monkeypatch.setattr(Rerun, "made", 0)
    pipe = load_pipeline(checkpoint, device="cpu", flow=shift_flow)
    assert not pipe.graph.records
    pipe.graph = LoopGraph(Rerun)
    return pipe


def frames(pipe, clip, options=MAX, state=None):
    return list(pipe.stream(clip.split(1), options, state))


def test_frames_are_the_same(recorder, guided):
    seen = []
    got = list(recorder.stream(moving(6).split(1), MAX, on_step=lambda *step: seen.append(step)))
    expected = frames(guided, moving(6), UpscaleOptions(num_inference_steps=2))
    assert all(torch.equal(a.hq, b.hq) for a, b in zip(got, expected, strict=True))
    assert Rerun.made == 1
    # Frame 0 has no guidance, 1 is the first of its kind, 2 is recorded and compared.
    assert recorder.graph._recording.replays == 1 + 3
    assert seen.count(("denoise", 2, 2)) == 6


def test_another_size_and_other_options_are_recorded_anew(recorder, guided):
    for clip in (moving(4), moving(4, 16, 12)):
        for seed in (0, 1):
            options = UpscaleOptions(num_inference_steps=2, compile_mode="max", seed=seed)
            exact = UpscaleOptions(num_inference_steps=2, seed=seed)
            for a, b in zip(frames(recorder, clip, options), frames(guided, clip, exact), strict=True):
                assert torch.equal(a.hq, b.hq)
    assert Rerun.made == 4


@pytest.mark.parametrize("options", [{"compile_mode": "auto"}, {"compile_mode": "max", "tile_size": 64}])
def test_only_what_was_asked_for_in_one_piece(recorder, options):
    plan = "tiled" if "tile_size" in options else "auto"
    settings = UpscaleOptions(num_inference_steps=1, memory_plan=plan, tile_overlap=16, **options)
    frames(recorder, moving(4, 24, 24), settings)
    assert Rerun.made == 0


def test_not_where_a_host_moves_the_weights(recorder):
    class Elsewhere:
        def acquire(self, stage, activation_bytes):
            return torch.device("cpu")

    recorder.placement = Elsewhere()
    frames(recorder, moving(4))
    assert Rerun.made == 0


def run(graph, loop, x, has_room=lambda: True):
    """What the pipeline does with a frame."""
    inputs = [torch.tensor(float(x))]
    repeated = graph.repeat("key", inputs)
    if repeated is None:
        repeated = loop(*inputs)
        graph.learn("key", loop, inputs, repeated, has_room)
    return repeated


def test_not_without_room_and_later_with_it():
    graph, room = LoopGraph(Rerun), [False, False, True]
    for x in range(6):
        assert run(graph, lambda x: x + 1, x, lambda: room.pop(0)) == x + 1
    assert room == [] and graph._recording.replays == 1 + 2


def test_one_that_repeats_nothing_is_not_used(caplog):
    """As a graph does into which nothing was recorded."""

    class Empty(Rerun):
        def replay(self):
            pass

    graph = LoopGraph(Empty)
    for x in range(5):
        assert run(graph, lambda x: x * 2, x) == 2 * x
    assert caplog.messages == ["the denoising loop runs without a CUDA graph: its numbers differ"]


def test_one_that_repeats_other_numbers_is_not_used(caplog):
    class Wrong(Rerun):
        def replay(self):
            super().replay()
            self.output.add_(1)

    graph = LoopGraph(Wrong)
    for x in range(5):
        assert run(graph, lambda x: x * 2, x) == 2 * x
    assert caplog.messages == ["the denoising loop runs without a CUDA graph: its numbers differ"]


def test_one_that_cannot_be_recorded_is_not_used(caplog):
    def refuse(loop, inputs):
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("capture ended with an error")

    graph = LoopGraph(refuse)
    for x in range(4):
        assert run(graph, lambda x: x * 2, x) == 2 * x
    assert caplog.messages == ["the denoising loop runs without a CUDA graph: operation not permitted"]


def test_inference_mode_may_come_and_go(recorder, guided):
    clip = moving(6)
    with torch.inference_mode():
        done = frames(recorder, clip[:4])
    rest = frames(recorder, clip[4:], state=done[-1].state)
    assert recorder.graph.holds_memory
    expected = frames(guided, clip, UpscaleOptions(num_inference_steps=2))
    assert all(torch.equal(a.hq, b.hq) for a, b in zip([*done, *rest], expected, strict=True))


def test_a_frame_repeated_in_float32_frees_the_recording(recorder, checkpoint, monkeypatch):
    """The weights are elsewhere meanwhile, and afterwards at new addresses."""
    half = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow=shift_flow)
    half.graph = LoopGraph(Rerun)
    done = frames(half, moving(4))
    assert half.graph.holds_memory
    finite = iter([False, True])
    monkeypatch.setattr(pipeline, "is_finite", lambda hq: next(finite))
    half.process_frame(moving(5)[4:], done[-1].state, MAX)
    assert not half.graph.holds_memory


def test_memory_that_runs_out_takes_the_recording_first_and_keeps_the_plan(recorder, guided, monkeypatch):
    clip = moving(6)
    done = frames(recorder, clip[:4])
    assert recorder.graph.holds_memory
    decode, failures = recorder._decode, [torch.OutOfMemoryError("out of memory")]

    def short(*args):
        if failures:
            raise failures.pop()
        return decode(*args)

    monkeypatch.setattr(recorder, "_decode", short)
    rest = frames(recorder, clip[4:], state=done[-1].state)
    expected = frames(guided, clip, UpscaleOptions(num_inference_steps=2))
    assert all(torch.equal(a.hq, b.hq) for a, b in zip([*done, *rest], expected, strict=True))
    assert rest[-1].state.metadata["plan"] == done[0].state.metadata["plan"]
    assert not recorder.graph.holds_memory and Rerun.made == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_same_frames(checkpoint):
    pipe = load_pipeline(checkpoint, device="cuda", dtype="float32", flow=shift_flow)
    got = frames(pipe, moving(6, 64, 64))
    assert pipe.graph.holds_memory
    pipe.graph.give_up()
    expected = frames(pipe, moving(6, 64, 64))
    assert all(torch.equal(a.hq, b.hq) for a, b in zip(got, expected, strict=True))
