"""A real ComfyUI on loopback, and what a test asks of it. Standard library only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from node_pack import ROOT

START_SECONDS, RUN_SECONDS = 300, 900
PACK = "ComfyUI-Stream-DiffVSR"
NOTES = ("MarkdownNote", "Note")


def video_helper_suite() -> Path | None:
    """The checkout named by COMFYUI_VHS_PATH, or the one in COMFYUI_PATH's custom_nodes."""
    given = os.environ.get("COMFYUI_VHS_PATH")
    if given:
        return Path(given)
    return next(Path(os.environ["COMFYUI_PATH"], "custom_nodes").glob("*[Vv]ideo[Hh]elper[Ss]uite*"), None)


ZEROS = """import sys, torch, comfy.cli_args as given
given.args.cpu = True
from comfy_extras.frame_interpolation_models.ifnet import IFNet
from safetensors.torch import save_file
weights = IFNet(4, [8] * 5).state_dict()
save_file({name: torch.zeros_like(value) for name, value in weights.items()}, sys.argv[1])"""


def interpolation_model(models: Path) -> None:
    """A stand-in for the model of core's frame interpolation, where core has it: the mean of two frames."""
    if Path(os.environ["COMFYUI_PATH"], "comfy_extras", "frame_interpolation_models").is_dir():
        path = models / "frame_interpolation" / "film_net_fp16.safetensors"
        path.parent.mkdir(parents=True)
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        subprocess.run([python, "-c", ZEROS, str(path)], cwd=os.environ["COMFYUI_PATH"], check=True)


class Server:
    """ComfyUI with this pack and VideoHelperSuite, and a base folder of its own."""

    def __init__(self, base: Path) -> None:
        self.base = base
        packs = base / "custom_nodes"
        packs.mkdir(parents=True)
        (base / "input").mkdir()
        (packs / PACK).symlink_to(ROOT)
        suite = video_helper_suite()
        if suite:
            (packs / "ComfyUI-VideoHelperSuite").symlink_to(suite)
        self.log = base / "server.log"

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        options = [
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
        ]
        quiet = ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        if "COMFYUI_FRONTEND" in os.environ:  # the folder static of another comfyui-frontend-package
            quiet += ["--front-end-root", os.environ["COMFYUI_FRONTEND"]]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, "main.py", *options, *quiet],
                cwd=os.environ["COMFYUI_PATH"],
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended: {self.log.read_text()[-3000:]}")
            try:
                self.get("/queue")
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(f"ComfyUI is not up: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def queue(self, prompt: Mapping[str, Any]) -> str:
        """Queue a prompt; the answer must be without any complaint."""
        answer = self.post("/prompt", {"prompt": prompt})
        assert "prompt_id" in answer and not answer["node_errors"], answer
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """The history of a prompt once it is over, and the queue with it (meta-batches queue themselves)."""
        return self.wait_until_idle(lambda history: {prompt_id} & set(history))[0]

    def wait_until_idle(self, wanted: Callable[[Mapping[str, Any]], set[str]]) -> list[dict[str, Any]]:
        """The entries that are `wanted` of the history, once there are some and nothing waits or runs."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            history = self.get("/history")
            queue = self.get("/queue")
            found = wanted(history)
            if found and not queue["queue_running"] and not queue["queue_pending"]:
                return [history[prompt_id] for prompt_id in found]
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-3000:])

    def run(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """Queue, wait, and expect success; returns the history entry of the last batch."""
        done = self.wait(self.queue(prompt))
        assert done["status"]["status_str"] == "success", done["status"]["messages"]
        return done

    def free(self, memory: bool = True) -> None:
        """Unload models, and with `memory` forget all that was computed."""
        self.post("/free", {"unload_models": True, "free_memory": memory})
        time.sleep(1)

    def files(self, kind: str = "output") -> set[Path]:
        """All files in a folder of the server."""
        return {path for path in (self.base / kind).rglob("*") if path.is_file()}


def messages(history: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a prompt's history."""
    return [content for name, content in history["status"]["messages"] if name == kind]


def to_prompt(workflow: Mapping[str, Any], server: Server) -> dict[str, Any]:
    """A saved workflow as the page would queue it."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        values = widget_values(node, server.get(f"/object_info/{node['type']}")[node["type"]])
        linked = {
            slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None
        }
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return prompt


def widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by name: saved by position, or by name as VideoHelperSuite does."""
    saved = node.get("widgets_values") or []
    names = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *rest = info["input"][group][name]
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                names.append(name)
                if rest and rest[0].get("control_after_generate"):
                    names.append("")
    if isinstance(saved, dict):
        extra = ("pix_fmt", "crf", "save_metadata", "trim_to_audio")
        return {name: value for name, value in saved.items() if name in names or name in extra}
    return {name: value for name, value in zip(names, saved, strict=False) if name}


def missing_kinds(workflow: Mapping[str, Any], server: Server) -> list[str]:
    """Types of nodes that this ComfyUI does not have."""
    kinds = {node["type"] for node in workflow["nodes"]} - set(NOTES)
    return sorted(kinds - set(server.get("/object_info")))
