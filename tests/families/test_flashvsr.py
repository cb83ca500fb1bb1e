"""FlashVSR on a tiny checkpoint: the recorded numbers of the published code, and what is its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr.errors import CheckpointError, IncompatibleInputError, ModelNotFoundError, VRAMError
from stream_diffvsr.families.flashvsr import attention, checkpoint, transformer
from stream_diffvsr.families.flashvsr.checkpoint import build, converted, open_flashvsr, problem, recognise
from stream_diffvsr.families.flashvsr.method import FlashVSR
from stream_diffvsr.families.flashvsr.options import FlashVSROptions
from stream_diffvsr.families.flashvsr.pictures import enlarge
from stream_diffvsr.fidelity import adain
from stream_diffvsr.memory import LiveTensors
from stream_diffvsr.upscaler import State, Upscaled

GOLDEN = Path(__file__).parents[1] / "golden_flashvsr"
FOLDER = GOLDEN / "checkpoint"
CASES = json.loads((GOLDEN / "cases.json").read_text())
CPU = torch.device("cpu")
CLOSE = {"atol": 1e-4, "rtol": 0}


def opened(version: str = "v1.1", dtype: torch.dtype = torch.float32, folder: Path = FOLDER) -> FlashVSR:
    return open_flashvsr(folder, version, CPU, dtype)


@pytest.fixture(scope="module")
def upscalers() -> dict[str, FlashVSR]:
    return {version: opened(version) for version in ("v1", "v1.1")}


@pytest.fixture(scope="module")
def upscaler(upscalers) -> FlashVSR:
    return upscalers["v1.1"]


@pytest.fixture(scope="module")
def units() -> dict[str, Tensor]:
    return load_file(GOLDEN / "units.safetensors")


def clip(count: int, height: int = 16, width: int = 24, seed: int = 0) -> list[Tensor]:
    frames = torch.rand((count, 1, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return list(frames)


def pictures(results: list[Upscaled]) -> Tensor:
    return torch.cat([result.hq for result in results])


def same(results: list[Upscaled], others: list[Upscaled]) -> bool:
    return [r.index for r in results] == [r.index for r in others] and bool(
        torch.equal(pictures(results), pictures(others))
    )


# The recorded numbers


def prepared(case: dict[str, Any], lq: Tensor) -> list[Tensor]:
    """As the published code prepares 8-bit pictures: four times as large, the middle of multiples of 128."""
    frames = []
    for picture in lq.numpy():
        image = Image.fromarray(picture)
        image = image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)
        left, top = (image.width - case["width"]) // 2, (image.height - case["height"]) // 2
        image = image.crop((left, top, left + case["width"], top + case["height"]))
        frames.append(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    return frames


def recorded(name: str) -> tuple[dict[str, Any], dict[str, Tensor], list[Tensor], Tensor, FlashVSROptions]:
    case, tensors = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    frames = prepared(case, load_file(GOLDEN / f"{name[:6]}.safetensors")["lq_u8"])
    height, width = case["height"], case["width"]
    shape = 1, 16, (case["num_frames"] - 1) // 4, height // 8, width // 8
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(case["noise_seed"]))
    sparse = case["sparse_ratio"]
    if not isinstance(sparse, float):  # the ratio that follows from it was recorded
        sparse = case["topk_ratio"] * height * width / (768 * 1280)
    options = FlashVSROptions(scale=1, sparse_ratio=sparse, local_range=case["local_range"])
    # Frame 38 of case B only tells what the third chunk looks ahead at; its own result takes a fourth chunk.
    noise = torch.cat([noise, noise[:, :, :2]], 2)
    return case, tensors, frames, noise, options


@pytest.mark.parametrize("name", CASES)
def test_golden(name, upscalers, monkeypatch):
    case, expected, frames, noise, options = recorded(name)
    latents, masks = [], []
    denoise, select = transformer.denoise, attention.select

    def watched(*args, **kwargs):
        latents.append(denoise(*args, **kwargs))
        return latents[-1]

    def selected(*args):
        masks.append(select(*args))
        return masks[-1]

    monkeypatch.setattr("stream_diffvsr.families.flashvsr.method.denoise", watched)
    monkeypatch.setattr(attention, "select", selected)
    upscaler = upscalers["v1" if case["lq_version"] == "v1" else "v1.1"]
    results = list(upscaler.stream(frames, replace(options, colour_fix="none"), noise=noise))
    assert [result.index for result in results] == list(range(len(frames)))
    results, latents = results[:37], latents[:3]
    for index, mask in enumerate(masks[:9]):
        assert torch.equal(mask, expected[f"mask_c{index // 3}_b{index % 3}"].bool())
    found = torch.cat([each for each, _ in latents], 2)[..., ::4, ::4]
    wanted = expected["latents"] if "latents" in expected else expected["latents_last"]
    torch.testing.assert_close(found[:, :, -wanted.shape[2] :], wanted, **CLOSE)
    if "tiny_out_s9" in expected:
        _compare_frames(results, frames, expected, "tiny")


def _compare_frames(results, frames, expected, decoder):
    decoded = pictures(results).transpose(0, 1)[:, ::4, ::18, ::18]
    recorded = expected[f"{decoder}_decoded_s9"]
    torch.testing.assert_close(decoded, recorded[:, : decoded.shape[1]], **CLOSE)
    fixed = torch.cat([adain(r.hq, lq).clamp(-1, 1) for r, lq in zip(results, frames, strict=False)])
    fixed = fixed.transpose(0, 1)[:, ::4, ::18, ::18]
    torch.testing.assert_close(fixed, expected[f"{decoder}_out_s9"][:, : fixed.shape[1]], **CLOSE)


LONG = [
    pytest.param("case_A", 37, marks=pytest.mark.long),
    pytest.param("case_B", 33, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "count"), [("case_B", 25), *LONG])
def test_golden_full_decoder(name, count, upscalers):
    """Slow on a CPU: a scene's first chunk by default."""
    case, expected, frames, noise, options = recorded(name)
    upscaler = upscalers["v1" if case["lq_version"] == "v1" else "v1.1"]
    options = replace(options, decoder="full", colour_fix="none")
    session = upscaler.session(options, noise=noise)
    results = [result for frame in frames[:count] for result in session.push(frame)]
    results += session.finish() if name == "case_A" else []
    _compare_frames(results, frames, expected, "full")


def test_colour_is_fixed_by_default(upscaler):
    frames = clip(3, 8, 8)
    options = FlashVSROptions(scale=2)
    plain = list(upscaler.stream(frames, replace(options, colour_fix="none")))
    for fixed, raw, lq in zip(upscaler.stream(frames, options), plain, frames, strict=True):
        assert torch.equal(fixed.hq, adain(raw.hq, enlarge(lq, fixed.hq.shape[-2:])).clamp(-1, 1))


def test_units(units, upscaler):
    for rows, columns, reach in ((6, 10, 11), (5, 7, 3), (4, 4, 4), (13, 13, 9)):
        expected = units[f"local_mask_{rows}x{columns}_r{reach}"].bool()
        assert torch.equal(attention.neighbours(rows, columns, reach), expected)
    order = attention.to_windows(torch.arange(4 * 16 * 24).view(4, 16, 24))
    assert torch.equal(order.view(12, 128).int(), units["window_order_f4_h16_w24"])
    q, k = (units[f"draft_{name}_mean"].view(-1, 2, 32).transpose(0, 1)[:, :, None] for name in "qk")
    for count in (0, 1, 5, 17, 60, 143, 500):
        selection = attention.Selection(attention.neighbours(2, 3, 3), count)
        assert torch.equal(attention.select(q, k, selection), units[f"draft_mask_k{count}"].bool())
    time, modulation, _ = transformer._conditions(upscaler.networks["transformer"], upscaler.prompt)
    # A linear layer rounds differently from one processor to another.
    torch.testing.assert_close((time, modulation), (units["time_t"], units["time_mod"]), rtol=0, atol=5e-7)
    places = torch.arange(6)
    angles = transformer.rotation_angles(6, 6, 6, 4, 32)[places, places, places]
    torch.testing.assert_close(angles.cos().float(), units["rope_cos_f4_h3_w5_rows"])
    torch.testing.assert_close(angles.sin().float(), units["rope_sin_f4_h3_w5_rows"])
    hq, lq = units["color_hq"][:, :, 0], units["color_lq"][:, :, 0]
    torch.testing.assert_close(adain(hq, lq).clamp(-1, 1), units["color_adain"][:, :, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_close_by_mean(dtype, bound, upscaler, monkeypatch):
    """By mean, since a window that is selected or not makes a large difference in one place."""
    latents, denoise = [], transformer.denoise

    def watched(*args, **kwargs):
        latents.append(denoise(*args, **kwargs)[0])
        raise KeyboardInterrupt

    monkeypatch.setattr("stream_diffvsr.families.flashvsr.method.denoise", watched)
    for each in (upscaler, opened(dtype=dtype)):
        with pytest.raises(KeyboardInterrupt):
            list(each.stream(clip(21, 32, 64)))
    assert latents[1].dtype == torch.float32
    assert 0 < (latents[1] - latents[0]).abs().mean() < bound


def test_enlarged_as_8_bit_pictures_are():
    lq = torch.randint(90, 170, (24, 40, 3), dtype=torch.uint8)  # without overshoot, which Pillow cuts twice
    large = Image.fromarray(lq.numpy()).resize((100, 60), Image.Resampling.BICUBIC)
    ours = (enlarge(lq.permute(2, 0, 1)[None] / 127.5 - 1, (60, 100)) + 1) * 127.5
    difference = ours[0].permute(1, 2, 0) - torch.from_numpy(np.array(large))
    assert difference.abs().max() < 2 and difference.abs().mean() < 0.5


# Attention


def test_gathered_windows_equal_a_dense_mask_and_empty_ones_give_zero():
    q, k, v = (torch.randn(2, count, 128, 16) for count in (6, 12, 12))
    selected = torch.rand(2, 6, 12) > 0.6
    selected[0, 2], selected[:, 4] = False, False
    found = attention.attend(q, k, v, selected)
    mask = selected.repeat_interleave(128, 1).repeat_interleave(128, 2)
    dense = F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (q, k, v)), attn_mask=mask)
    dense = dense.view_as(q).masked_fill(~selected.any(-1)[..., None, None], 0)
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=0)
    assert not found[0, 2].any() and not found[:, 4].any() and found[1, 2].any()


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_selects_the_same():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (torch.randn(2, count, 128, 16) for count in (2, 4, 4))
    selected = torch.rand(2, 2, 4) > 0.5
    selected[0, 1] = False
    found = attention._by_blocks(flex_attention, q, k, v, selected)
    torch.testing.assert_close(found, attention.gathered(q, k, v, selected), atol=1e-5, rtol=0)


# The promises


@pytest.mark.long
def test_as_many_out_as_in_up_to_60(upscaler):
    for count in range(1, 61):
        results = list(upscaler.stream(clip(count, 8, 8), FlashVSROptions(scale=1)))
        assert [result.index for result in results] == list(range(count))


@pytest.mark.parametrize("version", ["v1", pytest.param("v1.1", marks=pytest.mark.long)])
@pytest.mark.parametrize("decoder", ["tiny", pytest.param("full", marks=pytest.mark.long)])
def test_a_run_split_at_borders_is_the_whole_run(version, decoder, upscalers, tmp_path):
    upscaler, frames = upscalers[version], clip(34, 8, 8)
    options = FlashVSROptions(seed=5, scale=1, decoder=decoder)
    expected = list(upscaler.stream(frames, options, State(index=7)))
    state, results = State(index=7), []
    while state.index < 7 + 29:  # the state of each border is saved, and loaded by another session
        session = upscaler.session(options, state)
        for frame in frames[state.index - 7 :]:
            if got := session.push(frame):
                results += got
                break
        border = session.state()
        assert border is not None and border.index == results[-1].index + 1
        border.save(tmp_path / "state.safetensors")
        state = State.load(tmp_path / "state.safetensors")
    results += list(upscaler.stream(frames[state.index - 7 :], options, state))
    assert same(results, expected)


def test_the_scene_and_the_seed_decide_the_noise(upscaler):
    frames = clip(1)
    one = list(upscaler.stream(frames, FlashVSROptions(seed=5), State(index=7)))
    moved = list(upscaler.stream(frames, FlashVSROptions(seed=4), State(index=8)))
    other = list(upscaler.stream(frames, FlashVSROptions(seed=5), State(index=8)))
    assert torch.equal(one[0].hq, moved[0].hq) and not torch.equal(one[0].hq, other[0].hq)


def test_any_length_in_constant_memory(upscaler):
    """Where the published code ends, at frame 4093, nothing ends here."""
    options, frames = FlashVSROptions(scale=1), clip(25, 8, 8)
    session = upscaler.session(options)
    for frame in frames:
        session.push(frame)
    first = session.state()
    assert first is not None
    position = first.tensors["position"] + torch.tensor([0, 20_000, 0, 0])
    late = replace(first, index=80_021, tensors={**first.tensors, "position": position})
    session = upscaler.session(options, late)
    results = [result for frame in frames[-12:] for result in session.push(frame)]
    assert [result.index for result in results] == list(range(80_021, 80_029))
    after = session.state()
    assert after is not None and after.nbytes == first.nbytes


def test_padding_does_not_colour(upscaler):
    """The statistics of the colour fix are those of the frame, not of what was padded to it."""
    lq = clip(1, 30, 50)[0]
    hq = next(iter(upscaler.stream([lq], FlashVSROptions(scale=2)))).hq
    inside = (hq.abs() < 1).float().mean()
    assert inside > 0.5
    torch.testing.assert_close(hq.mean((2, 3)), enlarge(lq, (60, 100)).mean((2, 3)), atol=0.05, rtol=0)


# What does not fit


def test_errors_of_a_session(upscaler):
    session = upscaler.session(FlashVSROptions(scale=1))
    session.push(clip(1)[0])
    with pytest.raises(IncompatibleInputError, match="size"):
        session.push(clip(1, 8, 8)[0])
    with pytest.raises(IncompatibleInputError, match="LQ frame"):
        session.push(clip(1)[0].double())
    for shape in ((1, 4, 6, 16, 16), (1, 16, 16, 16)):
        with pytest.raises(IncompatibleInputError, match="noise must have the shape"):
            upscaler.session(noise=torch.zeros(shape))
    with pytest.raises(IncompatibleInputError, match="at least 6 latents of 16 x 16"):
        list(upscaler.stream(clip(1, 8, 8), noise=torch.zeros(1, 16, 5, 16, 16)))
    with pytest.raises(IncompatibleInputError, match="scale"):
        FlashVSROptions(scale=5)


def test_errors_of_a_state(upscaler, upscalers, caplog):
    options = FlashVSROptions(scale=1)
    session = upscaler.session(options)
    for frame in clip(25, 8, 8):
        session.push(frame)
    state = session.state()
    assert state is not None
    with pytest.raises(IncompatibleInputError, match="size"):
        upscaler.session(options, state).push(clip(1)[0])
    with pytest.raises(IncompatibleInputError, match="model"):
        upscalers["v1"].session(options, state)
    with pytest.raises(IncompatibleInputError, match="decoder must be 'tiny'"):
        upscaler.session(replace(options, decoder="full"), state)
    with pytest.raises(IncompatibleInputError, match="scale must be 1"):
        upscaler.session(FlashVSROptions(), state)
    with pytest.raises(IncompatibleInputError, match="not to flashvsr"):
        upscaler.session(options, State("swiftvr", 3, {"latents": torch.zeros(1)}))
    upscaler.session(replace(options, sparse_ratio=1.5), state)
    assert "not an exact continuation of frame 21: sparse_ratio: 2.0 -> 1.5" in caplog.text


def test_out_of_memory_is_said(upscaler, monkeypatch):
    denoise = transformer.denoise

    def runs_out(network, noise, *args, **kwargs):
        if noise.is_meta:  # counted for the message
            return denoise(network, noise, *args, **kwargs)
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("stream_diffvsr.families.flashvsr.method.denoise", runs_out)
    with pytest.raises(VRAMError, match="smaller frames"):
        list(upscaler.stream(clip(1, 8, 8)))


# Loading


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "flashvsr"))


def test_published_pickles_and_renamed_copies_load_alike(folder, upscaler):
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"num_heads": 2}))
    for name, file in (("LQ_proj_in", "ckpt"), ("TCDecoder", "ckpt"), ("Wan2.1_VAE", "pth")):
        path = folder / f"{name}.safetensors"
        torch.save(load_file(path), folder / f"{name}.{file}")
        path.unlink()
    prompt = folder / "posi_prompt.safetensors"
    torch.save(load_file(prompt)["context"], folder / "posi_prompt.pth")
    prompt.unlink()
    name = "diffusion_pytorch_model_streaming_dmd.safetensors"
    (folder / name).rename(folder / "FlashVSR.safetensors")
    frames = clip(1, 8, 8)
    assert recognise(folder) and problem(folder) is None
    loaded = opened(folder=folder)
    assert same(list(loaded.stream(frames)), list(upscaler.stream(frames)))


def test_a_copy_whose_name_tells_v1_1_is_not_opened_as_v1(folder):
    name = "diffusion_pytorch_model_streaming_dmd.safetensors"
    (folder / name).rename(folder / "FlashVSR1_1.safetensors")
    with pytest.raises(IncompatibleInputError, match=r"FlashVSR1_1.* is a file of version 'v1\.1'"):
        opened(folder=folder, version="v1")


def test_a_projection_in_the_transformers_file(folder, upscaler):
    path = folder / "diffusion_pytorch_model_streaming_dmd.safetensors"
    projection = folder / "LQ_proj_in.safetensors"
    merged = load_file(path) | {f"LQ_proj_in.{key}": value for key, value in load_file(projection).items()}
    save_file(merged, path)
    projection.unlink()
    frames = clip(1, 8, 8)
    found, expected = (pictures(list(each.stream(frames))) for each in (opened(folder=folder), upscaler))
    torch.testing.assert_close(found, expected, **CLOSE)  # weights lie at other places in the mapped file


def test_version_is_told_and_never_guessed(upscalers):
    for version in (None, "v2"):
        with pytest.raises(IncompatibleInputError, match=r"version must be 'v1' or 'v1\.1'"):
            open_flashvsr(FOLDER, version, CPU, torch.float32)
    assert upscalers["v1"].info.model != upscalers["v1.1"].info.model


def test_a_prompt_with_nan_is_refused(folder):
    save_file({"context": torch.full((1, 7, 24), torch.nan)}, folder / "posi_prompt.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        opened(folder=folder)
    assert "NaN" in str(problem(folder))


def test_what_a_folder_lacks_is_named(folder):
    (folder / "posi_prompt.safetensors").unlink()
    assert "code repository" in str(problem(folder))
    with pytest.raises(ModelNotFoundError, match="prompt not found"):
        opened(folder=folder)
    assert not recognise(folder.parent)


def test_one_decoder_is_enough(folder):
    (folder / "Wan2.1_VAE.safetensors").unlink()
    upscaler = opened(folder=folder)
    with pytest.raises(IncompatibleInputError, match="decoder 'tiny'"):
        upscaler.session(FlashVSROptions(decoder="full"))


@pytest.mark.parametrize("name", ["LQ_proj_in", "TCDecoder", "diffusion_pytorch_model_streaming_dmd"])
def test_keys_are_compared_strictly(name, folder):
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"another.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"'another\.weight', which"):
        opened(folder=folder)
    del tensors[min(tensors)]
    save_file(tensors, path)
    assert problem(folder) is not None


@pytest.fixture
def real() -> FlashVSR:
    """At its real size, on the meta device, in bfloat16."""
    shapes = json.loads((GOLDEN / "real_shapes.json").read_text())
    shapes = {part: {key: tuple(shape) for key, shape in each.items()} for part, each in shapes.items()}
    networks = build(shapes, "v1.1")
    for name, network in networks.items():
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes[name].items()}
        got = {key: tuple(value.shape) for key, value in converted(name, empty).items()}
        assert got == {key: tuple(value.shape) for key, value in network.state_dict().items()}
    prompt = torch.empty((1, 512, 4096), device="meta", dtype=torch.bfloat16)
    networks = {name: network.to(torch.bfloat16).requires_grad_(False) for name, network in networks.items()}
    return FlashVSR(
        networks=networks, prompt=prompt, device=torch.device("meta"), dtype=torch.bfloat16, model="real"
    )


USED = {"transformer": 1_418_996_800, "projection": 287_845_888, "tiny": 45_338_371}


def test_real_networks_have_the_published_names_and_sizes(real):
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in real.networks.items()}
    assert counts == {**USED, "full": 126_892_531}


@pytest.mark.long
def test_memory_of_the_real_networks(real):
    """1280 x 768 with the tiny decoder: 14 GB, and far below 8 with offloading."""
    size = (192, 320)
    del real.networks["full"]
    block = sum(weight.nbytes for weight in real.networks["transformer"].blocks[0].parameters())
    assert real.bytes_needed(size) + 2 * sum(USED.values()) < 14e9
    beside = 2 * (USED["projection"] + USED["tiny"]) + block
    assert real.bytes_needed(size, FlashVSROptions(memory_plan="offload")) + beside < 3e9


def test_offloading_changes_nothing_but_memory(upscaler, tmp_path):
    """What is remembered of earlier pairs is not on the device, and comes back as it was."""
    frames, options = clip(33, 8, 8), FlashVSROptions(scale=1)
    whole = list(upscaler.stream(frames, options))
    session = upscaler.session(replace(options, memory_plan="offload"))
    results = [result for frame in frames[:25] for result in session.push(frame)]
    state = session.state()
    assert state.provenance.parts == "blocks that are not running are kept in system memory"
    rest = list(upscaler.stream(frames[21:], options, state))
    assert same(results + rest, whole)
    pairs = sum(value.nbytes for name, value in state.tensors.items() if name[:4] in ("keys", "valu"))
    needs = [upscaler.bytes_needed((8, 8), replace(options, memory_plan=p)) for p in ("whole", "offload")]
    assert needs[0] - needs[1] > 0.9 * pairs > 0


@pytest.mark.cuda
def test_offloaded_pairs_come_back_to_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    frames, found = clip(33, 32, 32), []
    for plan in ("whole", "offload"):
        upscaler = open_flashvsr(FOLDER, "v1.1", torch.device("cuda"), torch.float32)
        session = upscaler.session(FlashVSROptions(memory_plan=plan))
        found.append([each for frame in frames for each in session.push(frame)])
        state = session.state()
        assert state.tensors["keys.0.0"].is_cuda == (plan == "whole")
    assert same(*found)


def test_no_run_takes_more_than_bytes_needed(upscaler):
    options = FlashVSROptions(scale=4, sparse_ratio=0.4)
    with LiveTensors(upscaler.weights()) as live:
        for result in upscaler.stream(clip(29, 32, 64), options):
            del result
    assert live.peak < 1.1 * upscaler.bytes_needed((32, 64), options)


def test_names(upscaler):
    assert set(checkpoint.FILES) - {"prompt"} == set(upscaler.networks)
    assert upscaler.info.frame_by_frame is False and upscaler.info.scales is None
