"""The entry point, which runs the subcommand and turns any error into one sentence and an exit code.

The exit code is 0 for success, 1 for a failure while running, 2 for bad input or usage, and 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from .. import __version__
from ..errors import StreamDiffVSRError, VRAMError
from . import bench, demo, doctor, download, export, metrics, scenes, serve, train, upscale
from .output import fail

COMMANDS = {
    "upscale": upscale,
    "scenes": scenes,
    "demo": demo,
    "doctor": doctor,
    "download": download,
    "export": export,
    "bench": bench,
    "metrics": metrics,
    "train": train,
    "serve": serve,
}
"""Each module has a one-line docstring (its help), `add_arguments(parser)` and `run(args) -> int`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return fail(args, "interrupted", 130)
    except VRAMError as error:
        return fail(args, str(error), 1)
    except StreamDiffVSRError as error:
        return fail(args, str(error), 2)
    except BrokenPipeError as error:
        if is_read(sys.stdout):
            return fail(args, f"reading or writing failed: {error}", 1)
        return 1
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        return fail(args, f"reading or writing failed: {reason or error}", 1)
    except Exception as error:
        return fail(args, f"{type(error).__name__}: {error}", 1)


def is_read(stream: TextIO) -> bool:
    """Return whether a stream still has a reader; if not, as after `| head`, discard its unwritten output."""
    try:
        stream.write("\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


class Parser(argparse.ArgumentParser):
    """A parser that reports errors without printing the long usage text first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="stream-diffvsr", description="Streaming video super-resolution.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--debug", action="store_true", help="Print the traceback of an error.")
        module.add_arguments(command)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
