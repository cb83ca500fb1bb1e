"""The server, configured only by environment variables; it never imports torch."""

from __future__ import annotations

import logging
import os
import sys

from ..errors import StreamDiffVSRError
from .server import run
from .settings import Settings, from_environment


def main() -> int:
    """Serve until told to stop, and return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # This logger warns about every malformed form, for which the caller gets an error anyway.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        run(Settings(**from_environment(os.environ)))
    except StreamDiffVSRError as error:
        logging.error("stream-diffvsr: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
