"""The real server as a process of its own, asked over HTTP."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx


class Server:
    """`stream-diffvsr serve` on a free port; `root` holds its jobs."""

    def __init__(self, root: Path, *flags: str, direct: bool = False, **environment: str) -> None:
        self.root, self.flags, self.environment, self.direct = root, flags, environment, direct
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        wanted = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "STREAM_DIFFVSR_ROOT": str(self.root)}
        wanted |= {"STREAM_DIFFVSR_PORT": "0", **self.environment}
        # The command itself, or what it becomes, which starts faster.
        command = ("stream_diffvsr.cli.main", "serve", *self.flags)
        module = ("stream_diffvsr.service",) if self.direct else command
        self.process = subprocess.Popen(
            [sys.executable, "-m", *module],
            env={**os.environ, **wanted},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        addresses: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert self.process.stderr
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(r"open (http://\S+)", line):
                    addresses.put(found[1])
            addresses.put(None)

        threading.Thread(target=read, daemon=True).start()
        address = addresses.get(timeout=300)
        assert address, "".join(self.lines)
        self.address = address
        self.client = httpx.Client(base_url=address + "api/v1", timeout=300)

    def kill(self) -> None:
        """As a power cut would, but that its jobs' processes stay."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """As Ctrl-C would; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=120)

    def upload(self, path: Path, kind: str = "videos", name: str | None = None) -> str:
        """Send a file; returns the task's id."""
        with path.open("rb") as file:
            answer = self.client.post(f"/{kind}/upload", files={"file": (name or path.name, file)})
        assert answer.status_code == 201, answer.text
        return answer.json()["task_id"]

    def ask(self, task: str, kind: str = "videos", **request: Any) -> httpx.Response:
        """Ask for the job."""
        return self.client.post(f"/{kind}/{task}/upscaling", json=request)

    def status(self, task: str, kind: str = "videos") -> dict[str, Any]:
        return self.client.get(f"/{kind}/{task}/status").json()

    def wait(self, task: str, *states: str, kind: str = "videos", seconds: float = 600) -> dict[str, Any]:
        """Until a task is in one of these states, or over."""
        for _ in range(int(seconds * 5)):
            status = self.status(task, kind)
            if status["status"] in (*states, "finished", "failed", "cancelled"):
                return status
            time.sleep(0.2)
        raise AssertionError(f"still {status}")
