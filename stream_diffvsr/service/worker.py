"""Workers that run the jobs, with one `upscale` process per device, restarted after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import s3
from .command import PYTHON_MODULE, Checks, arguments, check_limits, environment
from .problems import ProblemError
from .settings import Settings
from .store import RUNNING, WAITING, Store, Task

log = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that a process has to assemble its finished part after being asked to stop."""
PAUSE = 2.0
"""Seconds before a crashed job is tried again."""
LAST_LINES = 5
BAD_INPUT = 2
"""The command's exit code for a job that would fail however often it is tried."""
SAVE_EVERY = 1.0
"""The minimum number of seconds between two writes of a job's progress."""
LOG = "log.txt"


@dataclass
class RunningJob:
    """A running job."""

    task: Task
    device: str
    process: asyncio.subprocess.Process | None = None
    cancelled: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The most recent progress message, parsed."""
    doing: str = ""
    """A description of what the job is doing if it is not upscaling, otherwise ''."""


class Workers:
    """The workers of all devices; `live` maps task ids to running jobs."""

    def __init__(self, store: Store, settings: Settings, checks: Checks) -> None:
        self.store, self.settings, self.checks = store, settings, checks
        self.live: dict[str, RunningJob] = {}
        self.devices: list[str] = []
        self._wake = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        """Queue the jobs that an earlier server left unfinished, then run jobs until `stop`."""
        end_orphans(self.store.folder)
        for task in self.store.running():
            self.store.change(task, state=WAITING)
        self._tasks.append(asyncio.create_task(self._begin()))

    async def _begin(self) -> None:
        """Start one loop for each device."""
        wanted = self.settings.devices
        if self.settings.ray:
            self.devices = ["ray"]
        elif wanted == "all":
            self.devices = [each["name"] for each in (await self.checks.about())["devices"]]
            self.devices = [name for name in self.devices if name != "cpu"] or ["cpu"]
        else:
            self.devices = [name.strip() for name in wanted.split(",") if name.strip()]
        self._tasks += [asyncio.create_task(self._work(device)) for device in self.devices]

    async def stop(self) -> None:
        """Stop the processes; their jobs continue when the server starts again."""
        self._stopping = True
        await asyncio.gather(*(self._end(live) for live in list(self.live.values())))
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wake(self) -> None:
        """Notify the workers of a new job."""
        async with self._wake:
            self._wake.notify_all()

    async def cancel(self, task: Task) -> Task:
        """Stop a job, or remove it from the queue; return its updated task."""
        live = self.live.get(task.id)
        if live is None:
            return (
                self.store.change(task, state="cancelled", ended=time.time())
                if task.state == WAITING
                else task
            )
        live.cancelled = True
        await self._end(live)
        await live.over.wait()
        return self.store.get(task.id) or task

    async def _end(self, live: RunningJob) -> None:
        """Interrupt a process as Ctrl-C would, and kill it if it does not stop in time."""
        process = live.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate() if sys.platform == "win32" else process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), GRACE)
        except (TimeoutError, asyncio.TimeoutError):
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _work(self, device: str) -> None:
        while True:
            async with self._wake:
                while not (waiting := self.store.waiting()) or self._stopping:
                    await self._wake.wait()
                task = self.store.change(waiting[0], state=RUNNING, message="")
                live = self.live[task.id] = RunningJob(task, device)
            try:
                await self._run(live)
            except Exception as error:
                log.exception("job %s", task.id)
                self._over(
                    live, "failed", f"The server could not run the job ({type(error).__name__}: {error})."
                )
            finally:
                del self.live[task.id]
                live.over.set()

    def _over(self, live: RunningJob, state: str, message: str = "") -> None:
        live.task = self.store.change(live.task, state=state, message=message, ended=time.time())
        log.info("job %s is %s", live.task.id, state)

    async def _run(self, live: RunningJob) -> None:
        """Run a job: fetch its source, upscale it and deliver the result."""
        try:
            if await self._fetch(live) and await self._upscale(live) and await self._deliver(live):
                self._over(live, "finished")
        except ProblemError as error:
            self._over(live, "failed", str(error))
        if live.cancelled and live.task.state == RUNNING:
            self._over(live, "cancelled")

    async def _fetch(self, live: RunningJob) -> bool:
        """Download the source if it is in S3, and check it; return False if the job was stopped meanwhile."""
        task, source = live.task, self.store.source_of(live.task)
        if s3.is_url(task.source) and not source.is_file():
            live.doing = f"reading {task.source}"
            if not await self._transfer(live, s3.fetch(task.source, source, self.settings.max_bytes)):
                return False
        if not task.facts:
            # Sources in S3 can be checked only now; others were checked when the job was requested.
            facts = await self.checks.facts(await self._arguments(live))
            check_limits(facts, self.settings)
            live.task = self.store.change(task, facts=facts)
        return not live.cancelled

    async def _arguments(self, live: RunningJob) -> list[str]:
        """Return the arguments for the command."""
        task, about = live.task, await self.checks.about()
        source, result = self.store.source_of(task), self.store.result_of(task)
        return arguments(task.request, about, source, result, live.device, self.settings.ray)

    async def _deliver(self, live: RunningJob) -> bool:
        """Upload the result if a target was requested; return False if the job was stopped meanwhile."""
        target = live.task.request.get("target")
        if not target:
            return True
        live.doing = f"writing {target}"
        return await self._transfer(live, s3.deliver(self.store.result_of(live.task), target))

    async def _transfer(self, live: RunningJob, work: Any) -> bool:
        """Await a transfer; if the job is stopped, abort the transfer and return False."""
        transfer = asyncio.ensure_future(work)
        while not transfer.done():
            await asyncio.wait([transfer], timeout=0.2)
            if live.cancelled or self._stopping:
                transfer.cancel()
                await asyncio.gather(transfer, return_exceptions=True)
                return False
        transfer.result()
        live.doing = ""
        return True

    async def _upscale(self, live: RunningJob) -> bool:
        """Run the command until the job is done; return False if it was stopped or failed."""
        if self._made(live.task):
            return True
        task, folder = live.task, self.store.folder_of(live.task)
        folder.mkdir(exist_ok=True)
        flags = await self._arguments(live)
        command = [sys.executable, "-m", PYTHON_MODULE, "upscale", "--progress=json", "--preview=1", *flags]
        while not (live.cancelled or self._stopping):
            before = live.task.done
            code = await self._once(live, command, folder / LOG)
            if live.cancelled or self._stopping:
                return False
            if code == 0:
                return True
            log.warning("job %s: its process ended with exit code %d", task.id, code)
            deaths = live.task.deaths + 1 if live.task.done <= before else 1
            live.task = self.store.change(live.task, deaths=deaths)
            if code == BAD_INPUT or deaths >= self.settings.tries:
                self._over(live, "failed", last_words(folder / LOG))
                return False
            await asyncio.sleep(PAUSE)
        return False

    def _made(self, task: Task) -> bool:
        """Whether the command had finished before an earlier server died."""
        result = self.store.result_of(task)
        return result.is_file() and not result.with_name(f"{result.name}.parts").exists()

    async def _once(self, live: RunningJob, command: list[str], log_file: Path) -> int:
        """Run the command once, and return its exit code."""
        with log_file.open("wb") as errors:
            live.process = process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment(),
                start_new_session=True,
            )
        assert process.stdout
        if live.cancelled or self._stopping:
            process.kill()
        saved = time.monotonic()
        async for line in process.stdout:
            live.numbers = _numbers(line) or live.numbers
            if "done" in live.numbers and time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                self._save(live)
        code = await process.wait()
        self._save(live)
        live.numbers = {}
        return code

    def _save(self, live: RunningJob) -> None:
        if "done" in live.numbers:
            numbers = live.numbers
            live.task = self.store.change(live.task, done=numbers["done"], total=numbers["total"])


def _numbers(line: bytes) -> dict[str, Any]:
    """Parse a progress message; return an empty dict for any other line."""
    with contextlib.suppress(ValueError):
        numbers = json.loads(line)
        if isinstance(numbers, dict) and numbers.keys() & {"done", "downloaded"}:
            return numbers
    return {}


def last_words(log_file: Path) -> str:
    """Return the last lines of a process's log."""
    with contextlib.suppress(OSError):
        lines = log_file.read_bytes()[-8192:].decode("utf-8", "replace").splitlines()
        told = [line.removeprefix("stream-diffvsr: ") for line in lines if line.strip()][-LAST_LINES:]
        if told:
            return "\n".join(told)
    return "The process was killed, perhaps because memory ran out."


def end_orphans(folder: Path) -> None:
    """Kill the processes that a crashed server left running, identified by an output inside `folder`."""
    import psutil

    begin, found = f"--output={folder}", []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if PYTHON_MODULE in words and any(word.startswith(begin) for word in words):
            log.warning("killing process %d, which an earlier server left running", process.pid)
            with contextlib.suppress(psutil.Error):
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=30)
