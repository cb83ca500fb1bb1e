"""The service, asked over HTTP as its users do: jobs, refusals, and who may ask.

What takes longer is in `test_service_long.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import pytest
from clips import write_video
from service_server import Server

TOKEN = "a word"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "allowed").mkdir()
    made = Server(
        folder / "root",
        direct=True,
        STREAM_DIFFVSR_ALLOW=str(folder / "allowed"),
        STREAM_DIFFVSR_TOKEN=TOKEN,
        STREAM_DIFFVSR_MAX_GIGABYTES="0.001",
        STREAM_DIFFVSR_MAX_PIXELS="100000",
    )
    made.client.headers["Authorization"] = f"Bearer {TOKEN}"
    yield made
    made.stop()


@pytest.fixture(scope="module")
def finished(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task that is done."""
    clip = write_video(tmp_path_factory.mktemp("clips") / "in.mp4", 3)
    task = server.upload(clip, name="../../h\u00e4\u00df.mp4")
    asked = server.ask(task, size="2x", options={"seed": 3, "num_inference_steps": 1})
    assert asked.status_code == 202 and asked.json()["output_size"] == [64, 48]
    status = server.wait(task)
    assert status["status"] == "finished", status
    assert (status["frames_done"], status["frames_total"], status["name"]) == (3, 3, "h\u00e4\u00df.mp4")
    return task


def test_result_comes_whole_and_in_ranges(server: Server, finished: str, tmp_path: Path) -> None:
    whole = server.client.get(f"/videos/{finished}/result")
    (tmp_path / "out.mp4").write_bytes(whole.content)
    with av.open(str(tmp_path / "out.mp4")) as video:
        frames = list(video.decode(video=0))
    assert [(frame.width, frame.height) for frame in frames] == [(64, 48)] * 3
    etag, url = whole.headers["etag"], f"/videos/{finished}/result"
    part = server.client.get(url, headers={"Range": "bytes=5-14", "If-Range": etag})
    assert part.status_code == 206 and part.content == whole.content[5:15]
    assert server.client.get(url, headers={"Range": "bytes=-7"}).content == whole.content[-7:]
    other = server.client.get(url, headers={"Range": "bytes=5-14", "If-Range": '"old"'})
    assert (other.status_code, other.content) == (200, whole.content)
    assert server.client.get(url, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416
    assert server.client.get(url, headers={"If-None-Match": f'W/"x", {etag}'}).status_code == 304
    assert server.client.get(f"/videos/{finished}/preview.jpg").headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ({"model": "v9"}, 422, "there is no model 'v9'"),
        ({"model": "v1"}, 409, "not on this machine"),
        ({"size": "9x"}, 422, "neither a factor"),
        ({"preset": "best"}, 422, "Stream-DiffVSR has the presets exact"),
        ({"options": {"steps": 2}}, 422, "no such option"),
        ({"options": {"seed": 1.5}}, 422, "not of type 'integer'"),
        ({"options": {"decoder": "full"}}, 422, "an option of FlashVSR"),
        ({"options": {"codec": "prores"}}, 422, "prores cannot be written to mp4"),
        ({"options": {"scene_cut": "/etc/passwd"}}, 422, "does not match"),
        ({"options": {"state_out": "elsewhere/x"}}, 422, "no such option"),
        ({"options": {"prompt": "a\0b"}}, 422, "null character"),
        ({"options": {"target": "2000x2000"}}, 413, "Result frames of"),
        ({"format": "gif"}, 422, "is not one of .mp4"),
        ({"fromat": "mp4"}, 422, "fromat"),
        ({"target": "s3:/x"}, 422, "not of the form"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    server: Server, finished: str, asked: dict, status: int, told: str
) -> None:
    answer = server.ask(finished, **asked)
    problem = answer.json()
    assert (answer.status_code, problem["status"]) == (status, status), problem
    assert answer.headers["content-type"] == "application/problem+json" and told in problem["detail"], problem
    assert server.status(finished)["status"] == "finished"


def test_only_allowed_paths_are_sources(server: Server, tmp_path: Path) -> None:
    allowed = server.root.parent / "allowed"
    clip = write_video(allowed / "clip.mp4", 2)
    secret = write_video(tmp_path / "secret.mp4", 2)
    (allowed / "link.mp4").symlink_to(secret)
    for path in (
        secret,
        allowed / "link.mp4",
        allowed / ".." / ".." / secret.name,
        allowed,
        allowed / "no.mp4",
    ):
        answer = server.ask("0" * 31 + "1", source=str(path))
        assert answer.status_code in (415, 422), (path, answer.text)
    good = server.ask("00000000-0000-0000-0000-000000000002", source=str(clip), options={"seed": 1})
    assert good.status_code == 202, good.text
    again = server.ask("00000000-0000-0000-0000-000000000002", source=str(clip), options={"seed": 1})
    assert again.status_code == 202 and again.json()["task_id"] == good.json()["task_id"]
    gone = server.client.request("DELETE", f"/videos/{good.json()['task_id']}?remove=true")
    assert gone.json()["status"] == "cancelled" and clip.is_file()
    assert not (server.root / "tasks" / good.json()["task_id"]).exists()


def test_uploads_are_checked(server: Server, tmp_path: Path) -> None:
    # Playlists that name a file which is there.
    secret = write_video(tmp_path / "secret.ts", 2)
    lines = ("#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", str(secret), "#EXT-X-ENDLIST", "")
    (tmp_path / "x.m3u8").write_text("\n".join(lines))
    (tmp_path / "x.ts").write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    for name in ("x.m3u8", "x.ts"):
        refused = server.ask(server.upload(tmp_path / name))
        assert refused.status_code == 422 and "cannot be opened" in refused.json()["detail"]
    post = server.client.post
    before = sorted((server.root / "tasks").iterdir())
    assert post("/videos/upload", files={"file": ("a.mp4", b"x" * 1_100_000)}).status_code == 413
    assert post("/videos/upload", files={"file": ("a", b"x")}).status_code == 415
    assert post("/images/upload", files={"file": ("a.mp4", b"x")}).status_code == 415
    assert post("/videos/upload", files={"other": ("a.mp4", b"x")}).status_code == 422
    assert post("/videos/upload", content=b"x").status_code == 415
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    broken = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\nabc'
    assert post("/videos/upload", content=broken, headers=kind).status_code == 400
    assert sorted((server.root / "tasks").iterdir()) == before


def test_who_may_ask(server: Server) -> None:
    with httpx.Client(base_url=server.address) as stranger:
        refused = stranger.get("api/v1/videos")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        for word in ("no", TOKEN[:-1], TOKEN + "x"):
            told = {"Authorization": f"Bearer {word}"}
            assert stranger.get("api/v1/videos", headers=told).status_code == 401
        page = stranger.get("")
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["x-content-type-options"] == "nosniff"
        login = {"token": TOKEN}
        other = {"Origin": "http://example.com"}
        assert stranger.post("api/v1/session", json=login, headers=other).status_code == 403
        for word in ("no", "", TOKEN[:-1]):
            assert stranger.post("api/v1/session", json={"token": word}).status_code == 401
        entered = stranger.post("api/v1/session", json=login)
        assert "HttpOnly" in entered.headers["set-cookie"] and TOKEN not in entered.headers["set-cookie"]
        assert stranger.get("api/v1/videos").status_code == 200


def test_description_is_complete(server: Server) -> None:
    described = server.client.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            assert about["summary"] and "4XX" in about["responses"], (path, method)
            assert method != "post" or about["requestBody"]["content"], path
    told = server.client.get("/capabilities").json()
    assert told["families"]["diffvsr"]["schema"]["properties"]["num_inference_steps"]["minimum"] == 1
    assert "cpu" in [device["name"] for device in told["devices"] if device["free"] > 0]
    assert not {"state_out", "cuts_out", "compare", "overwrite"} & told["job"]["options"].keys()


def test_other_machines_need_a_token() -> None:
    command = [sys.executable, "-m", "stream_diffvsr.service"]
    open_to_all = {"STREAM_DIFFVSR_HOST": "0.0.0.0", "STREAM_DIFFVSR_TOKEN": ""}
    done = subprocess.run(command, env={**os.environ, **open_to_all}, capture_output=True, text=True)
    assert done.returncode == 2 and "a token" in done.stderr
