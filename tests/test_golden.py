"""The reference's recorded numbers: at most 1e-4 away, in float32 on a CPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, from_pixels, load_pipeline
from stream_diffvsr.families.diffvsr.denoise import Schedule, noise
from stream_diffvsr.families.diffvsr.plan import BAND_ROWS, Plan, plan_details
from stream_diffvsr.families.diffvsr.prompt import encode, token_ids
from stream_diffvsr.families.diffvsr.vae import POOL
from stream_diffvsr.flow import RaftFlow
from stream_diffvsr.flow.warp import warp
from stream_diffvsr.tensors import upsample

TOLERANCE = 1e-4

VARIANTS = {
    "steps1": {"num_inference_steps": 1},
    "steps8": {"num_inference_steps": 8},
    "cnscale05": {"controlnet_conditioning_scale": 0.5},
    "cgend05": {"control_guidance_end": 0.5},
    "trailing4": {"timestep_spacing": "trailing"},
    "trailing1": {"timestep_spacing": "trailing", "num_inference_steps": 1},
}


def lq_of(case: dict[str, Tensor]) -> Tensor:
    """LQ frames (N, 3, h, w) in model range."""
    if "lq" in case:
        return case["lq"]
    return from_pixels(case["lq_u8"].permute(0, 3, 1, 2).float() / 255).contiguous()


def upscale(
    pipe, case: dict[str, Tensor], options: UpscaleOptions, frames: int, flows=None, plan: Plan | None = None
) -> Tensor:
    """All frames of a recorded case with its noise and, unless the pipe estimates it, its flow."""
    lq, state, results = lq_of(case), None, []
    if plan is not None:
        state = StreamDiffVSRState(metadata=plan_details(plan, lq.shape[-2:]))
    for index in range(frames):
        flow = flows[index - 1 : index] if flows is not None and index else None
        latents = case["init_latents"][index : index + 1]
        result = pipe.process_frame(lq[index : index + 1], state, options, latents=latents, flow=flow)
        state = result.state
        results.append(result.hq)
    if plan is not None:
        assert Plan.from_json(state.metadata["plan"]).rows == plan.rows
    return torch.cat(results)


def assert_near(got: Tensor, recorded: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare with what was kept of a recording: its last frames, every n-th row."""
    got = got[-len(recorded) :, :, :: got.shape[-2] // recorded.shape[-2]]
    error = (got - recorded).abs()
    assert error.max() <= tolerance, f"max {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize("name", ["A", "B", "C_resize"])
def test_case(pipe, golden: Path, name: str):
    case = load_file(golden / f"case_{name}.safetensors")
    got = upscale(pipe, case, UpscaleOptions(), len(case["init_latents"]), case["flows"])
    assert_near(got, case["hq"])


@pytest.mark.parametrize("plan", [Plan(rows=4), Plan(rows=28), Plan(rows=BAND_ROWS)], ids=str)
@pytest.mark.parametrize("name", ["A", "B", "C_resize"])
def test_case_in_bands(pipe, golden: Path, name: str, plan: Plan):
    """Exact plans keep the recorded numbers, within the same tolerance."""
    case = load_file(golden / f"case_{name}.safetensors")
    got = upscale(pipe, case, UpscaleOptions(), 2, case["flows"], plan)
    assert_near(got, case["hq"][: len(got)])


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(pipe, golden: Path, name: str):
    case = load_file(golden / "case_A.safetensors")
    recorded = load_file(golden / "case_A_variants.safetensors")[f"{name}.hq"]
    got = upscale(pipe, case, UpscaleOptions(**VARIANTS[name]), 2, case["flows"])
    assert_near(got, recorded)


def test_every_recorded_variant_is_tested(golden: Path):
    manifest = json.loads((golden / "manifest.json").read_text())
    assert set(manifest["cases"]["case_A_variants"]["variants"]) == set(VARIANTS)


@pytest.fixture(scope="module")
def raft(golden: Path) -> RaftFlow:
    from torchvision.models.optical_flow import raft_large

    recipe = json.loads((golden / "manifest.json").read_text())["cases"]["case_R_raft"]["raft"]
    torch.manual_seed(4242)
    network = raft_large(weights=None, progress=False).eval()
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.numpy().tobytes())
    assert digest.hexdigest() == recipe["sha256_of_state_dict"]
    return RaftFlow(network, "raft_large")


@pytest.mark.parametrize("plan", [Plan(), Plan("linear"), Plan("linear", 32)], ids=str)
def test_raft_case(checkpoint: Path, golden: Path, raft: RaftFlow, plan: Plan):
    case = load_file(golden / "case_R_raft.safetensors")
    lq_up = upsample(lq_of(case))
    with torch.no_grad():
        for index in range(len(case["hq"]) - 1):
            flow = raft.estimate(lq_up[index + 1 : index + 2], lq_up[index : index + 1], plan.flow)
            assert (flow - case["flows"][index : index + 1]).abs().max() <= 1e-3
    pipe = load_pipeline(checkpoint, device="cpu", flow=raft)
    assert_near(upscale(pipe, case, UpscaleOptions(), len(case["hq"]), plan=plan), case["hq"])


@pytest.fixture(scope="module")
def units(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "units.safetensors")


def test_warp_unit(units):
    torch.testing.assert_close(
        warp(units["warp.x"], units["warp.flow"]), units["warp.out"], atol=1e-5, rtol=0
    )


def test_bicubic_unit(units):
    torch.testing.assert_close(upsample(units["bicubic.x"]), units["bicubic.out"], atol=1e-6, rtol=0)


def test_autoencoder_units(pipe, units):
    with torch.no_grad():
        torch.testing.assert_close(pipe.vae.encode(units["enc.x"]), units["enc.latent"], atol=1e-5, rtol=0)
        torch.testing.assert_close(pipe.vae.decode(units["dec.z"]), units["dec.image"], atol=1e-5, rtol=0)


def test_temporal_block_unit(pipe, units):
    # The recording does not say which block it used: exactly one decoder block must give its numbers.
    pooled = torch.nn.functional.avg_pool2d(units["tpm.prev"], POOL)
    blocks = [layer for layer in pipe.vae.decoder.layers if hasattr(layer, "alpha")]
    with torch.no_grad():
        matches = [
            torch.allclose(block(units["tpm.x"], pooled), units["tpm.out"], atol=1e-5)
            and torch.allclose(block(units["tpm.x"]), units["tpm.out_none"], atol=1e-5)
            for block in blocks
        ]
    assert sum(matches) == 1


def test_scheduler_unit(pipe, units):
    schedule = Schedule.prepare(pipe.scheduler_config, 4, None, torch.device("cpu"))
    torch.testing.assert_close(
        schedule.scheduler.alphas_cumprod, units["ddim.alphas_cumprod"], atol=1e-7, rtol=0
    )
    assert [number for number, _ in schedule.timesteps] == units["ddim.timesteps"].tolist()
    for (number, _), expected in zip(schedule.timesteps, units["ddim.prev_sample"], strict=True):
        got = schedule.step(units["ddim.model_output"], number, units["ddim.sample"])
        torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=0)


def test_prompt(checkpoint: Path, pipe, golden: Path):
    case = load_file(golden / "case_A.safetensors")
    assert token_ids(checkpoint / "tokenizer", "", 77) == case["input_ids"][0].tolist()
    torch.testing.assert_close(encode(checkpoint, ""), case["prompt_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(pipe.prompts.get(""), case["prompt_embeds"], atol=1e-5, rtol=0)


def test_control_embedding(pipe, golden: Path):
    case = load_file(golden / "case_A.safetensors")
    hq = upscale(pipe, case, UpscaleOptions(), 1)
    with torch.no_grad():
        got = pipe.control.embed(warp(hq, case["flows"][:1]))
    torch.testing.assert_close(got, case["cn_cond_embedding_f1"], atol=1e-4, rtol=0)


def test_seeded_noise_is_the_generators(golden: Path):
    case = load_file(golden / "case_A.safetensors")
    assert torch.equal(noise(100, 0, *case["init_latents"].shape[-3:]), case["init_latents"][:1])
