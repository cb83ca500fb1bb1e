"""Loader, Upscale and Process Frame, with the tiny checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from node_pack import load_pack, part
from samples import moving

from stream_diffvsr import StreamDiffVSRPipeline, UpscaleOptions, load_pipeline, to_pixels

PACK = load_pack()
NODES = PACK.NODE_CLASS_MAPPINGS
LOADER = NODES["StreamDiffVSR_Loader"]
UPSCALE = NODES["StreamDiffVSR_Upscale"]
PROCESS = NODES["StreamDiffVSR_ProcessFrame"]
SETTINGS = NODES["StreamDiffVSR_Settings"]
CREATE = NODES["StreamDiffVSR_CreateState"]


@pytest.fixture(scope="module")
def pipe(checkpoint: Path):
    """The tiny checkpoint through the loader node, with a flow that needs no weights."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))
        return LOADER().execute(
            model_version=checkpoint.name, device="cpu", dtype="float32", flow_model="dis"
        )[0]


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> StreamDiffVSRPipeline:
    return load_pipeline(checkpoint, device="cpu", flow="dis")


def pictures(count: int, channels: int = 3) -> torch.Tensor:
    """A moving clip as ComfyUI has it, (N, 12, 16, C) in [0, 1]."""
    clip = to_pixels(moving(count)).movedim(1, -1)
    alpha = torch.linspace(0, 1, 16).expand(count, 12, 16)[..., None]
    return torch.cat([clip, alpha], dim=-1)[..., :channels].contiguous()


def same_state(one, other) -> bool:
    return (
        torch.equal(one.previous_hq, other.previous_hq)
        and torch.equal(one.previous_lq, other.previous_lq)
        and one.frame_index == other.frame_index
        and one.metadata == other.metadata
    )


def test_the_loader_offers_found_folders(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))
    versions, options = LOADER.INPUT_TYPES()["required"]["model_version"]
    assert versions[:2] == ["v1", "nano"] and checkpoint.name in versions
    assert options["default"] == "v1"


def test_an_incomplete_folder_is_not_offered(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    (broken / "unet").mkdir(parents=True)
    monkeypatch.setenv("STREAM_DIFFVSR_MODELS", str(tmp_path))
    assert "broken" not in LOADER.INPUT_TYPES()["required"]["model_version"][0]


def test_equal_settings_share_one_pipe() -> None:
    settings = {"model_version": "nano", "device": "cpu", "dtype": "float32", "flow_model": "none"}
    first, second = LOADER().execute(**settings)[0], LOADER().execute(**settings)[0]
    assert first is second
    assert LOADER().execute(**{**settings, "dtype": "bfloat16"})[0] is not first


def test_a_pipe_goes_with_its_last_user() -> None:
    shared = part(PACK, "nodes.load")._open
    settings = {"model_version": "nano", "device": "cpu", "dtype": "float32", "flow_model": "none"}
    pipe = LOADER().execute(**settings)[0]
    assert pipe in shared.values()
    before = len(shared)
    del pipe
    assert len(shared) == before - 1


def test_the_loader_notices_changed_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    monkeypatch.setenv("STREAM_DIFFVSR_MODELS", str(tmp_path))
    before = LOADER.IS_CHANGED(model_version="mine")
    assert LOADER.IS_CHANGED(model_version="mine", device="cpu") == before
    (mine / "unet" / "note.txt").write_text("new")
    assert LOADER.IS_CHANGED(model_version="mine") != before


def test_upscale_equals_the_engine(pipe, engine: StreamDiffVSRPipeline) -> None:
    images = pictures(3)
    before = images.clone()
    result, state = UPSCALE().execute(pipe, images, num_inference_steps=2, seed=5)
    frames = images.movedim(-1, 1) * 2 - 1
    expected, expected_state = engine(frames, UpscaleOptions(num_inference_steps=2, seed=5))
    assert torch.equal(result, to_pixels(expected).movedim(1, -1))
    assert same_state(state, expected_state)
    assert torch.equal(images, before)


def test_inside_inference_mode_as_comfyui_runs_it(pipe) -> None:
    plain, _ = UPSCALE().execute(pipe, pictures(2), num_inference_steps=1)
    with torch.inference_mode():
        inside, state = UPSCALE().execute(pipe, pictures(2), num_inference_steps=1)
    assert torch.equal(plain, inside)
    assert UPSCALE().execute(pipe, pictures(1), state, num_inference_steps=1)[1].frame_index == 3


@settings(max_examples=8)
@given(cut=st.integers(1, 3), seed=st.integers(0, 2**64 - 1))
def test_two_chunks_equal_one_run(pipe, cut: int, seed: int) -> None:
    images = pictures(4)
    widgets = {"num_inference_steps": 1, "seed": seed}
    whole, end = UPSCALE().execute(pipe, images, **widgets)
    first, state = UPSCALE().execute(pipe, images[:cut], **widgets)
    second, last = UPSCALE().execute(pipe, images[cut:], state, **widgets)
    assert torch.equal(torch.cat([first, second]), whole)
    assert same_state(end, last)


def test_frame_by_frame_equals_one_run(pipe) -> None:
    images = pictures(3)
    whole, end = UPSCALE().execute(pipe, images, num_inference_steps=2)
    state = CREATE().execute()[0]
    for index, image in enumerate(images.split(1)):
        result, state = PROCESS().execute(pipe, image, state, num_inference_steps=2)
        assert torch.equal(result[0], whole[index])
    assert same_state(state, end)


def test_alpha_is_carried(pipe) -> None:
    with_alpha = pictures(2, channels=4)
    result, _ = UPSCALE().execute(pipe, with_alpha, num_inference_steps=1)
    plain, _ = UPSCALE().execute(pipe, with_alpha[..., :3], num_inference_steps=1)
    assert result.shape == (2, 48, 64, 4)
    assert torch.equal(result[..., :3], plain)
    alpha = result[..., 3]
    assert alpha.min() >= 0 and alpha.max() <= 1
    # The ramp from 0 to 1 stays one; its ends are flattened by the filter's border.
    wanted = ((torch.arange(64) + 0.5) / 4 - 0.5).clamp(0, 15) / 15
    assert torch.allclose(alpha, wanted.expand_as(alpha), atol=0.02)


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (13, 30)])
def test_any_size_becomes_exactly_four_times_it(pipe, size: tuple[int, int]) -> None:
    height, width = size
    result, _ = UPSCALE().execute(pipe, torch.rand(2, height, width, 3), num_inference_steps=1)
    assert result.shape == (2, 4 * height, 4 * width, 3)
    assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize(
    "images, said",
    [
        (torch.zeros(0, 16, 16, 3), "there are no images: check the loader's cap and skip"),
        (torch.zeros(1, 16, 16, 1), "(1, 16, 16, 1)"),
        (torch.zeros(16, 16, 3), "(16, 16, 3)"),
        (torch.zeros(1, 4, 6, 3), "pictures must be at least 8x8, not 6x4"),
        (torch.full((1, 16, 16, 3), float("nan")), "NaN"),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(pipe, images: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        UPSCALE().execute(pipe, images)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "widgets, said",
    [
        (
            {"enable_tiling": True, "tile_size": 256, "tile_overlap": 128},
            "below half of tile_size 256, not 128",
        ),
        ({"tile_size": 128}, "tile_size must be from 256 to 1024, not 128"),
        ({"tile_overlap": 272}, "tile_overlap must be from 16 to 256, not 272"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_before_the_run(widgets: dict, said: str) -> None:
    """Raised and not returned: ComfyUI reports a text once for each argument."""
    with pytest.raises(ValueError, match=said):
        UPSCALE.VALIDATE_INPUTS(**widgets)


def test_tiles_that_fit_are_taken() -> None:
    assert UPSCALE.VALIDATE_INPUTS() is True  # all linked
    assert UPSCALE.VALIDATE_INPUTS(enable_tiling=False, tile_size=256, tile_overlap=256) is True
    assert UPSCALE.VALIDATE_INPUTS(enable_tiling=True, tile_size=256, tile_overlap=112) is True


@pytest.mark.parametrize(
    "name, widgets, said",
    [
        ("Settings", {"codec": "h264", "crf": 52}, "crf must be at most 51 for h264, not 52"),
        ("Settings", {"codec": "h265", "crf": 63}, "crf must be at most 51 for h265"),
        ("Settings", {"codec": "vp9"}, "codec must be one of h264, .* not 'vp9'"),
        ("Settings", {"flow_scale": 0.3}, "flow_scale must be one of 1.0"),
        ("ImageSettings", {"crf": 60}, "crf must be at most 51 for h264"),
        ("ImageSettings", {"tile_size": 128, "tile_overlap": 64}, "tile_overlap must be below half"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_run(name: str, widgets: dict, said: str) -> None:
    node = NODES[f"StreamDiffVSR_{name}"]
    with pytest.raises(ValueError, match=said):
        node.VALIDATE_INPUTS(**widgets)
    if "vp9" not in widgets.values():  # what no widget offers is told by whoever takes it
        with pytest.raises(ValueError, match=said.partition(" must ")[0]):
            node().execute(**widgets)


def test_settings_that_fit_are_taken() -> None:
    assert SETTINGS.VALIDATE_INPUTS(codec="av1", crf=63, prompt=None, flow_scale="0.5") is True
    assert SETTINGS.VALIDATE_INPUTS(codec=None, crf=51) is True
    assert SETTINGS.VALIDATE_INPUTS(flow_scale=1) is True  # as JSON has 1.0


def test_a_result_that_memory_cannot_hold_is_refused_with_the_way_out(pipe) -> None:
    """Before anything is computed; ten million frames that take no memory themselves."""
    images = torch.zeros(1, 1, 1, 1).expand(10**7, 1080, 1920, 3)
    with pytest.raises(Exception, match=r"MB are needed, .*Meta Batch Manager.*Upscale Video"):
        UPSCALE().execute(pipe, images)


def test_the_result_lies_where_comfyui_keeps_results(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    host = part(PACK, "nodes.host")
    state_class, moved = part(PACK, "stream_diffvsr.families.diffvsr.state").StreamDiffVSRState, []
    monkeypatch.setattr(host, "intermediate_device", lambda: torch.device("meta"))
    monkeypatch.setattr(state_class, "to", lambda state, device: moved.append(torch.device(device)) or state)
    result, _ = UPSCALE().execute(pipe, pictures(1), num_inference_steps=1)
    assert result.device.type == moved[-1].type == "meta"


FLOWS = part(PACK, "nodes.load").Loader.INPUT_TYPES()["optional"]["flow_model"][0]


@pytest.mark.parametrize("flow", [flow for flow in FLOWS if not flow.startswith("raft")])
def test_every_flow_that_needs_no_download_works(flow: str) -> None:
    (pipe,) = LOADER().execute(model_version="nano", device="cpu", dtype="float32", flow_model=flow)
    result, _ = UPSCALE().execute(pipe, pictures(2), num_inference_steps=1)
    assert result.shape == (2, 48, 64, 3)


def test_process_frame_refuses_batches(pipe) -> None:
    with pytest.raises(ValueError, match="a batch of 2"):
        PROCESS().execute(pipe, pictures(2), CREATE().execute()[0])


def test_tiling_widgets_reach_the_engine(pipe) -> None:
    with pytest.raises(ValueError, match="below half of tile_size 256"):
        UPSCALE().execute(pipe, pictures(1), enable_tiling=True, tile_size=256, tile_overlap=256)
    _, state = UPSCALE().execute(pipe, pictures(1), num_inference_steps=1, enable_tiling=True, tile_size=320)
    assert '"tile_size": 320' in state.metadata["options"]
    assert '"memory_plan": "tiled"' in state.metadata["options"]


def test_without_tiling_the_settings_decide(pipe) -> None:
    settings = SETTINGS().execute(memory_plan="banded", use_tpm=False)[0]
    _, state = UPSCALE().execute(pipe, pictures(1), settings=settings, num_inference_steps=1, tile_size=320)
    for wanted in ('"memory_plan": "banded"', '"use_tpm": false', '"tile_size": null'):
        assert wanted in state.metadata["options"]


def test_a_nodes_own_widget_wins(pipe) -> None:
    module = part(PACK, "nodes.settings")
    settings = module.SettingsValue({"seed": 7, "num_inference_steps": 9})
    _, state = PROCESS().execute(pipe, pictures(1), CREATE().execute()[0], settings, 1, 3)
    assert (
        '"seed": 3' in state.metadata["options"] and '"num_inference_steps": 1' in state.metadata["options"]
    )


def manager() -> SimpleNamespace:
    """What VideoHelperSuite's batch manager shows to other nodes."""

    class Manager(SimpleNamespace):
        __hash__ = object.__hash__

    return Manager(has_closed_inputs=False)


def prompt(requeue: int) -> dict:
    """A prompt as ComfyUI hands it to node 4, in batch `requeue` of a meta-batch."""
    return {
        "1": {"class_type": "VHS_BatchManager", "inputs": {"frames_per_batch": 2, "requeue": requeue}},
        "2": {"class_type": "VHS_LoadVideo", "inputs": {"meta_batch": ["1", 0]}},
        "4": {"class_type": "StreamDiffVSR_Upscale", "inputs": {"images": ["2", 0], "meta_batch": ["1", 0]}},
    }


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_meta_batch_equals_the_single_run(pipe, size: int, linked: bool) -> None:
    images = pictures(5)
    whole, _ = UPSCALE().execute(pipe, images, num_inference_steps=1)
    node, batches, parts = UPSCALE(), manager(), []
    for number, chunk in enumerate(images.split(size)):
        batches.has_closed_inputs = number == (len(images) - 1) // size
        link = batches if linked else None
        result, _ = node.execute(
            pipe, chunk, num_inference_steps=1, meta_batch=link, unique_id="4", prompt=prompt(number)
        )
        parts.append(result)
    assert torch.equal(torch.cat(parts), whole)
    assert not part(PACK, "nodes.upscale")._sequences.get(batches)


def test_a_new_meta_batch_run_starts_anew(pipe) -> None:
    images, node, batches = pictures(2), UPSCALE(), manager()
    run = {"num_inference_steps": 1, "meta_batch": batches, "unique_id": "4"}
    first, _ = node.execute(pipe, images, **run, prompt=prompt(0))
    node.execute(pipe, images, **run, prompt=prompt(1))
    again, state = node.execute(pipe, images, **run, prompt=prompt(0))
    assert torch.equal(first, again) and state.frame_index == 2


def test_a_gap_between_meta_batches_is_said(pipe, caplog: pytest.LogCaptureFixture) -> None:
    node, batches = UPSCALE(), manager()
    run = {"num_inference_steps": 1, "meta_batch": batches, "unique_id": "4"}
    node.execute(pipe, pictures(1), **run, prompt=prompt(0))
    _, state = node.execute(pipe, pictures(1), **run, prompt=prompt(2))
    assert state.frame_index == 1
    assert "starting a new sequence" in caplog.text


def test_two_nodes_of_one_meta_batch_keep_their_own_sequences(pipe) -> None:
    batches, images = manager(), pictures(4)
    for number in (0, 1):
        for node_id, seed in (("4", 1), ("5", 2)):
            steps = prompt(number)
            steps["5"] = steps["4"]
            result, _ = UPSCALE().execute(
                pipe,
                images[2 * number : 2 * number + 2],
                num_inference_steps=1,
                seed=seed,
                meta_batch=batches,
                unique_id=node_id,
                prompt=steps,
            )
    whole, _ = UPSCALE().execute(pipe, images, num_inference_steps=1, seed=2)
    assert torch.equal(result, whole[2:])
