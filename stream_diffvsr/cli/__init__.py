"""The command line: `stream-diffvsr`."""

import os
import sys

# How long torch's idle threads spin before they sleep; read once, when torch is imported. By default, they
# keep the cores busy: with other programs running, a frame took eight times as long, or barely progressed.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "2000"


def start() -> int:
    """Run `stream-diffvsr`; Ctrl-C prints a short message, even during imports."""
    try:
        from .main import main
    except KeyboardInterrupt:
        print("stream-diffvsr: interrupted", file=sys.stderr)
        return 130
    return main()
