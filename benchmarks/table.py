"""README.md's table of speed, from what `stream-diffvsr bench --json FILE` wrote.

python benchmarks/table.py FILE...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = (
    "model",
    "input",
    "number format",
    "compile_mode",
    "ms per frame",
    "first frame, s",
    "peak, MB",
    "U-Net, share of a matrix product's rate",
    "outside the networks",
    "plain time / ours",
)


def rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One for each size of a report."""
    for result in report["results"]:
        share = result["rates"]["denoise"] / report["matrix_rate"]
        yield (
            report["model"],
            f"{result['width']}x{result['height']}",
            report["dtype"],
            report["compile_mode"],
            f"{result['milliseconds']:.0f}",
            f"{result['first_frame'] / 1000:.1f}",
            f"{result['peak_mb']:.0f}",
            f"{share:.0%}",
            f"{result['stages']['rest'] / sum(result['stages'].values()):.1%}",
            f"{result['plain_ratio']:.2f}" if result["plain_ratio"] else "",
        )


def main() -> None:
    reports = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    for line in (HEAD, ("---",) * len(HEAD), *(row for report in reports for row in rows(report))):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
