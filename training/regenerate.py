"""Makes every table and picture that shows nano again, once its weights have changed:

    python -m training.regenerate CLIP_OR_FOLDER ...

Each part of a text between two marks is what a command printed; the opening mark has the part's name.
Pictures of ComfyUI's page are made where COMFYUI_PATH is set, as for the tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRAMES = 16
"""Of each clip that is measured."""

Part = tuple[Path, str, Sequence[str]]
"""A text, the name of its part, and what makes it."""


def videos(paths: Sequence[Path]) -> Iterator[str]:
    """The files themselves, and those right in the folders."""
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        yield from (str(file) for file in files if file.is_file())


def parts(clips: Sequence[str]) -> list[Part]:
    notes, training = ROOT / "benchmarks" / "NOTES.md", ROOT / "training" / "README.md"
    return [
        (training, "stability", ["-m", "training.stability"]),
        (training, "flow", ["-m", "training.flow_evaluate", "--clips", *clips]),
        (
            notes,
            "approximations",
            ["benchmarks/approximations.py", clips[0], "--frames", "9", "--shrink", "4"],
        ),
    ]


def printed(command: Sequence[str]) -> str:
    """By a Python of the same environment; its failure ends this run, before anything is written."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def insert(text: str, path: Path, name: str) -> None:
    """Between the marks of a file: tables as they are, other lines as they were printed."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path} has no place for this: it needs the lines {begin!r} and {end!r}.")
    body = text if text.startswith("|") else f"```\n{text}\n```"
    path.write_text(f"{head}{begin}\n{body}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", type=Path, nargs="+", help="videos, or folders of them")
    clips = list(videos(parser.parse_args().clips))
    subprocess.run(
        [sys.executable, "-m", "training.figures", *clips, "--frames", str(FRAMES), "--write"],
        cwd=ROOT,
        check=True,
    )
    for path, name, command in parts(clips):
        insert(printed(command), path, name)
        print(f"{path.relative_to(ROOT)}: {name}", flush=True)
    if "COMFYUI_PATH" not in os.environ:
        print("COMFYUI_PATH is not set: the pictures of ComfyUI's page stay as they are.")
        return
    subprocess.run([sys.executable, "tests/comfy_pictures.py"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
