"""The benchmark measures the real thing: both paths give the same picture, and stages add up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from family_cases import CASES
from node_pack import ROOT
from PIL import Image
from samples import moving

from stream_diffvsr import IncompatibleInputError, UpscaleOptions, load_pipeline
from stream_diffvsr.bench.measure import Clock, count_operations, measure
from stream_diffvsr.bench.networks import CONFIGS, reference_way, wan_networks
from stream_diffvsr.cli.main import main
from stream_diffvsr.runtimes.torch import packed

QUIET = ("rest", "flow", "full")
"""What need not compute anything, as the decoder that was not asked for."""


def test_the_plain_path_gives_the_same_numbers(guided):
    clip, options = moving(3), UpscaleOptions(num_inference_steps=2)
    calls = []
    hook = guided.control.embedding.register_forward_hook(lambda *_: calls.append(1))
    ours, _ = guided(clip, options)
    once = len(calls)
    theirs, _ = reference_way(guided)(clip, options)
    hook.remove()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (once, len(calls) - once) == (2, 4)


def test_figures(guided):
    result = measure(guided, 12, 16, 2, UpscaleOptions(num_inference_steps=1), reference_way(guided))
    assert set(result.stages) == {"flow", "control", "denoise", "decode", "rest"}
    assert all(value > 0 for name, value in result.stages.items() if name != "flow")
    assert result.plain_ratio > 0
    assert result.fps == pytest.approx(1000 / result.milliseconds)
    assert result.operations["control"] > 0 and result.operations["flow"] == 0
    assert result.rates["denoise"] == pytest.approx(
        1000 * result.operations["denoise"] / result.stages["denoise"]
    )


def test_the_plain_path_is_float32(checkpoint):
    half = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none")
    other = reference_way(half)
    assert {weight.dtype for weight in other.stages["unet"].parameters()} == {torch.float32}
    assert other(moving(1))[1].metadata["dtype"] == "float32"
    assert {weight.dtype for weight in half.stages["unet"].parameters()} == {torch.bfloat16}


def test_the_plain_path_takes_no_approximation(guided):
    """Eager and exact, whatever ours does, and nothing is said of it."""
    other, seen = reference_way(guided), []
    original = other.process_frame
    other.process_frame = lambda lq, state, options: seen.append(options) or original(lq, state, options)
    options = UpscaleOptions(num_inference_steps=2, control_every=2)
    measure(guided, 12, 16, 1, options, other)
    assert set(seen) == {UpscaleOptions(num_inference_steps=2)}


def test_operations_are_those_of_the_network(guided):
    """One convolution of the decoder, counted by hand."""
    result, lq = guided.process_frame(moving(1)), moving(2)[1:]
    block = guided.vae.decoder.layers[0]
    with Clock(guided.device).watching(guided):
        pass  # takes its hooks away again
    counts = count_operations(guided, lq, result.state, UpscaleOptions(num_inference_steps=1))
    twice = count_operations(guided, lq, result.state, UpscaleOptions(num_inference_steps=2))
    assert twice["denoise"] == pytest.approx(2 * counts["denoise"])
    assert counts["decode"] == twice["decode"] > 2 * block.weight.numel() * 12 * 16 / 1e9


def test_command(checkpoint, tmp_path, capsys):
    command = ["bench", "--model", str(checkpoint), "--flow", "dis", "--device", "cpu", "--frames", "1"]
    written = ["--json", str(tmp_path / "b.json"), "--chart", str(tmp_path / "b.png")]
    assert main([*command, "--size", "16x12", "--plain", *written]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["results"][0]["width"] == 16 and min(report["limits"].values()) > 0
    assert Image.open(tmp_path / "b.png").size[0] > 500
    table = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "table.py"), str(tmp_path / "b.json")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "| float32 | off | 16x12 |" in table
    assert "| 16x12 |" in capsys.readouterr().out
    assert main([*command, "--size", "16"]) == 2


@pytest.mark.parametrize("family", ["flashvsr", "swiftvr", "image"])
def test_every_family(family, tmp_path, capsys):
    """Times, stages and operations per frame, of chunks that are not the first."""
    path, options = CASES[family].make(tmp_path), ["--size", "16x16", "--frames", "1", "--device", "cpu"]
    assert main(["bench", "--model", str(path), *options, "--json", str(tmp_path / "b.json")]) == 0
    (result,) = json.loads((tmp_path / "b.json").read_text())["results"]
    stages = result["stages"]
    assert all(stages[name] > 0 and result["operations"][name] > 0 for name in stages if name not in QUIET)
    assert sum(stages.values()) > 0.5 * stages["rest"] and result["rates"]["frame"] > 0
    assert main(["bench", "--model", str(path), *options, "--plain"]) == 2
    assert "does not support --plain" in capsys.readouterr().err


def test_packed_layers_are_counted(checkpoint, monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this torch has no oneDNN")
    pipe, lq = load_pipeline(checkpoint, device="cpu", flow="none"), moving(1)
    state, options = pipe.process_frame(lq).state, UpscaleOptions(num_inference_steps=1)
    plainly = count_operations(pipe, lq, state, options)
    monkeypatch.setattr(packed, "is_faster_here", lambda: True)
    monkeypatch.setattr(packed, "SMALLEST", 1)
    assert count_operations(pipe, lq, state, options) == plainly
    assert any(layer in packed._kept for layer in pipe.stages["unet"].modules())


def test_random_networks_have_the_published_sizes():
    """The shapes that others have recorded of the published files."""
    counts = {
        "random-flashvsr": {"transformer": 1_418_996_800, "projection": 287_845_888, "tiny": 45_338_371},
        "random-swiftvr": {"encoder": 1_494_576, "transformer": 4_999_787_712, "decoder": 39_369_868},
    }
    for name, wanted in counts.items():
        networks = wan_networks(name)
        assert {part: sum(x.numel() for x in each.parameters()) for part, each in networks.items()} == wanted


def test_released_sizes():
    """Counts of the real networks, built without weights."""
    from stream_diffvsr.families.diffvsr.components import from_config
    from stream_diffvsr.weights.networks import empty

    counts = {"unet": 472_374_020, "controlnet": 207_699_264, "vae": 2_052_501}
    for name, count in counts.items():
        network = empty(lambda name=name: from_config(name, CONFIGS[name]))
        assert sum(weight.numel() for weight in network.parameters()) == count


def test_sizes_are_checked():
    from stream_diffvsr.cli.bench import parse_size

    assert parse_size("320x180") == (320, 180)
    with pytest.raises(IncompatibleInputError):
        parse_size("320*180")


def test_random_flow_networks_run():
    from stream_diffvsr.bench.networks import untrained_flow
    from stream_diffvsr.flow import open_flow

    clip = moving(2, 128, 128)
    with torch.no_grad():
        assert open_flow("raft_small", untrained_flow)(clip[:1], clip[1:]).shape == (1, 2, 128, 128)
