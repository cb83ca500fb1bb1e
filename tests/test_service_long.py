"""What the service promises under bad luck and bad will, and its page in a browser.

    pytest -m service tests/test_service_long.py

S3 needs moto and obstore, the page Playwright and Chromium (`CHROMIUM` names it); its accessibility is
checked where `AXE` names axe-core's axe.min.js. `SCREENSHOTS` names a folder that the pictures are kept in.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import psutil
import pytest
from clips import write_video
from service_server import Server

pytestmark = pytest.mark.service
JOB = {
    "format": "mkv",
    "options": {"codec": "ffv1", "num_inference_steps": 1, "segment_frames": 2, "seed": 5},
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "root", direct=True, STREAM_DIFFVSR_TRIES="3")
    yield made
    made.stop()


def workers(server: Server) -> list[psutil.Process]:
    """Processes that do a job of this server."""
    below = f"--output={server.root.resolve()}"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(word.startswith(below) for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def wait_for_worker(server: Server) -> psutil.Process:
    for _ in range(1200):
        if found := workers(server):
            return found[0]
        time.sleep(0.05)
    raise AssertionError("no worker")


def frames_of(content: bytes, folder: Path) -> list[bytes]:
    """Digests of the pictures of a video."""
    (folder / "video.mkv").write_bytes(content)
    with av.open(str(folder / "video.mkv")) as video:
        return [hashlib.sha256(frame.to_ndarray()).digest() for frame in video.decode(video=0)]


def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    """kill -9 of the server or of the worker, at random moments; the frames are those of a quiet run."""
    chance = random.Random(int(os.environ.get("KILL_SEED", "1")))
    clip = write_video(tmp_path / "in.mp4", 8)
    server = Server(tmp_path / "root", direct=True, STREAM_DIFFVSR_TRIES="100")
    quiet = server.upload(clip)
    begin = time.monotonic()
    assert server.ask(quiet, **JOB).status_code == 202 and server.wait(quiet)["status"] == "finished"
    usual = time.monotonic() - begin
    wanted = frames_of(server.client.get(f"/videos/{quiet}/result").content, tmp_path)
    task = server.upload(clip)
    assert server.ask(task, **JOB).status_code == 202
    kills = {"server": 0, "worker": 0}
    finished: list[str] = []
    while sum(kills.values()) < 20:
        time.sleep(chance.uniform(0, 1.5 * usual))
        victim = chance.choice(["server", "worker"])
        if server.status(task)["status"] == "finished":
            finished.append(task)
            task = server.upload(clip)
            assert server.ask(task, **JOB).status_code == 202
        elif victim == "worker":
            for process in workers(server):
                process.kill()
                kills[victim] += 1
        else:
            server.kill()
            kills[victim] += 1
            server.start()
    for each in [*finished, task]:
        assert server.wait(each)["status"] == "finished", server.status(each)
        assert frames_of(server.client.get(f"/videos/{each}/result").content, tmp_path) == wanted
    assert min(kills.values()) > 0
    server.stop()
    assert not workers(server)


def test_three_deaths_fail_the_job(server: Server, tmp_path: Path) -> None:
    task = server.upload(write_video(tmp_path / "in.mp4", 4))
    assert server.ask(task, **JOB).status_code == 202
    seen: set[int] = set()
    while len(seen) < 3:
        process = wait_for_worker(server)
        if process.pid not in seen:
            process.kill()
            seen.add(process.pid)
        time.sleep(0.1)
    status = server.wait(task, seconds=60)
    assert status["status"] == "failed" and status["message"], status
    # Asked again, it has three tries again.
    assert server.ask(task, **JOB).status_code == 202
    assert server.wait(task)["status"] == "finished"


def test_cancelled_within_a_step_and_continued(server: Server, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "in.mp4", 12, size=(128, 96))
    task, other = server.upload(clip), server.upload(clip)
    assert server.ask(task, **JOB).status_code == 202 and server.ask(other, **JOB).status_code == 202
    assert server.status(other)["position"] is not None
    while server.status(task)["frames_done"] < 4:
        assert server.status(task)["status"] in ("queued", "running")
        time.sleep(0.05)
    assert server.client.delete(f"/videos/{other}").json()["status"] == "cancelled"
    assert server.client.delete(f"/videos/{task}").json()["status"] == "cancelled"
    assert not workers(server)
    part = server.client.get(f"/videos/{task}/result")
    assert part.status_code == 200 and 0 < len(frames_of(part.content, tmp_path)) < 12
    assert server.ask(task, **JOB).status_code == 202
    assert server.wait(task)["status"] == "finished"
    assert len(frames_of(server.client.get(f"/videos/{task}/result").content, tmp_path)) == 12


def test_a_hundred_clients_poll_while_five_upload(server: Server, tmp_path: Path) -> None:
    task = server.upload(write_video(tmp_path / "in.mp4", 30, size=(64, 48)))
    assert server.ask(task, **JOB).status_code == 202
    process = psutil.Process(server.process.pid)
    idle = process.memory_info().rss
    peak = 0
    content = random.Random(0).randbytes(40_000_000)

    async def poll(client: httpx.AsyncClient) -> int:
        nonlocal peak
        for _ in range(30):
            answer = await client.get(f"/videos/{task}/status")
            assert answer.status_code == 200, answer.text
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.2)
        return 1

    async def upload(client: httpx.AsyncClient) -> int:
        answer = await client.post("/videos/upload", files={"file": ("a.mp4", content)})
        assert answer.status_code == 201, answer.text
        path = server.root / "tasks" / answer.json()["task_id"] / "source.mp4"
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(content).digest()
        return 1

    async def everybody() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(
            base_url=server.address + "api/v1", timeout=300, limits=limits
        ) as client:
            return await asyncio.gather(
                *(poll(client) for _ in range(100)), *(upload(client) for _ in range(5))
            )

    assert sum(asyncio.run(everybody())) == 105
    print(f"server: {idle >> 20} MB before, {peak >> 20} MB at most")
    assert peak - idle < 100 * 2**20


NAMES = (
    "../../../etc/passwd",
    "..\\..\\x.mp4",
    "/etc/x.mp4",
    "a\0b.mp4",
    "x.mp4/../../y.mp4",
    ".mp4",
    "CON.mp4",
    "x" * 5000 + ".mp4",
    "\u202e4pm.exe",
    "a.mp4;rm -rf ~",
    "%2e%2e%2fx.mp4",
    "",
    "x.php",
    "-o.mp4",
    "http://x/y.mp4",
)
EVIL = Path(tempfile.gettempdir()) / f"evil-{os.getpid()}"
"""What no request may write."""
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**200,
    1.5,
    "",
    "x" * 3000,
    "../../x",
    "/etc/passwd",
    f"-o{EVIL}",
    f"--output={EVIL}",
    "a\0b",
    "\ud800",
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    "http://127.0.0.1:1/x.mp4",
    "s3://",
    "file:///etc/passwd",
    "concat:/etc/passwd|/etc/hosts",
    f"; touch {EVIL}",
    f"$(touch {EVIL})",
)
FIELDS = ("model", "preset", "size", "format", "options", "source", "target", "download", "x", "__class__")
OPTIONS = (
    "seed",
    "codec",
    "crf",
    "pix_fmt",
    "scene_cut",
    "start",
    "target",
    "prompt",
    "state_out",
    "lora",
    "stream",
)
BODIES = (
    b"",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b"\xff\xfe",
    b"[" * 60000,
    b'{"size": NaN}',
    b'{"options": {"crf": 1e999}}',
    b"x" * 200_000,
    b'{"options": {"seed": ' + b"9" * 5000 + b"}}",
    b'{"model": "nano", "model": 3}',
)
PATHS = (
    "/videos/../../etc/passwd",
    "/videos/%2e%2e%2f%2e%2e/status",
    "/videos/%00/status",
    "/videos/x/result",
    "/videos/00000000000000000000000000000000/result",
    "/../../pyproject.toml",
    "/videos//status",
    "/%",
    "/videos?limit=-1",
    "/videos?limit=9999999999999999999999",
    "/videos?offset=99999999999999999999",
    "/videos/" + "a" * 8000 + "/status",
    "/images/'; DROP TABLE tasks; --/status",
)


def hostile(chance: random.Random, task: str) -> dict[str, Any]:
    """A request that nobody who means well sends."""
    kind = chance.randrange(5)
    upscaling = f"/videos/{chance.choice([task, 'x', '0' * 32, '1' * 32])}/upscaling"
    if kind == 0:
        headers = {"Range": chance.choice(["bytes=9-1", "bytes=0-,0-,0-,0-", "x", "bytes=-" + "9" * 400])}
        return {"method": chance.choice(["GET", "DELETE", "PUT", "TRACE"]), "url": chance.choice(PATHS),
                "headers": headers}  # fmt: skip
    if kind == 1:
        name = chance.choice(NAMES)
        content = chance.choice([b"", b"\0" * 1000, b"#EXTM3U\n/etc/passwd", chance.randbytes(500)])
        return {"method": "POST", "url": "/videos/upload", "files": {"file": (name, content)}}
    if kind == 2:
        headers = {
            "Content-Type": chance.choice(
                ["application/json", "text/plain", "multipart/form-data; boundary=b"]
            )
        }
        return {"method": "POST", "url": chance.choice([upscaling, "/videos/upload"]),
                "content": chance.choice(BODIES), "headers": headers}  # fmt: skip
    if kind == 3:
        return {"method": "POST", "url": upscaling, "json": {chance.choice(FIELDS): chance.choice(VALUES)}}
    options = {chance.choice(OPTIONS): chance.choice(VALUES)}
    return {"method": "POST", "url": upscaling, "json": {"options": options}}


def test_a_thousand_hostile_requests(tmp_path: Path) -> None:
    """None makes the server fail, and nothing is written outside the root."""
    chance = random.Random(7)
    assert not EVIL.exists()
    server = Server(tmp_path / "root", direct=True, STREAM_DIFFVSR_MAX_GIGABYTES="0.01")
    task = server.upload(write_video(tmp_path / "in.mp4", 2))
    outside = sorted(tmp_path.rglob("*"))
    inside = {"lock", "jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm", "tasks"}
    codes: dict[int, int] = {}
    for _ in range(1000):
        request = hostile(chance, task)
        if "json" in request:
            import json

            request["content"] = json.dumps(request.pop("json")).encode()
        try:
            answer = server.client.request(**request)
        except (httpx.InvalidURL, httpx.RemoteProtocolError, UnicodeError):
            continue
        codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
        assert answer.status_code < 500 or answer.status_code == 501, (request, answer.text)
        if answer.status_code >= 400 and answer.content:
            assert answer.headers["content-type"] == "application/problem+json", (request, answer.text)
        if answer.status_code == 202:
            server.client.delete(f"/videos/{answer.json()['task_id']}")
    print(codes)
    assert server.client.get("/models").status_code == 200
    now = [path for path in sorted(tmp_path.rglob("*")) if server.root not in path.parents]
    assert now == [path for path in outside if server.root not in path.parents] and not EVIL.exists()
    assert {path.name for path in server.root.iterdir()} <= inside
    assert all(len(path.name) == 32 for path in (server.root / "tasks").iterdir())
    names = {path.name for path in (server.root / "tasks").rglob("*") if path.is_file()}
    assert all(name.startswith(("source.", "result", "log.txt")) for name in names), names
    server.stop()
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


class Cutting:
    """A proxy before S3 that breaks the first connections off after some bytes."""

    def __init__(self, port: int, cuts: int, after: int) -> None:
        self.port, self.cuts, self.after = port, cuts, after
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self.listener.accept()
            behind = socket.create_connection(("127.0.0.1", self.port))
            threading.Thread(target=self._copy, args=(client, behind, None), daemon=True).start()
            threading.Thread(target=self._copy, args=(behind, client, self.after), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, after: int | None) -> None:
        sent = 0
        try:
            while data := source.recv(65536):
                if after is not None and self.cuts > 0 and sent + len(data) > after:
                    self.cuts -= 1
                    break
                target.sendall(data)
                sent += len(data)
        except OSError:
            pass
        for each in (source, target):
            each.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, int]]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{port}/")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="videos")
    yield client, port
    process.terminate()
    process.wait()


def test_from_s3_to_s3(s3: tuple[Any, int], tmp_path: Path) -> None:
    client, _ = s3
    clip = write_video(tmp_path / "in.mp4", 3)
    client.upload_file(str(clip), "videos", "in/a clip.mp4")
    server = Server(tmp_path / "root", direct=True)
    task, bad = "0" * 31 + "1", "0" * 31 + "2"
    asked = {**JOB, "source": "s3://videos/in/a clip.mp4", "target": "s3://videos/out/x.mkv"}
    assert server.ask(bad, **{**asked, "source": "s3://videos/none.mp4"}).status_code == 422
    assert server.ask(task, **asked).status_code == 202
    assert server.wait(task)["status"] == "finished", server.status(task)
    stored = client.get_object(Bucket="videos", Key="out/x.mkv")["Body"].read()
    assert stored == server.client.get(f"/videos/{task}/result").content
    assert server.ask(bad, **{**asked, "target": "s3://nowhere/x.mkv"}).status_code == 202
    status = server.wait(bad)
    assert status["status"] == "failed" and "cannot be written" in status["message"], status
    server.stop()
    small = Server(tmp_path / "small", direct=True, STREAM_DIFFVSR_MAX_PIXELS="100")
    assert small.ask(task, **asked).status_code == 202, "what is in S3 is seen only when it is here"
    status = small.wait(task)
    assert status["status"] == "failed" and "exceed the limit of 100 pixels" in status["message"], status
    small.stop()


def test_broken_transfers_begin_again(
    s3: tuple[Any, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stream_diffvsr.service import s3 as transfers
    from stream_diffvsr.service.problems import ProblemError

    client, port = s3
    content = random.Random(0).randbytes(20_000_000)
    client.put_object(Bucket="videos", Key="big.bin", Body=content)
    monkeypatch.setattr(transfers, "PAUSE", 0.1)
    proxy = Cutting(port, cuts=2, after=1_000_000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    target = tmp_path / "task" / "source.bin"
    asyncio.run(transfers.fetch("s3://videos/big.bin", target, 10**9))
    assert target.read_bytes() == content and proxy.cuts == 0
    asyncio.run(transfers.deliver(target, "s3://videos/copy.bin"))
    assert client.get_object(Bucket="videos", Key="copy.bin")["Body"].read() == content
    target.unlink()
    proxy.cuts = 10**6
    with pytest.raises(ProblemError, match="cannot be read"):
        asyncio.run(transfers.fetch("s3://videos/big.bin", target, 10**9))
    assert not list(target.parent.iterdir())


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: CHROMIUM names one")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


def until(page: Any, expression: str, seconds: float = 600) -> None:
    """Until a JavaScript expression is true; Playwright's own way needs eval, which the page forbids."""
    for _ in range(int(seconds * 5)):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(200)
    raise AssertionError(expression)


def accessible(page: Any) -> None:
    """Nothing that axe objects to."""
    if axe := os.environ.get("AXE"):
        page.evaluate(Path(axe).read_text(encoding="utf-8"))
        found = page.evaluate("axe.run().then((result) => result.violations)")
        assert not found, [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


def picture(page: Any, name: str, folder: Path) -> None:
    """Screenshots of the page, wide and narrow, light and dark; nothing is wider than the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in ((1400, 900), (390, 844)):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            page.screenshot(path=str(folder / f"{name}-{width}-{scheme}.png"), full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            accessible(page)
    page.set_viewport_size({"width": 1400, "height": 900})


def test_page_with_the_keyboard_alone(browser: Any, tmp_path: Path) -> None:
    """Token, upload, progress, live comparison, download, compare: no mouse."""
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path / "screenshots"))
    server = Server(tmp_path / "root", direct=True, STREAM_DIFFVSR_TOKEN="word")
    clip = write_video(tmp_path / "holiday.mp4", 40, size=(160, 120))
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.address)
    page.wait_for_selector("dialog[open]")
    accessible(page)
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('login-problem').textContent != ''")
    page.focus("#token")
    page.keyboard.press("Control+A")
    page.keyboard.type("word")
    page.keyboard.press("Enter")
    page.wait_for_selector("#videos form", timeout=300_000)
    picture(page, "begin", shots)
    page.focus("#tab-videos")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    chooser.value.set_files(str(clip))
    # On to the button, past what stands between.
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Upscale":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#videos [data-version]", timeout=600_000)
    first = page.get_attribute("#videos [data-version]", "data-version")
    until(page, f"document.querySelector('#videos [data-version]').dataset.version != '{first}'")
    picture(page, "running", shots)
    page.focus("#videos input[type=range]")
    page.keyboard.press("Home")
    assert page.evaluate("document.querySelector('#videos .layers').style.getPropertyValue('--at')") == "0%"
    page.wait_for_selector("#videos a:has-text('Download')", timeout=600_000)
    page.focus("#videos a:has-text('Download')")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "holiday_upscaled.mp4"
    with av.open(str(download.value.path())) as video:
        assert sum(1 for _ in video.decode(video=0)) == 40
    page.focus("#tab-videos")
    for expected in ("images", "jobs"):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"#{expected}:visible")
        page.wait_for_timeout(1500)
        picture(page, expected, shots)
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#compare video.after")
    until(page, "document.querySelector('#compare video.after').readyState >= 2")
    page.focus("#compare button")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#compare video.after').currentTime > 0.2")
    page.keyboard.press("Enter")
    picture(page, "compare", shots)
    page.reload()
    page.wait_for_selector("#compare:visible")
    assert not errors
    server.stop()
    assert server.process.returncode in (0, 130)
