"""Simulate how scenes are spread over many workers, without any frames, for docs/cluster.md.

    uv run python benchmarks/spread.py LIST.csv [LIST.csv ...]

Scene lengths are drawn at random from lists written by `stream-diffvsr scenes --cuts-out`, up to two hours at
24 frames per second. As in `jobs.spread`, each idle worker gets the longest known scene, and a scene is known
once the pass that reads ahead has reached its end.
"""

from __future__ import annotations

import csv
import heapq
import random
import sys
from pathlib import Path

FRAMES = 2 * 60 * 60 * 24
WORKERS = (1, 2, 4, 8, 16, 32, 64)
START, SCENE = 60.0, 0.6
"""Seconds until a worker has loaded its model; seconds of overhead per scene: transfer, files, digest."""


def film(lengths: list[int], frames: int = FRAMES) -> list[int]:
    """Return the scene lengths of a film, drawn from the measured ones."""
    draw, found = random.Random(0), [0]
    while sum(found) < frames:
        found.append(draw.choice(lengths))
    return found[1:]


def hours(scenes: list[int], workers: int, frame: float, reading: float) -> float:
    """Return the hours until all scenes are done.

    A worker needs `frame` seconds per frame, and the pass that reads ahead covers `reading` frames a second.
    """
    known: list[tuple[float, int]] = []
    at = 0.0
    for length in scenes:
        at += length / reading
        known.append((at, length))
    idle, number, end = [START] * workers, 0, 0.0
    ready: list[int] = []
    for _ in scenes:
        now = heapq.heappop(idle)
        if not ready and number < len(known):
            now = max(now, known[number][0])
        while number < len(known) and known[number][0] <= now:
            heapq.heappush(ready, -known[number][1])
            number += 1
        done = now - heapq.heappop(ready) * frame + SCENE
        end = max(end, done)
        heapq.heappush(idle, done)
    return end / 3600


def lengths_of(path: Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["Length (frames)"]) for row in csv.DictReader(file)]


def main(lists: list[str]) -> None:
    scenes = film([length for path in lists for length in lengths_of(Path(path))])
    median = sorted(scenes)[len(scenes) // 2]
    print(f"{len(scenes)} scenes, the longest {max(scenes)} frames, the median {median}")
    print("| seconds a frame | read ahead, frames/s |" + "".join(f" {n} |" for n in WORKERS))
    print("|---|---|" + "---|" * len(WORKERS))
    for frame in (0.328, 2.0):
        for reading in (40.0, 150.0, 1e9):
            times = [hours(scenes, workers, frame, reading) for workers in WORKERS]
            cells = "".join(f" {time:.2f} h ({times[0] / time:.1f}) |" for time in times)
            told = "all known" if reading > 1e6 else f"{reading:.0f}"
            print(f"| {frame} | {told} |{cells}")


if __name__ == "__main__":
    main(sys.argv[1:])
