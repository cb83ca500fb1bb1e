"""The pack in ComfyUI's real page, in a headless Chromium.

Set COMFYUI_PATH, COMFYUI_PYTHON and COMFYUI_VHS_PATH as for test_comfyui_server; CHROMIUM names the browser
where none is on the PATH. With COMFYUI_SCREENSHOTS=FOLDER the screenshots are kept there, to be looked at.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from comfy_page import ComfyPage, chromium
from comfy_server import Server, interpolation_model, missing_kinds, video_helper_suite
from family_cases import stand_ins
from node_clips import make_clip, pattern
from node_pack import ROOT, load_pack

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI"),
    pytest.mark.skipif(chromium() is None, reason="no Chromium: set CHROMIUM"),
]
SUITE = "COMFYUI_PATH" in os.environ and video_helper_suite() is not None
NAMES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
WORKFLOWS = sorted(NAMES, key="resume_state".__eq__)
"""One needs the file that another saves, so it comes last."""
OUTPUT_NODES = (
    "SaveVideo",
    "SaveImage",
    "VHS_VideoCombine",
    "PreviewAny",
    "PreviewImage",
    "ImageCompare",
    "StreamDiffVSR_UpscaleVideo",
    "StreamDiffVSR_SimpleUpscale",
    "StreamDiffVSR_SaveState",
)
NODES = load_pack().NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from PIL import Image

    server = Server(tmp_path_factory.mktemp("comfy"))
    make_clip(server.base / "input" / "video.mp4", 16, 48, 32)
    Image.fromarray(pattern(0, 52, 36)).save(server.base / "input" / "example.png")
    stand_ins(server.base / "models")
    interpolation_model(server.base / "models")
    server.start()
    server.post("/settings/Comfy.TutorialCompleted", True)
    yield server
    server.stop()


@pytest.fixture
def page(server: Server, tmp_path: Path) -> Iterator[ComfyPage]:
    page = ComfyPage(tmp_path / "profile")
    page.open_page(server.port)
    yield page
    page.close()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("COMFYUI_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def colours(picture: Path) -> int:
    """How many different colours a screenshot has; an empty page has few."""
    from PIL import Image

    return len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_an_example_opens_and_runs_in_the_page(
    server: Server, page: ComfyPage, screenshots: Path, name: str
) -> None:
    if name.startswith("vhs") and not SUITE:
        pytest.skip("no VideoHelperSuite: set COMFYUI_VHS_PATH")
    workflow = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    if missing := missing_kinds(workflow, server):
        pytest.skip(f"this ComfyUI has no {', '.join(missing)}")
    page.load(workflow)
    assert (page.unknown(), page.marked(), page.dialogs(), page.untidy()) == ([], [], [], [])
    assert colours(page.picture(screenshots / f"{name}.png")) > 100
    page.watch_previews()
    before = set(server.get("/history"))
    page.queue()
    done = server.wait_until_idle(lambda history: set(history) - before)
    assert {entry["status"]["status_str"] for entry in done} == {"success"}
    # What output nodes show has arrived at the page, and our nodes showed pictures meanwhile.
    outputs = {str(node["id"]) for node in workflow["nodes"] if node["type"] in OUTPUT_NODES}
    wanted = json.dumps(sorted(outputs))
    page.wait_for(f"{wanted}.every(id => app.nodeOutputs[id])", 60)
    file_nodes = {"StreamDiffVSR_UpscaleVideo", "StreamDiffVSR_SimpleUpscale"}  # see test_comfyui_frontends
    assert page.previews() >= 1 or file_nodes & {node["type"] for node in workflow["nodes"]}
    page.evaluate("new Promise(done => setTimeout(done, 2000)).then(() => 0)")
    page.picture(screenshots / f"{name}_run.png")
    assert (page.marked(), page.dialogs(), page.untidy(), drawing_errors(page)) == ([], [], [], [])


def drawing_errors(page: ComfyPage) -> list[str]:
    """What went wrong in the page; a picture that is missing ends the drawing of all nodes behind it."""
    page.evaluate("0")
    known = "reading 'id'"  # of the page itself, in its store of settings
    wrong = ("Error drawing", "TypeError")
    return [error for error in page.errors if any(w in error for w in wrong) and known not in error]


def test_the_page_offers_a_model_that_is_missing(page: ComfyPage, screenshots: Path) -> None:
    text = (ROOT / "example_workflows" / "image_model_steady.json").read_text(encoding="utf-8")
    page.load(json.loads(text.replace("RealESRGAN_x4plus.safetensors", "gone.safetensors")))
    offered = "document.querySelector('.p-dialog, [role=alert], [role=status]')?.innerText.includes('gone.')"
    page.wait_for(f"{offered} || document.body.innerText.includes('gone.safetensors is missing')", 30)
    page.picture(screenshots / "missing_model.png")


def test_a_failed_run_says_its_remedy_on_the_page(server: Server, page: ComfyPage, screenshots: Path) -> None:
    workflow = json.loads((ROOT / "example_workflows" / "single_image.json").read_text(encoding="utf-8"))
    upscale = next(node for node in workflow["nodes"] if node["type"] == "StreamDiffVSR_Upscale")
    upscale["widgets_values"][3:6] = [True, 256, 256]
    page.load(workflow)
    page.queue()
    page.wait_for("document.querySelector('.p-dialog')?.innerText", 120)
    page.picture(screenshots / "error.png")
    assert "below half of tile_size 256" in page.dialogs()[0]


def test_new_nodes_keep_their_seed(page: ComfyPage) -> None:
    """Older pages would draw another one after every run, and a cancelled job could not be gone on with."""
    seeded = [kind for kind, node in NODES.items() if "seed" in node.INPUT_TYPES().get("optional", {})]
    assert len(seeded) == 4
    for kind in seeded:
        control = page.evaluate(f"""(() => {{
            const node = LiteGraph.createNode({json.dumps(kind)}); app.graph.add(node);
            const at = node.widgets.findIndex(widget => widget.name === "seed");
            return node.widgets[at + 1].value }})()""")
        assert control == "fixed", kind


def test_a_saved_workflow_may_still_change_its_seed(page: ComfyPage) -> None:
    workflow = json.loads((ROOT / "example_workflows" / "single_image.json").read_text(encoding="utf-8"))
    upscale = next(node for node in workflow["nodes"] if node["type"] == "StreamDiffVSR_Upscale")
    upscale["widgets_values"][2] = "increment"
    page.load(workflow)
    loaded = "app.graph._nodes.find(node => node.type === 'StreamDiffVSR_Upscale').widgets[2].value"
    assert page.evaluate(loaded) == "increment"


@pytest.mark.parametrize("kind", sorted(NODES))
def test_a_help_page_is_rendered(page: ComfyPage, screenshots: Path, kind: str) -> None:
    page.resize(1600, 2000)
    page.evaluate("app.graph.clear(); 0")
    page.evaluate(f"(() => {{ app.graph.add(LiteGraph.createNode({json.dumps(kind)})); return 0 }})()")
    page.fit()
    shown = page.help_of(kind)
    page.picture(screenshots / f"help_{kind}.png")
    source = (ROOT / "web" / "docs" / f"{kind}.md").read_text(encoding="utf-8")
    for heading in re.findall(r"^#+ (.+)$", source, re.MULTILINE):
        assert heading in shown["text"]
    for group in ("required", "optional"):
        for widget in NODES[kind].INPUT_TYPES().get(group, {}):
            assert widget in shown["text"]
    assert shown["fits"], "wider than the side bar"
    assert len(shown["pictures"]) >= 1
    assert all(width > 100 for _, width in shown["pictures"])
