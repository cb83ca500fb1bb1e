"""Workers in threads of this process: all that spreads scenes but Ray itself."""

from __future__ import annotations

import json
import queue
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stream_diffvsr.jobs.cluster import FarModel
from stream_diffvsr.jobs.worker import Worker
from stream_diffvsr.load import load_pipeline
from stream_diffvsr.upscaler import Upscaler

OPENED: dict[str, list[Upscaler]] = {}


class LocalPool:
    """As many workers, each with a model of its own; `lost` of them vanish, each with its first scene.

    Models are opened once for all pools with the same arguments.
    """

    def __init__(self, model: Mapping[str, Any], count: int, lost: int = 0) -> None:
        self.model_arguments, self.lost, self.threads = model, lost, 1
        opened = OPENED.setdefault(json.dumps(model), [])
        opened += [load_pipeline(**model) for _ in range(count - len(opened))]
        self.at = {f"worker {number}": Worker(model) for number in range(count)}
        for worker, pipe in zip(self.at.values(), opened, strict=False):
            worker.pipe = pipe
        self.pool = ThreadPoolExecutor(count)
        self.back: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.given: list[tuple[str, int]] = []
        first = next(iter(self.at.values()))
        self.model = FarModel(
            travelled(first.describe()), lambda name, *values: getattr(first, name)(*values)
        )

    @property
    def workers(self) -> list[str]:
        return list(self.at)

    def check_access(self, *values: Any) -> list[str]:
        answers = [worker.check_access(*travelled(values)) for worker in self.at.values()]
        return [answer["error"] for answer in answers if "error" in answer]

    def give(self, worker: str, name: str, job: Any, scene: Any) -> None:
        self.given.append((worker, scene["first"]))
        if self.lost:
            self.lost -= 1
            del self.at[worker]
            self.back.put((name, None))
            return

        def work(at: Worker) -> None:
            self.back.put((name, travelled(at.render(*travelled([name, job, scene])))))

        self.pool.submit(work, self.at[worker])

    def answers(self, seconds: float) -> list[tuple[str, Any]]:
        try:
            return [self.back.get(timeout=min(seconds, 0.02))]
        except queue.Empty:
            return []

    def progress(self) -> dict[str, int]:
        return {name: done for name, done, _ in (worker.progress() for worker in self.at.values())}

    def stop(self, name: str) -> None:
        for worker in self.at.values():
            worker.stop(name)


def travelled(value: Any) -> Any:
    """What arrives at the other end: JSON, and nothing else."""
    return json.loads(json.dumps(value))
