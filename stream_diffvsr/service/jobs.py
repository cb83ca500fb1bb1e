"""Turning requests into queued jobs, or refusing them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import s3
from .command import Checks, arguments, check_limits, check_request
from .problems import ProblemError
from .schemas import Status, Upscaling
from .settings import Settings
from .store import KINDS, OVER, WAITING, Store, Task
from .worker import Workers

SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")
SPARE = 256 * 2**20
"""Bytes of disk space to keep free."""


class Jobs:
    """The operations behind the routes and the page."""

    def __init__(self, store: Store, settings: Settings, checks: Checks, workers: Workers) -> None:
        self.store, self.settings, self.checks, self.workers = store, settings, checks, workers

    def task(self, kind: str, task_id: str) -> Task:
        """Return a task; raise `ProblemError` if there is none."""
        task = self.store.get(plain_id(task_id))
        if task is None or task.kind != kind:
            raise ProblemError(404, f"There is no task {task_id[:80]!r} in /api/v1/{kind}.")
        return task

    def check_room(self, needed: int) -> None:
        """Raise `ProblemError` if a file of `needed` bytes is too large or does not fit on the disk."""
        if needed > self.settings.max_bytes:
            raise ProblemError(413, f"The file exceeds the limit of {self.settings.max_bytes / 1e9:g} GB.")
        self._check_disk(needed)

    def _check_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self.store.folder).free
        if free < needed + SPARE:
            told = f"{needed / 1e9:.2f} GB is needed, but the server's disk has only {free / 1e9:.2f} GB free"
            raise ProblemError(507, f"About {told}.")

    async def named(self, kind: str, name: str) -> Task:
        """Return a new, unsaved task for a file called `name`; raise `ProblemError` for a bad suffix."""
        suffix = Path(name.replace("\\", "/")).suffix.lower()
        if not SUFFIX.fullmatch(suffix):
            raise ProblemError(
                415, "The file's name needs an extension that shows its type, such as .mp4 or .png."
            )
        if kind == "images" and suffix not in (await self.checks.about())["pictures"]:
            raise ProblemError(
                415, f"{suffix} is not a supported picture format: send videos to /api/v1/videos."
            )
        shown = Path(name.replace("\\", "/")).name[-200:]
        shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)
        return Task(uuid.uuid4().hex, kind, shown, suffix)

    async def submit(self, kind: str, task_id: str, asked: Upscaling) -> Task:
        """Queue a job; if it cannot run, raise `ProblemError` with the reason."""
        request = asked.model_dump()
        _check_texts(request)
        request["size"] = request["size"].lower()
        about = await self.checks.about(fresh=True)
        check_request(request, about)
        if asked.target is not None:
            s3.check_url(asked.target)
        task = await self._task_for(kind, task_id, asked)
        if task.state == "queued" or task.state == "running":
            if {**task.request} == {**request, "suffix": task.request.get("suffix")}:
                return task
            raise ProblemError(
                409, f"This task is already {task.state} with a different request: cancel it first."
            )
        if len(self.store.waiting()) >= self.settings.max_waiting:
            raise ProblemError(503, "The queue is full: try again later.", Retry_After="60")
        request["suffix"] = _format(kind, task, asked.format, about)
        facts = await self._facts(task, request, about)
        again = self.store.get(task.id)
        if again is None and not task.source:
            raise ProblemError(404, "The task has been deleted.")
        if again is not None and again.state not in ("uploaded", *OVER):
            return again
        if task.state == "finished" or dict(task.request) != request:
            self._forget_results(task)
            task = self.store.change(task, done=0, total=None) if again else task
        changes = {
            "state": WAITING,
            "request": request,
            "facts": facts,
            "message": "",
            "deaths": 0,
            "queued": time.time(),
            "ended": 0.0,
        }
        if again is None:
            self.store.folder_of(task).mkdir(exist_ok=True)
            task = self.store.add(task)
        task = self.store.change(task, **changes)
        await self.workers.wake()
        return task

    async def _task_for(self, kind: str, task_id: str, asked: Upscaling) -> Task:
        """Return the existing task, or a new one for a source that was not uploaded."""
        there = self.store.get(plain_id(task_id))
        if there is not None or asked.source is None:
            task = self.task(kind, task_id)
            if asked.source is not None and asked.source != task.request.get("source"):
                raise ProblemError(409, "This task has a different source: choose a new task id.")
            return task
        new = await self.named(kind, asked.source)
        if s3.is_url(asked.source):
            s3.check_url(asked.source)
            self.check_room(await s3.exists(asked.source))
            source = asked.source
        else:
            source = str(allowed(asked.source, self.settings.allow))
        return Task(plain_id(task_id), kind, new.name, new.suffix, source)

    async def _facts(
        self, task: Task, request: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the command's facts about the job, which are empty until an S3 source is downloaded."""
        source = self.store.source_of(task)
        if s3.is_url(task.source) and not source.is_file():
            return {}
        if task.source and not s3.is_url(task.source):
            allowed(task.source, self.settings.allow)
        # The result's own name is not used, so that leftovers of an earlier result do not interfere.
        output = self.store.folder_of(task) / f"check{request['suffix']}"
        if not output.parent.is_dir():
            output = self.store.folder / output.name
        device = self.workers.devices[0] if self.workers.devices else "auto"
        asked = arguments(request, about, source, output, device, self.settings.ray)
        facts = await self.checks.facts(asked)
        check_limits(facts, self.settings)
        self._check_disk(facts["bytes"])
        return facts

    def _forget_results(self, task: Task) -> None:
        """Delete the results of an earlier request for this task."""
        folder = self.store.folder_of(task)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.startswith("result"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def status(self, task: Task) -> Status:
        """Return a task's status as clients see it."""
        live = self.workers.live.get(task.id)
        numbers = live.numbers if live else {}
        message, preview = task.message, self.store.preview_of(task)
        if live is not None:
            message = live.doing or message
            if "downloaded" in numbers:
                message = f"downloading the model: {numbers['downloaded'] / max(1, numbers['bytes']):.0%}"
        waiting = [each.id for each in self.store.waiting()] if task.state == WAITING else []
        try:
            newest = f"{preview.stat().st_mtime_ns:x}"
        except OSError:
            newest = None
        facts = task.facts
        return Status(
            task_id=task.id,
            kind=task.kind,  # type: ignore[arg-type]
            name=task.name,
            status=task.state,  # type: ignore[arg-type]
            frames_done=numbers.get("done", task.done),
            frames_total=numbers.get("total", task.total) or facts.get("frames"),
            fps=numbers.get("fps"),
            seconds_left=numbers.get("seconds_left"),
            message=message,
            position=waiting.index(task.id) if task.id in waiting else None,
            device=live.device if live else None,
            created=task.created,
            ended=task.ended or None,
            size=facts.get("size"),
            output_size=facts.get("output_size"),
            codec=facts.get("codec"),
            request={name: value for name, value in task.request.items() if name != "suffix"},
            has_result=task.state in ("finished", "cancelled") and self.store.result_of(task).is_file(),
            preview=newest,
        )

    async def clean(self) -> None:
        """Delete old tasks every hour while the server runs."""
        while self.settings.keep_days:
            for task in self.store.old(time.time() - self.settings.keep_days * 86400):
                await asyncio.to_thread(self.store.remove_files, task)
                self.store.remove(task)
            await asyncio.sleep(3600)


def plain_id(task_id: str) -> str:
    """Return a UUID, with or without dashes, as 32 hex digits; raise `ProblemError` if it is not a UUID."""
    plain = task_id.replace("-", "").lower()
    if not re.fullmatch("[0-9a-f]{32}", plain):
        raise ProblemError(404, f"{task_id[:80]!r} is not a task id, which must be a UUID.")
    return plain


def allowed(path: str, folders: tuple[Path, ...]) -> Path:
    """Return the real path, with links resolved, of a file inside one of the folders.

    Raise the same `ProblemError` for a file outside these folders as for one that does not exist.
    """
    refused = ProblemError(422, f"source: {path[:200]!r} is not a file in a folder that this server allows.")
    try:
        real = Path(path).resolve(strict=True)
        inside = any(real.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, ValueError, RuntimeError) as error:
        raise refused from error
    if not (Path(path).is_absolute() and inside and real.is_file()):
        raise refused
    return real


def _format(kind: str, task: Task, asked: str | None, about: Mapping[str, Any]) -> str:
    """Return the suffix of the result; raise `ProblemError` for an unknown format."""
    known = about["written"][kind]
    if asked is None:
        return task.suffix if task.suffix in known else {KINDS[0]: ".mp4", KINDS[1]: ".png"}[kind]
    suffix = "." + asked.lower().removeprefix(".")
    if suffix not in known:
        raise ProblemError(422, f"format: {asked!r} is not one of {', '.join(known)}.")
    return suffix


def _check_texts(request: Mapping[str, Any]) -> None:
    """Raise `ProblemError` for text that cannot be stored or passed on a command line."""
    try:
        text = json.dumps(request, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise ProblemError(422, "The request contains text or numbers that cannot be stored.") from error
    if "\\u0000" in text:
        raise ProblemError(422, "The request contains a null character.")
