"""The settings of `stream-diffvsr serve`, from flags or environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import IncompatibleInputError
from ..options import check_options, option, rules

PREFIX = "STREAM_DIFFVSR_"
"""Each environment variable's name is this prefix plus the option's name in capitals."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GIGABYTE = 10**9


def parse_folders(text: str) -> tuple[Path, ...]:
    """Split a list of folders that uses the same separator as PATH."""
    return tuple(Path(part).expanduser() for part in text.split(os.pathsep) if part)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server; invalid values raise `IncompatibleInputError`."""

    host: str = option("127.0.0.1", "Address to listen on; if other machines can reach it, set --token.")
    port: int = option(8000, "Port to listen on; 0 means any free port.", low=0, high=65535)
    root: Path = option(
        Path("stream-diffvsr-service"),
        "Folder for uploads, results and the list of jobs. It is created if it does not exist.",
        parse=Path,
        metavar="FOLDER",
    )
    token: str = option(
        "",
        "Password that every request must include; the page asks for it. An environment variable is "
        "safer than the command line.",
    )
    allow: tuple[Path, ...] = option(
        (),
        f"Folders whose files may be used as sources, separated by '{os.pathsep}'.",
        parse=parse_folders,
        metavar="FOLDERS",
    )
    devices: str = option(
        "auto",
        "Devices that run jobs, one job at a time on each: auto, all, or a list such as cuda:0,cuda:1.",
    )
    ray: str = option(
        "", "Ray cluster over which each job is spread, as with upscale --ray; jobs run one at a time."
    )
    max_gigabytes: float = option(20.0, "Maximum size of a file, in GB (10^9 bytes).", low=0.001)
    max_pixels: int = option(
        8192 * 4320,
        "Maximum number of pixels in an input frame; an output frame may have 8 times as many.",
        low=64,
    )
    max_seconds: float = option(6 * 3600.0, "Maximum length of a video, in seconds.", low=0.1)
    max_waiting: int = option(1000, "Maximum number of jobs in the queue.", low=1)
    keep_days: float = option(
        0.0, "Days after which finished jobs and unused uploads are deleted; 0 means never.", low=0
    )
    tries: int = option(
        3,
        "How many times a job may crash without progress before it is marked as failed.",
        low=1,
        expert=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.host not in LOOPBACK and not self.token:
            raise IncompatibleInputError(
                f"--host {self.host} lets other machines reach the server and needs a token: set --token or "
                "STREAM_DIFFVSR_TOKEN",
            )

    @property
    def max_bytes(self) -> int:
        return int(self.max_gigabytes * GIGABYTE)


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read settings from environment variables; raise `IncompatibleInputError` for invalid values."""
    found = {}
    for name, rule in rules(Settings).items():
        variable = PREFIX + name.upper()
        if (text := environment.get(variable)) is None:
            continue
        try:
            found[name] = (rule.parse or rule.kind)(text)
        except ValueError as error:
            raise IncompatibleInputError(
                f"{variable} must be of type {rule.kind.__name__}, not {text!r}"
            ) from error
    return found


def to_environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables from which `from_environment` reads the same settings."""
    values = {name: getattr(settings, name) for name in rules(Settings)}
    values["allow"] = os.pathsep.join(map(str, settings.allow))
    return {PREFIX + name.upper(): str(value) for name, value in values.items()}
