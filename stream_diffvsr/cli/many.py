"""Many inputs in one run: one that fails does not stop the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import IncompatibleInputError, StreamDiffVSRError, VideoError
from ..jobs.job import VideoJob
from ..jobs.journal import WorkFolder
from ..jobs.prepare import known_suffix, prepare
from ..jobs.run import run as run_job
from ..media import pictures
from ..upscaler import Upscaler
from .output import fail, follow

log = logging.getLogger(__name__)


def positive(text: str) -> int:
    """A flag's number of at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, got {text}")
    return int(text)


def sources(inputs: Sequence[Path]) -> list[Path]:
    """The inputs, with each folder of videos as the videos in it."""
    found = []
    for path in inputs:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        videos = [file for file in inside if file.is_file() and is_video(file)]
        holds_pictures = any(pictures.is_picture(file) for file in inside)
        found += videos if videos and not holds_pictures else [path]
    return found


def is_video(path: Path) -> bool:
    return known_suffix(path.suffix) and not pictures.is_picture(path) and not path.name.startswith(".")


def outputs(found: Sequence[Path], args: argparse.Namespace, named: Callable[[Path], Path]) -> list[Path]:
    """Where each of several inputs goes: into the folder of -o, or beside itself. Raises `VideoError`."""
    folder = args.output
    if args.plan or args.preview or args.state_in:
        raise IncompatibleInputError("one input for --plan, --preview and --state-in", f"{len(found)}")
    if folder is not None:
        if known_suffix(folder.suffix) and not folder.is_dir():
            raise VideoError(f"{folder} is one file, the inputs are {len(found)}: give a folder with -o.")
        folder.mkdir(exist_ok=True)
    made = [named(path) if folder is None else folder / named(path).name for path in found]
    twice = [path for path, count in Counter(path.absolute() for path in made).items() if count > 1]
    if twice:
        raise VideoError(f"two inputs would both become {twice[0]}: rename one of them.")
    return made


class Results:
    """How the jobs of a run ended: told at once, and by the exit code."""

    def __init__(self, args: argparse.Namespace, single: bool) -> None:
        self.args, self.single, self.failed = args, single, 0

    def attempt(self, output: Path, make: Callable[[], VideoJob]) -> VideoJob | None:
        """A job; None where it is done already, or cannot be."""
        try:
            job = make()
            if not self.single and not job.overwrite and job.output.exists() and not begun(job):
                log.info("%s is there already: skipped", job.output)
                return None
            return job
        except StreamDiffVSRError as error:
            self.told(output, error)
            return None

    def told(self, output: Path, error: Exception | None) -> None:
        if error is None:
            print(json.dumps({"output": str(output)}) if self.args.progress == "json" else output, flush=True)
            return
        if self.single:
            raise error
        self.failed += 1
        fail(self.args, f"{output.name}: {error}", 1)

    def code(self, count: int) -> int:
        if self.failed:
            print(f"stream-diffvsr: {self.failed} of {count} files failed", file=sys.stderr)
        return int(self.failed > 0)


def begun(job: VideoJob) -> bool:
    return WorkFolder(job.output).journal_file.is_file()


def one_after_another(pipe: Upscaler, jobs: Sequence[VideoJob], results: Results) -> None:
    """In this process."""
    for job in jobs:
        try:
            with contextlib.closing(run_job(pipe, prepare(job))) as steps:
                follow(steps, results.args.progress)
            results.told(job.output, None)
        except (StreamDiffVSRError, OSError) as error:
            results.told(job.output, error)
