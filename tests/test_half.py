"""Half precision: near float32 where it holds, float32 where it does not."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import moving, shift_flow

from stream_diffvsr import CheckpointError, UpscaleOptions, from_pixels, load_pipeline
from stream_diffvsr.runtimes.torch.precision import UpcastAttention

# Three times what rounding the weights alone changes in the reference.
LIMITS = {torch.float16: 3 * 4.4e-3, torch.bfloat16: 3 * 4.6e-2}
FAST = UpscaleOptions(num_inference_steps=1)


@pytest.fixture(scope="module", params=list(LIMITS), ids=str)
def half(request, checkpoint):
    return load_pipeline(checkpoint, device="cpu", dtype=request.param, flow="none")


@pytest.mark.parametrize("name", ["A", "B", "C_resize"])
def test_golden_cases_within_three_times_the_rounding_of_weights(half, pipe, golden, name):
    case = load_file(golden / f"case_{name}.safetensors")
    lq = case["lq"] if "lq" in case else from_pixels(case["lq_u8"].permute(0, 3, 1, 2).float() / 255)
    states, worst = [None, None], 0.0
    for index in range(2):
        given = {"latents": case["init_latents"][index : index + 1]}
        if index:
            given["flow"] = case["flows"][index - 1 : index]
        results = [
            engine.process_frame(lq[index : index + 1].contiguous(), state, **given)
            for engine, state in zip((half, pipe), states, strict=True)
        ]
        states = [result.state for result in results]
        worst = max(worst, float((results[0].hq - results[1].hq).abs().max()))
    assert 1e-5 < worst <= LIMITS[half.dtype]
    assert "float32_since" not in states[0].metadata


def test_state_and_result_are_float32(half):
    result = half.process_frame(moving(1)[:1], options=FAST)
    assert (
        result.hq.dtype == result.state.previous_hq.dtype == result.state.previous_lq.dtype == torch.float32
    )
    assert {weight.dtype for weight in half.stages["unet"].parameters()} == {half.dtype}


@pytest.fixture(scope="module")
def overflowing(checkpoint, tmp_path_factory):
    """A checkpoint whose decoder leaves float16's range inside, and comes back into it.

    Rectified, so scaling one layer up and the next one down by as much changes nothing but what lies between.
    """
    folder = tmp_path_factory.mktemp("overflowing") / "tiny"
    shutil.copytree(checkpoint, folder)
    path = next((folder / "vae").glob("*.safetensors"))
    weights = load_file(path)
    last = max(
        int(key.split(".")[2]) for key in weights if key.startswith("decoder.layers") and ".conv.0" in key
    )
    for layer, factor in (("0", 2.0**17), ("2", 2.0**-17)):
        weights[f"decoder.layers.{last}.conv.{layer}.weight"] *= factor
    weights[f"decoder.layers.{last}.conv.0.bias"] *= 2.0**17
    save_file(weights, path)
    return folder


def test_overflow_is_redone_in_float32_and_said_once(overflowing, checkpoint, caplog):
    half = load_pipeline(overflowing, device="cpu", dtype="float16", flow=shift_flow)
    frames, before = moving(3), {k: v.clone() for k, v in half.stages["vae"].state_dict().items()}
    with caplog.at_level(logging.WARNING):
        hq, state = half(frames, FAST)
    assert torch.isfinite(hq).all()
    assert sum("recomputed in float32" in record.message for record in caplog.records) == 1
    assert state.metadata["float32_since"] == "0" and state.metadata["dtype"] == "float16"
    # The same computation with the rounded weights in float32 throughout.
    upcast = load_pipeline(overflowing, device="cpu", dtype="float32", flow=shift_flow)
    for name in ("unet", "controlnet", "vae"):
        upcast.stages[name].load_state_dict(half.stages[name].state_dict())
    torch.testing.assert_close(hq, upcast(frames, FAST)[0], atol=1e-5, rtol=0)
    after = half.stages["vae"].state_dict()
    assert all(
        value.dtype == torch.float16 and torch.equal(value, before[key]) for key, value in after.items()
    )


def test_weights_return_to_half_when_the_repetition_is_cancelled(overflowing):
    half = load_pipeline(overflowing, device="cpu", dtype="float16", flow="none")
    stages = []

    def on_step(stage, done, total):
        stages.append(stage)
        if stages.count("decode") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half.process_frame(moving(1)[:1], options=FAST, on_step=on_step)
    assert {weight.dtype for weight in half.stages["unet"].parameters()} == {torch.float16}


def test_continuity_with_repetitions(overflowing):
    half = load_pipeline(overflowing, device="cpu", dtype="float16", flow=shift_flow)
    frames = moving(3)
    whole, last = half(frames, FAST)
    first, state = half(frames[:2], FAST)
    second, end = half(frames[2:], FAST, state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert end.metadata == last.metadata


def test_damaged_weights_are_an_error(checkpoint):
    broken = load_pipeline(checkpoint, device="cpu", flow="none")
    with torch.no_grad():
        broken.vae.decoder.layers[0].weight.fill_(torch.inf)
    with pytest.raises(CheckpointError, match="NaN or infinite values even in float32"):
        broken.process_frame(moving(1)[:1], options=FAST)


def test_attention_is_upcast_where_the_configuration_asks(checkpoint, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(checkpoint, folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "upcast_attention": True}))
    asked, plain = (load_pipeline(f, device="cpu", flow="none") for f in (folder, checkpoint))
    kinds = {type(p) for p in asked.stages["unet"].attn_processors.values()}
    assert kinds == {UpcastAttention}
    assert UpcastAttention not in {type(p) for p in plain.stages["unet"].attn_processors.values()}
    same = [pipe.process_frame(moving(1)[:1], options=FAST).hq for pipe in (asked, plain)]
    torch.testing.assert_close(*same, atol=1e-5, rtol=0)
