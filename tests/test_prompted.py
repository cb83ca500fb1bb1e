"""Keys and values of the prompt come ready: the same numbers, computed once."""

from __future__ import annotations

import pytest
import torch
from samples import moving
from torch import nn

from stream_diffvsr import UpscaleOptions, load_pipeline
from stream_diffvsr.bench.networks import CONFIGS
from stream_diffvsr.families.diffvsr.build import empty, from_config
from stream_diffvsr.families.diffvsr.prompted import Ready, keys_and_values, put_back, take_out
from stream_diffvsr.runtimes.torch.precision import in_float32


def unet_of(pipe, **settings) -> nn.Module:
    """A random U-Net as the checkpoint's, with other settings, nothing done to it."""
    return from_config("unet", {**pipe.stages["unet"].config, **settings}).eval().requires_grad_(False)


def predict(unet: nn.Module, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return unet(x, torch.tensor(500), encoder_hidden_states=prompt).sample


@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_the_same_numbers(pipe, size):
    unet, x, prompt = unet_of(pipe), torch.randn(1, 7, *size), torch.randn(1, 77, 32)
    expected, keys = predict(unet, x, prompt), set(unet.state_dict())
    take_out(unet)
    assert torch.equal(predict(unet, x, keys_and_values(unet, prompt)), expected)
    put_back(unet)
    assert torch.equal(predict(unet, x, prompt), expected)
    assert set(unet.state_dict()) == keys


@pytest.mark.parametrize(
    "settings", [{"cross_attention_norm": "layer_norm"}, {"addition_embed_type": "text"}], ids=str
)
def test_networks_that_need_the_prompt_itself_keep_it(pipe, settings):
    if "addition_embed_type" in settings:
        settings = {**settings, "addition_embed_type_num_heads": 4}
    unet, x, prompt = unet_of(pipe, **settings), torch.randn(1, 7, 8, 8), torch.randn(1, 77, 32)
    expected = predict(unet, x, prompt)
    take_out(unet)
    assert torch.equal(predict(unet, x, keys_and_values(unet, prompt)), expected)


def test_computed_once_in_a_run(checkpoint):
    pipe = load_pipeline(checkpoint, device="cpu", flow="none")
    layers = [
        layer.linear
        for network in (pipe.stages["unet"], pipe.control)
        for layer in network.modules()
        if isinstance(layer, Ready)
    ]
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    options = UpscaleOptions(num_inference_steps=2, guidance_scale=2.0)
    pipe(moving(3), options)
    assert len(calls) == 2 * len(layers) > 0
    pipe(moving(2), UpscaleOptions(num_inference_steps=3))
    assert len(calls) == 3 * len(layers)
    assert len(pipe._prepared) == 1


def test_another_number_format_has_its_own(checkpoint):
    pipe = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none")
    options, unet = UpscaleOptions(), pipe.stages["unet"]
    _, (half,) = pipe._prepare(options, pipe.device, torch.bfloat16)
    with in_float32([unet, pipe.control], torch.bfloat16):
        _, (single,) = pipe._prepare(options, pipe.device, torch.float32)
        expected = keys_and_values(unet, pipe.prompts.get(""))
    assert half.unet.dtype == torch.bfloat16
    assert torch.equal(single.unet, expected)


def test_every_attention_to_the_prompt_of_the_released_networks():
    for name in ("unet", "controlnet"):
        network = empty(lambda name=name: from_config(name, CONFIGS[name]))
        crossing = [each for each in network.modules() if getattr(each, "is_cross_attention", False)]
        weights = len(network.state_dict())
        take_out(network)
        assert sum(isinstance(each, Ready) for each in network.modules()) == 2 * len(crossing) > 0
        assert len(network.state_dict()) == weights
