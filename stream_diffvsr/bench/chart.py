"""A chart of the measurements that `bench` makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import VideoError


def write_chart(path: Path, report: Mapping[str, Any]) -> None:
    """Write a PNG with a bar for each size: milliseconds per frame by stage and share of the best rate."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "a chart needs matplotlib: run pip install 'stream-diffvsr[quality]'"
        ) from error
    if path.suffix.lower() != ".png":
        raise VideoError(f"the chart must be a PNG file: choose a name that ends in .png, not {path.name}.")
    results, best = report["results"], max(report["limits"].values())
    names = [f"{result['width']}x{result['height']}" for result in results]
    figure = Figure(figsize=(9, 1.8 + 0.6 * len(results)), layout="constrained")
    axes = figure.subplots()
    ends = [0.0] * len(results)
    for stage in results[0]["stages"]:
        times = [max(result["stages"][stage], 0) for result in results]
        axes.barh(names, times, left=ends, label=stage)
        ends = [end + time for end, time in zip(ends, times, strict=True)]
    for index, (end, result) in enumerate(zip(ends, results, strict=True)):
        share = result["rates"]["frame"] / best
        axes.annotate(f" {share:.0%} of the best rate", (end, index), va="center", fontsize=9)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per frame, by stage")
    axes.set_ylabel("LQ size")
    axes.set_title(f"{report['model']}, {report['dtype']}, {report['device']}", fontsize=10)
    axes.legend(ncols=len(results[0]["stages"]), fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=120)
