"""Checks that a job must pass before it is accepted, and the arguments of the command that runs it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from .problems import ProblemError
from .settings import Settings

log = logging.getLogger(__name__)

PYTHON_MODULE = "stream_diffvsr.cli.main"
CHECKS = "stream_diffvsr.cli.checks"
ANY_SIZE = 8
"""The maximum number of pixels in an output frame, as a multiple of the maximum in an input frame."""
PATIENCE = 60.0
"""Seconds allowed for inspecting a file."""
IDLE = 120.0
"""Seconds of idleness after which the `Checks` process is killed, since it uses half a gigabyte of memory."""
FRESH = 10.0
"""Seconds for which information about devices and models is reused."""
STARTING = 300.0
"""Seconds allowed for starting the `Checks` process, since torch may be loaded from a slow disk."""
SIZES = re.compile(r"(?P<factor>[1-8](\.\d{1,3})?)x|(?P<edge>\d{2,5})p")
SECRETS = ("STREAM_DIFFVSR_TOKEN", "AWS_")
"""Prefixes of environment variables that no child process needs."""


def environment() -> dict[str, str]:
    """Return the environment variables for child processes, without the secrets."""
    return {name: text for name, text in os.environ.items() if not name.startswith(SECRETS)}


class Checks:
    """A process that answers questions about models, options and files; it runs only while it is needed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._used = 0.0
        self._about: tuple[float, dict[str, Any]] = (-FRESH, {})

    async def about(self, *, fresh: bool = False) -> dict[str, Any]:
        """Return models, devices and options (see `cli.checks`); if `fresh`, at most a few seconds old."""
        told, about = self._about
        if not about or (fresh and time.monotonic() - told > FRESH):
            about = await self._ask({"about": True})
            self._about = time.monotonic(), about
        return about

    async def facts(self, arguments: list[str]) -> dict[str, Any]:
        """Return what `upscale` reports about a job; raise `ProblemError` if it refuses the job."""
        answer = await self._ask({"upscale": arguments})
        if answer["code"]:
            raise ProblemError(422, answer["message"])
        return answer["facts"]

    async def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        async with self._lock:
            process = await self._started()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
            except (TimeoutError, asyncio.TimeoutError, ConnectionError, ValueError):
                line = b""
            self._used = time.monotonic()
            if not line:
                await self._end()
                raise ProblemError(422, "The file was rejected: inspecting it failed or took too long.")
            return json.loads(line)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", CHECKS),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
            limit=16 * 2**20,
        )
        assert process.stdin and process.stdout
        process.stdin.write(b'{"about": true}\n')
        line = await asyncio.wait_for(process.stdout.readline(), STARTING)
        if not line:
            await self._end()
            raise ProblemError(500, "The engine failed to start: run 'stream-diffvsr doctor' to see why.")
        self._about = time.monotonic(), json.loads(line)
        return process

    async def end_when_idle(self) -> None:
        """While the server runs, stop the process each time it has been idle for a while."""
        while True:
            await asyncio.sleep(IDLE / 4)
            if self._process and not self._lock.locked() and time.monotonic() - self._used > IDLE:
                async with self._lock:
                    await self._end()

    async def close(self) -> None:
        """End the process."""
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


def check_request(asked: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Check a request, and return its model's entry; raise `ProblemError` if the request is invalid."""
    model = next((each for each in about["models"] if each["name"] == asked["model"]), None)
    if model is None:
        raise ProblemError(
            422, f"model: there is no model {asked['model']!r} here; GET /api/v1/models lists the models."
        )
    if not model["here"]:
        if not model["can_download"]:
            raise ProblemError(
                409, f"{model['name']} is not on this machine, and HF_HUB_OFFLINE forbids downloads."
            )
        if not asked["download"]:
            raise ProblemError(
                409,
                f'{model["name"]} is not on this machine: send "download": true to download it '
                f"({model['download_gigabytes']} GB) first.",
            )
    if not SIZES.fullmatch(asked["size"]):
        raise ProblemError(
            422, f"size: {asked['size']!r} is neither a factor such as 2x nor a short edge such as 1080p."
        )
    family = about["families"][model["family"]]
    if asked["preset"] not in family["presets"]:
        known = ", ".join(family["presets"])
        raise ProblemError(
            422, f"preset: {family['title']} has the presets {known}, not {asked['preset']!r}."
        )
    _check_options(asked["options"], model, about)
    return model


def _check_options(options: Mapping[str, Any], model: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    family = about["families"][model["family"]]
    parts = (about["job"], about["loader"], family)
    properties = {
        name: rule for part in reversed(parts) for name, rule in part["schema"]["properties"].items()
    }
    for name in options:
        if name in properties:
            continue
        owners = [each["title"] for each in about["families"].values() if name in each["options"]]
        if owners:
            raise ProblemError(
                422,
                f"options.{name}: this is an option of {' and '.join(owners)}, but {model['name']} belongs "
                f"to the family {family['title']}.",
            )
        raise ProblemError(
            422, f"options.{name}: there is no such option; GET /api/v1/capabilities lists all options."
        )
    schema = {"type": "object", "properties": properties}
    for error in Draft202012Validator(schema).iter_errors(dict(options)):
        place = ".".join(["options", *(str(part) for part in error.absolute_path)])
        raise ProblemError(422, f"{place}: {error.message[:300]}.")


def check_limits(facts: Mapping[str, Any], settings: Settings) -> None:
    """Raise `ProblemError` if a source or its result exceeds the limits."""
    (width, height), (out_width, out_height) = facts["size"], facts["output_size"]
    most = settings.max_pixels
    if width * height > most:
        raise ProblemError(413, f"Frames of {width}x{height} exceed the limit of {most:,} pixels.")
    if out_width * out_height > ANY_SIZE * most:
        raise ProblemError(
            413,
            f"Result frames of {out_width}x{out_height} exceed the limit of {ANY_SIZE * most:,} pixels.",
        )
    if (facts["seconds"] or 0) > settings.max_seconds:
        raise ProblemError(
            413,
            f"The length of {facts['seconds']:.0f} s exceeds the limit of {settings.max_seconds:g} s.",
        )


def arguments(
    asked: Mapping[str, Any], about: Mapping[str, Any], source: Path, output: Path, device: str, ray: str = ""
) -> list[str]:
    """Return the arguments of `upscale` for a request that has been checked."""
    model = next((each for each in about["models"] if each["name"] == asked["model"]), None)
    if model is None:
        raise ProblemError(422, f"The model {asked['model']} is no longer on this machine.")
    made = [f"--output={output}", f"--model={model.get('file', model['name'])}"]
    made += [f"--ray={ray}"] if ray else [f"--device={device}"]
    made.append(f"--preset={asked['preset']}")
    size = SIZES.fullmatch(asked["size"])
    assert size is not None
    if size["edge"]:
        made.append(f"--short-edge={size['edge']}")
    elif float(size["factor"]) != 4:
        made.append(f"--scale={size['factor']}")
    parts = (about["job"], about["loader"], about["families"][model["family"]])
    known = {name: told for part in reversed(parts) for name, told in part["options"].items()}
    made += [flag for name, value in asked["options"].items() for flag in _flags(known[name], value)]
    return [*made, "--", str(source)]


def _flags(told: Mapping[str, Any], value: Any) -> Iterator[str]:
    if value is None:
        return
    if not told["switch"]:
        yield f"--{told['flag']}={value}"
    elif value != told["default"]:
        yield f"--{'' if value else 'no-'}{told['flag']}"
