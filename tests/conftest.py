"""Fixtures: real tiny networks, the recorded reference data, and frames to feed them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Compiled code that another checkout left behind need not fit this one's headers.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor-"))
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command does, before torch is imported

import hypothesis
import pytest
import torch
from samples import shift_flow
from stand_in_hub import StandInHub, serving

from stream_diffvsr import StreamDiffVSRPipeline, load_pipeline
from stream_diffvsr.weights.released import RELEASES

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("project")

# The networks here are tiny: sharing their work out costs more than it saves, above all beside other work.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

GOLDEN = Path(os.environ.get("STREAM_DIFFVSR_GOLDEN", Path(__file__).parent / "golden"))
"""The trimmed copy, or a folder with all that was recorded."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `long`, `ray` or `service` run only where `-m` asks for them."""
    for name in ("long", "ray", "service"):
        for item in items if name not in config.getoption("markexpr") else ():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"takes minutes: pytest -m {name}"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing is written to the user's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _random_state():
    """Each test finds and leaves torch's random numbers as they were."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A writable copy of the tiny random checkpoint; read it, do not change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(GOLDEN / "checkpoint", folder, copy_function=shutil.copyfile)
    before = _files(folder)
    yield folder
    assert _files(folder) == before, "a test changed the checkpoint that all share"


def _files(folder: Path) -> dict[str, bytes]:
    """What is in a checkpoint, but for the cache of prompts that using it writes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stem != "prompt_embeddings"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def pipe(checkpoint: Path) -> StreamDiffVSRPipeline:
    """The tiny checkpoint without flow estimation: guided only where a test gives flow."""
    return load_pipeline(checkpoint, device="cpu", flow="none")


@pytest.fixture(scope="session")
def guided(checkpoint: Path) -> StreamDiffVSRPipeline:
    """The tiny checkpoint with a cheap flow, so that every frame after the first is guided."""
    return load_pipeline(checkpoint, device="cpu", flow=shift_flow)


@pytest.fixture
def published(checkpoint: Path, tmp_path: Path) -> Path:
    """The released layout, with what a repository holds besides."""
    folder = tmp_path / "published"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("prompt_embeddings*"))
    (folder / "README.md").write_text("# weights")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the same again")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"and again")
    (folder / "assets").mkdir()
    (folder / "assets" / "teaser.png").write_bytes(b"picture")
    return folder


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    from huggingface_hub import constants, file_download

    with serving(published, RELEASES["v1"].repository) as hub:
        # What HF_ENDPOINT sets when huggingface_hub is imported; the processes below use the variable.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # older versions have a copy in the second
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's models folder, not there yet."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("STREAM_DIFFVSR_MODELS", raising=False)
    return tmp_path / "data" / "stream-diffvsr" / "models"
