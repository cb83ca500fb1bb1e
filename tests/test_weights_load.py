"""What loading does besides: prompt embeddings, flow weights, memory."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_in_hub import serving
from torch import nn

from stream_diffvsr import CheckpointError, ModelNotFoundError, StreamDiffVSRPipeline, load_pipeline
from stream_diffvsr.families.diffvsr import prompt as prompts
from stream_diffvsr.families.diffvsr.check import problem
from stream_diffvsr.families.diffvsr.prompt import FILE, PromptEmbeddings
from stream_diffvsr.flow import raft_weights as raft
from stream_diffvsr.flow.raft_weights import find_raft, open_raft
from stream_diffvsr.weights.folders import user_cache, user_models


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stream-diffvsr"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, without embeddings."""
    target = tmp_path / "folder"
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("prompt_embeddings*"))
    return target


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the text encoder is run for."""
    seen: list[str] = []
    encode = prompts.encode

    def counted(folder: Path, prompt: str) -> torch.Tensor:
        seen.append(prompt)
        return encode(folder, prompt)

    monkeypatch.setattr(prompts, "encode", counted)
    return seen


def test_the_text_encoder_runs_once_for_a_prompt(folder: Path, runs: list[str]):
    first = load_pipeline(folder, device="cpu", flow="none")
    assert runs == [""]
    assert (folder / FILE).is_file()
    second = load_pipeline(folder, device="cpu", flow="none")
    assert runs == [""]
    assert torch.equal(first.prompts.get(""), second.prompts.get(""))
    second.prompts.get("a house")
    assert load_pipeline(folder, device="cpu", flow="none").prompts.has("a house")
    assert runs == ["", "a house"]


def test_the_text_encoder_is_gone_before_the_networks_come(
    folder: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
):
    import gc

    from stream_diffvsr.families.diffvsr import checkpoint as opening

    alive: list[int] = []
    fill = opening.fill

    def watched(network: nn.Module, *rest: object) -> nn.Module:
        alive.append(sum(type(each).__name__ == "CLIPTextModel" for each in gc.get_objects()))
        return fill(network, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "fill", watched)
    load_pipeline(folder, device="cpu", flow="none")
    assert runs == [""]
    assert alive == [0, 0, 0]


def test_a_folder_that_cannot_be_written(folder: Path, cache: Path, runs: list[str]):
    (folder / FILE).mkdir()  # so that no file can get this name, whoever tries
    embedding = load_pipeline(folder, device="cpu", flow="none").prompts.get("")
    assert [path.name.endswith(FILE) for path in cache.iterdir() if path.suffix == ".safetensors"] == [True]
    assert torch.equal(load_pipeline(folder, device="cpu", flow="none").prompts.get(""), embedding)
    assert runs == [""]


def test_nothing_can_be_written_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / FILE).mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_pipeline(folder, device="cpu", flow="none").prompts.has("")


def test_without_text_encoder_the_file_beside_counts(folder: Path):
    whole = load_pipeline(folder, device="cpu", flow="none")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    assert problem(folder) is None
    assert torch.equal(
        load_pipeline(folder, device="cpu", flow="none").prompts.get(""), whole.prompts.get("")
    )
    with pytest.raises(ModelNotFoundError, match=r"text encoder.*'a house'"):
        whole.prompts.get("a house")


def test_another_encoder_s_embedding_does_not_count(folder: Path, runs: list[str]):
    load_pipeline(folder, device="cpu", flow="none")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {key: value + 1 for key, value in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)
    load_pipeline(folder, device="cpu", flow="none")
    assert runs == ["", ""]


def test_a_damaged_embedding_is_made_again(folder: Path, runs: list[str]):
    first = load_pipeline(folder, device="cpu", flow="none").prompts.get("")
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-100])
    assert problem(folder) is None
    assert torch.equal(load_pipeline(folder, device="cpu", flow="none").prompts.get(""), first)
    assert runs == ["", ""] and (folder / FILE).read_bytes() == content


def test_a_damaged_embedding_that_cannot_be_made_again(folder: Path, caplog: pytest.LogCaptureFixture):
    load_pipeline(folder, device="cpu", flow="none")
    (folder / FILE).write_bytes(b"<html>")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    assert FILE in str(problem(folder)) and "text_encoder" in str(problem(folder))
    assert str(folder / FILE) in caplog.text and "web page" in caplog.text


def test_a_cache_of_somebody_else(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """As root's is for those whom sudo made somebody else."""
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.is_relative_to(cache):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert problem(folder) is None
    assert load_pipeline(folder, device="cpu", flow="none").prompts.has("")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_stored_embeddings_can_be_replaced_on_windows(folder: Path):
    """There a file that is mapped can be neither renamed nor written."""
    load_pipeline(folder, device="cpu", flow="none")
    again = load_pipeline(folder, device="cpu", flow="none")
    assert again.prompts.get("").shape == (1, 77, 32)
    assert str(folder / FILE) not in Path("/proc/self/maps").read_text()


def test_an_embedding_of_another_width(folder: Path):
    load_pipeline(folder, device="cpu", flow="none")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    wide = {key: torch.zeros(1, 77, 48) for key in load_file(folder / FILE)}
    (folder / FILE).unlink()
    save_file(wide, folder / FILE)
    assert "width 48, but the U-Net needs prompt embeddings of width 32" in str(problem(folder))


def test_only_a_prompt_needs_merges(folder: Path):
    (folder / "tokenizer" / "merges.txt").unlink()
    embeddings = PromptEmbeddings(folder, user_cache())
    assert embeddings.get("").shape == (1, 77, 32)
    with pytest.raises(ModelNotFoundError, match=r"merges\.txt"):
        embeddings.get("a house")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_weights_of_the_right_type_stay_in_the_file(folder: Path):
    """On a CPU nothing is copied, unless the type changes."""
    mapped = load_pipeline(folder, device="cpu", dtype="float32", flow="none")
    assert share_in_files(mapped, folder) == 1
    copied = load_pipeline(folder, device="cpu", dtype="bfloat16", flow="none")
    assert share_in_files(copied, folder) == 0


def share_in_files(pipe: StreamDiffVSRPipeline, folder: Path) -> float:
    """Which share of the large networks' weights lies in memory that is one of the folder's files."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            ranges.append(range(start, end))
    named = [item for name in ("unet", "controlnet") for item in pipe.stages[name].named_parameters()]
    inside = [any(weight.data_ptr() in each for each in ranges) for _, weight in named]
    return sum(inside) / len(inside)


@pytest.fixture
def small_raft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """RAFT small with random weights, an empty hub cache, and nobody to download from."""
    from huggingface_hub import constants
    from torchvision.models.optical_flow import raft_small

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return raft_small(weights=None).eval()


def assert_equal(network: nn.Module, expected: nn.Module) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["raft_small.safetensors", "raft_small.pth", "raft_small_C_T_V2.pth"])
def test_flow_weights_from_a_models_folder(small_raft: nn.Module, tmp_path: Path, name: str):
    path = tmp_path / "models" / "flow" / name
    path.parent.mkdir(parents=True)
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(small_raft.state_dict(), path)
    folders = [tmp_path / "nothing", tmp_path / "models"]
    assert find_raft("raft_small", folders) == path
    assert find_raft("raft_large", folders) is None
    assert_equal(open_raft("raft_small", folders), small_raft)


def test_flow_weights_from_comfyui_s_folder(small_raft: nn.Module, tmp_path: Path):
    """Which other packs fill too: what is not named as torchvision's file is left alone."""
    shared, folders = tmp_path / "models" / "optical_flow", [tmp_path / "models" / "StreamDiffVSR"]
    shared.mkdir(parents=True)
    (shared / "raft_small-things.pth").write_bytes(b"another maker's")
    assert find_raft("raft_small", folders) is None
    path = shared / (raft.hub_file("raft_small").name.partition("-")[0] + ".pth")
    torch.save(small_raft.state_dict(), path)
    assert find_raft("raft_small", folders) == find_raft("raft_small", [tmp_path / "models"]) == path
    assert find_raft("raft_large", folders) is None
    assert_equal(open_raft("raft_small", folders), small_raft)
    own = folders[0] / "flow" / "raft_small.pth"
    own.parent.mkdir(parents=True)
    path.rename(own)
    assert find_raft("raft_small", folders) == own


class Code:
    """What a pickle that runs code holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_downloaded_flow_weights_run_no_code(
    small_raft: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ran, served = tmp_path / "ran", tmp_path / "served" / "raft_small.pth"
    served.parent.mkdir()
    torch.save({"weight": Code(ran)}, served)
    path = served.with_name(f"raft_small-{hashlib.sha256(served.read_bytes()).hexdigest()[:8]}.pth")
    served.rename(path)
    with serving(path.parent, "any/any") as hub:
        member = raft._weights("raft_small")
        member._value_ = dataclasses.replace(member.value, url=f"{hub.url}/cdn/{path.name}")
        with pytest.raises(CheckpointError):
            open_raft("raft_small")
        assert len(hub.requests) == 1 and not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()  # it would have


def test_a_pipeline_with_flow_weights_beside(small_raft: nn.Module, folder: Path, tmp_path: Path):
    (tmp_path / "models" / "flow").mkdir(parents=True)
    save_file(small_raft.state_dict(), tmp_path / "models" / "flow" / "raft_small.safetensors")
    folder = folder.rename(tmp_path / "models" / "v1")
    pipe = load_pipeline(folder, device="cpu", flow="raft_small")
    assert pipe.flow.name == "raft_small"
    assert not any(weight.requires_grad for weight in pipe.flow.parameters())
    assert not any(module.training for module in pipe.flow.modules() if module is not pipe.flow)


def test_flow_weights_from_torch_s_cache(small_raft: nn.Module, tmp_path: Path):
    put_in_cache(small_raft, tmp_path, "raft_small")
    assert_equal(open_raft("raft_small"), small_raft)


def put_in_cache(network: nn.Module, tmp_path: Path, name: str) -> Path:
    """Under the name that torchvision gives it, but for the hash, which these weights cannot have."""
    path = raft.hub_file(name)
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    patched = path.with_name(f"raft_small-{digest}.pth")
    path.rename(patched)
    raft_weights = raft._weights(name)
    raft_weights._value_ = dataclasses.replace(raft_weights.value, url=f"http://127.0.0.1:9/{patched.name}")
    return patched


@pytest.fixture(autouse=True)
def _weights_as_they_were() -> Iterator[None]:
    if "torchvision.models.optical_flow" not in sys.modules:
        yield
        return
    members = [raft._weights(name) for name in raft.RAFT]
    values = [member.value for member in members]
    yield
    for member, value in zip(members, values, strict=True):
        member._value_ = value


def test_damaged_flow_weights(small_raft: nn.Module, tmp_path: Path):
    path = put_in_cache(small_raft, tmp_path, "raft_small")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*delete the file") as caught:
        open_raft("raft_small")
    assert str(path) in str(caught.value)


def test_flow_weights_of_another_network(small_raft: nn.Module, tmp_path: Path):
    (tmp_path / "flow").mkdir()
    weights = {f"module.{key}": value for key, value in small_raft.state_dict().items()}
    torch.save(weights, tmp_path / "flow" / "raft_small.pth")
    with pytest.raises(CheckpointError, match=r"raft_small\.pth lacks '.*another model"):
        open_raft("raft_small", [tmp_path])


def test_flow_weights_offline(small_raft: nn.Module, tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"HF_HUB_OFFLINE.*folder 'flow'.*'dis'") as caught:
        open_raft("raft_small")
    assert caught.value.expected_path.parent == tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("damaged", [False, True])
def test_flow_weights_are_downloaded(
    small_raft: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
):
    """With a check of the hash in their name."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = put_in_cache(small_raft, tmp_path, "raft_small")
    served = tmp_path / "served" / path.name
    served.parent.mkdir()
    path.rename(served)
    if damaged:
        served.write_bytes(served.read_bytes()[:-1])
    with serving(served.parent, "any/any") as hub:
        member = raft._weights("raft_small")
        member._value_ = dataclasses.replace(member.value, url=f"{hub.url}/cdn/{path.name}")
        if damaged:
            with pytest.raises(ModelNotFoundError, match="invalid hash"):
                open_raft("raft_small")
            assert not path.exists()
        else:
            assert_equal(open_raft("raft_small"), small_raft)
            assert_equal(open_raft("raft_small"), small_raft)
            assert len(hub.requests) == 1


LINUX = (".local/share/stream-diffvsr/models", ".cache/stream-diffvsr")
MAC = ("Library/Application Support/stream-diffvsr/models", "Library/Caches/stream-diffvsr")
WINDOWS = ("AppData/Local/stream-diffvsr/models", "AppData/Local/stream-diffvsr/cache")
XDG = ("/d/stream-diffvsr/models", "/c/stream-diffvsr")
LOCAL = ("/local/stream-diffvsr/models", "/local/stream-diffvsr/cache")
SYSTEMS: dict[str, tuple[str, dict[str, str], tuple[str, str]]] = {
    "Linux": ("linux", {}, LINUX),
    "Linux, relative": ("linux", {"XDG_DATA_HOME": "relative", "XDG_CACHE_HOME": ""}, LINUX),
    "Linux, named": ("linux", {"XDG_DATA_HOME": "/d", "XDG_CACHE_HOME": "/c"}, XDG),
    "macOS": ("darwin", {}, MAC),
    "Windows": ("win32", {"LOCALAPPDATA": "/local"}, LOCAL),
    "Windows, without variable": ("win32", {}, WINDOWS),
}


@pytest.mark.parametrize(("system", "variables", "folders"), SYSTEMS.values(), ids=SYSTEMS)
def test_user_folders(
    monkeypatch: pytest.MonkeyPatch, system: str, variables: dict[str, str], folders: tuple[str, str]
):
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert (user_models(), user_cache()) == tuple(Path.home() / folder for folder in folders)
