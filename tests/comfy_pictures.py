"""Makes the pictures of the pack in ComfyUI's real page: run it when a node or an example changed its looks.

    COMFYUI_PATH=... COMFYUI_PYTHON=... COMFYUI_VHS_PATH=... python tests/comfy_pictures.py [NAME ...]

It writes the thumbnails of the examples after a run of each (the README shows some of them), and a picture of
every node for its help page; or only those of the examples and nodes that are named.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from comfy_examples import EXAMPLES, put_inputs
from comfy_page import ComfyPage
from comfy_server import Server, interpolation_model, missing_kinds
from family_cases import stand_ins
from node_pack import ROOT, load_pack

HELP = ROOT / "web" / "docs"
STAND_INS = ("flashvsr", "swiftvr", "image_model_steady")
NODES_2 = ("before_after",)
VIDEOS = {"SaveVideo", "StreamDiffVSR_UpscaleVideo", "StreamDiffVSR_SimpleUpscale"}
SHOWN = "[...document.querySelectorAll('video')].some(v => v.src.includes('type=output') && v.videoWidth)"
ORDER = {"save_state": 0, "resume_state": 1}


def example(page: ComfyPage, server: Server, path: Path) -> None:
    """The thumbnail of an example that has run; of one whose model is a stand-in, before it."""
    page.set("Comfy.VueNodes.Enabled", path.stem in NODES_2)
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.load(workflow)
    if path.stem not in STAND_INS:
        before = set(server.get("/history"))
        page.queue()
        server.wait_until_idle(lambda history: set(history) - before)
        if VIDEOS & {node["type"] for node in workflow["nodes"]}:
            page.wait_for(SHOWN)
        time.sleep(4)
        for _ in range(3):  # a node that shows a video grows once more after it was made to fit
            page.fit()
    as_app = path.stem.endswith(".app")  # newer pages show these without a graph, behind a tutorial
    if as_app:
        page.evaluate(
            "[...document.querySelectorAll('button')].find(b => b.innerText === 'Skip')?.click(); 0"
        )
        time.sleep(2)
    page.picture(path.with_suffix(".jpg"), None if as_app else page.graph_box())


def node(page: ComfyPage, kind: str) -> None:
    """A node by itself."""
    page.evaluate(f"""(() => {{ app.graph.clear();
        const node = LiteGraph.createNode({json.dumps(kind)}); app.graph.add(node);
        node.size = [Math.max(320, node.computeSize()[0]), node.computeSize()[1]];
        app.canvas.ds.scale = 1; app.canvas.ds.offset = [150, 150];
        app.canvas.setDirty(true, true); return 0 }})()""")
    time.sleep(1)
    page.picture(HELP / f"{kind}.png", page.graph_box(10))


def wanted(path: Path) -> bool:
    return len(sys.argv) == 1 or path.stem in sys.argv


def in_order(path: Path) -> int:
    """One example needs the file that another saves."""
    return ORDER.get(path.stem, 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder, "comfy"))
        put_inputs(server.base / "input")
        stand_ins(server.base / "models")
        interpolation_model(server.base / "models")
        server.start()
        server.post("/settings/Comfy.TutorialCompleted", True)
        try:
            for path in filter(wanted, sorted(EXAMPLES.glob("*.json"), key=in_order)):
                if missing_kinds(json.loads(path.read_text(encoding="utf-8")), server):
                    continue
                # A page of its own, so that its lists of files are new.
                page = ComfyPage(Path(folder, path.stem), height=1200)
                page.open_page(server.port)
                example(page, server, path)
                page.close()
            page = ComfyPage(Path(folder, "nodes"), height=1200)
            page.open_page(server.port)
            for kind in load_pack().NODE_CLASS_MAPPINGS:
                if wanted(Path(kind)):
                    node(page, kind)
            page.close()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
