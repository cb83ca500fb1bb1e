"""The list of jobs: one SQLite table, and a folder for each job."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

KINDS = ("videos", "images")
WAITING, RUNNING = "queued", "running"
OVER = ("finished", "failed", "cancelled")
"""The final states. A task is 'uploaded' until a job is requested for it."""
TASK_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Task:
    """A file and the job to run on it."""

    id: str
    """32 hex digits, which also name the task's folder."""
    kind: str
    """One of KINDS."""
    name: str
    """The caller's name for the file, which is displayed but never used as a path."""
    suffix: str
    """The file's suffix in lower case, with the dot."""
    source: str = ""
    """The location of a file that was not uploaded: a path, or s3://bucket/key."""
    state: str = "uploaded"
    request: Mapping[str, Any] = field(default_factory=dict)
    """The job as requested."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the source and the planned result."""
    message: str = ""
    done: int = 0
    total: int | None = None
    deaths: int = 0
    """How many times the process has died since it last made progress."""
    created: float = 0.0
    queued: float = 0.0
    ended: float = 0.0
    """These three times are in seconds since 1970; 0 means not yet."""


COLUMNS = tuple(each.name for each in fields(Task))
AS_JSON = ("request", "facts")


class Store:
    """The tasks stored in one root folder. Every change is on disk when the call returns."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "tasks"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(root / "jobs.sqlite", isolation_level=None)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA busy_timeout=10000")
        self.database.execute(f"CREATE TABLE IF NOT EXISTS tasks ({', '.join(COLUMNS)}, PRIMARY KEY (id))")

    def folder_of(self, task: Task) -> Path:
        """Return the folder with the files of a task."""
        return self.folder / task.id

    def source_of(self, task: Task) -> Path:
        """Return the path of the file to upscale."""
        local = task.source and not task.source.startswith("s3://")
        return Path(task.source) if local else self.folder_of(task) / f"source{task.suffix}"

    def result_of(self, task: Task) -> Path:
        """Return the path of the job's result, which is complete only when the task is finished."""
        return self.folder_of(task) / f"result{task.request.get('suffix', task.suffix)}"

    def preview_of(self, task: Task) -> Path:
        """Return the path of the command's preview picture, which shows the newest frame."""
        return self.folder_of(task) / "result_preview.jpg"

    def add(self, task: Task) -> Task:
        """Store a new task, and return it with its creation time."""
        task = replace(task, created=time.time())
        marks = ", ".join("?" for _ in COLUMNS)
        self.database.execute(f"INSERT INTO tasks VALUES ({marks})", _row(task))
        return task

    def change(self, task: Task, **changes: Any) -> Task:
        """Store changes to a task, and return the changed task."""
        task = replace(task, **changes)
        values = dict(zip(COLUMNS, _row(task), strict=True))
        names = ", ".join(f"{name} = ?" for name in changes)
        self.database.execute(
            f"UPDATE tasks SET {names} WHERE id = ?", [*(values[name] for name in changes), task.id]
        )
        return task

    def get(self, task_id: str) -> Task | None:
        """Return the task with the given id, or None."""
        found = self._select("WHERE id = ?", task_id)
        return found[0] if found else None

    def newest(self, kind: str, limit: int, offset: int = 0) -> list[Task]:
        """Return tasks of one kind, newest first."""
        return self._select("WHERE kind = ? ORDER BY created DESC LIMIT ? OFFSET ?", kind, limit, offset)

    def waiting(self) -> list[Task]:
        """Return the waiting jobs in queue order."""
        return self._select("WHERE state = ? ORDER BY queued", WAITING)

    def running(self) -> list[Task]:
        """Return the jobs that are running, or were running when the server died."""
        return self._select("WHERE state = ?", RUNNING)

    def old(self, before: float) -> list[Task]:
        """Return tasks that ended, or were uploaded but never queued, before a given time."""
        return self._select(
            f"WHERE state IN {(*OVER, 'uploaded')} AND MAX(created, queued, ended) < ?", before
        )

    def remove(self, task: Task) -> None:
        """Delete a task; its files must be deleted first, so that none are left behind."""
        self.database.execute("DELETE FROM tasks WHERE id = ?", (task.id,))

    def remove_files(self, task: Task) -> None:
        """Delete the files of a task."""
        shutil.rmtree(self.folder_of(task), ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Delete folders that interrupted uploads left behind without a task."""
        for folder in self.folder.iterdir():
            if TASK_ID.fullmatch(folder.name) and self.get(folder.name) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def _select(self, where: str, *values: Any) -> list[Task]:
        rows = self.database.execute(f"SELECT {', '.join(COLUMNS)} FROM tasks {where}", values)
        return [_task(row) for row in rows]


def _row(task: Task) -> list[Any]:
    return [json.dumps(getattr(task, name)) if name in AS_JSON else getattr(task, name) for name in COLUMNS]


def _task(row: tuple[Any, ...]) -> Task:
    values = dict(zip(COLUMNS, row, strict=True))
    return Task(**{name: json.loads(value) if name in AS_JSON else value for name, value in values.items()})
