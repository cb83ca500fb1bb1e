"""Regenerate every table and picture of nano's results after its weights have changed:

    python -m training.regenerate CLIP_OR_FOLDER ...

Each part of a text between two marks is the output of a command; the opening mark contains the part's name.
Pictures of ComfyUI's page are made if COMFYUI_PATH is set, as for the tests.
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
"""Number of frames measured in each clip."""

Part = tuple[Path, str, Sequence[str]]
"""A text file, the name of the part in it, and the command that prints it."""


def videos(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the given files, and the files directly in the given folders."""
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
    """Return a script's output, run by this Python; if it fails, stop before its part is written."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def insert(text: str, path: Path, name: str) -> None:
    """Replace the text between the marks of a file; text that is not a table becomes a code block."""
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
