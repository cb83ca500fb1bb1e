"""ComfyUI's page in a headless Chromium, driven through its debugging pipe. Standard library only.

The browser reaches nothing but this machine. It is the one that CHROMIUM names, or one on the PATH.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

READY_SECONDS, ANSWER_SECONDS = 300, 120
READY = "window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 50"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def chromium() -> str | None:
    """The browser to use, if there is one and this system can start it with two pipes."""
    if not hasattr(os, "posix_spawn"):
        return None
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


UNTIDY = """(() => {
    const graph = app.graph, said = new Set();
    const nodes = graph._nodes.map(({type, pos: [x, y], size: [wide, high]}) =>
        ({type, left: x + 12, top: y - 30, right: x + wide - 12, bottom: y + high}));
    for (const [at, one] of nodes.entries())
        for (const other of nodes.slice(at + 1))
            if (one.left < other.right && other.left < one.right
                && one.top < other.bottom && other.top < one.bottom) said.add(`${one.type} on ${other.type}`);
    for (const [, from, fromSlot, to, slot] of graph.serialize().links) {
        const target = graph.getNodeById(to);
        const [x, y] = graph.getNodeById(from).getConnectionPos(false, fromSlot);
        const [farX, farY] = target.getConnectionPos(true, slot);
        const bend = Math.hypot(farX - x, farY - y) / 4;
        for (let t = 0; t <= 1; t += 0.02) {
            const [a, b, c, d] = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3];
            const atX = a * x + b * (x + bend) + c * (farX - bend) + d * farX;
            const atY = (a + b) * y + (c + d) * farY;
            for (const {type, left, top, right, bottom} of nodes)
                if (left < atX && atX < right && top < atY && atY < bottom)
                    said.add(`wire to ${target.type}.${target.inputs[slot].name} behind ${type}`);
        }
    }
    return [...said];
})()"""
"""A wire is the curve that the page draws."""


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, profile: Path, width: int = 1600, height: int = 900) -> None:
        program = chromium()
        assert program, "no Chromium: set CHROMIUM"
        self.errors: list[str] = []
        self._buffer, self._number, self._session = b"", 0, {}
        self._start(program, [*OPTIONS, f"--user-data-dir={profile}", "about:blank"])
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime"):
            self._send(f"{domain}.enable")
        self.resize(width, height)

    def _start(self, program: str, options: list[str]) -> None:
        """The browser reads what it shall do from its file 3, and answers into its file 4."""
        import fcntl

        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]
        read_theirs, self._write, self._read, write_theirs = ends
        nowhere = os.open(os.devnull, os.O_RDWR)
        moves = [(nowhere, 1), (nowhere, 2), (read_theirs, 3), (write_theirs, 4)]
        actions = [(os.POSIX_SPAWN_DUP2, mine, theirs) for mine, theirs in moves]
        self.pid = os.posix_spawn(program, [program, *options], os.environ, file_actions=actions)
        for end in (read_theirs, write_theirs, nowhere):
            os.close(end)

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something, and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end:
            answer = self._next_message(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note_error(answer)
        raise TimeoutError(method)

    def _note_error(self, event: Mapping[str, Any]) -> None:
        """Keep what the page says that went wrong."""
        wrong = event.get("method") == "Runtime.exceptionThrown" or (
            event.get("method") == "Runtime.consoleAPICalled" and event["params"]["type"] == "error"
        )
        if wrong:
            self.errors.append(json.dumps(event["params"])[:1000])

    def _next_message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                return {}
            self._buffer += os.read(self._read, 1 << 20)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address: str) -> None:
        self._send("Page.navigate", url=address)

    def evaluate(self, code: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self._send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, code: str, seconds: float = READY_SECONDS) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.evaluate(code):
                return value
            time.sleep(0.25)
        raise TimeoutError(code)

    def click(self, x: float, y: float) -> None:
        """A real click: one that scripts make does not reach all of the page."""
        place = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, **place)

    def picture(self, path: Path, clip: Mapping[str, float] | None = None) -> Path:
        """A screenshot, of the whole tab or of a part (x, y, width, height); JPEG or PNG by its suffix."""
        kind = {"format": "jpeg", "quality": 85} if path.suffix == ".jpg" else {"format": "png"}
        part = {"clip": {"scale": 1, **clip}} if clip else {}
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", **kind, **part)["data"]))
        return path

    def close(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)
        os.close(self._read)
        os.close(self._write)


class ComfyPage(Browser):
    """ComfyUI's page, with an open workflow."""

    def open_page(self, port: int) -> None:
        self.open(f"http://127.0.0.1:{port}/")
        self.wait_for(READY)
        self.set("Comfy.Minimap.Visible", False)
        self.set("Comfy.NodeBadge.NodeSourceBadgeMode", "None")
        self.set("LiteGraph.Canvas.MinFontSizeForLOD", 0)
        self.evaluate("app.canvas.low_quality_zoom_threshold = 0; 0")

    def set(self, name: str, value: Any) -> None:
        """Change one of the page's settings."""
        self.evaluate(f"app.extensionManager.setting.set({json.dumps(name)}, {json.dumps(value)})")

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a workflow and show all of it."""
        self.evaluate(f"app.loadGraphData({json.dumps(workflow)}, true, true, 'example')")
        time.sleep(1)
        self.fit()

    def fit(self) -> None:
        self.evaluate("app.canvas.deselectAll(); 0")
        self.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        time.sleep(1)

    def unknown(self) -> list[str]:
        """Types of nodes that the page does not know."""
        unknown = "app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
        return self.evaluate(unknown)

    def marked(self) -> list[str]:
        """Types of nodes that the page shows in red."""
        return self.evaluate("app.graph._nodes.filter(n => n.has_errors).map(n => n.type)")

    def dialogs(self) -> list[str]:
        """What stands in open dialogs and notices."""
        found = "document.querySelectorAll('.p-dialog, .p-toast-message')"
        return self.evaluate(f"[...{found}].map(shown => shown.innerText)")

    def untidy(self) -> list[str]:
        """Wires that run behind a node, and nodes that lie on each other."""
        return self.evaluate(UNTIDY)

    def watch_previews(self) -> None:
        """Count the pictures that arrive while a prompt runs."""
        kinds = "['b_preview', 'b_preview_with_metadata']"
        count = f"for (const kind of {kinds}) app.api.addEventListener(kind, () => window.previews++)"
        self.evaluate(f"if (window.previews === undefined) {{ {count} }} window.previews = 0; 0")

    def previews(self) -> int:
        return self.evaluate("window.previews")

    def queue(self) -> None:
        """Press Run."""
        self.evaluate("app.queuePrompt(0, 1).then(() => 0)")

    def place_of(self, left: float, top: float) -> tuple[float, float]:
        """Where a point of the graph lies in the tab."""
        code = f"""(() => {{ const box = app.canvas.canvas.getBoundingClientRect(),
            point = app.canvas.ds.convertOffsetToCanvas([{left}, {top}]);
            return [box.left + point[0], box.top + point[1]] }})()"""
        x, y = self.evaluate(code)
        return x, y

    def graph_box(self, margin: float = 12) -> dict[str, float]:
        """The part of the tab that the nodes take."""
        corners = """(() => { const nodes = app.graph._nodes; return [
            Math.min(...nodes.map(n => n.pos[0])), Math.min(...nodes.map(n => n.pos[1] - 34)),
            Math.max(...nodes.map(n => n.pos[0] + n.size[0])),
            Math.max(...nodes.map(n => n.pos[1] + n.size[1]))] })()"""
        left, top, right, bottom = self.evaluate(corners)
        (x, y), (far_x, far_y) = self.place_of(left, top), self.place_of(right, bottom)
        x, y = max(0, x - margin), max(0, y - margin)
        return {"x": x, "y": y, "width": far_x + margin - x, "height": far_y + margin - y}

    def help_of(self, kind: str) -> dict[str, Any]:
        """Open the help page of a node; its text, its pictures with their widths, and whether it fits."""
        node = f"app.graph._nodes.find(n => n.type === {json.dumps(kind)})"
        left, top = self.evaluate(f"(() => {{ const n = {node}; return [n.pos[0] + 60, n.pos[1] - 14] }})()")
        self.click(*self.place_of(left, top))
        button = "document.querySelector('[data-testid=\"info-button\"]')"
        self.wait_for(f"!!{button}", 30)
        self.evaluate(f"{button}.click(); 0")
        shown = "document.querySelector('.node-help-content')"
        loaded = f"[...{shown}.querySelectorAll('img')].every(picture => picture.complete)"
        self.wait_for(f"!!{shown}?.innerText && {loaded}", 60)
        pictures = f"[...{shown}.querySelectorAll('img')].map(p => [p.src, p.naturalWidth])"
        fits = f"{shown}.scrollWidth <= {shown}.clientWidth"
        return self.evaluate(f"({{ text: {shown}.innerText, pictures: {pictures}, fits: {fits} }})")
