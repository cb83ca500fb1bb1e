"""LoRA files: merged into copies of the layers they change, and refused where they do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import random_lora as make
from node_pack import load_pack, part
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stream_diffvsr import StreamDiffVSRPipeline, StreamDiffVSRState, UpscaleOptions, load_pipeline
from stream_diffvsr.cli.main import main
from stream_diffvsr.cli.model import lora_argument
from stream_diffvsr.errors import CheckpointError, IncompatibleInputError, ModelNotFoundError
from stream_diffvsr.families.diffvsr import lora
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.files import read_metadata
from stream_diffvsr.runtimes.torch import folded

FAST = UpscaleOptions(num_inference_steps=1, memory_plan="whole")


def frames(count: int = 2) -> Tensor:
    return torch.rand((count, 3, 20, 28), generator=torch.Generator().manual_seed(7)) * 2 - 1


def side_by_side(pipe: StreamDiffVSRPipeline, path: Path, strength: float) -> list[Any]:
    """The same LoRA unmerged: every layer's own result, and beside it B A x."""
    known = dict(lora.layers(pipe.torch_networks))
    handles = []
    for name, (a, b) in lora.read_lora(path).changes.items():

        def add(layer: nn.Module, given: Any, out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            if isinstance(layer, nn.Conv2d):
                low = F.conv2d(given[0], a, None, layer.stride, layer.padding)
                return out + strength * 2 * F.conv2d(low, b)
            return out + strength * 2 * F.linear(F.linear(given[0], a), b)

        handles.append(known[name].register_forward_hook(add))
    return handles


def test_merged_equals_unmerged(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    path = make(tmp_path / "a.safetensors", guided)
    assert len(lora.read_lora(path).changes) == len(list(lora.layers(guided.torch_networks)))
    merged, _ = guided.with_loras((path, 0.7))(frames(), FAST)
    handles = side_by_side(guided, path, 0.7)
    with pytest.MonkeyPatch.context() as patch:
        # The hooks see every convolution by itself, at its own size.
        patch.setattr(folded, "_pairs", lambda network: iter(()))
        beside, _ = guided(frames(), FAST)
    for handle in handles:
        handle.remove()
    assert (merged - guided(frames(), FAST)[0]).abs().max() > 0.05
    torch.testing.assert_close(merged, beside, atol=1e-4, rtol=0)


def test_the_base_is_the_same_before_beside_and_after(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    path = make(tmp_path / "a.safetensors", guided)
    before, _ = guided(frames(), FAST)
    weights = {name: x.clone() for name, x in guided.torch_networks.unet.state_dict().items()}
    other = guided.with_loras((path, 1.0))
    changed, _ = other(frames(), FAST)
    beside, _ = guided(frames(), FAST)
    del other
    after, _ = guided(frames(), FAST)
    assert torch.equal(before, beside) and torch.equal(before, after) and not torch.equal(before, changed)
    assert all(torch.equal(x, weights[name]) for name, x in guided.torch_networks.unet.state_dict().items())


def test_what_is_not_changed_is_shared(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    path = make(tmp_path / "a.safetensors", guided, names="unet.*attn1.to_q")
    other = guided.with_loras((path, 1.0))
    mine, own = (dict(each.torch_networks.unet.named_parameters()) for each in (guided, other))
    different = {name for name in mine if mine[name] is not own[name]}
    assert different and all(name.endswith("attn1.to_q.weight") for name in different)
    assert other.torch_networks.controlnet is guided.torch_networks.controlnet
    assert other.vae is guided.vae


def test_loras_add_up_in_whatever_way_they_come(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{seed}.safetensors", guided, seed) for seed in (1, 2)]
    at_once = guided.with_loras((paths[0], 0.5), (paths[1], -1.0))
    in_a_row = guided.with_loras((paths[0], 0.5)).with_loras((paths[1], -1.0))
    assert torch.equal(at_once(frames(), FAST)[0], in_a_row(frames(), FAST)[0])
    assert at_once.model == in_a_row.model
    name, layer = next(iter(lora.layers(at_once.torch_networks)))
    products = [
        lora.low_rank_product(lora.read_lora(path).changes[name], layer.weight.shape) for path in paths
    ]
    base = dict(lora.layers(guided.torch_networks))[name].weight
    torch.testing.assert_close(layer.weight, base + products[0] - 2 * products[1])


def test_strength_zero_is_the_base(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    other = guided.with_loras((make(tmp_path / "a.safetensors", guided), 0.0))
    assert torch.equal(other(frames(), FAST)[0], guided(frames(), FAST)[0])
    assert other.model == guided.model and other.info == guided.info


def test_a_state_names_its_loras_and_fits_no_others(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    path = make(tmp_path / "mine.safetensors", guided)
    other = guided.with_loras((path, 0.8))
    _, state = other(frames(), FAST)
    state.save(tmp_path / "state.safetensors")
    kept = StreamDiffVSRState.load(tmp_path / "state.safetensors")
    assert re.fullmatch(r"mine\.safetensors \(\w{8}\) at 0\.8", kept.metadata["loras"])
    again, _ = guided.with_loras((path, 0.8))(frames(), FAST, state=kept)
    assert torch.equal(again, other(frames(), FAST, state=state)[0])
    for stranger in (guided, guided.with_loras((path, 0.7))):
        with pytest.raises(IncompatibleInputError, match="the state belongs to model"):
            stranger(frames(), FAST, state=kept)


def test_half_precision(checkpoint: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none")
    path = make(tmp_path / "a.safetensors", pipe)
    other = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none", loras=[(path, 1.0)])
    (name, layer), (_, base) = (next(iter(lora.layers(each.torch_networks))) for each in (other, pipe))
    delta = 2 * lora.low_rank_product(lora.read_lora(path).changes[name], layer.weight.shape)
    assert torch.equal(layer.weight, (base.weight.float() + delta).bfloat16())


def test_memory_is_counted_for_the_layers_it_has(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    other = guided.with_loras((make(tmp_path / "a.safetensors", guided), 1.0))
    # With the weights: what is kept of them in other forms depends on the frames that were computed.
    peaks = [pipe.needs((20, 28), FAST, Plan())["peak"] for pipe in (other, guided)]
    assert peaks[0] == peaks[1] > 0
    assert other.needs is not guided.needs


def spoiled(path: Path, to: Path, key: str | None = None, value: Tensor | None = None, **told: str) -> Path:
    tensors = load_file(path)
    if key:
        tensors.pop(key)
        tensors |= {} if value is None else {key: value}
    save_file(tensors, to, {**read_metadata(path), **told})
    return to


def test_what_does_not_fit_is_told_in_a_sentence(guided: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    whole, bad = make(tmp_path / "a.safetensors", guided), tmp_path / "bad.safetensors"
    key = "unet.conv_in.lora_A.weight"

    def refused(error: type[Exception], match: str, path: Path = bad, strength: float = 1.0) -> None:
        with pytest.raises(error, match=match) as raised:
            guided.with_loras((path, strength))
        assert "\n" not in str(raised.value)

    refused(ModelNotFoundError, "LoRA not found", tmp_path / "nowhere.safetensors")
    refused(IncompatibleInputError, "must be from -2 to 2", whole, 2.5)
    refused(IncompatibleInputError, "must be from -2 to 2", whole, float("nan"))
    bad.write_bytes(whole.read_bytes()[:-100])
    refused(CheckpointError, "not a complete safetensors file")
    refused(IncompatibleInputError, "was trained for another model", spoiled(whole, bad, base="f" * 32))
    refused(
        CheckpointError,
        "NaN or infinite values in unet.conv_in",
        spoiled(whole, bad, key, torch.full((3, 7, 3, 3), torch.nan)),
    )
    refused(CheckpointError, "lacks one of its matrices", spoiled(whole, bad, key))
    refused(
        CheckpointError, "does not fit .* unet.conv_in", spoiled(whole, bad, key, torch.zeros(3, 9, 3, 3))
    )
    refused(CheckpointError, "rank and alpha", spoiled(whole, bad, rank="0"))
    refused(CheckpointError, "rank and alpha", spoiled(whole, bad, alpha="nan"))
    sd2 = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({sd2: torch.zeros(4, 320), sd2.replace("_A", "_B"): torch.zeros(320, 4)}, bad)
    refused(CheckpointError, "Stable Diffusion 2")


def test_a_lora_is_of_one_family_and_comes_before_the_runtime(nano_lora: Path, tmp_path: Path) -> None:
    from stream_diffvsr.runtimes.choose import open_runtime

    pipe = load_pipeline("nano", device="cpu")
    runtime = open_runtime("openvino", "cpu", pipe.device, torch.float32, "none")
    assert runtime
    with pytest.raises(IncompatibleInputError, match="LoRAs must be added before"):
        pipe.on(runtime).with_loras((nano_lora, 1.0))
    built = load_pipeline("nano", device="cpu", runtime="openvino", loras=[(nano_lora, 1.0)])
    assert built.info.model == pipe.with_loras((nano_lora, 1.0)).model != pipe.model


@pytest.fixture(scope="module")
def nano_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "nano.safetensors"
    return make(path, load_pipeline("nano", device="cpu"), names="unet")


def test_arguments() -> None:
    assert lora_argument("a.safetensors") == ("a.safetensors", 1.0)
    assert lora_argument("a.safetensors:-0.5") == ("a.safetensors", -0.5)
    assert lora_argument(r"C:\a.safetensors") == (r"C:\a.safetensors", 1.0)
    assert lora_argument(r"C:\a.safetensors:2") == (r"C:\a.safetensors", 2.0)


def test_a_job_that_began_with_another_lora_is_not_continued(
    nano_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from stream_diffvsr.jobs.output import Output

    clip, result = tmp_path / "clip", tmp_path / "clip.mkv"
    clip.mkdir()
    for index in range(3):
        Image.new("RGB", (24, 16), (40 * index, 90, 60)).save(clip / f"{index}.png")
    command = ["upscale", str(clip), "-o", str(result), "--device", "cpu", "--progress", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(Output, "join", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
        assert main([*command, "--lora", f"{nano_lora}:0.5"]) == 1
    assert main(command) == 2
    assert main([*command, "--lora", f"{nano_lora}:0.6"]) == 2
    assert "model" in capsys.readouterr().err
    assert main([*command, "--lora", f"{nano_lora}:0.5"]) == 0


def test_the_node(nano_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = load_pack()
    host, node = part(pack, "nodes.host"), pack.NODE_CLASS_MAPPINGS["StreamDiffVSR_LoRA"]
    stranger = tmp_path / "stranger.safetensors"
    save_file({"x": torch.zeros(1)}, stranger)
    monkeypatch.setattr(
        host, "lora_files", lambda: [("sd.safetensors", stranger), ("mine.safetensors", nano_lora)]
    )
    assert node.INPUT_TYPES()["required"]["lora"][0] == ["mine.safetensors"]
    loader = pack.NODE_CLASS_MAPPINGS["StreamDiffVSR_Loader"]()
    (pipe,) = loader.execute("nano", "cpu", "float32")
    model = pipe.info.model
    (made,) = node().execute(pipe, "mine.safetensors", 0.5)
    assert pipe.info.model == model != made.info.model
    assert not torch.equal(made(frames(2), FAST)[0], pipe(frames(2), FAST)[0])
    assert node.IS_CHANGED("mine.safetensors") != node.IS_CHANGED("gone.safetensors") == "missing"
    with pytest.raises(Exception, match="models/loras"):
        node().execute(pipe, "gone.safetensors", 1.0)
