"""Folded layers give what the layers gave one after another, at every size, and follow their network."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stream_diffvsr import load_pipeline
from stream_diffvsr.families.diffvsr.folded import FoldedLayers, FoldedUpsampler, fold, unfold
from stream_diffvsr.families.diffvsr.vae import TemporalAutoencoderTiny


def doubling() -> nn.Module:
    return nn.Upsample(scale_factor=2.0, mode="nearest")


def conv(inside: int, outside: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, stride=stride, bias=bias)


RUNS = {
    "doubled": lambda bias: [doubling(), conv(5, 6, bias=bias)],
    "doubled twice convolved": lambda bias: [doubling(), conv(8, 7, bias=bias), conv(7, 3)],
    "without a second bias": lambda bias: [doubling(), conv(8, 7, bias=bias), conv(7, 3, bias=False)],
    "pair": lambda bias: [conv(3, 9, bias=bias), conv(9, 8)],
    "halving pair": lambda bias: [conv(3, 9, bias=bias), conv(9, 8, stride=2, bias=False)],
}


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=25)
@given(height=st.integers(1, 15), width=st.integers(1, 15), bias=st.booleans())
def test_folded_layers_are_their_parts(name, height, width, bias):
    torch.manual_seed(height * 16 + width)
    parts = RUNS[name](bias)
    x = torch.randn(1, next(part for part in parts if isinstance(part, nn.Conv2d)).in_channels, height, width)
    with torch.no_grad():
        expected = nn.Sequential(*parts)(x)
        torch.testing.assert_close(FoldedLayers(parts)(x), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("encoder", "decoder", "count"), [([0, 1, 1], [1, 1, 0], 3), ([1, 1, 1], [1, 1, 1], 2)]
)
def test_autoencoder(encoder, decoder, count):
    widths = {"block_out_channels": [8, 8, 8], "latent_channels": 4}
    vae = TemporalAutoencoderTiny({**widths, "num_encoder_blocks": encoder, "num_decoder_blocks": decoder})
    folded = copy.deepcopy(vae)
    fold(nn.Module(), folded)
    assert sum(isinstance(module, FoldedLayers) for module in folded.modules()) == count
    warped, latents = torch.randn(1, 3, 48, 80), torch.randn(1, 4, 12, 20)
    with torch.no_grad():
        expected = vae.decode(latents, vae.features(warped))
        got = folded.decode(latents, folded.features(warped))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(folded.encode(warped), vae.encode(warped), atol=1e-5, rtol=0)
    unfold(nn.Module(), folded)
    assert list(folded.state_dict()) == list(vae.state_dict())


@pytest.mark.parametrize("size", [None, (32, 40), (31, 40), (31, 39)])
def test_upsamplers_of_the_unet(pipe, size):
    found = [module for module in pipe.stages["unet"].modules() if isinstance(module, FoldedUpsampler)]
    assert found
    for upsampler in found:
        x = torch.randn(1, upsampler.original.channels, 16, 20)
        with torch.no_grad():
            expected = upsampler.original(x, size)
            torch.testing.assert_close(upsampler(x, size), expected, atol=1e-5, rtol=0)


def test_folded_weights_follow_their_network(checkpoint):
    vae = load_pipeline(checkpoint, device="cpu", flow="none").vae
    vae.half()
    assert {weight.dtype for weight in vae.parameters()} == {torch.float16}
    vae.to("meta")
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}
