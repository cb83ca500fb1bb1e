"""Workers run by Ray, on several devices of this machine or on a cluster. Only this module imports Ray.

Ray starts the worker processes, restarts any that die, and repeats their calls. However, it waits forever for
a lost node, so this module detects lost nodes and frees their scenes for other workers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import available, resolve_device
from ..errors import IncompatibleInputError, VideoError
from ..load import FAMILIES
from ..upscaler import Info, Provenance

log = logging.getLogger(__name__)

INSTALL = "pip install 'stream-diffvsr[ray]'"
START = float(os.environ.get("STREAM_DIFFVSR_WORKER_START", "600"))
"""Seconds that workers may take to start and open their model; a busy machine may need minutes."""
ANSWER = 300.0
"""Seconds that a worker may take to answer a question."""
RESTARTS = 3
LOOK = 2.0
"""Seconds between checks for lost nodes."""
PACKAGE = Path(__file__).resolve().parents[2]
VISIBLE = "CUDA_VISIBLE_DEVICES"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves workers on a busy machine
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Otherwise, under 'uv run', Ray packs up the driver's current folder, and each worker installs it.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@dataclass(frozen=True)
class Devices:
    """The requested workers."""

    names: tuple[str, ...]
    """One device per worker, such as 'cuda:1' or 'cpu'; empty to use all devices of the cluster."""
    kind: str
    """'cuda' or 'cpu'."""


def parse_devices(text: str) -> Devices:
    """Parse `all`, `cuda:0,cuda:1`, `0,1`, or `cpu:2` (two workers). Raises `IncompatibleInputError`."""
    if text == "all":
        found = [name for name in available() if name.startswith("cuda")]
        return Devices(tuple(found), "cuda") if found else Devices(("cpu",), "cpu")
    kind, _, count = text.partition(":")
    if kind == "cpu" and (not count or (count.isdecimal() and int(count) > 0)):
        return Devices(("cpu",) * int(count or 1), "cpu")
    names = tuple(f"cuda:{part}" if part.isdecimal() else part for part in text.replace(" ", "").split(","))
    if not all(name.startswith("cuda:") for name in names) or len(set(names)) < len(names):
        raise IncompatibleInputError(
            "devices must be all, a list such as cuda:0,cuda:1 or 0,1, or a count such as cpu:2, "
            f"not {text!r}"
        )
    for name in names:
        resolve_device(name)
    return Devices(names, "cuda")


def import_ray() -> Any:
    """Import and return Ray. Raises `IncompatibleInputError` with the command to install it."""
    # Ray reads these variables when it is imported.
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    try:
        import ray
    except ImportError:
        raise IncompatibleInputError(
            f"the ray package is needed to use several devices or machines: run {INSTALL}"
        ) from None
    return ray


class FarModel:
    """Stand-in for a model that workers have opened; implements `prepare.Model` by asking a worker."""

    def __init__(self, facts: Mapping[str, Any], ask: Any) -> None:
        told = dict(facts["info"])
        told["scales"] = None if told["scales"] is None else tuple(told["scales"])
        self.info = Info(**told)
        self.Options: type = FAMILIES[self.info.family].options
        self.device = torch.device(facts["device"])
        self._ask = ask

    def provenance(self, size: tuple[int, int], options: Any = None) -> Provenance:
        """Return the provenance of frames made from an LQ input of this size (height, width)."""
        found = self._ask("provenance", size, None if options is None else asdict(options))
        return Provenance.from_texts(_checked(found)["made"])


class RayPool:
    """A `spread.Pool` whose workers are Ray actors."""

    def __init__(
        self, ray: Any, actors: Mapping[str, Any], threads: int, on_wait: Callable[[], object]
    ) -> None:
        self.ray, self.threads, self.on_wait = ray, threads, on_wait
        self.actors = dict(actors)
        self.flying: dict[Any, tuple[str, str]] = {}
        """The (scene, worker) pair to which each pending result belongs."""
        self.asked: dict[str, Any] = {}
        self.frames: dict[str, int] = {}
        self.looked = 0.0
        facts = self._all("describe", START)
        self.nodes = {worker: each["node"] for worker, each in facts.items()}
        check_same(facts)
        for worker, each in facts.items():
            log.info("%s: %s on %s, %s", worker, each["device"], each["machine"], _threads(each))
        self.model = FarModel(next(iter(facts.values())), self._ask)
        self.threads = next(iter(facts.values()))["threads"]

    @property
    def workers(self) -> Sequence[str]:
        return list(self.actors)

    def _ask(self, question: str, *values: Any) -> Any:
        """Ask one worker after another; return the first answer."""
        for worker in self.workers:
            with contextlib.suppress(self.ray.exceptions.RayError):
                return self.ray.get(self.actors[worker].call.remote(question, *values), timeout=ANSWER)
        raise OSError("no worker responded; run the same command again to resume")

    def _all(self, question: str, seconds: float, *values: Any) -> dict[str, Any]:
        """Return the answers of all workers. Raises `VideoError` if one fails or does not answer in time."""
        asked = {self.actors[worker].call.remote(question, *values): worker for worker in self.workers}
        there, missing, end = [], list(asked), time.monotonic() + seconds
        while missing and (left := end - time.monotonic()) > 0:
            self.on_wait()
            there, missing = self.ray.wait(list(asked), num_returns=len(asked), timeout=min(0.5, left))
        if missing:
            raise VideoError(
                f"only {len(there)} of {len(asked)} workers responded within {seconds:.0f} s: request fewer "
                "workers, or run 'ray status' to see what the cluster lacks."
            )
        try:
            return {asked[each]: self.ray.get(each) for each in there}
        except self.ray.exceptions.RayError as error:
            raise VideoError(f"a worker did not start: {_first_line(error)}") from error

    def check_access(self, job: Mapping[str, Any], source: Mapping[str, Any], token: str) -> list[str]:
        answers = self._all("check_access", ANSWER, job, dict(source), token)
        return [answer["error"] for answer in answers.values() if "error" in answer]

    def give(self, worker: str, name: str, job: Mapping[str, Any], scene: Mapping[str, Any]) -> None:
        self.flying[self.actors[worker].call.remote("render", name, job, scene)] = name, worker

    def answers(self, seconds: float) -> list[tuple[str, Mapping[str, Any] | None]]:
        ready: list[Any] = []
        if self.flying:
            ready, _ = self.ray.wait(list(self.flying), timeout=seconds)
        else:
            time.sleep(seconds / 5)
        found = []
        for each in ready:
            name, worker = self.flying.pop(each)
            try:
                found.append((name, self.ray.get(each)))
            except self.ray.exceptions.RayError as error:
                self._lose(worker, _first_line(error))
                found.append((name, None))
        return [*found, *self._of_lost_nodes()]

    def _of_lost_nodes(self) -> Iterator[tuple[str, None]]:
        """Yield the scenes of workers whose node has been lost."""
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        there = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        for worker in [each for each in self.workers if self.nodes[each] not in there]:
            self._lose(worker, "its machine no longer responds")
            for ref in [ref for ref, (_, at) in self.flying.items() if at == worker]:
                yield self.flying.pop(ref)[0], None

    def _lose(self, worker: str, why: str) -> None:
        """Drop a lost worker; another worker will redo its scene."""
        actor = self.actors.pop(worker, None)
        if actor is not None:
            log.warning("%s is lost (%s); %d workers remain", worker, why, len(self.actors))
            self.asked.pop(worker, None)
            self.ray.kill(actor, no_restart=True)

    def progress(self) -> Mapping[str, int]:
        """Return the number of frames done in each scene, as last reported; log the workers' new messages."""
        for worker, asked in list(self.asked.items()):
            if self.ray.wait([asked], timeout=0)[0]:
                del self.asked[worker]
                with contextlib.suppress(self.ray.exceptions.RayError):
                    name, done, lines = self.ray.get(asked)
                    self.frames[name] = done
                    for level, line in lines:
                        log.log(level, "%s: %s", worker, line)
        for worker in self.workers:
            if worker not in self.asked:
                self.asked[worker] = self.actors[worker].call.remote("progress")
        working = {name for name, _ in self.flying.values()}
        self.frames = {name: done for name, done in self.frames.items() if name in working}
        return self.frames

    def stop(self, name: str) -> None:
        for scene, worker in self.flying.values():
            if scene == name and worker in self.actors:
                self.actors[worker].call.remote("stop", name)


def check_same(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `VideoError` if a worker cannot start, or if workers differ in anything that changes pixels."""
    for each in facts.values():
        if "error" in each:
            raise VideoError(f"{each['machine']}: {each['error']}")
    first, *others = facts.values()
    told = {
        "version": "stream-diffvsr",
        "torch": "torch",
        "device": "device type",
        "threads": "threads per worker",
        "info": "the model",
    }
    for other in others:
        for key, what in told.items():
            if other[key] != first[key]:
                a, b = (each[key] if key != "info" else each[key]["model"][:12] for each in (first, other))
                raise VideoError(
                    f"{first['machine']} has {what} {a}, but {other['machine']} has {b}: "
                    "all workers must match."
                )


def _checked(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    if "error" in answer:
        raise VideoError(answer["error"])
    return answer


def _threads(facts: Mapping[str, Any]) -> str:
    return f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def workers(
    model: Mapping[str, Any],
    devices: Devices,
    address: str | None = None,
    threads: int = 0,
    on_wait: Callable[[], object] = lambda: None,
) -> Generator[RayPool]:
    """Yield a pool of workers that is shut down at the end of the block.

    `model` contains the arguments for `load_pipeline`.
    `address` is the address of a cluster, or None to start workers on this machine. `on_wait` is called every
    half second while waiting for all workers, for example while they start, and may raise an exception to
    cancel. Raises `VideoError` if no cluster answers or its workers differ, and `IncompatibleInputError` if
    the ray package is missing.
    """
    ray = import_ray()
    names = devices.names
    visible = os.environ.get(VISIBLE)
    if address is None and devices.kind == "cpu":
        threads = threads or max(1, (os.cpu_count() or 1) // len(names))
    try:
        if address is None:
            _start_here(ray, devices)
        else:
            _connect(ray, address)
        try:
            if address is not None:
                threads = threads or _fewest_cpus(ray)
                names = names or _all_of(ray, devices.kind, threads)
            actors = {}
            for number, _ in enumerate(names, 1):
                actors[f"worker {number}"] = _actor(ray, model, devices.kind, threads, address is not None)
            yield RayPool(ray, actors, threads, on_wait)
        finally:
            ray.shutdown()
    finally:
        if visible is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = visible


def _start_here(ray: Any, devices: Devices) -> None:
    gpus = 0
    if devices.kind == "cuda":
        gpus = len(devices.names)
        os.environ[VISIBLE] = cards(devices.names, os.environ.get(VISIBLE))
    for last in (False, False, True):
        try:
            # 'local': never join a cluster that an earlier run left behind.
            ray.init(
                address="local",
                num_cpus=len(devices.names),
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=100 << 20,
            )
            return
        except Exception as error:  # Ray raises bare exceptions here
            ray.shutdown()
            # Ray waits half a minute for its own processes, which is too short on a busy machine.
            if last or "timed out" not in str(error):
                raise VideoError(
                    f"Ray cannot start on this machine: {_first_line(error).rstrip('.')}. "
                    "Fix the cause, or use a single device."
                ) from error


def cards(names: Sequence[str], visible: str | None) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES that selects these devices, given its current value."""
    numbers = [int(name.partition(":")[2]) for name in names]
    shown = visible.split(",") if visible else []
    return ",".join(shown[number] if shown else str(number) for number in numbers)


def _connect(ray: Any, address: str) -> None:
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ImportError, OSError) as error:
        raise VideoError(
            f"no Ray cluster answers at {address} ({_first_line(error)}): start one with 'ray start --head', "
            "or check the address and the token."
        ) from error


def _knock(address: str) -> None:
    """Raise `OSError` if nothing is listening at the address; Ray itself would end this process instead."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _fewest_cpus(ray: Any) -> int:
    """Return the CPU count of the cluster's smallest machine, used as the number of threads per worker."""
    counts = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return int(min((count for count in counts if count >= 1), default=1))


def _all_of(ray: Any, kind: str, threads: int) -> tuple[str, ...]:
    """Return one device per worker: each GPU of the cluster, or 'cpu' for every `threads` cores."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(each.get("GPU", 0) for each in alive))
    if kind == "cuda":
        if not gpus:
            raise VideoError("the cluster has no GPU: set --device cpu, or add a machine with a GPU.")
        return ("cuda",) * gpus
    return ("cpu",) * sum(math.floor(each.get("CPU", 0) / threads) for each in alive)


def _actor(ray: Any, model: Mapping[str, Any], kind: str, threads: int, cluster: bool) -> Any:
    """Start one worker. If its process dies, Ray restarts it and repeats its pending calls."""

    class Actor:
        """Wrapper for a `Worker`. Ray sends this class by value; its instances import the package by name."""

        def __init__(self, model: Any, threads: int) -> None:
            from importlib import import_module

            self.worker = import_module("stream_diffvsr.jobs.worker").Worker(model, threads)
            self.worker.keep_lines()

        def call(self, name: str, *values: Any) -> Any:
            found = getattr(self.worker, name)(*values)
            if name == "describe":
                from importlib import import_module

                found["node"] = import_module("ray").get_runtime_context().get_node_id()
            return found

    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000")}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    share = max(1, threads) if cluster and kind == "cpu" else 1
    options = {
        "num_cpus": share,
        "num_gpus": int(kind == "cuda"),
        "max_restarts": RESTARTS,
        "max_task_retries": RESTARTS,
        "max_concurrency": 4,  # so that a worker can answer questions while it renders
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": variables},
    }
    device = "cuda" if kind == "cuda" else "cpu"
    return ray.remote(**options)(Actor).remote({**model, "device": device}, threads)
