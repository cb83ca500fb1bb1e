"""Where checkpoints are found, which of them count, and what is said about those that do not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from stream_diffvsr import (
    CheckpointError,
    ModelNotFoundError,
    StreamDiffVSRPipeline,
    find_checkpoints,
    load_pipeline,
)
from stream_diffvsr.families.diffvsr.check import problem
from stream_diffvsr.files import fingerprint
from stream_diffvsr.load import resolve
from stream_diffvsr.weights import find
from stream_diffvsr.weights.find import models_folders
from stream_diffvsr.weights.released import RELEASES

REPOSITORY = RELEASES["v1"].repository

WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORKS = ("unet", "controlnet", "vae")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, one for all tests, since working out the networks' shapes takes seconds."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no user folders, no variables, no hub cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv(find.VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break."""
    return copy(checkpoint, tmp_path / "broken")


def copy(checkpoint: Path, target: Path) -> Path:
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("prompt_embeddings*"))
    return target


def test_an_empty_machine_has_none():
    assert find_checkpoints() == []
    assert resolve("v1") is None


PLACES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "registered, with its level": ("m/StreamDiffVSR/v1", ("m/StreamDiffVSR",), "v1"),
    "registered, without": ("m/StreamDiffVSR", ("m/StreamDiffVSR",), "v1"),
    "registered in small letters": ("m/streamdiffvsr/V1", ("m/streamdiffvsr",), "v1"),
    "the second registered": ("n/v1", ("m/StreamDiffVSR", "n"), "v1"),
    "as the repository is called": ("m/StreamDiffVSR/Stream-DiffVSR", ("m/StreamDiffVSR",), "v1"),
    "another name": ("m/StreamDiffVSR/my tuning", ("m/StreamDiffVSR",), "my tuning"),
    "models/diffusers": ("m/diffusers/Stream-DiffVSR", ("m/diffusers/Stream-DiffVSR",), "v1"),
    "user data folder": ("data/stream-diffvsr/models/v1", (), "v1"),
}


@pytest.mark.parametrize(("place", "registered", "name"), PLACES.values(), ids=PLACES)
def test_places(checkpoint: Path, machine: Path, place: str, registered: tuple[str, ...], name: str):
    path = copy(checkpoint, machine / place)
    folders = [machine / folder for folder in registered]
    assert find_checkpoints(folders) == [(name, path, None)]
    assert find_checkpoints([str(folder) for folder in folders]) == [(name, path, None)]
    assert resolve(name, folders) == path


def test_environment_variable(checkpoint: Path, machine: Path, monkeypatch: pytest.MonkeyPatch):
    path = copy(checkpoint, machine / "second" / "v1")
    monkeypatch.setenv(find.VARIABLE, f"{machine / 'first'}{find.os.pathsep}{machine / 'second'}")
    assert find_checkpoints() == [("v1", path, None)]


def test_the_home_of_a_user_that_does_not_exist(checkpoint: Path, machine: Path):
    copy(checkpoint, machine / "there" / "v1")
    found = find_checkpoints(["~nobody-by-this-name/models", machine / "there"])
    assert [(name, problem) for name, _, problem in found] == [("v1", None)]
    assert find.registered(["~/models"]) == [Path.home() / "models"]


@pytest.mark.parametrize("place", ["StreamDiffVSR/v1", "streamdiffvsr", "diffusers/Stream-DiffVSR"])
def test_a_comfyui_around(checkpoint: Path, machine: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    pack = machine / "ComfyUI" / "custom_nodes" / "pack" / "stream_diffvsr" / "weights"
    pack.mkdir(parents=True)
    path = copy(checkpoint, machine / "ComfyUI" / "models" / place)
    monkeypatch.setattr(find, "__file__", str(pack / "find.py"))
    assert find_checkpoints() == [("v1", path, None)]


def test_the_hub_s_cache(checkpoint: Path, machine: Path):
    repository = machine / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    linked(checkpoint, repository, "a" * 40)
    linked(checkpoint, repository, "b" * 40)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    snapshots = [repository / "snapshots" / (letter * 40) for letter in "ab"]
    assert find_checkpoints() == [("v1", snapshot, None) for snapshot in snapshots]
    assert load_pipeline("v1", device="cpu", flow="none").prompts.folder.name == "a" * 40


def linked(checkpoint: Path, repository: Path, commit: str) -> None:
    """A snapshot as the cache has it: links to blobs."""
    for file in checkpoint.rglob("*"):
        if file.is_file() and not file.name.startswith("prompt_embeddings"):
            name = file.relative_to(checkpoint)
            blob = repository / "blobs" / name.as_posix().replace("/", "_")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link = repository / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)


def test_the_order(checkpoint: Path, machine: Path, monkeypatch: pytest.MonkeyPatch):
    """Registered, the variable's, the user's, a ComfyUI around, the hub's cache; v1 is the first whole."""
    pack = machine / "ComfyUI" / "custom_nodes" / "pack" / "stream_diffvsr" / "weights"
    pack.mkdir(parents=True)
    monkeypatch.setattr(find, "__file__", str(pack / "find.py"))
    monkeypatch.setenv(find.VARIABLE, str(machine / "variable"))
    places = ["registered/v1", "again/v1", "variable/v1", "data/stream-diffvsr/models/v1"]
    places += ["ComfyUI/models/StreamDiffVSR/v1", "ComfyUI/models/diffusers/Stream-DiffVSR"]
    paths = [copy(checkpoint, machine / place) for place in places]
    linked(checkpoint, machine / "hub" / f"models--{REPOSITORY.replace('/', '--')}", "c" * 40)
    registered = [machine / "registered", machine / "again"]
    found = [each.path for each in find_checkpoints(registered)]
    assert found[:-1] == paths and found[-1].name == "c" * 40
    for path in paths:
        assert resolve("v1", registered) == path
        (path / "unet" / WEIGHTS).unlink()
    assert resolve("v1", registered) == found[-1]


def test_an_explicit_folder_comes_first(checkpoint: Path, machine: Path, monkeypatch: pytest.MonkeyPatch):
    copy(checkpoint, machine / "m" / "mine")
    here = copy(checkpoint, machine / "mine")
    monkeypatch.chdir(machine)
    assert resolve("mine", [machine / "m"]).resolve() == here  # type: ignore[union-attr]
    assert resolve("v1", [machine / "m"]) is None


def test_a_folder_of_checkpoints_is_none(checkpoint: Path, machine: Path):
    copy(checkpoint, machine / "m" / "v1")
    copy(checkpoint, machine / "m" / "mine")
    with pytest.raises(
        ModelNotFoundError, match=r"contains several checkpoints: choose .*/m/mine or .*/m/v1"
    ):
        load_pipeline(machine / "m", device="cpu", flow="none")


def test_a_folder_is_listed_once(checkpoint: Path, machine: Path):
    path = copy(checkpoint, machine / "m" / "v1")
    (machine / "link").symlink_to(machine / "m")
    assert find_checkpoints([machine / "m", machine / "link", path]) == [("v1", path, None)]


def test_other_things_in_a_models_folder_are_not_listed(machine: Path):
    for name in ("flow", "notes", ".hidden/unet", "v1.partial/unet"):
        (machine / "m" / name).mkdir(parents=True)
    assert find_checkpoints([machine / "m"]) == []


AS_NOBODY = """
import os, sys
from huggingface_hub import constants
from stream_diffvsr import find_checkpoints
if not os.geteuid():
    os.setgid(65534), os.setuid(65534)
print([(found.name, found.problem) for found in find_checkpoints(sys.argv[1:])])
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as POSIX has them")
def test_what_may_not_be_read_stops_nobody(machine: Path):
    """A disk's lost+found, another user's folder, another user's hub cache."""
    repository = machine / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    (machine / "m" / "v1" / "unet").mkdir(parents=True)
    closed = [machine / "m" / "lost+found", machine / "m" / "v1", repository]
    for folder in closed:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0)
    # Nobody has to get here, and pytest's own folders are closed to them.
    for parent in [machine, *machine.parents]:
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)
    variables = {**os.environ, "HF_HUB_CACHE": str(machine / "hub")}
    command = [sys.executable, "-c", AS_NOBODY, str(machine / "m")]
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    for folder in closed:
        folder.chmod(0o755)
    assert process.returncode == 0, process.stderr
    assert "lost+found" not in process.stdout
    assert "'v1'" in process.stdout and "check its permissions" in process.stdout


def test_an_unknown_name_says_which_there_are(checkpoint: Path, machine: Path):
    copy(checkpoint, machine / "m" / "mine")
    with pytest.raises(ModelNotFoundError, match=r"nano, v1, .*mine"):
        load_pipeline("yours", extra_folders=[machine / "m"])


FILES = {
    "unet/config.json": "unet",
    f"unet/{WEIGHTS}": "unet",
    "controlnet/config.json": "controlnet",
    f"controlnet/{WEIGHTS}": "controlnet",
    "vae/config.json": "vae",
    f"vae/{WEIGHTS}": "vae",
    "scheduler/scheduler_config.json": "scheduler",
    "text_encoder/config.json": "text_encoder",
    "text_encoder/model.safetensors": "text_encoder",
}
NOT_NEEDED = ("model_index.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json")
NOT_NEEDED += ("tokenizer/special_tokens_map.json", "tokenizer/vocab.json")


def test_the_table_has_every_file(folder: Path):
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {*FILES, *NOT_NEEDED}


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_missing(folder: Path, file: str):
    (folder / file).unlink()
    with pytest.raises(ModelNotFoundError, match=FILES[file]) as caught:
        load_pipeline(folder, device="cpu", flow="none")
    assert caught.value.expected_path == folder / file
    assert "stream-diffvsr download" in str(caught.value)
    (found,) = find_checkpoints([folder])
    assert found.problem == str(caught.value)


@pytest.mark.parametrize("file", NOT_NEEDED)
def test_a_file_that_can_be_missing(folder: Path, pipe: StreamDiffVSRPipeline, file: str):
    (folder / file).unlink()
    broken = load_pipeline(folder, device="cpu", flow="none")
    assert torch.equal(broken.prompts.get(""), pipe.prompts.get(""))
    assert broken.model == pipe.model


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".safetensors")])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_file_is_cut(folder: Path, file: str, share: float):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(len(content) * share)])
    error = problem(folder)
    assert isinstance(error, CheckpointError)
    assert str(folder / file) in str(error) and "again" in str(error)


@pytest.mark.parametrize("file", [file for file in [*FILES, "model_index.json"] if file.endswith(".json")])
@pytest.mark.parametrize("content", ["", "{", "[1]", "<html>no</html>"])
def test_a_configuration_does_not_parse(folder: Path, file: str, content: str):
    (folder / file).write_text(content)
    error = problem(folder)
    assert isinstance(error, CheckpointError)
    assert str(folder / file) in str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"<!DOCTYPE html><html></html>", "web page"), (b"version https://git-lfs", "Git LFS"), (b"", "empty")],
)
def test_something_else_under_the_name_of_weights(folder: Path, content: bytes, words: str):
    (folder / "vae" / WEIGHTS).write_bytes(content)
    assert words in str(problem(folder))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    tensors = {key: value.clone() for key, value in tensors.items()}
    edit(tensors)
    path.unlink()
    save_file(tensors, path)


EDITS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "lacks": lambda tensors: tensors.pop(sorted(tensors)[3]),
    "does not have": lambda tensors: tensors.update(extra=torch.zeros(1)),
    "of shape": lambda tensors: tensors.update({sorted(tensors)[3]: torch.zeros(5)}),
}


@pytest.mark.parametrize("words", EDITS)
@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".safetensors")])
def test_a_key_is_wrong(folder: Path, file: str, words: str):
    key = (
        "extra"
        if words == "does not have"
        else sorted(load_file(folder / file))[3].removeprefix("text_model.")
    )
    change(folder / file, EDITS[words])
    error = problem(folder)
    assert isinstance(error, CheckpointError)
    assert str(folder / file) in str(error) and key in str(error) and words in str(error)


@pytest.mark.parametrize("file", [f"{name}/{WEIGHTS}" for name in NETWORKS])
def test_loading_is_as_strict(folder: Path, file: str):
    key = sorted(load_file(folder / file))[3]
    change(folder / file, EDITS["of shape"])
    with pytest.raises(CheckpointError, match="of shape") as caught:
        load_pipeline(folder, device="cpu", flow="none")
    assert str(folder / file) in str(caught.value) and key in str(caught.value)


def configure(folder: Path, name: str, **values: object) -> None:
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def widen(channels: int) -> Callable[[dict[str, torch.Tensor]], object]:
    """A first convolution for so many channels."""
    return lambda tensors: tensors.update({"conv_in.weight": torch.zeros(8, channels, 3, 3)})


def test_a_plain_x4_upscaler_is_named(folder: Path):
    configure(folder, "unet", num_class_embeds=1000)
    assert "plain Stable Diffusion x4 upscaler (num_class_embeds 1000)" in str(problem(folder))


def test_a_plain_x4_upscaler_is_told_by_its_keys(folder: Path):
    change(folder / "unet" / WEIGHTS, lambda t: t.update({"class_embedding.weight": torch.zeros(1000, 32)}))
    assert "plain Stable Diffusion x4 upscaler (num_class_embeds 1000)" in str(problem(folder))
    with pytest.raises(CheckpointError, match="x4 upscaler"):
        load_pipeline(folder, device="cpu", flow="none")


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1.5 ControlNet"), (1024, "Stable Diffusion 2 ControlNet")]
)
def test_a_generator_s_controlnet_is_named(folder: Path, width: int, family: str):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        widen(4)(tensors)
        keys = [key for key in tensors if key.endswith("attn2.to_k.weight")]
        tensors.update({key: torch.zeros(len(tensors[key]), width) for key in keys})

    change(folder / "controlnet" / WEIGHTS, edit)
    assert family in str(problem(folder))


FOREIGN: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "inpainting U-Net": ("unet", widen(9)),
    "single-file": ("unet", lambda tensors: tensors.update({"model.diffusion_model.x": torch.zeros(1)})),
    "AutoencoderKL": ("vae", lambda tensors: tensors.update({"decoder.conv_in.weight": torch.zeros(1)})),
    "without the Temporal": (
        "vae",
        lambda tensors: [tensors.pop(key) for key in list(tensors) if ".temporal_processor." in key],
    ),
}


@pytest.mark.parametrize("words", FOREIGN)
def test_other_models_are_named(folder: Path, words: str):
    name, edit = FOREIGN[words]
    change(folder / name / WEIGHTS, edit)
    assert words in str(problem(folder)) and "choose the folder" in str(problem(folder))


def test_networks_that_changed_places_are_named(folder: Path):
    (folder / "unet").rename(folder / "other")
    (folder / "controlnet").rename(folder / "unet")
    (folder / "other").rename(folder / "controlnet")
    assert "is a ControlNet, not Stream-DiffVSR's unet" in str(problem(folder))


class Broken(ModuleType):
    """A package some other package of which does not import, as diffusers tells it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("Failed to import diffusers.models") from OSError("libaudio.so is missing")


@pytest.mark.parametrize(
    ("package", "words"),
    [(None, "diffusers"), (Broken("diffusers"), "diffusers cannot be imported: libaudio.so is missing")],
)
def test_a_package_is_missing_or_broken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: ModuleType | None, words: str
):
    """That is told, and is no reason to call weights damaged or to download them again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))  # where no shapes are known
    monkeypatch.setitem(sys.modules, "diffusers", package)  # type: ignore[arg-type]
    (found,) = find_checkpoints([folder])
    assert found.problem is not None and words in found.problem
    for use in (lambda: resolve("v1", [folder]), lambda: load_pipeline(folder, device="cpu", flow="none")):
        with pytest.raises(ImportError, match=words):
            use()


def test_a_text_encoder_of_another_family(folder: Path):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads((folder / "text_encoder" / "config.json").read_text()) | {"hidden_size": 16}
    shutil.rmtree(folder / "text_encoder")
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder")
    assert "width 16, but the U-Net needs prompt embeddings of width 32" in str(problem(folder))


SENSELESS = {
    "unet": {"act_fn": None, "attention_head_dim": 0, "in_channels": -1, "down_block_types": []},
    "controlnet": {"conditioning_embedding_out_channels": [], "block_out_channels": "wide"},
    "vae": {"num_decoder_blocks": [1], "latent_channels": None},
    "text_encoder": {"num_attention_heads": 0, "max_position_embeddings": "x", "hidden_act": 3},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in SENSELESS for key in SENSELESS[name]])
def test_a_configuration_that_makes_no_sense(folder: Path, name: str, key: str):
    configure(folder, name, **{key: SENSELESS[name][key]})
    assert isinstance(problem(folder), CheckpointError)


@pytest.mark.parametrize("decoder", [None, [], "x", {"0": 5}, {"x": {"content": "<|startoftext|>"}}])
def test_a_tokenizer_that_makes_no_sense(folder: Path, decoder: object):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": decoder}))
    assert "download the folder again" in str(problem(folder))


def split(part: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """A part's weights in two files with an index."""
    path = part / f"{stem}.safetensors"
    tensors = load_file(path)
    path.unlink()
    keys, places = sorted(tensors), {}
    for number, chosen in enumerate((keys[::2], keys[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in chosen}, part / file)
        places |= dict.fromkeys(chosen, file)
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sorted(part.glob("*-of-*"))


def half(part: Path) -> None:
    path = part / WEIGHTS
    halved = {key: value.half() for key, value in load_file(path).items()}
    save_file(halved, part / "diffusion_pytorch_model.fp16.safetensors")
    path.unlink()


def pickled(part: Path, name: str = "diffusion_pytorch_model.bin", zipped: bool = True) -> None:
    path = next(part.glob("*.safetensors"))
    torch.save(load_file(path), part / name, _use_new_zipfile_serialization=zipped)
    path.unlink()


def linked_part(part: Path) -> None:
    part.rename(part.with_name("elsewhere"))
    part.symlink_to(part.with_name("elsewhere"))


def each(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder / name) for name in NETWORKS]


FORMS: dict[str, Callable[[Path], object]] = {
    "sharded": each(split),
    "sharded text encoder": lambda folder: split(folder / "text_encoder", "model"),
    "fp16": each(half),
    "bin": each(pickled),
    "bin text encoder": lambda folder: pickled(folder / "text_encoder", "pytorch_model.bin"),
    "pth": each(lambda part: pickled(part, "diffusion_pytorch_model.pth")),
    "old bin": each(lambda part: pickled(part, zipped=False)),
    "links": lambda folder: linked_part(folder / "unet"),
    "extra files": each(lambda part: (part / ".DS_Store").write_text("x")),
    "two formats": each(lambda part: (part / "diffusion_pytorch_model.bin").write_bytes(b"not even read")),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_weights(folder: Path, pipe: StreamDiffVSRPipeline, form: str):
    FORMS[form](folder)
    assert problem(folder) is None
    loaded = load_pipeline(folder, device="cpu", flow="none")
    for name in NETWORKS:
        found = loaded.stages[name].state_dict()
        for key, value in pipe.stages[name].state_dict().items():
            expected = value.half().float() if form == "fp16" else value
            assert torch.equal(found[key], expected), (name, key)
    assert torch.equal(loaded.prompts.get(""), pipe.prompts.get(""))


def test_a_shard_is_missing(folder: Path):
    _, second = split(folder / "unet")
    second.unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        load_pipeline(folder, device="cpu")
    assert caught.value.expected_path == second


def test_an_index_does_not_lead_out_of_its_folder(folder: Path):
    split(folder / "unet")
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(
        index.read_text().replace('"diffusion_pytorch_model-0', '"../../diffusion_pytorch_model-0')
    )
    assert problem(folder) is None


def test_a_link_to_nowhere(folder: Path):
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "vae" / WEIGHTS).symlink_to("/nowhere/at/all")
    assert "a link to /nowhere/at/all" in str(problem(folder))


def test_pickles_with_code_are_not_opened(folder: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "harm",)

    (folder / "unet" / WEIGHTS).unlink()
    torch.save({"x": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    assert isinstance(problem(folder), CheckpointError)
    with pytest.raises(CheckpointError, match="weights"):
        load_pipeline(folder, device="cpu")
    assert not (tmp_path / "harm").exists()


def test_a_fingerprint_names_the_content(folder: Path, tmp_path: Path):
    path = folder / "unet" / WEIGHTS
    name = fingerprint([path])
    shutil.copyfile(path, tmp_path / "copy.safetensors")
    assert fingerprint([tmp_path / "copy.safetensors"]) == name
    change(path, lambda tensors: tensors["conv_out.bias"].add_(1))
    assert fingerprint([path]) != name
    change(path, lambda tensors: tensors["conv_out.bias"].sub_(1))


def test_a_fingerprint_covers_the_whole_header(tmp_path: Path):
    """Names that stand far behind in a long header count."""
    tensors = {f"a long name of a tensor, number {index:05d}": torch.zeros(1) for index in range(3000)}
    save_file(tensors, tmp_path / "first.safetensors")
    tensors["b long name of a tensor, number 01500"] = tensors.pop("a long name of a tensor, number 01500")
    save_file(tensors, tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").stat().st_size > 1 << 17
    assert fingerprint([tmp_path / "first.safetensors"]) != fingerprint([tmp_path / "second.safetensors"])


def test_models_folders_hold_no_doubles(machine: Path):
    folders = models_folders([machine, machine])
    assert len(folders) == len(set(folders))
