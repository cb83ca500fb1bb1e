"""The command line: `stream-diffvsr`."""

import os
import sys

# How long torch's idle threads spin before they sleep, read once, when torch is imported. By default they
# keep the cores busy: beside other work a frame then took eight times as long, and at times hardly moved.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "2000"


def start() -> int:
    """Run `stream-diffvsr`; Ctrl-C prints one word, even while imports still run."""
    try:
        from .main import main
    except KeyboardInterrupt:
        print("stream-diffvsr: interrupted", file=sys.stderr)
        return 130
    return main()
