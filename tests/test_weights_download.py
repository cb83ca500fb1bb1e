"""Downloading the released weights, over real HTTP, from a hub on loopback with all that goes wrong."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
from stand_in_hub import StandInHub, cut_after, stalled_after, status

from stream_diffvsr import CheckpointError, ModelNotFoundError, find_checkpoints, load, load_pipeline
from stream_diffvsr.families.diffvsr.check import problem
from stream_diffvsr.weights.released import RELEASES

REPOSITORY = RELEASES["v1"].repository
download = partial(load.download, "v1")
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
SIGNPOSTS = (REPOSITORY,)

pytestmark = pytest.mark.usefixtures("home")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def assert_same(folder: Path, published: Path) -> None:
    for name in names(folder):
        if not name.startswith("prompt_embeddings"):
            assert (folder / name).read_bytes() == (published / name).read_bytes(), name


def test_first_download(hub: StandInHub, home: Path, published: Path):
    seen: list[tuple[int, int]] = []
    folder = download(on_progress=lambda done, total: seen.append((done, total)))
    assert folder == home / "v1"
    assert problem(folder) is None
    assert_same(folder, published)
    extra = {"README.md", "assets/teaser.png", "unet/diffusion_pytorch_model.bin"}
    extra |= {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert set(names(published)) - set(names(folder)) == extra
    assert [path.name for path in home.iterdir() if not path.name.startswith(".")] == ["v1"]
    size = sum((folder / name).stat().st_size for name in names(folder))
    assert seen[-1] == (size, size)
    assert all(before <= after for (before, _), (after, _) in itertools.pairwise(seen))
    assert len(hub.gets()) == len(names(folder)), "each file once"


def test_loads_by_name_and_is_not_fetched_again(hub: StandInHub, home: Path):
    pipe = load_pipeline("v1", device="cpu", flow="none")
    assert pipe.prompts.folder == home / "v1"
    asked = len(hub.requests)
    assert load_pipeline("v1", device="cpu", flow="none").model == pipe.model
    assert len(hub.requests) == asked
    assert [(found.name, found.problem) for found in find_checkpoints()] == [("v1", None)]


def test_goes_to_the_first_registered_folder(hub: StandInHub, home: Path, tmp_path: Path):
    first, second = tmp_path / "models" / "StreamDiffVSR", tmp_path / "other"
    assert download([first, second]) == first / "v1"
    assert not home.exists()


def test_skips_a_folder_that_cannot_be_written(hub: StandInHub, tmp_path: Path):
    # Below a file nobody can make a folder, not even root.
    (tmp_path / "file").write_text("")
    assert download([tmp_path / "file" / "models", tmp_path / "other"]) == tmp_path / "other" / "v1"


def test_resumes_within_one_call(hub: StandInHub, published: Path):
    size = (published / UNET).stat().st_size
    hub.fail(UNET, cut_after(size // 3))
    folder = download()
    assert_same(folder, published)
    starts = [request.start for request in hub.gets(UNET)]
    assert starts[0] == 0 < starts[1]


def test_resumes_after_being_cancelled(hub: StandInHub, home: Path, published: Path):
    """Cancelled in the middle of the U-Net: what has come is not fetched again, to the byte."""

    class CancelledError(Exception):
        pass

    part = home / "v1.partial" / f"{UNET}.part"

    def cancel(done: int, total: int) -> None:
        assert done < total
        if part.is_file() and part.stat().st_size:
            raise CancelledError

    cancelled = threading.Event()
    hub.fail(UNET, stalled_after((published / UNET).stat().st_size // 2, cancelled))
    with pytest.raises(CancelledError):
        download(on_progress=cancel)
    cancelled.set()
    assert not (home / "v1").exists()
    assert find_checkpoints() == []
    fetched, there = len(hub.gets()), part.stat().st_size
    told: list[int] = []
    hub.requests.clear()
    folder = download(on_progress=lambda done, total: told.append(done))
    assert_same(folder, published)
    assert [request.start for request in hub.gets(UNET)] == [there]
    assert fetched + len(hub.gets()) == len(names(folder)) + 1, "only the U-Net is asked for twice"
    assert told[-1] == sum((published / name).stat().st_size for name in names(folder))


@pytest.mark.parametrize(("code", "words"), [(404, "does not exist"), (401, "HF_TOKEN"), (403, "HF_TOKEN")])
def test_an_error_that_stays(hub: StandInHub, home: Path, code: int, words: str):
    hub.fail("revision/main", status(code))
    with pytest.raises(ModelNotFoundError, match=words) as caught:
        download()
    assert_manual(caught.value, home / "v1", hub.url)
    assert len([r for r in hub.requests if "/revision/" in r.path]) == 1, "asking again would not help"


@pytest.mark.parametrize("answer", [b"<html>Please log in</html>", b"", b"[]", b"{}", b'"files"'])
def test_somebody_else_answers(hub: StandInHub, home: Path, answer: bytes):
    """The login page of a hotel's network says 200 to everything."""
    hub.fail("revision/main", lambda handler, content: handler.answer(200, answer, {}))
    with pytest.raises(ModelNotFoundError, match=r"did not return a list of files.*login page") as caught:
        download()
    assert_manual(caught.value, home / "v1", hub.url)


def assert_manual(error: ModelNotFoundError, folder: Path, endpoint: str) -> None:
    """One sentence that says what to fetch, from where, and where to put it."""
    text = str(error)
    assert all(word in text for word in (*SIGNPOSTS, str(folder), endpoint)), text
    assert "\n" not in text
    assert error.expected_path == folder


def test_another_revision_that_is_not_there(hub: StandInHub):
    with pytest.raises(ModelNotFoundError, match="no-such-branch"):
        download(revision="no-such-branch")


def test_revision_from_the_environment(hub: StandInHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STREAM_DIFFVSR_REVISION", "named-by-variable")
    with pytest.raises(ModelNotFoundError, match="named-by-variable"):
        download()


def test_what_came_of_another_revision_is_not_mixed_in(hub: StandInHub, home: Path, published: Path):
    part = home / "v1.partial" / f"{UNET}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"old" * 1000)
    (home / "v1.partial" / ".commit").write_text("f" * 40)
    assert_same(download(), published)
    assert [request.start for request in hub.gets(UNET)] == [0]
    assert not (home / "v1" / ".commit").exists()


def test_a_token_is_sent_to_the_hub_and_to_nobody_else(hub: StandInHub, monkeypatch: pytest.MonkeyPatch):
    hub.token = "hf_secret"
    with pytest.raises(ModelNotFoundError, match="HF_TOKEN"):
        download()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    download()
    assert all(request.authorized for request in hub.requests if "/resolve/" in request.path)
    assert not any(request.authorized for request in hub.requests if request.path.startswith("/cdn/"))


def test_no_connection(home: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    with pytest.raises(ModelNotFoundError, match="connection") as caught:
        load_pipeline("v1", device="cpu", flow="none")
    assert_manual(caught.value, home / "v1", closed)


def test_offline_asks_nobody(hub: StandInHub, home: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE") as caught:
        download()
    assert_manual(caught.value, home / "v1", hub.url)
    assert hub.requests == []


def test_disk_space_is_looked_at_first(hub: StandInHub, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelNotFoundError, match=r"GB free.*make room"):
        download()
    assert hub.gets() == []


@pytest.mark.parametrize("keep_embedding", [True, False])
def test_only_the_missing_parts_are_fetched(
    hub: StandInHub, published: Path, home: Path, keep_embedding: bool
):
    folder = home / "v1"
    load_pipeline("v1", device="cpu", flow="none")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    if not keep_embedding:
        (folder / "prompt_embeddings.safetensors").unlink()
    hub.requests.clear()
    load_pipeline("v1", device="cpu", flow="none")
    fetched = {request.path.split("/")[-2] for request in hub.gets()}
    assert fetched == (set() if keep_embedding else {"text_encoder", "tokenizer"})


def test_no_text_encoder_where_the_embedding_is(hub: StandInHub, home: Path):
    folder = download()
    load_pipeline(folder, device="cpu", flow="none")
    for name in ("text_encoder", "tokenizer", "unet"):
        shutil.rmtree(folder / name)
    hub.requests.clear()
    download()
    assert {request.path.split("/")[-2] for request in hub.gets()} == {"unet"}
    assert problem(folder) is None


def test_a_folder_copied_in_half_is_completed(hub: StandInHub, published: Path, tmp_path: Path):
    folder = tmp_path / "models" / "v1"
    shutil.copytree(published, folder)
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[: len(content) // 2])
    (folder / "notes.txt").write_text("mine")
    assert download([folder.parent]) == folder
    assert [request.path.rpartition("/unet/")[2] for request in hub.gets()] == [Path(UNET).name]
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder.parent / "v1.partial").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_on_another_disk(hub: StandInHub, home: Path, published: Path, there: bool):
    """What comes grows there, where there is room, and can be renamed."""
    disk = Path("/dev/shm")
    if not disk.is_dir() or disk.stat().st_dev == home.parent.parent.parent.stat().st_dev:
        pytest.skip("needs a second disk")
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        real = Path(folder, "weights")
        if there:
            real.mkdir()
        home.mkdir(parents=True)
        (home / "v1").symlink_to(real)
        assert download() == real
        assert_same(real, published)
        assert [found.path for found in find_checkpoints()] == [home / "v1"]
        assert names(home) in ([], [".v1.lock"])


def test_the_hub_s_cache_is_left_to_the_hub(hub: StandInHub, home: Path, published: Path, tmp_path: Path):
    """It takes strange files in it for damage."""
    snapshots = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots"
    ignored = shutil.ignore_patterns("text_encoder", "tokenizer")
    shutil.copytree(published, snapshots / ("a" * 40), ignore=ignored)
    assert download() == home / "v1"
    assert [path.name for path in snapshots.iterdir()] == ["a" * 40]
    assert not (snapshots / ("a" * 40) / "text_encoder").exists()


def test_a_mirror_that_lists_names_alone(hub: StandInHub, published: Path):
    hub.sparse = True
    assert_same(download(), published)


def test_sharded_weights_are_fetched_whole(hub: StandInHub, published: Path):
    split(published / "unet")
    folder = download()
    assert [name for name in names(folder) if name.startswith("unet/")] == [
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]


def split(part: Path) -> None:
    """A part's weights as two files and an index."""
    import json

    from safetensors.torch import load_file, save_file

    for extra in part.glob("*.fp16.safetensors"):
        extra.unlink()
    path = part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    keys, places = sorted(tensors), {}
    for number, chosen in enumerate((keys[::2], keys[1::2]), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in chosen}, part / file)
        places |= dict.fromkeys(chosen, file)
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_repository_with_another_model(hub: StandInHub, published: Path, home: Path):
    shutil.copyfile(published / VAE, published / UNET)
    with pytest.raises(CheckpointError, match="unet"):
        download()
