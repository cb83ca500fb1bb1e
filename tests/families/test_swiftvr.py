"""SwiftVR on a tiny checkpoint: the recorded numbers of the published code, and what is its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stream_diffvsr.errors import (
    CheckpointError,
    IncompatibleInputError,
    ModelNotFoundError,
    StreamDiffVSRError,
    VRAMError,
)
from stream_diffvsr.families.swiftvr import method, transformer
from stream_diffvsr.families.swiftvr.autoencoder import converted
from stream_diffvsr.families.swiftvr.checkpoint import build, needed, open_swiftvr, problem, recognise
from stream_diffvsr.families.swiftvr.method import SwiftVR
from stream_diffvsr.families.swiftvr.options import SwiftVROptions
from stream_diffvsr.families.swiftvr.state import Memory
from stream_diffvsr.families.wan.taehv import Grow
from stream_diffvsr.families.wan.transformer import conditioning, rotation_angles
from stream_diffvsr.memory import LiveTensors
from stream_diffvsr.tensors import to_pixels
from stream_diffvsr.upscaler import State, Upscaled, ignore_progress

HERE = Path(__file__).parents[1] / "golden_swiftvr"
GOLDEN = Path(os.environ.get("STREAM_DIFFVSR_GOLDEN_SWIFTVR", HERE))
"""The trimmed copy, or a folder with all that was recorded."""
STEP = 4 if GOLDEN == HERE else 1
"""Of the rows and columns that were kept."""
FOLDER = HERE / "checkpoint"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
RUNS = [(case, run) for case in "AB" for run in MANIFEST["cases"][case]["runs"] if run != "stream_irreg"]
CPU = torch.device("cpu")
CLOSE = {"atol": 1e-4, "rtol": 0}
SHORT = SwiftVROptions(scale=1, clip_len=8)
"""First 12 frames, then 8 each."""


def opened(dtype: torch.dtype = torch.float32, folder: Path = FOLDER) -> SwiftVR:
    return open_swiftvr(folder, CPU, dtype)


@pytest.fixture(scope="module")
def upscaler() -> SwiftVR:
    return opened()


@pytest.fixture(scope="module")
def units() -> dict[str, Tensor]:
    return load_file(GOLDEN / "units.safetensors")


def clip(count: int, height: int = 40, width: int = 72, seed: int = 0) -> list[Tensor]:
    frames = torch.rand((count, 1, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return list(frames)


def pictures(results: list[Upscaled]) -> Tensor:
    return torch.cat([result.hq for result in results])


def same(results: list[Upscaled], others: list[Upscaled]) -> bool:
    return [r.index for r in results] == [r.index for r in others] and bool(
        torch.equal(pictures(results), pictures(others))
    )


# The recorded numbers


def recorded(case: str) -> tuple[dict[str, Tensor], list[Tensor], int]:
    """All tensors of a case, its LQ frames in model range, and the scale to run them with."""
    tensors = load_file(GOLDEN / f"case_{case}.safetensors")
    frames, scale = tensors["lq_u8"].permute(0, 3, 1, 2).float(), 4
    if case == "B":  # 4.3 times as high, 4.2 times as wide: enlarged before
        frames = F.interpolate(frames, size=(120, 150), mode="bilinear", align_corners=False)
        scale = 1
    return tensors, list((frames / 127.5 - 1).split(1)), scale


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """What the transformer got and what it made of it, call by call."""
    found, denoise = [], transformer.denoise

    def watched(network: Any, latents: Tensor, *args: Any) -> Tensor:
        restored = denoise(network, latents, *args)
        found.append((latents, restored))
        return restored

    monkeypatch.setattr(method, "denoise", watched)
    return found


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_golden(case, name, upscaler, calls):
    tensors, frames, scale = recorded(case)
    run = MANIFEST["cases"][case]["runs"][name]
    session = "steps" in run
    options = SwiftVROptions(
        scale=scale,
        protocol="session" if session else "file",
        clip_len=max(run["steps"]) if session else run["clip_len"],
        overlap=run["dit_overlap"],
    )
    count = sum(run["steps"]) if session else run["frames_used"]
    results = list(upscaler.stream(frames[:count], options))
    assert [result.index for result in results] == list(range(count))
    found = to_pixels(pictures(results))
    wanted = tensors.get(f"{name}.hq_sel")
    if wanted is not None:
        torch.testing.assert_close(found[run["sel"]][..., ::STEP, ::STEP], wanted, **CLOSE)
    compared = _compare_calls(name, tensors, calls)
    assert wanted is not None or compared or name not in ("file", "short5", "short1")
    if f"{name}.hq_u8" in tensors:
        levels = (found * 255).byte().permute(0, 2, 3, 1).int() - tensors[f"{name}.hq_u8"].int()
        assert levels.abs().max() <= 1 and (levels != 0).float().mean() < 1e-4


def _compare_calls(name: str, tensors: dict[str, Tensor], calls: list[tuple[Tensor, Tensor]]) -> int:
    """How many numbers of the transformer's calls were recorded; all of them are close."""
    compared = 0
    for index, (got, restored) in enumerate(calls):
        for kind in ("chunk", "call"):
            at = f"{name}.{kind}{index}"
            if f"{at}.dit_in" in tensors:
                torch.testing.assert_close(got[0], tensors[f"{at}.dit_in"], **CLOSE)
                compared += 1
            if f"{at}.pred" in tensors:
                torch.testing.assert_close((got - restored)[0], tensors[f"{at}.pred"], **CLOSE)
            if f"{at}.latents_hq" in tensors:
                wanted = tensors[f"{at}.latents_hq"].transpose(0, 1)
                torch.testing.assert_close(restored[0, :, -wanted.shape[1] :], wanted, **CLOSE)
    return compared


def test_golden_of_irregular_steps(upscaler, calls):
    """Groups of 4, 12, 8, and the last 2 frames filled up, as that session got them."""
    tensors, frames, scale = recorded("A")
    run = MANIFEST["cases"]["A"]["runs"]["stream_irreg"]
    options = SwiftVROptions(scale=scale, protocol="session", overlap=run["dit_overlap"])
    memory, results = Memory(), []
    for group in (frames[:4], frames[4:16], frames[16:24], [*frames[24:26], *[frames[25]] * 2]):
        seen = results and [frames[0]] * memory.ahead  # seen again, and not looked at
        hq, memory = upscaler.chunk([*seen, *group], memory, options, ignore_progress)
        results += hq
    assert len(results) == run["frames_out"]
    assert [got.shape[2] for got, _ in calls] == [call["latents_in_dit"] for call in run["dit_calls"]]
    assert _compare_calls("stream_irreg", tensors, calls) or "stream_irreg.hq_sel" not in tensors
    if "stream_irreg.hq_sel" in tensors:
        found = to_pixels(torch.cat(results))[run["sel"]][..., ::STEP, ::STEP]
        torch.testing.assert_close(found, tensors["stream_irreg.hq_sel"], **CLOSE)


def test_prepared_frames():
    for case in "AB":
        tensors, frames, scale = recorded(case)
        lq = frames[MANIFEST["cases"][case]["pre_idx"][-1]]
        size = scale * lq.shape[-2], scale * lq.shape[-1]
        torch.testing.assert_close(method.prepared(lq, size)[0], tensors["pre"][-1], **CLOSE)


def watch(modules: dict[str, nn.Module]) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """What modules return, call by call."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: found[name].append(out.clone()))
        for name, module in modules.items()
    ]
    return found, hooks


def test_units_of_the_transformer(units, upscaler):
    network: Any = upscaler.networks["transformer"]
    modules = {f"dit.block{index}": block for index, block in enumerate(network.blocks)}
    modules |= {f"{name}.attn1": block.attn1 for name, block in modules.items()}
    modules |= {"dit.block0.attn2": network.blocks[0].attn2, "dit.proj_out": network.proj_out}
    found, hooks = watch(modules)
    restored = transformer.denoise(network, units["dit.in"], upscaler.prompt, ignore_blocks)
    for hook in hooks:
        hook.remove()
    for name, (value,) in found.items():
        torch.testing.assert_close(value.reshape(units[name].shape), units[name], **CLOSE)
    torch.testing.assert_close(units["dit.in"] - restored, units["dit.out"], **CLOSE)
    sinusoid = network.condition_embedder.timesteps_proj(torch.tensor([1000.0]))
    for name, value in zip(
        ("temb", "timestep_proj", "text"), conditioning(network, upscaler.prompt, sinusoid), strict=True
    ):
        torch.testing.assert_close(value, units[f"dit.{name}"], **CLOSE)
    for angles, name in (
        (rotation_angles(3, 3, 5, 5, 20), "dit.rope"),
        (rotation_angles(2, 1, 1, 1030, 20), "rope_ext"),
    ):
        twice = angles.flatten(0, 2).repeat_interleave(2, 1)
        torch.testing.assert_close(twice.cos().float(), units[f"{name}_cos"], **CLOSE)
        torch.testing.assert_close(twice.sin().float(), units[f"{name}_sin"], **CLOSE)


def ignore_blocks(done: int, total: int) -> None:
    pass


def test_units_of_the_autoencoder(units, upscaler):
    _, frames, scale = recorded("A")
    encoder: Any = upscaler.networks["encoder"]
    decoder: Any = upscaler.networks["decoder"]
    modules = {f"enc.layer{index}": layer for index, layer in enumerate(encoder.encoder)}
    modules |= {
        f"dec.layer{index}": layer
        for index, layer in enumerate(decoder.decoder)
        if not isinstance(layer, (nn.Identity, Grow))  # these enlarge later than the published ones
    }
    found, hooks = watch(modules)
    size = scale * frames[0].shape[-2], scale * frames[0].shape[-1]
    large = torch.cat([method.prepared(frame, size) for frame in frames[:12]])
    past: dict[int, Tensor] = {}
    latents = torch.cat([encoder(four, past) for four in large.split(4)])
    torch.testing.assert_close(latents, units["enc.out"], **CLOSE)
    past = {}
    for latent in latents.split(1):
        list(decoder(latent, past))
    for hook in hooks:
        hook.remove()
    assert len(found) == 18 + 23 - 6
    for name, values in found.items():
        torch.testing.assert_close(torch.cat(values)[..., :6, :6], units[name], **CLOSE)
    crop = torch.cat(found["dec.layer22"])[..., :16, :16]
    torch.testing.assert_close(crop, units["dec.out"], **CLOSE)


def test_windows():
    table = MANIFEST["window_starts"]["table"]
    assert len(table) > 20
    for name, wanted in table.items():
        count, side = map(int, name.split("/"))
        assert [transformer.window_starts(count, side, shift) for shift in (0, side // 2)] == wanted


def test_which_window_a_token_takes_where_they_overlap():
    example = MANIFEST["window_example"]
    latents, rows, columns = example["grid_thw"]
    height, width = example["window"]
    tokens = torch.arange(latents * rows * columns).view(latents, rows, columns)
    for shifted, name in ((False, "even"), (True, "odd")):
        attention = transformer.WindowAttention((height, width), shifted)
        order = attention.corners(rows, columns)
        areas = [(slice(None), slice(r, r + height), slice(c, c + width)) for r, c in sorted(order)]
        assert torch.cat([tokens[area].flatten() for area in areas]).tolist() == example[f"gather_{name}"]
        owner, places = torch.full_like(tokens, -1), latents * height * width
        for corner in order:
            at = sorted(order).index(corner)
            owner[areas[at]] = torch.arange(at * places, (at + 1) * places).view(latents, height, width)
        assert owner.flatten().tolist() == example[f"owner_{name}"]


def test_one_picture_becomes_two(upscaler):
    """Folded into a 1x1 convolution, it equals repeating, and convolving in time over the two alone."""
    weight, x = torch.randn(5, 5, 3, 1, 1), torch.randn(1, 5, 4, 4)
    folded = converted({"decoder.13.conv3d.weight": weight})["decoder.13.conv.weight"]
    wanted = F.conv3d(torch.stack([x, x], 2), weight, padding=(1, 0, 0))
    torch.testing.assert_close(torch.stack(F.conv2d(x, folded).chunk(2, 1), 2), wanted)


@pytest.mark.parametrize(("name", "most", "mean"), [("bfloat16", 0.06, 4e-3), ("float16", 0.01, 1e-3)])
def test_half_precision(name, most, mean, upscaler):
    _, frames, scale = recorded("A")
    options, upscalers = SwiftVROptions(scale=scale, clip_len=8), (upscaler, opened(getattr(torch, name)))
    frames = [frame[..., :16, :24].contiguous() for frame in frames[:13]]
    exact, half = (to_pixels(pictures(list(each.stream(frames, options)))) for each in upscalers)
    difference = (exact - half).abs()
    assert half.dtype == torch.float32 and 0 < difference.max() < most and difference.mean() < mean


# The promises


@pytest.mark.parametrize(("spec", "wanted"), MANIFEST["chunk_specs"].items())
def test_chunks_as_published(spec, wanted, upscaler, calls):
    frames, clip_len = map(int, spec.split("/"))
    list(upscaler.stream(clip(frames, 8, 8), SwiftVROptions(scale=1, clip_len=clip_len)))
    sizes = {"first": clip_len // 4 + 1, "middle": clip_len // 4, "last": clip_len // 4 + 1}
    assert [got.shape[2] for got, _ in calls] == [sizes[kind] for kind, _, _ in wanted]


@pytest.mark.parametrize("protocol", ["file", "session"])
def test_as_many_out_as_in(protocol, upscaler):
    options = replace(SHORT, protocol=protocol, clip_len=4)
    for count in range(14):
        results = list(upscaler.stream(clip(count, 8, 8), options))
        assert [result.index for result in results] == list(range(count))


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["file", "session"])
@pytest.mark.parametrize("clip_len", [8, 12, 24])
def test_as_many_out_as_in_up_to_60(protocol, clip_len, upscaler):
    options = replace(SHORT, protocol=protocol, clip_len=clip_len)
    for count in range(1, 61):
        results = list(upscaler.stream(clip(count, 8, 8), options))
        assert [result.index for result in results] == list(range(count))


def test_frames_without_an_end_of_their_own_are_continued_by_the_last(upscaler):
    """N other than 4k + 1 gives what the published code gives where the last frame is repeated up to it."""
    frames = clip(15)
    expected = list(upscaler.stream([*frames, *[frames[-1]] * 2], SHORT))
    assert same(list(upscaler.stream(frames, SHORT)), expected[:15])


OPTIONS = [
    SHORT,
    replace(SHORT, overlap=1),
    replace(SHORT, protocol="session"),
    replace(SHORT, protocol="session", overlap=0),
    replace(SHORT, protocol="session", overlap=6),
]


@pytest.fixture(scope="module")
def whole(upscaler) -> list[Upscaled]:
    return list(upscaler.stream(clip(23), SHORT, State(index=7)))


@pytest.mark.parametrize(("options", "count"), [*((each, 23) for each in OPTIONS), (SHORT, 20)])
def test_a_run_split_at_borders_is_the_whole_run(options, count, upscaler, tmp_path):
    frames = clip(count)
    expected = list(upscaler.stream(frames, options, State(index=7)))
    assert [result.index for result in expected] == list(range(7, 7 + count))
    state, results, borders = State(index=7), [], 0
    while True:  # the state of each border is saved, and loaded by another session
        session = upscaler.session(options, state)
        for frame in frames[state.index - 7 :]:
            if got := session.push(frame):
                results += got
                break
        else:
            break
        border = session.state()
        assert border is not None and border.index == results[-1].index + 1
        border.save(tmp_path / "state.safetensors")
        state, borders = State.load(tmp_path / "state.safetensors"), borders + 1
    assert borders == 2
    assert same(results + session.finish(), expected)


def test_a_state_only_at_borders(upscaler):
    session = upscaler.session(SHORT, State(index=7))
    start = session.state()
    assert start is not None and start.index == 7 and not start.has_previous
    at = [count for count, frame in enumerate(clip(31, 8, 8), 1) if session.push(frame) and session.state()]
    assert at == [12, 20, 28]
    assert session.state() is None
    session.finish()
    assert session.state() is None
    with pytest.raises(IncompatibleInputError, match="the sequence has ended"):
        session.push(clip(1, 8, 8)[0])


def test_a_state_holds_its_own_memory(upscaler):
    """And no more than it says, so that nothing else is kept with it."""
    session = upscaler.session(SHORT)
    for frame in clip(12, 8, 8):
        session.push(frame)
    state = session.state()
    assert state is not None and len(state.tensors) == 1 + 9 + 9 + 1
    assert state.nbytes == sum(each.untyped_storage().nbytes() for each in state.tensors.values())


def test_a_scene_starts_anew(upscaler, whole):
    """Nothing but the number of its frames depends on where it lies in the video."""
    moved = list(upscaler.stream(clip(23), SHORT, State(index=1234)))
    assert [result.index - 1234 for result in moved] == [result.index - 7 for result in whole]
    assert torch.equal(pictures(moved), pictures(whole))


@pytest.mark.parametrize(("options", "first"), [(SwiftVROptions(scale=1), 28), (SHORT, 12)])
def test_no_frame_depends_on_what_lies_beyond_its_look_ahead(options, first, upscaler):
    """And frame 0 sees as far as that."""
    frames, others = clip(30, 8, 8), clip(30, 8, 8, seed=3)
    expected = list(upscaler.stream(frames, options))
    results = list(upscaler.stream(frames[:first] + others[first:], options))
    early = first - 3
    assert same(results[:early], expected[:early])
    assert not torch.equal(results[early].hq, expected[early].hq)
    late = next(iter(upscaler.stream(frames[: first - 1] + others[first - 1 :], options)))
    assert not torch.equal(late.hq, expected[0].hq)
    assert first - 1 <= upscaler.info.look_ahead and first <= upscaler.info.first


def test_any_length_in_constant_memory(upscaler):
    session, sizes, peaks = upscaler.session(SHORT), [], []
    for frames in (clip(12, 8, 8), *[clip(8, 8, 8)] * 5):
        with LiveTensors() as live:
            for frame in frames:
                session.push(frame)
        state = session.state()
        assert state is not None
        sizes.append(state.nbytes)
        peaks.append(live.peak)
    assert len(set(sizes[1:])) == 1 and len(set(peaks[2:])) == 1
    position = state.tensors["position"] + torch.tensor([0, 20_000, 0, 0])
    late = replace(state, index=state.index + 80_000, tensors={**state.tensors, "position": position})
    far, near = (upscaler.session(SHORT, each) for each in (late, state))
    results = [[r for frame in clip(11, 8, 8) for r in each.push(frame)] for each in (far, near)]
    assert [r.index - 80_000 for r in results[0]] == [r.index for r in results[1]]
    assert torch.equal(pictures(results[0]), pictures(results[1]))


# What does not fit


def test_errors_of_a_session(upscaler):
    session = upscaler.session(SHORT)
    session.push(clip(1)[0])
    with pytest.raises(IncompatibleInputError, match="size"):
        session.push(clip(1, 8, 8)[0])
    with pytest.raises(IncompatibleInputError, match="LQ frame"):
        session.push(clip(1)[0].double())
    with pytest.raises(IncompatibleInputError, match="no noise"):
        upscaler.session(noise=torch.zeros(1, 6, 3, 4, 4))
    for wrong in ({"scale": 5}, {"clip_len": 28}, {"clip_len": 6}, {"overlap": 7}, {"protocol": "live"}):
        with pytest.raises(IncompatibleInputError, match=next(iter(wrong))):
            SwiftVROptions(**wrong)


def test_errors_of_a_state(upscaler, caplog):
    session = upscaler.session(SHORT)
    for frame in clip(12, 8, 8):
        session.push(frame)
    state = session.state()
    assert state is not None
    with pytest.raises(IncompatibleInputError, match="size"):
        upscaler.session(SHORT, state).push(clip(1)[0])
    other = replace(state, provenance=replace(state.provenance, model="another"))
    with pytest.raises(IncompatibleInputError, match="the state belongs to model another"):
        upscaler.session(SHORT, other)
    for change in ({"scale": 2.0}, {"protocol": "session"}, {"clip_len": 12}):
        with pytest.raises(IncompatibleInputError, match=f"{next(iter(change))} .*state's frames"):
            upscaler.session(replace(SHORT, **change), state)
    with pytest.raises(IncompatibleInputError, match="not to swiftvr"):
        upscaler.session(SHORT, State("flashvsr", 3, {"latents": torch.zeros(1)}))
    upscaler.session(replace(SHORT, overlap=2), state)
    assert "not an exact continuation of frame 9: overlap: None -> 2" in caplog.text


def test_out_of_memory_is_said(upscaler, monkeypatch):
    denoise = transformer.denoise

    def runs_out(network, latents, *args):
        if latents.is_meta:  # counted for the message
            return denoise(network, latents, *args)
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(method, "denoise", runs_out)
    with pytest.raises(VRAMError, match="smaller clip_len"):
        list(upscaler.stream(clip(1), SHORT))


# Loading


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "swiftvr"))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_what_is_said_of_a_folder(folder, upscaler):
    assert recognise(folder) and problem(folder) is None and not recognise(folder.parent)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(needed([*files, "README.md"], folder)) == sorted(files)
    info = upscaler.info
    assert (info.family, info.scales, info.frame_by_frame) == ("swiftvr", None, False)
    assert info.model == opened(folder=folder).info.model
    assert set(upscaler.networks) == {"encoder", "transformer", "decoder"}
    assert upscaler.provenance((8, 8)).options["protocol"] == "file"


def test_pickled_weights_load_alike(folder, upscaler):
    torch.save(load_file(folder / WEIGHTS), folder / "transformer/diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    frames = clip(1, 8, 8)
    found, expected = (list(each.stream(frames, SHORT)) for each in (opened(folder=folder), upscaler))
    torch.testing.assert_close(pictures(found), pictures(expected), **CLOSE)


def test_a_pickle_with_code_is_refused(folder):
    torch.save({"weight": Path("nowhere")}, folder / "transformer/diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "more than weights" in str(problem(folder))


@pytest.mark.parametrize("shape", [(7, 24), (2, 7, 24), (1, 1, 7, 24)])
def test_the_first_prompt_is_used_whole(shape, folder, upscaler):
    path = folder / "prompt_embedding.safetensors"
    prompt = load_file(path)["prompt_emb"][0]
    assert torch.equal(upscaler.prompt, prompt[None]) and not prompt[-1].any()
    several = torch.cat([prompt[None], torch.ones(1, 7, 24)])[: shape[0] if len(shape) == 3 else 1]
    save_file({"prompt_emb": several.reshape(shape), "input_ids": torch.zeros(1, 7).long()}, path)
    assert torch.equal(opened(folder=folder).prompt, prompt[None])


def test_a_damaged_prompt_is_refused(folder):
    path = folder / "prompt_embedding.safetensors"
    save_file({"prompt_emb": torch.full((1, 7, 24), torch.nan)}, path)
    assert "NaN" in str(problem(folder))
    save_file({"context": torch.zeros(1, 7, 24)}, path)
    with pytest.raises(CheckpointError, match="prompt_emb"):
        opened(folder=folder)
    save_file({"prompt_emb": torch.zeros(1, 7, 25)}, path)
    with pytest.raises(CheckpointError, match="mixes parts"):
        opened(folder=folder)


@pytest.mark.parametrize(
    "name", [WEIGHTS, "reae.safetensors", "prompt_embedding.safetensors", "transformer/config.json"]
)
def test_what_a_folder_lacks_is_named(name, folder):
    (folder / name).unlink()
    assert recognise(folder) and "not found" in str(problem(folder))
    with pytest.raises(ModelNotFoundError, match="H-oliday"):
        opened(folder=folder)


@pytest.mark.parametrize("name", [WEIGHTS, "reae.safetensors"])
def test_keys_are_compared_strictly(name, folder):
    path = folder / name
    tensors = load_file(path)
    save_file(tensors | {"another.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"'another\.weight', which"):
        opened(folder=folder)
    for key in (min(tensors), max(tensors)):
        save_file({other: value for other, value in tensors.items() if other != key}, path)
        assert problem(folder) is not None
    save_file(tensors | {min(tensors): torch.zeros(3)}, path)
    assert problem(folder) is not None


def test_a_config_of_something_else_is_refused(folder):
    (folder / "transformer/config.json").write_text(json.dumps({"num_layers": "many"}))
    with pytest.raises(CheckpointError, match=r"config\.json does not belong to SwiftVR"):
        opened(folder=folder)


def test_an_old_diffusers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    with pytest.raises(StreamDiffVSRError, match="needs diffusers"):
        opened()


@pytest.fixture
def real() -> SwiftVR:
    """At its real size, on the meta device, in bfloat16."""
    files = json.loads((GOLDEN / "state_dict_manifest.json").read_text())["files"]
    autoencoder = {key: tuple(shape) for key, shape in files["reae.safetensors"]["tensors"].items()}
    networks = build(autoencoder, json.loads((GOLDEN / "real_transformer_config.json").read_text()))
    published = {key: tuple(shape) for key, shape in files[WEIGHTS]["tensors"].items()}
    assert shapes(networks["transformer"]) == published
    empty = {key: torch.empty(shape, device="meta") for key, shape in autoencoder.items()}
    got = {key: tuple(value.shape) for key, value in converted(empty).items()}
    assert got == shapes(networks["encoder"]) | shapes(networks["decoder"])
    return SwiftVR(
        networks={name: each.to(torch.bfloat16).requires_grad_(False) for name, each in networks.items()},
        prompt=torch.empty((1, 512, 4096), device="meta", dtype=torch.bfloat16),
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        model="real",
    )


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def test_real_networks_have_the_published_names_and_sizes(real):
    counts = {name: sum(p.numel() for p in each.parameters()) for name, each in real.networks.items()}
    assert counts["transformer"] == 4_999_787_712 and counts["encoder"] == 1_494_576
    assert counts["decoder"] == 40_946_364 - 1_494_576 - (256**2 + 128**2)  # two taps of three
    network: Any = real.networks["transformer"]
    assert network.blocks[1].attn1.processor.window == (16, 16) and network.blocks[1].attn1.processor.shifted


@pytest.mark.long
def test_memory_of_the_real_networks(real):
    """At 1080p: 1.4 GiB beside the weights (17 GB with them, 8 without most), and a state of 230 MiB."""
    size, options = (270, 480), SwiftVROptions()
    weights = {name: sum(p.nbytes for p in each.parameters()) for name, each in real.networks.items()}
    need = real.bytes_needed(size)
    assert 2**30 < need < 1.5 * 2**30 and need + sum(weights.values()) < 17e9
    del weights["transformer"]
    block = sum(weight.nbytes for weight in real.networks["transformer"].blocks[0].parameters())
    assert need + block + sum(weights.values()) < 3e9
    frames = [torch.empty(1, 3, *size, device="meta")] * 28
    _, memory = real.chunk(frames, Memory(), options, ignore_progress)
    assert 220 * 2**20 < memory.to_state(size, real.provenance(size)).nbytes < 240 * 2**20


def test_no_run_takes_more_than_bytes_needed(upscaler):
    frames = clip(23)
    with LiveTensors(upscaler.weights()) as live:
        for result in upscaler.stream(frames, SHORT):
            del result
    need = upscaler.bytes_needed((40, 72), SHORT)
    assert need / 1.5 < live.peak < 1.1 * need
