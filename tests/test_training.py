"""Fine-tuning: it learns, it is repeatable, and a run that was stopped ends with the same weights."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from samples import moving

from stream_diffvsr import StreamDiffVSRPipeline, load_pipeline
from stream_diffvsr.cli.main import main
from stream_diffvsr.errors import CheckpointError, IncompatibleInputError
from stream_diffvsr.files import read_metadata
from stream_diffvsr.tensors import to_pixels
from stream_diffvsr.training.clips import Footage, read_clips
from stream_diffvsr.training.degrade import PRESETS, STEPS, check_steps, degrade, open_recipe
from stream_diffvsr.training.loop import Run
from stream_diffvsr.training.options import TrainOptions
from stream_diffvsr.training.perceptual import Perceptual
from stream_diffvsr.training.trainer import Trainer, of_state


def pictures(folder: Path, count: int = 6, side: int = 64, seed: int = 0) -> Path:
    """A clip as a folder of pictures: a pattern in shades of one colour, that drifts without a cut."""
    folder.mkdir(parents=True)
    wide = 0.3 * moving(1, side, side + count, seed)[0] + torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    for index in range(count):
        array = (to_pixels(wide[..., index : index + side]) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Footage:
    return read_clips([pictures(tmp_path_factory.mktemp("clips") / "one")], 32, 2)


def begin(pipe: StreamDiffVSRPipeline, footage: Footage, folder: Path, **options: object) -> Run:
    made = TrainOptions(**{"size": 48, "frames": 2, "rank": 4, "every": 100, **options})  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    return Run(
        pipe, footage, PRESETS["clean"], made, folder / "made.safetensors", folder, {"licence": "none"}
    )


@pytest.mark.parametrize("what", ["lora", "full"])
def test_it_learns_one_clip(
    guided: StreamDiffVSRPipeline, footage: Footage, tmp_path: Path, what: str
) -> None:
    before = {name: x.clone() for name, x in guided.torch_networks.unet.state_dict().items()}
    run = begin(guided, footage, tmp_path, steps=8, frames=1, decoder=True, what=what, rate=0.01, loss="l2")
    losses = [progress.loss for progress in run]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    assert run.best.psnr > run.begun.psnr + 1
    assert all(torch.equal(x, before[name]) for name, x in guided.torch_networks.unet.state_dict().items())
    for name in ("log.csv", "measures.csv", "chart.png", "step_000008.png"):
        assert (tmp_path / name).stat().st_size
    if what == "lora":
        told = read_metadata(tmp_path / "made.safetensors")
        assert (told["base"], told["rank"], told["licence"]) == (guided.model, "4", "none")
        assert guided.with_loras((tmp_path / "made.safetensors", 1.0)).model != guided.model


def test_a_run_that_was_stopped_ends_with_the_same_weights(
    guided: StreamDiffVSRPipeline, footage: Footage, tmp_path: Path
) -> None:
    whole = begin(guided, footage, tmp_path / "whole", steps=3, every=2)
    losses = [progress.loss for progress in whole]
    stopped = begin(guided, footage, tmp_path / "stopped", steps=3, every=2)
    at = random.Random(2).randint(1, 2)
    for progress in stopped:
        if progress.step == at:
            break  # what is on the disk is that of step 0 or 2
    resumed = begin(guided, footage, tmp_path / "stopped", steps=3, every=2)
    resumed.resume(resumed.state_file)
    assert (resumed.step, resumed.best_step) == (at // 2 * 2, stopped.best_step)
    assert [progress.loss for progress in resumed] == losses[at // 2 * 2 :]
    for name, weight in whole.tuned.parameters.items():
        assert torch.equal(weight, resumed.tuned.parameters[name]), name
    for name in ("log.csv", "measures.csv"):
        rows = [(tmp_path / each / name).read_text().count("\n") for each in ("whole", "stopped")]
        assert rows[0] == rows[1]
    with pytest.raises(IncompatibleInputError, match="seed was 0 and is now 1"):
        begin(guided, footage, tmp_path / "stopped", steps=3, every=2, seed=1).resume(resumed.state_file)


def test_checkpointing_changes_no_gradient(
    guided: StreamDiffVSRPipeline, footage: Footage, tmp_path: Path
) -> None:
    plain, saving = (begin(guided, footage, tmp_path, steps=1, checkpointing=each) for each in (False, True))
    assert plain.update() == saving.update()
    for name, weight in plain.tuned.parameters.items():
        torch.testing.assert_close(weight, saving.tuned.parameters[name], atol=1e-6, rtol=0)


def test_a_perceptual_loss_on_the_features_of_vgg(
    guided: StreamDiffVSRPipeline, footage: Footage, tmp_path: Path
) -> None:
    """With torchvision's own network: the same features; a loss that is learned from, and 0 for the truth."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    theirs = vgg16(weights=None).features.eval()
    weights = {f"features.{name}": x for name, x in theirs.state_dict().items()}
    torch.save({**weights, "classifier.0.bias": torch.zeros(1)}, tmp_path / "vgg.pth")
    loss, (one, other) = Perceptual(tmp_path / "vgg.pth"), torch.rand(2, 1, 3, 32, 48).mul(2).sub(1).unbind()
    mean, spread = loss.mean, loss.spread
    seen = [theirs[:16]((x / 2 + 0.5 - mean) / spread) for x in (one, other)]
    torch.testing.assert_close(loss(one, other), (seen[0] - seen[1]).abs().mean())
    assert loss(one, one) == 0
    given = {"perceptual": str(tmp_path / "vgg.pth"), "perceptual_weight": 1.0, "steps": 1, "frames": 1}
    plain = begin(guided, footage, tmp_path / "a", steps=1, frames=1)
    run = begin(guided, footage, tmp_path / "b", **given)
    assert run.update() > plain.update()
    differs = [name for name, x in run.parameters.items() if not torch.equal(x, plain.parameters[name])]
    assert differs
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not contain the weights of VGG-16"):
        Perceptual(tmp_path / "other.pth")


@pytest.mark.parametrize("name", PRESETS)
def test_degradation_depends_on_the_seed_alone(name: str) -> None:
    truth = to_pixels(moving(3, 96, 128))

    def made(seed: int) -> torch.Tensor:
        return degrade(truth, open_recipe(name), np.random.default_rng(seed))

    assert made(1).shape == (3, 3, 24, 32) and torch.equal(made(1), made(1))
    assert any(not torch.equal(made(1), made(seed)) for seed in (2, 3, 4))
    assert made(1).min() >= 0 and made(1).max() <= 1


@pytest.mark.parametrize("name", STEPS)
def test_each_step_changes_frames_and_nothing_else(name: str) -> None:
    function, known = STEPS[name]
    truth = to_pixels(moving(3, 48, 64))
    middle = {"quality": 30.0, "sigma": 2.0, "size": 1.0, "shift": 2.0}
    for word in next((each for each in known.values() if isinstance(each[0], str)), ("",)):
        drawn = {key: word if isinstance(rule[0], str) else middle[key] for key, rule in known.items()}
        out = function(truth, np.random.default_rng(0), **drawn)
        assert out.shape == ((3, 3, 12, 16) if name == "reduce" else truth.shape)
        if name != "reduce":
            assert 1e-4 < (out - truth).abs().mean() < 0.2


def test_a_file_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- noise: {chance: 0.5, sigma: [1, 3]}\n- reduce: {method: area}\n- interlace\n")
    assert [name for name, _ in open_recipe(str(path))] == ["noise", "reduce", "interlace"]
    for bad in (
        "- [",
        "x: 1",
        "- blurr: {sigma: 1}",
        "- reduce: {method: area}\n- noise: {sigma: lots}",
        "- interlace",
    ):
        path.write_text(bad)
        with pytest.raises(IncompatibleInputError):
            open_recipe(str(path))
    with pytest.raises(IncompatibleInputError, match="chance"):
        check_steps([("reduce", {"method": "area", "chance": 2})])


def test_clips_are_cut_at_scenes_and_told(tmp_path: Path) -> None:
    two = pictures(tmp_path / "two", 6)
    for index in range(6, 12):
        Image.new("RGB", (64, 64), (255 - index, 0, 0)).save(two / f"{index:03}.png")
    small = pictures(tmp_path / "small", 4, 16)
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    found = read_clips([two, small, tmp_path / "bad.mp4"], 32, 2)
    assert [(scene.first, scene.end) for scene in found.train] == [(0, 4), (6, 10)]
    assert [(scene.first, scene.end) for scene in found.held] == [(4, 6), (10, 12)]
    assert "2 scenes" in found.told[0] and "smaller than 32" in found.told[1] and "skipped" in found.told[2]
    with pytest.raises(IncompatibleInputError, match="no clip has scenes of at least 2 frames"):
        read_clips([small], 32, 2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip, made = str(pictures(tmp_path / "clip")), str(tmp_path / "mine")
    command = ["train", clip, "-o", made, "--device", "cpu", "--size", "32", "--frames", "2"]
    assert main([*command, "--show-degradation", str(tmp_path / "shown.png")]) == 0
    assert Image.open(tmp_path / "shown.png").size == (64, 128)
    assert main([*command, "--steps", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"{made}.safetensors" and "are held out" in said.err
    assert main([*command, "--steps", "1"]) == 2
    assert "--resume" in capsys.readouterr().err
    load_pipeline("nano", device="cpu", loras=[(f"{made}.safetensors", 1.0)])
    folder = str(tmp_path / "whole")
    assert main([*command, "-o", folder, "--steps", "1", "--what", "full"]) == 0
    assert load_pipeline(folder, device="cpu").info.model != load_pipeline("nano", device="cpu").info.model


@pytest.fixture(scope="module")
def pool() -> Iterator[object]:
    """What nano learns from; the recipe stands beside the package, and draws one scene here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from training.data import Pictures

        yield Pictures(0, 1)


@pytest.mark.parametrize("stage", ["autoencoder", "temporal", "flow"])
def test_the_recipe_of_nano_uses_the_same_loop(stage: str, pool: Any, tmp_path: Path) -> None:
    """Two steps at once, and in two runs: the same weights, and the moving average beside them."""
    from training import flow, train
    from training.flow_data import Pool

    def begin() -> Trainer:
        if stage == "flow":
            given = {"steps": 2, "rate": 1e-3, "batch": 1, "size": 32, "scenes": 1, "seed": 0, "start": None}
            return flow.Run(Namespace(**given), Pool(pool))
        wanted = [stage, "--steps", "2", "--batch", "1", "--frames", "2", "--size", "32", "--scenes", "1"]
        return train.Stage(train.arguments(wanted), pool)

    train.fit(begin(), tmp_path / "whole.safetensors", tmp_path / "log.csv")
    stopped = begin()
    stopped.update()
    stopped.keep(tmp_path / "parts.safetensors")
    train.fit(begin(), tmp_path / "parts.safetensors", tmp_path / "log.csv")
    for kind in ("weights", "average"):
        whole, parts = (of_state(tmp_path / f"{name}.safetensors", kind) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    before = {name: x.detach().clone() for name, x in begin().parameters.items()}
    changed = [name for name, x in of_state(tmp_path / "whole.safetensors", "weights").items()
               if not torch.equal(x, before[name])]  # fmt: skip
    assert changed and "prompt" not in changed
    assert (tmp_path / "log.csv").read_text().count("\n") == 2


@pytest.mark.long
def test_two_processes_share_a_run(tmp_path: Path) -> None:
    """As `accelerate launch` starts them on GPUs: one report, one file, and nobody waits at the end."""
    clips = pictures(tmp_path / "clip")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "stream_diffvsr.cli.main", "train", str(clips), "--size", "48", "--frames", "2"]
    command += [
        "--steps",
        "40",
        "--minutes",
        "0.2",
        "--every",
        "1000",
        "-o",
        str(tmp_path / "made.safetensors"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "made.safetensors")]
    assert done.stderr.count("over the base") == 1 and "inf" not in done.stderr
    assert (tmp_path / "made.safetensors").is_file()
