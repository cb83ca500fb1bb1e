"""Single-image models of many architectures, tiny and with random weights, and what is their own."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import spandrel
import torch
from safetensors.torch import load_file, save_file
from spandrel.architectures.DAT import DAT
from spandrel.architectures.HAT import HAT
from spandrel.architectures.NAFNet import NAFNet
from spandrel.architectures.OmniSR import OmniSR
from spandrel.architectures.PLKSR import RealPLKSR
from spandrel.architectures.RealCUGAN import UpCunet2x
from spandrel.architectures.SAFMN import SAFMN
from spandrel.architectures.SPAN import SPAN
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor, nn
from torch.nn import functional as F

from stream_diffvsr.errors import CheckpointError, IncompatibleInputError, ModelNotFoundError, VRAMError
from stream_diffvsr.families.image.checkpoint import architecture as architecture_of
from stream_diffvsr.families.image.checkpoint import open_image_model, problem
from stream_diffvsr.families.image.method import ImageModel
from stream_diffvsr.families.image.options import ImageOptions
from stream_diffvsr.memory import LiveTensors
from stream_diffvsr.tensors import from_pixels, to_pixels
from stream_diffvsr.upscaler import State

ATTENTION: dict[str, Any] = {"embed_dim": 16, "num_heads": [2], "upscale": 2}
SMALL: dict[str, Any] = {"num_filters": 8, "num_blocks": 1}


def architecture(name: str, older: str = "") -> type[nn.Module]:
    """A class of spandrel's, under the name that it has in the version installed, if it has it at all."""
    module = pytest.importorskip(f"spandrel.architectures.{name}")
    return getattr(module, name, None) or getattr(module, older)


Compact, ESRGAN = architecture("Compact", "SRVGGNetCompact"), architecture("ESRGAN", "RRDBNet")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ESRGAN 4x": lambda: ESRGAN(scale=4, **SMALL),
    "ESRGAN 8x": lambda: ESRGAN(scale=8, **SMALL),
    "Compact 3x": lambda: Compact(num_feat=8, num_conv=2, upscale=3),
    "Compact 1x": lambda: Compact(num_feat=8, num_conv=2, upscale=1),
    "SPAN 2x": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
    "SwinIR light 2x": lambda: SwinIR(
        depths=[2], window_size=8, mlp_ratio=2, upsampler="pixelshuffledirect", **ATTENTION
    ),
    "DAT light 2x": lambda: DAT(
        depth=[2], split_size=[8, 8], expansion_factor=2, upsampler="pixelshuffledirect", **ATTENTION
    ),
    "HAT 2x": lambda: HAT(depths=(1,), window_size=8, mlp_ratio=2, squeeze_factor=2, num_feat=8, **ATTENTION),
    "OmniSR 2x": lambda: OmniSR(num_feat=16, up_scale=2),
    "RealPLKSR 4x": lambda: RealPLKSR(dim=16, n_blocks=1, upscaling_factor=4, kernel_size=5),
    "RealCUGAN 2x": lambda: UpCunet2x(),
    "SAFMN 4x": lambda: SAFMN(dim=16, n_blocks=1, upscaling_factor=4),
    "MoSR 2x": lambda: architecture("MoSR")(n_block=1, dim=8, upscale=2),
    "RCAN 2x": lambda: architecture("RCAN")(n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4, scale=2),
    "NAFNet 1x": lambda: NAFNet(width=8, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1]),
}


def saved(path: Path, make: Callable[[], nn.Module]) -> Path:
    """A file of random weights: safetensors, or as training leaves it."""
    torch.manual_seed(0)
    weights = make().state_dict()
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"params_ema": weights, "iter": 5}, path)
    return path


def opened(path: Path) -> ImageModel:
    return open_image_model(path, "cpu", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("upscale_models")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return saved(folder / "compact.safetensors", lambda: Compact(num_feat=8, num_conv=2, upscale=2))


@pytest.fixture
def model(path: Path) -> ImageModel:
    return opened(path)


def bare(path: Path, lq: Tensor) -> Tensor:
    """What spandrel itself makes of a frame, padded by its last row and column."""
    network = spandrel.ModelLoader("cpu").load_from_file(path).eval()
    assert isinstance(network, spandrel.ImageModelDescriptor)
    height, width = lq.shape[-2:]
    right, down = network.size_requirements.get_padding(width, height)
    made = network(F.pad((lq / 2 + 0.5).clamp(0, 1), (0, right, 0, down), mode="replicate"))
    return made[..., : height * network.scale, : width * network.scale] * 2 - 1


def clip(count: int, height: int = 24, width: int = 30, noise: float = 0.03) -> list[Tensor]:
    """A texture that moves by a pixel per frame, with noise."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand((1, 3, height // 2, width // 2 + 2 * count), generator=generator)
    wide = F.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1) * 1.6 - 0.8
    frames = [wide[..., 4 * i : 4 * i + 4 * width] for i in range(count)]
    small = [F.avg_pool2d(frame, 4) for frame in frames]
    return [frame + noise * torch.randn(frame.shape, generator=generator) for frame in small]


def pictures(results: Any) -> Tensor:
    return torch.cat([each.hq for each in results])


@pytest.mark.parametrize("name", MODELS)
def test_each_architecture_gives_what_spandrel_gives(name, tmp_path):
    suffix = ".pth" if list(MODELS).index(name) % 2 else ".safetensors"
    path = saved(tmp_path / f"model{suffix}", MODELS[name])
    assert problem(path) is None
    model = opened(path)
    scale = int(name.split()[-1][0])
    assert (model.info.scales, model.info.minimum, model.info.frame_by_frame) == ((scale,), 8, True)
    for height, width in ((8, 8), (19, 33)):
        lq = torch.rand(1, 3, height, width) * 2.4 - 1.2
        (result,) = model.stream([lq])
        assert result.hq.shape == (1, 3, scale * height, scale * width)
        assert result.hq.dtype == torch.float32 and not result.hq.is_inference()
        assert result.hq.std() > 0
        assert torch.equal(result.hq, bare(path, lq))
    assert model.bytes_needed((64, 64)) > 2 * model.bytes_needed((32, 32)) > 0


CORE = """
import sys, comfy.options
comfy.options.enable_args_parsing()
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
paths = sys.stdin.read().splitlines()
image = load_file(paths[0])["image"]
for path in paths[1:]:
    model = ModelLoader().load_from_file(path).eval()
    save_file({"image": ImageUpscaleWithModel.execute(model, image.clone())[0].contiguous()}, path + ".core")
"""


@pytest.mark.comfyui
@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI")
def test_cores_upscale_image_gives_the_same(tmp_path):
    """Below its tile of 512, and where nothing is padded, which it leaves to spandrel."""
    image = torch.rand(2, 48, 64, 3)
    save_file({"image": image}, tmp_path / "image")
    paths = [saved(tmp_path / f"{name}.safetensors", make) for name, make in MODELS.items()]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", CORE, "--cpu"],
        cwd=os.environ["COMFYUI_PATH"],
        input="\n".join(map(str, [tmp_path / "image", *paths])),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    frames = from_pixels(image.movedim(-1, 1)).split(1)
    for path in paths:
        theirs = load_file(f"{path}.core")["image"].movedim(-1, 1)
        ours = to_pixels(pictures(opened(path).stream(frames)))
        torch.testing.assert_close(
            ours, theirs, atol=1e-5, rtol=0, msg=lambda said, path=path: f"{path.stem}: {said}"
        )


def test_grey_models_get_each_colour_and_alpha_is_opaque(tmp_path):
    grey = saved(tmp_path / "grey.pth", lambda: ESRGAN(in_nc=1, out_nc=1, scale=2, **SMALL))
    alpha = saved(tmp_path / "alpha.pth", lambda: ESRGAN(in_nc=4, out_nc=4, scale=2, **SMALL))
    lq = torch.rand(1, 3, 9, 12) * 2 - 1
    expected = torch.cat([bare(grey, each) for each in lq.split(1, 1)], 1)
    assert torch.equal(pictures(opened(grey).stream([lq])), expected)
    with_alpha = torch.cat([lq, torch.ones_like(lq[:, :1])], 1)
    assert torch.equal(pictures(opened(alpha).stream([lq])), bare(alpha, with_alpha)[:, :3])


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(steady=0.6, tile_size=64, tile_overlap=8)])
def test_whole_equals_split_equals_saved(model, options, tmp_path):
    frames = clip(5, 40, 44)
    whole = list(model.stream(frames, options))
    assert [each.index for each in whole] == [0, 1, 2, 3, 4]
    session, others = model.session(options), model.session(options)
    first = []
    for frame, other in zip(frames[:2], frames[3:], strict=True):
        first += session.push(frame)
        others.push(other)  # an interleaved sequence disturbs nothing
    session.state().save(tmp_path / "s.safetensors")
    state = State.load(tmp_path / "s.safetensors")
    assert (state.family, state.index) == ("image", 2)
    assert state.tensors.keys() == ({"previous_hq", "previous_lq"} if options.steady else set())
    rest = list(model.stream(frames[2:], options, state))
    assert [each.index for each in rest] == [2, 3, 4]
    assert torch.equal(pictures([*first, *rest]), pictures(whole))


def test_steady_holds_what_is_seen_again_and_nothing_else(path, model):
    frames = clip(8)
    each = torch.cat([bare(path, frame) for frame in frames])
    clean = torch.cat([bare(path, frame) for frame in clip(8, noise=0)])
    assert torch.equal(pictures(model.stream(frames, ImageOptions(steady=0))), each)
    steady = pictures(model.stream(frames, ImageOptions(steady=0.8)))
    assert torch.equal(steady[0], each[0])
    inner = (..., slice(8, -8), slice(8, -8))

    def error(result: Tensor) -> Tensor:
        return (result - clean)[inner].square()[4:].mean()

    def flicker(result: Tensor) -> Tensor:
        moved = result[1:, :, :, :-2] - result[:-1, :, :, 2:]  # two pixels of the result per frame
        return moved[inner].square()[3:].mean()

    assert error(steady) < 0.8 * error(each)
    assert flicker(steady) < 0.5 * flicker(each)
    # Another scene has nothing to hold on to.
    session = model.session(ImageOptions(steady=1.0))
    session.push(frames[0])
    other = torch.rand_like(frames[0]) * 2 - 1
    assert (session.push(other)[0].hq - bare(path, other)).abs().max() < 0.05


@pytest.mark.parametrize("name", ["Compact 1x", "Compact 3x", "ESRGAN 8x"])
def test_steady_works_at_every_scale(name, tmp_path):
    still = [torch.rand(1, 3, 16, 20)] * 2
    first, second = opened(saved(tmp_path / "model.pth", MODELS[name])).stream(still, ImageOptions(steady=1))
    assert torch.allclose(first.hq, second.hq, atol=1e-4)  # nothing moves, so nothing may


def test_an_exception_from_on_step_leaves_nothing_half_done(model):
    frames, options = clip(3, 40, 44), ImageOptions(steady=0.5, tile_size=64, tile_overlap=8)
    expected = pictures(model.stream(frames, options))
    for stage in ("upscale", "steady"):
        stop = threading.Event()

        def on_step(name, done, total, stage=stage, stop=stop):
            if stop.is_set() and name == stage and done == total:
                raise KeyboardInterrupt

        session = model.session(options, on_step=on_step)
        results = session.push(frames[0])
        stop.set()
        with pytest.raises(KeyboardInterrupt):
            session.push(frames[1])
        stop.clear()
        results += session.push(frames[1]) + session.push(frames[2])
        assert session.finish() == []
        assert torch.equal(pictures(results), expected)


def test_one_frame_at_a_time(model):
    frame, done = clip(1)[0], threading.Event()

    def other() -> None:
        model.session().push(frame)
        done.set()

    waiting = threading.Thread(target=other)

    def on_step(*_) -> None:
        waiting.start()
        assert not done.wait(0.3)

    model.session(on_step=on_step).push(frame)
    waiting.join(10)
    assert done.is_set()


def limited(model: ImageModel, pixels: int) -> None:
    """Have the model run out of memory where it sees more pixels than that."""

    def check(_, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-2] * inputs[0].shape[-1] > pixels:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    model.network.model.register_forward_pre_hook(check)


def test_smaller_tiles_where_memory_runs_out(path, model, caplog):
    frames, whole = clip(2, 150, 280, noise=0), opened(path)
    expected, small = pictures(whole.stream(frames)), opened(path)
    limited(model, 40_000)  # of 150 x 280
    with caplog.at_level(logging.WARNING):
        results = list(model.stream(frames))
    (line,) = [record.message for record in caplog.records]
    assert "out of memory" in line and "tile_size 512" in line
    assert 0 < (pictures(results) - expected).abs().max() < 0.05
    session = model.session()
    session.push(frames[0])
    state = session.state()
    assert state.provenance.details["tiles"] == "512" and state.provenance.parts == "tiles of 512"
    # The state goes on in tiles, also where memory suffices; a job's plan without pictures likewise.
    assert torch.equal(pictures(small.stream(frames[1:], state=state)), pictures(results[1:]))
    # A given size is kept, or refused.
    given = ImageOptions(tile_size=512)
    assert torch.equal(pictures(small.stream(frames, given)), pictures(results))
    limited(model, 9)
    with pytest.raises(VRAMError, match="smaller tile_size"):
        model.session(given).push(frames[0])
    with pytest.raises(VRAMError, match="memory ran out"):
        model.session().push(frames[0])


def test_memory_is_counted(path, model):
    size = (48, 64)
    with LiveTensors() as live:
        model.session().push(torch.rand(1, 3, *size))
    assert 0.8 * live.peak < model.bytes_needed(size) < 1.5 * live.peak
    assert model.bytes_needed(size, ImageOptions(tile_size=64, tile_overlap=8)) < model.bytes_needed(size)
    assert model.bytes_needed(size, ImageOptions(steady=1)) > model.bytes_needed(size)

    def numbers(_, inputs: tuple[Tensor, ...]) -> None:
        float(inputs[0].sum())  # what the meta device has not

    rough = opened(path)
    rough.network.model.register_forward_pre_hook(numbers)
    assert rough.bytes_needed(size) > model.bytes_needed(size)
    assert 2 * rough.bytes_needed(size) < rough.bytes_needed((96, 128)) * 1.01


def test_half_precision_only_where_the_model_bears_it(path, tmp_path, caplog):
    half = open_image_model(path, "cpu", "bfloat16")
    assert half.info.number_format == "bfloat16" and half.dtype == torch.bfloat16
    frame = clip(1)[0]
    (result,) = half.stream([frame])
    assert result.hq.dtype == torch.float32
    assert 0 < (result.hq - bare(path, frame)).abs().max() < 0.1
    assert not caplog.records
    attention = open_image_model(saved(tmp_path / "hat.pth", MODELS["HAT 2x"]), "cpu", "float16")
    assert attention.info.number_format == "float32"
    (line,) = [record.message for record in caplog.records]
    assert "float16" in line and "float32" in line


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def test_files_that_are_no_model(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert architecture_of(path) == "RealESRGAN Compact"
    weights = Compact(num_feat=8, num_conv=2, upscale=2).state_dict()
    lama = {"generator.model.1.bn_l.running_mean": torch.zeros(1)}
    cases = {
        "notes.txt": (lambda path: path.write_text("x"), "must end in .safetensors"),
        "page.pth": (lambda path: path.write_text("<html>"), "is incomplete or contains more"),
        "cut.safetensors": (lambda path: path.write_bytes(b"\x80\0\0\0\0\0\0\0{"), "complete safetensors"),
        "code.pth": (lambda path: path.write_bytes(pickle.dumps(Trap())), "is incomplete or contains more"),
        "list.pt": (lambda path: torch.save([1, 2], path), "no super-resolution"),
        "other.safetensors": (lambda path: save_file({"a": torch.ones(1)}, path), "no super-resolution"),
        "script.pt": (
            lambda path: torch.jit.script(nn.Conv2d(3, 3, 1)).save(path),
            "is incomplete or contains more",
        ),
        "old.pth": (lambda path: tarfile.open(path, "w").close(), "torch's oldest format"),
        "lama.ckpt": (lambda path: torch.save(lama, path), "fills in masked parts"),
    }
    for name, (write, sentence) in cases.items():
        write(tmp_path / name)
        assert sentence in str(problem(tmp_path / name)), name
        with pytest.raises(CheckpointError, match=sentence):
            opened(tmp_path / name)
    assert not Path("trapped").exists()
    # What names and shapes alone do not tell is found when it is opened.
    del weights["body.0.bias"]
    torch.save(weights, tmp_path / "lacks.pth")
    with pytest.raises(CheckpointError, match="damaged, or newer"):
        opened(tmp_path / "lacks.pth")
    two = saved(tmp_path / "two.pth", lambda: Compact(num_in_ch=2, num_out_ch=2, num_feat=8, num_conv=2))
    with pytest.raises(CheckpointError, match="takes 2 channels"):
        opened(two)
    with pytest.raises(ModelNotFoundError):
        opened(tmp_path / "absent.pth")


def test_what_does_not_fit_is_refused(path, model, folder, caplog):
    frame, options = clip(1)[0], ImageOptions(steady=0.5)
    session = model.session(options)
    session.push(frame)
    state = session.state()
    other = saved(folder / "other.pth", lambda: Compact(num_feat=8, num_conv=1, upscale=2))
    for go, sentence in (
        (lambda: model.session(noise=frame), "no noise"),
        (lambda: model.session(options, state).push(frame[..., :-1]), "30x24"),
        (lambda: model.session(options, replace(state, family="diffvsr")).push(frame), "diffvsr"),
        (lambda: opened(other).session(options, state).push(frame), "model"),
        (lambda: model.session().push(frame * torch.nan), "finite"),
        (lambda: model.session().push(frame[..., :7]), "at least 8"),
        (lambda: ImageOptions(tile_size=64, tile_overlap=32), "tile_overlap"),
        (lambda: ImageOptions(steady=1.5), "steady"),
    ):
        with pytest.raises(IncompatibleInputError, match=sentence):
            go()
    assert not caplog.records
    model.session(ImageOptions(steady=0.7), state).push(frame)
    assert "steady: 0.5 -> 0.7" in caplog.text
    # An empty state begins a sequence where it says.
    (result,) = model.session(state=State(index=7)).push(frame)
    assert result.index == 7
