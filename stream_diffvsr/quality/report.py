"""Reports of quality measures: a table of all frames, a summary and a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import VideoError
from .measures import NAMES, Measures


def means(frames: Sequence[Measures]) -> dict[str, float]:
    """Return the mean of each measure over the frames that have a value, or NaN if none has."""
    columns = {name: [getattr(each, name) for each in frames] for name in NAMES}
    return {
        name: _mean([value for value in column if not math.isnan(value)]) for name, column in columns.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def measured(frames: Sequence[Measures]) -> list[str]:
    """Return the names of the measures for which at least one frame has a value."""
    return [name for name, value in means(frames).items() if not math.isnan(value)]


def summary(frames: Sequence[Measures], how: Mapping[str, str]) -> str:
    """Return a Markdown table of the measures: the mean of each and how it is computed (see `protocol`)."""
    values = means(frames)
    rows = [("measure", f"mean of {len(frames)} frames", "computed from"), ("---",) * 3]
    rows += [(name, f"{values[name]:.5g}", how[name]) for name in measured(frames)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def write_csv(path: Path, frames: Sequence[Measures]) -> None:
    """Write one row per frame, with an empty cell for each missing value."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["frame", *NAMES])
        writer.writeheader()
        for index, each in enumerate(frames):
            figures = {name: "" if math.isnan(value) else value for name, value in asdict(each).items()}
            writer.writerow({"frame": index, **figures})


def write_plot(path: Path, frames: Sequence[Measures]) -> None:
    """Plot each measure frame by frame, and save the plot as a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install 'stream-diffvsr[quality]'") from error
    if path.suffix.lower() != ".png":
        raise VideoError(f"the plot is written as a PNG file: choose a name ending in .png, not {path.name}.")
    names = measured(frames)
    figure = Figure(figsize=(10, 1.6 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), sharex=True), names, strict=True):
        axes.plot([getattr(each, name) for each in frames], linewidth=1)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
