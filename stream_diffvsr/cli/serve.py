"""Start the web page and the REST API."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys

from ..errors import IncompatibleInputError
from ..options import add_flags, given_options

NEEDED = ("fastapi", "uvicorn", "python_multipart", "jsonschema")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..service.settings import Settings

    parser.epilog = "Each option can also be set with an environment variable, such as STREAM_DIFFVSR_PORT."
    add_flags(parser, Settings, titles=())


def run(args: argparse.Namespace) -> int:
    from ..service.settings import Settings, from_environment, to_environment

    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise IncompatibleInputError(
            f"the packages {', '.join(missing)} are missing: run pip install 'stream-diffvsr[service]'"
        )
    settings = Settings(**{**from_environment(os.environ), **given_options(args, Settings)})
    # Run it as a separate program, without the hundreds of megabytes that torch needs in this one.
    command = [sys.executable, "-m", "stream_diffvsr.service"]
    environment = {**os.environ, **to_environment(settings)}
    if sys.platform != "win32":
        os.execve(sys.executable, command, environment)
    return subprocess.call(command, env=environment)
