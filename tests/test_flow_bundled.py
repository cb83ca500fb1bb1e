"""nano's own flow network: the shipped weights, and any others of its kind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import moving
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, estimate_memory, load_pipeline
from stream_diffvsr.errors import CheckpointError, ModelNotFoundError
from stream_diffvsr.flow import BundledFlow, open_flow
from stream_diffvsr.flow.bundled import (
    FlowNetwork,
    enlarged_and_reduced,
    least_squares,
    levels_for,
    near_change,
    sample_with_inside,
    window_differences,
)
from stream_diffvsr.flow.open import BUNDLED, open_bundled, open_flow_network
from stream_diffvsr.tensors import upsample
from stream_diffvsr.weights.folders import NANO

SCALE = 4


@pytest.fixture(scope="module")
def bundled() -> BundledFlow:
    return BundledFlow(open_bundled())


@pytest.fixture(scope="module")
def untrained() -> FlowNetwork:
    torch.manual_seed(3)
    return FlowNetwork(features=4, radius=1, widths=[6, 4], refinement=[4], hidden=2).requires_grad_(False)


def textured(height: int, width: int, seed: int = 0) -> Tensor:
    """Detail of every size, (1, 3, h, w) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(1, 3, height, width)
    for cell in (2, 4, 8, 24):
        coarse = torch.rand((1, 3, height // cell + 2, width // cell + 2), generator=generator) - 0.5
        picture += F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return picture.clamp(-1, 1)


def shifted(shift: tuple[float, float], height: int = 60, width: int = 80) -> tuple[Tensor, Tensor]:
    """LQ frames (current, previous) under a camera that pans; their flow (dx, dy) in LQ pixels is `shift`."""
    margin = 32
    picture = textured(2 * (height + 2 * margin), 2 * (width + 2 * margin))
    moved, _ = sample_with_inside(
        picture, torch.tensor(shift).mul(2).view(1, 2, 1, 1).expand(1, 2, *picture.shape[-2:])
    )
    return tuple(  # type: ignore[return-value]
        F.avg_pool2d(frame, 2)[..., margin:-margin, margin:-margin] for frame in (moved, picture)
    )


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (8, 200), (45, 61), (64, 48)])
def test_any_size(bundled: BundledFlow, size: tuple[int, int]):
    current, previous = moving(2, *size).split(1)
    flow = bundled(upsample(current), upsample(previous))
    assert flow.shape == (1, 2, SCALE * size[0], SCALE * size[1])
    assert flow.dtype == torch.float32
    assert torch.isfinite(flow).all()


@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_enlarging_and_reducing_at_once_are_the_same(height: int, width: int):
    lq = torch.rand(1, 3, height, width) * 3 - 1.5
    expected = F.avg_pool2d(upsample(lq), SCALE)
    torch.testing.assert_close(enlarged_and_reduced(lq), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (45, 61), (64, 48)])
@pytest.mark.parametrize("scale", [4.0, 2.0, 1.0])
@pytest.mark.parametrize("method", ["whole", "tiled"])
def test_lq_frames_need_not_be_enlarged(bundled: BundledFlow, size, scale: float, method: str):
    current, previous = moving(2, *size).split(1)
    enlarged = (
        F.interpolate(frame, scale_factor=scale, mode="bicubic") if scale > 1 else frame
        for frame in (current, previous)
    )
    expected = bundled.estimate(*enlarged, method)
    got = bundled.between(current, previous, scale, method)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_any_size_of_estimated_frames(untrained: FlowNetwork, height: int, width: int):
    """`flow_scale` may ask for sizes that are no multiple of anything."""
    current, previous = torch.rand(2, 1, 3, height, width)
    assert BundledFlow(untrained)(current, previous).shape == (1, 2, height, width)


@pytest.mark.parametrize(
    "shift", [(0.25, 0.0), (0.0, -0.5), (1.5, 1.0), (-3.0, 2.0), (6.25, -4.5), (0.0, 14.0)]
)
def test_a_pan_is_found(bundled: BundledFlow, shift: tuple[float, float]):
    """To a quarter of an LQ pixel and five percent, on average where both frames show the same."""
    current, previous = shifted(shift)
    flow = bundled(upsample(current), upsample(previous)) / SCALE
    edge = SCALE * 16
    error = (flow - torch.tensor(shift).view(1, 2, 1, 1)).norm(dim=1)[:, edge:-edge, edge:-edge]
    assert error.mean() < 0.1 + 0.05 * torch.tensor(shift).norm()


def test_the_pan_above_is_not_found_the_other_way(bundled: BundledFlow):
    current, previous = shifted((6.25, -4.5))
    flow = bundled(upsample(previous), upsample(current)) / SCALE
    assert (flow.mean((2, 3)) - torch.tensor([[-6.25, 4.5]])).norm() < 1.5


@pytest.mark.parametrize("size", [(8, 8), (45, 61), (90, 120)])
def test_a_still_scene_does_not_move(bundled: BundledFlow, size: tuple[int, int]):
    frame = upsample(textured(*size))
    assert not bundled(frame, frame.clone()).any()


def test_a_scene_of_one_colour_does_not_move(bundled: BundledFlow):
    for level in (-1.0, 0.0, 1.0):
        frame = torch.full((1, 3, 96, 128), level)
        assert not bundled(frame, frame.clone()).any()


def test_only_the_surroundings_of_a_change_may_move():
    previous = textured(100, 120)
    current = previous.clone()
    current[..., 20, 30] += 0.01
    near = near_change(current, previous)
    assert near[..., 4:36, 14:46].eq(1).all()
    assert not near[..., 70:, :].any()
    assert not near[..., 80:].any()
    assert not near_change(previous, previous).any()


def test_the_same_frames_give_the_same_flow(bundled: BundledFlow):
    current, previous = (upsample(frame) for frame in shifted((1.5, 1.0)))
    assert torch.equal(bundled(current, previous), bundled(current.clone(), previous.clone()))


def test_tiles_agree_with_the_whole(bundled: BundledFlow, monkeypatch: pytest.MonkeyPatch):
    from stream_diffvsr.flow import estimators

    monkeypatch.setattr(estimators, "TILE", 256)
    monkeypatch.setattr(estimators, "TILE_OVERLAP", 96)
    current, previous = (upsample(frame) for frame in shifted((0.5, -0.25), 80, 100))
    whole, tiled = (bundled.estimate(current, previous, method) for method in ("whole", "tiled"))
    assert not torch.equal(whole, tiled)
    assert (whole - tiled).norm(dim=1).mean() < 0.25


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_levels(height: int, width: int):
    levels = levels_for(height, width)
    assert 1 <= levels <= 6
    assert levels == 1 or min(height, width) / 2**levels >= 5


def test_the_difference_is_least_at_the_true_shift():
    previous = textured(30, 40)
    current = previous.roll((2, -1), (2, 3))  # what is at (y, x) was at (y - 2, x + 1)
    least = window_differences(current, previous, 3)[..., 6:-6, 6:-6].argmin(1)
    assert least.unique().tolist() == [(3 - 2) * 7 + 3 + 1]


def test_the_likely_shift_is_the_true_one(bundled: BundledFlow):
    previous = textured(30, 40)
    current = previous.roll((2, -1), (2, 3))
    shift = bundled.network.matcher(current, previous)[1][..., 6:-6, 6:-6]
    assert (shift - torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)).abs().mean() < 0.1


@pytest.mark.parametrize("shift", [(0.25, 0.0), (0.0, -0.4), (-0.3, 0.3)])
def test_least_squares_finds_small_shifts(shift: tuple[float, float]):
    """In pictures without the finest detail, whose gradients differences over two pixels underrate."""
    current, previous = (F.avg_pool2d(frame, 5, 1) for frame in shifted(shift))
    steps, firm = least_squares(current, previous, torch.ones(1, 1, *current.shape[-2:]))
    for window in steps.split(2, 1):
        assert (window.mean((2, 3)) - torch.tensor([shift])).abs().max() < 0.1
    assert firm.mean() > 0.5


def test_nothing_holds_what_is_flat_or_one_edge():
    flat = torch.zeros(1, 3, 20, 20)
    edge = flat.clone()
    edge[..., 10:] = 1
    for picture in (flat, edge):
        steps, firm = least_squares(picture, picture, torch.ones(1, 1, 20, 20))
        assert not steps.any()
        assert firm.max() < 0.05


def test_pull_is_exact():
    picture = torch.rand(1, 2, 6, 9)
    still, inside = sample_with_inside(picture, torch.zeros(1, 2, 6, 9))
    torch.testing.assert_close(still, picture)
    assert inside.all()
    flow = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 6, 9)
    moved, inside = sample_with_inside(picture, flow)
    torch.testing.assert_close(moved[..., 1:, :-2], picture[..., :-1, 2:])
    assert not inside[..., 0, :].any()
    assert not inside[..., -2:].any()


def test_it_is_small():
    assert BUNDLED.stat().st_size < 500_000
    assert sum(p.numel() for p in open_bundled().parameters()) == 100_951


def test_its_memory_is_counted(checkpoint: Path, tmp_path: Path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    needs = {}
    for name in ("bundled", "dis", "none"):
        (folder / "model_index.json").write_text(json.dumps({"flow": name}), encoding="utf-8")
        needs[name] = estimate_memory(64, 64, UpscaleOptions(), torch.float32, folder)
    assert needs["bundled"]["flow"] > needs["none"]["flow"] == 0
    assert needs["bundled"]["weights"] - needs["dis"]["weights"] == 4 * 100_951


def test_splitting_a_run_changes_nothing(checkpoint: Path):
    """Whole = in two parts = saved in between, bit for bit."""
    pipe = load_pipeline(checkpoint, device="cpu", flow="bundled")
    assert pipe.flow.name == "bundled"
    assert pipe.stages["flow"] is pipe.flow
    frames = moving(4, 17, 23)
    whole, end = pipe(frames)
    first, state = pipe(frames[:2])
    second, last = pipe(frames[2:], state=state)
    assert torch.equal(whole, torch.cat([first, second]))
    assert end.metadata["flow"] == last.metadata["flow"] == "bundled"
    assert not torch.equal(whole[1:], pipe(frames[1:], state=StreamDiffVSRState(frame_index=1))[0])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(tmp_path: Path, name: str):
    folder = shutil.copytree(BUNDLED.parent, tmp_path / "flow")
    (folder / name).unlink()
    with pytest.raises(ModelNotFoundError, match=r"nano's flow network not found: .*Reinstall"):
        open_bundled(folder / BUNDLED.name)


def test_a_damaged_file(tmp_path: Path):
    path = shutil.copytree(BUNDLED.parent, tmp_path / "flow") / BUNDLED.name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*copy or download it again"):
        open_bundled(path)


@pytest.mark.parametrize(
    ("change", "match"), [({"hidden": 8}, "has '"), ({"width": 8}, "does not describe a flow")]
)
def test_a_configuration_of_another_network(tmp_path: Path, change: dict[str, int], match: str):
    path = shutil.copytree(BUNDLED.parent, tmp_path / "flow") / BUNDLED.name
    config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    path.with_name("config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=match):
        open_bundled(path)


def test_nano_needs_no_opencv(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # importing it fails
    hq, state = load_pipeline("nano", device="cpu", flow="bundled")(moving(2, 16, 20))
    assert hq.shape == (2, 3, 64, 80) and state.metadata["flow"] == "bundled"


def test_dis_would_need_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"flow 'dis' needs OpenCV"):
        open_flow("dis", open_flow_network)


def test_the_weights_are_part_of_nano():
    assert BUNDLED.is_relative_to(NANO)
