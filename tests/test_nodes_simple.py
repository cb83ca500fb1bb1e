"""Live, Simple Video Upscale, and the sizes and presets of the other nodes, with the tiny checkpoint."""

from __future__ import annotations

import gc
from pathlib import Path

import av
import pytest
import torch
from node_clips import make_clip
from node_pack import load_pack, part

PACK = load_pack()
NODES = PACK.NODE_CLASS_MAPPINGS
UPSCALE = NODES["StreamDiffVSR_Upscale"]
LIVE = NODES["StreamDiffVSR_Live"]
SIMPLE = NODES["StreamDiffVSR_SimpleUpscale"]
SETTINGS = NODES["StreamDiffVSR_Settings"]
sizes = part(PACK, "nodes.sizes")
Info = part(PACK, "stream_diffvsr.upscaler").Info


@pytest.fixture(scope="module")
def pipe(checkpoint: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))
        return NODES["StreamDiffVSR_Loader"]().execute(checkpoint.name, "cpu", "float32", "dis")[0]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def clip(count: int) -> torch.Tensor:
    """Noise that drifts, so that the frame before matters; (N, 12, 16, 3) in [0, 1]."""
    wide = torch.rand(12, 16 + count, 3)
    return torch.stack([wide[:, index : index + 16] for index in range(count)])


def test_live_frames_queued_one_by_one_equal_one_run(pipe) -> None:
    images, node = clip(6), LIVE()
    whole, _ = UPSCALE().execute(pipe, images, num_inference_steps=1, seed=3)
    for index, image in enumerate(images.split(1)):
        result, info = node.execute(pipe, image, num_inference_steps=1, seed=3)
        assert torch.equal(result[0], whole[index])
        assert info.startswith(f"frame {index + 1}, 16x12 to 64x48")
        assert ("new sequence (first run)" in info) == (index == 0)
    assert LIVE.IS_CHANGED(seed=3) != LIVE.IS_CHANGED(seed=3)  # never cached


@pytest.mark.long
def test_fifty_live_frames_equal_one_run_and_memory_stays(pipe) -> None:
    """And 200 runs of Live and of Upscale each leave as many tensors as 20."""
    live, images = LIVE(), clip(50)
    whole, _ = UPSCALE().execute(pipe, images, num_inference_steps=1, seed=3)
    for index, expected in enumerate(whole):
        frame, _ = live.execute(pipe, images[index : index + 1], num_inference_steps=1, seed=3)
        assert torch.equal(frame[0], expected), index
    held = {}
    for count in (20, 180):
        for _ in range(count):
            live.execute(pipe, images[:1], num_inference_steps=1)
            UPSCALE().execute(pipe, images[:1], num_inference_steps=1)
        gc.collect()
        held[count] = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    assert held[180] <= held[20]


def test_live_begins_anew_where_it_must(pipe) -> None:
    images, node = clip(2), LIVE()
    run = {"num_inference_steps": 1}
    first, _ = node.execute(pipe, images[:1], **run)
    followed, _ = node.execute(pipe, images[:1], **run)
    again, info = node.execute(pipe, images[:1], reset=True, **run)
    assert torch.equal(again, first) and not torch.equal(followed, first)
    assert info.endswith("new sequence (reset is on)")
    _, info = node.execute(pipe, images[:1, :8], **run)
    assert info == "frame 1, 16x8 to 64x32; new sequence (different size)"
    workflow = {"workflow": {"id": "another"}}
    _, info = node.execute(pipe, images[:1, :8], extra_pnginfo=workflow, **run)
    assert info.endswith("new sequence (different workflow)")
    with pytest.raises(ValueError, match="image must be one picture"):
        node.execute(pipe, images, **run)


@pytest.mark.parametrize(
    "size, height, width", [("4x", 48, 64), ("2x", 24, 32), ("3x", 36, 48), ("720p", 720, 960)]
)
def test_a_size_is_one_resampling_after_the_model(pipe, size: str, height: int, width: int) -> None:
    images = clip(1)
    own, state = UPSCALE().execute(pipe, images, num_inference_steps=1)
    result, same = UPSCALE().execute(pipe, images, num_inference_steps=1, size=size)
    assert result.shape == (1, height, width, 3)
    assert torch.equal(state.previous_hq, same.previous_hq)  # the sequence stays exact
    resize = part(PACK, "stream_diffvsr.media.sizes").resize
    assert torch.equal(result, resize(own.movedim(-1, 1), (height, width)).movedim(1, -1))


def test_sizes_ask_for_nothing_that_the_model_makes_itself() -> None:
    info = Info("diffvsr", "", "")
    twice = Info("image", "", "", scales=(2.0,))
    any_scale = Info("swiftvr", "", "", scales=None)
    assert [sizes.size_fields("4x", each) for each in (info, twice, any_scale)] == [{}, {"scale": 4.0}, {}]
    assert [sizes.size_fields("2x", each) for each in (info, twice, any_scale)] == [
        {"scale": 2.0},
        {},
        {"scale": 2.0},
    ]
    assert sizes.size_fields("1440p", info) == {"short_edge": 1440}


def test_a_preset_of_the_node_takes_the_place_of_the_one_of_settings(pipe) -> None:
    fast = SETTINGS().execute(preset="fast", guidance_scale=2.0)[0]
    assert (fast.options(pipe).control_every, fast.options(pipe).flow_scale) == (4, 0.5)
    exact = fast.options(pipe, "exact")
    assert (exact.control_every, exact.flow_scale, exact.guidance_scale) == (1, 1.0, 2.0)
    assert fast.options(pipe, "balanced").control_every == 2


def test_simple_is_loader_and_upscale_video_in_one() -> None:
    source = make_clip(Path("input/clip.mp4").absolute(), 2, 24, 16)

    class FromFile:
        def get_stream_source(self) -> str:
            return str(source)

    assert (
        SIMPLE.INPUT_TYPES()["required"]["model"][0]
        == (NODES["StreamDiffVSR_Loader"].INPUT_TYPES()["required"]["model_version"][0])
    )
    node, before = SIMPLE(), SIMPLE.IS_CHANGED(model="nano", unique_id="50")
    done = node.execute(FromFile(), "nano", "fast", "2x", unique_id="50", prompt={"1": {}})
    video, path = done["result"]
    assert video == path and Path(path).name == "clip_2x_00001_.mp4"
    with av.open(path) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert (container.streams.video[0].width, container.streams.video[0].height) == (48, 32)
        assert container.metadata["prompt"] == '{"1": {}}'
    assert done["ui"]["images"][0]["filename"] == "clip_2x_00001_.mp4"
    assert SIMPLE.IS_CHANGED(model="nano", unique_id="50") == before
    Path(path).unlink()
    assert SIMPLE.IS_CHANGED(model="nano", unique_id="50") != before


@pytest.mark.parametrize(
    "fidelity", [{"strength": 0.0}, *({"colour_fix": fix} for fix in ("lab", "wavelet", "adain"))]
)
def test_colours_and_strength_change_what_goes_out_and_never_the_state(pipe, fidelity: dict) -> None:
    images = clip(3)
    plain, state = UPSCALE().execute(pipe, images, num_inference_steps=1)
    other, same = UPSCALE().execute(pipe, images, num_inference_steps=1, **fidelity)
    assert not torch.equal(plain, other)
    assert all(map(torch.equal, state.tensors.values(), same.tensors.values()))
    if "strength" in fidelity:
        bicubic = part(PACK, "stream_diffvsr.media.sizes").enlarge(images.movedim(-1, 1), (48, 64))
        assert torch.equal(other, bicubic.movedim(1, -1))
    assert torch.equal(UPSCALE().execute(pipe, images, num_inference_steps=1, strength=1.0)[0], plain)
