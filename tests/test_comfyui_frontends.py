"""Upscale Video on the page: the newest frame while it runs, then the finished video, each time.

Set COMFYUI_PATH and COMFYUI_PYTHON as for test_comfyui_server. COMFYUI_FRONTENDS names the folders `static`
of other comfyui-frontend-packages, with : between (on Windows ;); without it ComfyUI's own page is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_page import ComfyPage, chromium
from comfy_server import Server
from node_pack import ROOT

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI"),
    pytest.mark.skipif(chromium() is None, reason="no Chromium: set CHROMIUM"),
]
FRONTENDS = os.environ.get("COMFYUI_FRONTENDS", "").split(os.pathsep)
SIZE = [512, 288]
"""Of the result of the clip that comes with the pack."""
VIDEO = """[...document.querySelectorAll('video')].find(video => video.src.includes('type=output')
    && video.src.includes('_4x_') && video.videoWidth > 0 && video.getBoundingClientRect().width > 50)"""


@pytest.fixture(scope="module", params=FRONTENDS, ids=lambda folder: folder or "own")
def server(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setenv("COMFYUI_FRONTEND", request.param)
        server = Server(tmp_path_factory.mktemp("comfy"))
        server.start()
        server.post("/settings/Comfy.TutorialCompleted", True)
        yield server
        server.stop()


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_the_video_is_shown_after_the_live_picture(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    """In a first run and in a second one on the same page."""
    server.free()
    screenshots = Path(os.environ.get("COMFYUI_SCREENSHOTS", tmp_path))
    screenshots.mkdir(parents=True, exist_ok=True)
    page = ComfyPage(tmp_path / "profile")
    try:
        page.open_page(server.port)
        page.set("Comfy.VueNodes.Enabled", nodes_2)
        workflow = json.loads(
            (ROOT / "example_workflows" / "long_video_file.json").read_text(encoding="utf-8")
        )
        page.load(workflow)
        version = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
        if nodes_2 and tuple(map(int, version.split(".")[:2])) < (1, 40):
            pytest.skip(f"Nodes 2.0 of frontend {version} is a first draft that nobody is offered")
        assert page.evaluate("document.querySelectorAll('[data-node-id]').length > 0") == nodes_2
        # Pictures that were in the page, and how many at once.
        page.evaluate("""new MutationObserver(() => { const all = document.querySelectorAll(
            "img[src^='data:image/jpeg']"); for (const img of all) if (img.getBoundingClientRect().width > 50)
            window.live.add(img.src) }).observe(document.body, {childList: true, subtree: true,
            attributes: true}); window.live = new Set(); 0""")
        shown = ""
        for seed in (101 + 2 * nodes_2, 102 + 2 * nodes_2):
            node = "app.graph._nodes.find(node => node.type === 'StreamDiffVSR_UpscaleVideo')"
            page.evaluate(f"{node}.widgets.find(widget => widget.name === 'seed').value = {seed}")
            page.evaluate("window.live.clear(); 0")
            page.queue()
            page.wait_for("window.live.size > 0", 300)
            page.picture(screenshots / f"{version}_{nodes_2}_{seed}_live.png")
            shown = page.wait_for(f"({VIDEO})?.src !== {json.dumps(shown)} && ({VIDEO})?.src", 300)
            size = page.evaluate(f"(v => [v.videoWidth, v.videoHeight])({VIDEO})")
            assert size == SIZE
            page.evaluate("new Promise(done => setTimeout(done, 2000)).then(() => 0)")
            page.picture(screenshots / f"{version}_{nodes_2}_{seed}_video.png")
            assert page.evaluate("document.querySelectorAll(\"img[src^='data:image/jpeg']\").length") == 0
            assert "Error loading" not in page.evaluate("document.body.innerText")
    finally:
        page.close()
