"""The loader node: what it offers, and how it shows and ends a download."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from node_pack import load_pack, part
from stand_in_hub import StandInHub

from stream_diffvsr import load_pipeline

PACK = load_pack()
LOADER = PACK.NODE_CLASS_MAPPINGS["StreamDiffVSR_Loader"]
V1 = {"model_version": "v1", "device": "cpu", "dtype": "float32", "flow_model": "none"}

pytestmark = pytest.mark.usefixtures("home")

KNOWN = ["v1", "nano", "mix", "flashvsr-v1", "flashvsr-v1.1", "swiftvr"]


def offered() -> list[str]:
    return LOADER.INPUT_TYPES()["required"]["model_version"][0]


def test_a_folder_is_offered_as_soon_as_it_is_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each time the page asks; the embedding of the empty prompt makes up for the text encoder."""
    monkeypatch.setenv("STREAM_DIFFVSR_MODELS", str(tmp_path / "models"))
    embedding = Path(part(PACK, "stream_diffvsr.families.diffvsr.prompt").FILE)
    load_pipeline(checkpoint, device="cpu", flow="none")
    mine = tmp_path / "models" / "mine"
    shutil.copytree(checkpoint, mine, ignore=shutil.ignore_patterns("text_encoder", "prompt_emb*"))
    assert offered() == KNOWN
    shutil.copyfile(checkpoint / embedding, mine / embedding)
    assert offered() == [*KNOWN, "mine"]
    (mine / "vae" / "config.json").unlink()
    assert offered() == KNOWN


def test_folders_are_offered_where_a_package_is_missing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The list does not fail; running the node says what to install."""
    monkeypatch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.setitem(sys.modules, "diffusers", None)  # type: ignore[arg-type]
    part(PACK, "nodes.load").is_complete.cache_clear()
    assert offered() == [*KNOWN, checkpoint.name]
    mine = {**V1, "model_version": checkpoint.name}
    LOADER.IS_CHANGED(**mine)
    with pytest.raises(ModuleNotFoundError, match=r"requirements\.txt"):
        LOADER().execute(**mine)
    part(PACK, "nodes.load").is_complete.cache_clear()


class StoppedError(Exception):
    """As ComfyUI's own."""


class Page:
    """What ComfyUI's page is told, and its cancel button."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[tuple[int, int]] = []
        self.texts: list[tuple[str, str]] = []
        self.cancel_at = 1.0
        modules = {
            "comfy.utils": SimpleNamespace(ProgressBar=lambda total: self),
            "comfy_execution.utils": SimpleNamespace(
                get_executing_context=lambda: SimpleNamespace(node_id="7")
            ),
        }
        monkeypatch.setattr(part(PACK, "nodes.host"), "comfy_module", modules.get)
        server = SimpleNamespace(PromptServer=SimpleNamespace(instance=self))
        monkeypatch.setitem(sys.modules, "server", server)

    def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
        self.values.append((value, total))
        if value > total * self.cancel_at:
            raise StoppedError

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.texts.append((text, node_id))


def test_a_download_is_shown_on_the_node(hub: StandInHub, home: Path, monkeypatch: pytest.MonkeyPatch):
    page = Page(monkeypatch)
    assert LOADER().execute(**V1)[0].prompts.folder == home / "v1"
    size = sum(path.stat().st_size for path in (home / "v1").glob("*/*.*"))
    assert page.values[-1][0] == page.values[-1][1] >= size
    assert page.texts[-1][1] == "7"
    assert page.texts[-1][0].startswith("3.5 of 3.5 MB, ") and page.texts[-1][0].endswith(" MB/s")
    assert sum(text.startswith("3.5 of 3.5") for text, _ in page.texts) == 1


def test_a_download_is_cancelled_and_goes_on(hub: StandInHub, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part(PACK, "stream_diffvsr.weights.fetch"), "INTERVAL", 0)
    page = Page(monkeypatch)
    page.cancel_at = 0.5
    with pytest.raises(StoppedError):
        LOADER().execute(**V1)
    assert not (home / "v1").exists() and offered() == KNOWN
    page.cancel_at = 1.0
    hub.requests.clear()
    assert LOADER().execute(**V1)[0].prompts.folder == home / "v1"
    files = [path for path in (home / "v1").rglob("*") if path.is_file() and "prompt" not in path.name]
    assert len(hub.gets()) < len(files)
