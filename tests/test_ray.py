"""Scenes over a real Ray cluster on loopback: `pytest -m ray tests/test_ray.py`, with the extra `ray`.

STREAM_DIFFVSR_KILLS=6 kills at that many random moments: a worker, a raylet and the command in turn.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import clips
import numpy as np
import psutil
import pytest

from stream_diffvsr.jobs.journal import WorkFolder

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")

KILLS = int(os.environ.get("STREAM_DIFFVSR_KILLS", "3"))
SCENES, LENGTH = 30, 4


def many_scenes(index: int, width: int, height: int) -> np.ndarray:
    picture = clips.picture(index, width, height)
    return picture if index // LENGTH % 2 else 255 - picture[::-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return clips.write_video(folder / "in.mp4", SCENES * LENGTH, size=(32, 24), draw=many_scenes, audio=1)


@pytest.fixture(scope="module", params=[2, 4])
def cluster(request) -> Iterator[Any]:
    """Nodes of one core each, started as a user's would be, by processes of this test."""
    from ray.cluster_utils import Cluster

    os.environ.update({"RAY_raylet_start_wait_time_s": "300", "RAY_worker_niceness": "0"})
    for tries in range(3):
        found = Cluster()
        try:
            for _ in range(request.param):
                found.add_node(num_cpus=1)
            break
        except Exception:  # a node has half a minute to start, which is too little on a busy machine
            found.shutdown()
            if tries == 2:
                raise
    yield found
    found.shutdown()


def command(checkpoint: Path, source: Path, output: Path, *more: object) -> list[str]:
    return [
        sys.executable, "-m", "stream_diffvsr.cli.main", "upscale", *map(str, [
            source, "-o", output, "--model", checkpoint, "--device", "cpu", "--flow", "dis", "--steps", 1,
            "--codec", "ffv1", "--segment", 2, "--threads", 1, "--progress", "json", *more,
        ])
    ]  # fmt: skip


def actors() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if "ray::Actor" in " ".join(p.info["cmdline"] or [])]


def started(call: list[str], goal: int) -> subprocess.Popen[str]:
    """The command, when so many frames are done."""
    job = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None
    for line in job.stdout:
        if json.loads(line).get("done", 0) >= goal:
            break
    return job


def same(output: Path, wanted: Path) -> None:
    pairs = zip(clips.frames_of(output), clips.frames_of(wanted), strict=True)
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in pairs)
    assert clips.packets_of(output, "audio") == clips.packets_of(wanted, "audio")


@pytest.fixture(scope="module")
def whole(source, checkpoint, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out.mkv"
    subprocess.run(command(checkpoint, source, output), check=True, stdout=subprocess.DEVNULL)
    return output


def test_a_cluster_equals_one_process(cluster, source, whole, checkpoint, tmp_path) -> None:
    output = tmp_path / "out.mkv"
    done = subprocess.run(
        command(checkpoint, source, output, "--ray", cluster.address), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    same(output, whole)
    last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last[-1] == {"output": str(output)} and last[-2]["done"] == last[-2]["total"]
    assert done.stderr.count("worker 1: cpu on") == 1


@pytest.mark.parametrize("number", range(KILLS))
def test_losses(number, cluster, source, whole, checkpoint, tmp_path) -> None:
    """The job ends right, or is resumed by the same command."""
    chance, output = random.Random(number), tmp_path / "out.mkv"
    call = command(checkpoint, source, output, "--ray", cluster.address)
    job = started(call, chance.randrange(1, SCENES * LENGTH - 20))
    victim = ("worker", "command", "node")[number % 3]
    if victim == "worker":
        chance.choice(actors()).send_signal(signal.SIGKILL)
    elif victim == "command":
        job.kill()
    else:
        node = (
            cluster.add_node(num_cpus=1) if len(cluster.worker_nodes) < 1 else list(cluster.worker_nodes)[-1]
        )
        cluster.remove_node(node, allow_graceful=False)
    job.communicate()
    if job.returncode != 0:
        time.sleep(5)
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    same(output, whole)
    assert not Path(f"{output}.parts").exists()
    if victim == "node":
        cluster.add_node(num_cpus=1)


def test_one_scene(cluster, checkpoint, tmp_path) -> None:
    """Nothing to share out, and the same pixels."""
    clip = clips.write_video(tmp_path / "in.mp4", 8, size=(32, 24))
    subprocess.run(command(checkpoint, clip, tmp_path / "plain.mkv"), check=True, stdout=subprocess.DEVNULL)
    call = command(checkpoint, clip, tmp_path / "out.mkv", "--ray", cluster.address)
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    same(tmp_path / "out.mkv", tmp_path / "plain.mkv")


def test_ctrl_c(cluster, source, whole, checkpoint, tmp_path) -> None:
    """It ends the work everywhere, and leaves what is done."""
    output = tmp_path / "out.mkv"
    call = command(checkpoint, source, output, "--ray", cluster.address)
    job = started(call, 20)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=120)
    assert job.returncode == 130
    end = time.monotonic() + 60
    while actors() and time.monotonic() < end:
        time.sleep(0.5)
    assert not actors()
    left = WorkFolder(output).load()
    assert left is not None and left.segments
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    same(output, whole)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_fills_up(cluster, source, whole, checkpoint, tmp_path) -> None:
    """One sentence; nothing half written is joined; with room, the same command ends the job."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", disk], check=True)
    try:
        output = disk / "out.mkv"
        call = command(checkpoint, source, output, "--ray", cluster.address)
        job = started(call, 20)
        with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        _, told = job.communicate(timeout=300)
        assert job.returncode == 1 and "make room" in told.splitlines()[-1], told[-2000:]
        (disk / "filler").unlink()
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        same(output, whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_two_hundred_files_with_five_bad_ones(source, checkpoint, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    clip = clips.write_video(tmp_path / "clip.mp4", 2, size=(16, 16))
    bad = {f"{number:03}" for number in (0, 50, 77, 150, 199)}
    for number in range(200):
        file = folder / f"{number:03}.mp4"
        file.write_bytes(b"no video") if file.stem in bad else file.symlink_to(clip)
    done = subprocess.run(
        command(checkpoint, folder, tmp_path / "out", "--devices", "cpu:2"), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr[-2000:]
    told = done.stderr.splitlines()
    assert told[-1].endswith("5 of 200 files failed")
    assert {name for name in bad if any(f"{name}_4x.mp4: " in line for line in told)} == bad
    made = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert made == [f"{number:03}_4x.mp4" for number in range(200) if f"{number:03}" not in bad]
    subprocess.run(command(checkpoint, clip, tmp_path / "plain.mp4"), check=True, stdout=subprocess.DEVNULL)
    same(tmp_path / "out" / "123_4x.mp4", tmp_path / "plain.mp4")


def test_devices_of_this_machine_and_many_files(source, checkpoint, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.mp4").symlink_to(source)
    (folder / "bad.mp4").write_bytes(b"no video")
    done = subprocess.run(
        command(checkpoint, folder, tmp_path / "out", "--devices", "cpu:2"), capture_output=True, text=True
    )
    assert done.returncode == 1 and "bad_4x.mp4: " in done.stderr, done.stderr[-2000:]
    assert "1 of 5 files failed" in done.stderr
    subprocess.run(command(checkpoint, source, tmp_path / "plain.mp4"), check=True, stdout=subprocess.DEVNULL)
    for number in range(4):
        same(tmp_path / "out" / f"{number}_4x.mp4", tmp_path / "plain.mp4")


def test_a_cluster_that_is_not_there(source, checkpoint, tmp_path) -> None:
    call = command(checkpoint, source, tmp_path / "out.mkv", "--ray", "127.0.0.1:1")
    done = subprocess.run(
        call,
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"},
    )
    assert done.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr.splitlines()[-1]


def test_a_cancel_is_heard_while_workers_start() -> None:
    from stream_diffvsr.jobs.cluster import parse_devices, workers

    def cancel() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), workers({"source": "nano"}, parse_devices("cpu:2"), on_wait=cancel):
        raise AssertionError("they started")
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start(source, checkpoint, tmp_path) -> None:
    """A folder with a name too long for sockets is one of its reasons."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    done = subprocess.run(
        command(checkpoint, source, tmp_path / "out.mkv", "--devices", "cpu:2"),
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_TMPDIR": str(folder)},
    )
    assert done.returncode == 2
    assert "Ray cannot start on this machine" in done.stderr.splitlines()[-1]
