"""Compare workers of one thread each with one process that has all threads, for docs/cluster.md.

    uv run --extra ray python benchmarks/workers.py [--workers 2] [--rounds 3] [--size 160x90]

Both upscale a clip of 8 scenes with nano, alternately. The rate is measured from the first progress message
to the last, and the start-up time until the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

SCENES, LENGTH = 8, 8


def clip(path: Path, width: int, height: int) -> None:
    """Write a clip with scenes of a moving pattern, alternately dark and bright."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, width=width, height=height, pix_fmt="yuv420p")
        y, x = np.mgrid[:height, :width]
        for index in range(SCENES * LENGTH):
            grey = (127 + 80 * np.sin((x + 3 * index) / 7) * np.cos(y / 9)).astype(np.uint8)
            picture = np.repeat((grey if index // LENGTH % 2 else grey // 4)[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


def timed(source: Path, folder: Path, *options: str) -> tuple[float, float]:
    """Run a job; return the seconds until its first progress message, and frames per second from then on."""
    output = folder / "out.mkv"
    output.unlink(missing_ok=True)
    start, seen = time.perf_counter(), []
    call = [sys.executable, "-m", "stream_diffvsr.cli.main", "upscale", str(source), "-o", str(output)]
    call += ["--model", "nano", "--progress", "json", *options]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if done := json.loads(line).get("done"):
                seen.append((time.perf_counter() - start, done))
    if job.returncode != 0:
        raise SystemExit(job.returncode)
    (first, before), (last, after) = seen[0], seen[-1]
    return first, (after - before) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description="Workers against threads.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="160x90")
    arguments = parser.parse_args()
    count = str(arguments.workers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip(folder / "in.mp4", *map(int, arguments.size.split("x")))
        for _ in range(arguments.rounds):
            start, rate = timed(folder / "in.mp4", folder, "--threads", count)
            later, spread = timed(folder / "in.mp4", folder, "--devices", f"cpu:{count}", "--threads", "1")
            print(
                f"1 x {count}: {rate:.2f} frames/s, {start:.1f} s to start; {count} x 1: {spread:.2f}, "
                f"{later:.1f}; {spread / rate:.2f} times as fast, started {later - start:.1f} s later"
            )


if __name__ == "__main__":
    main()
