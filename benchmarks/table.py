"""Make the table of docs/speed.md from files of `stream-diffvsr bench --json FILE` or `benchmarks/gpu.py`.

python benchmarks/table.py FILE... [--write]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"

HEAD = (
    "model",
    "device, threads",
    "runtime",
    "number format",
    "compile_mode",
    "input",
    "ms per frame",
    "first result, s",
    "peak, MB",
    "share of the best rate",
    "outside the networks",
    "plain / ours",
)


def rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each size in a report."""
    best = max(report["limits"].values())
    for result in report["results"]:
        yield (
            report["model"],
            f"{report['device']}, {report['threads']}",
            report["runtime"],
            report["dtype"],
            report["compile_mode"],
            f"{result['width']}x{result['height']}",
            f"{result['milliseconds']:.0f}",
            f"{result['first_frame'] / 1000:.1f}",
            f"{result['peak_mb']:.0f}",
            f"{result['rates']['frame'] / best:.0%}",
            # Of another runtime's networks, the time is not known by stage.
            f"{result['stages']['rest'] / sum(result['stages'].values()):.1%}"
            if report["runtime"] == "torch"
            else "",
            f"{result['plain_ratio']:.2f}" if result["plain_ratio"] else "",
        )


def table(reports: list[dict[str, Any]]) -> str:
    lines = (HEAD, ("---",) * len(HEAD), *(row for report in reports for row in rows(report)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(page: str, name: str, made: str) -> None:
    """Insert a table into a page of docs, between the comments that bear its name."""
    path, begin, end = DOCS / page, f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{head}{begin}\n{made}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help="into docs/speed.md")
    args = parser.parse_args()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in args.file]
    made = table([report for each in found for report in each.get("reports", [each])])
    print(made)
    if args.write:
        write("speed.md", "measured", made)


if __name__ == "__main__":
    main()
