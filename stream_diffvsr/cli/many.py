"""Runs with many inputs, or with workers on several devices or machines."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import IncompatibleInputError, StreamDiffVSRError, VideoError
from ..jobs.ahead import Split
from ..jobs.cluster import Devices, parse_devices, workers
from ..jobs.job import VideoJob
from ..jobs.journal import WorkFolder
from ..jobs.prepare import known_suffix, prepare
from ..jobs.run import run as run_job
from ..jobs.spread import Spread, SpreadProgress
from ..media import pictures
from ..upscaler import Upscaler
from .output import fail, run_to_end

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --devices, --ray, --split-scenes and --warm-up."""
    group = parser.add_argument_group("several devices or machines")
    group.add_argument(
        "--devices",
        metavar="LIST",
        help="Distribute scenes among several devices: all, a list such as cuda:0,cuda:1 or 0,1, or cpu:2 "
        "for two workers on the CPU. This needs the ray package and has not yet been tested on GPUs.",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="Distribute scenes across a Ray cluster: auto for the cluster that this machine belongs to, "
        "HOST:PORT, or ray://HOST:PORT.",
    )
    group.add_argument(
        "--split-scenes",
        type=positive,
        metavar="N",
        help="With several workers, split scenes longer than N frames into parts of N frames. The result "
        "then differs from an unsplit run: see --warm-up.",
    )
    group.add_argument(
        "--warm-up",
        type=int,
        default=8,
        metavar="K",
        help="Start each part of a split scene K frames early, and discard the extra frames. Default: 8.",
    )


def positive(text: str) -> int:
    """Parse a flag's value, which must be a whole number of at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def workers_from_flags(args: argparse.Namespace) -> Devices | None:
    """Return the workers that the flags request, or None if this process does the work itself."""
    if args.devices is None and args.ray is None:
        if args.split_scenes:
            raise IncompatibleInputError("--split-scenes needs --devices or --ray")
        return None
    if args.preview:
        raise IncompatibleInputError("--preview does not work with --devices or --ray")
    if args.devices is not None and (args.ray is None or args.devices.startswith("cpu")):
        return parse_devices(args.devices)
    if args.devices is not None:
        raise IncompatibleInputError(
            f"with --ray, --devices can only be cpu:N, not {args.devices}; for GPUs, use --device cuda"
        )
    return Devices((), "cpu" if args.device in ("cpu", "auto") else "cuda")


def sources(inputs: Sequence[Path]) -> list[Path]:
    """Return the inputs, with each folder of videos replaced by the videos in it."""
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
    """Return the output for each of several inputs, either in the folder set with -o or next to the input.

    Raises `VideoError` if two outputs would be the same, or if -o is a file.
    """
    folder = args.output
    if args.plan or args.preview or args.state_in:
        raise IncompatibleInputError(
            f"--plan, --preview and --state-in work with only one input, not with {len(found)}"
        )
    if folder is not None:
        if known_suffix(folder.suffix) and not folder.is_dir():
            raise VideoError(f"{folder} is a file, but there are {len(found)} inputs: set a folder with -o.")
        folder.mkdir(exist_ok=True)
    made = [named(path) if folder is None else folder / named(path).name for path in found]
    twice = [path for path, count in Counter(path.absolute() for path in made).items() if count > 1]
    if twice:
        raise VideoError(f"two inputs would both become {twice[0]}: rename one of them.")
    return made


class Results:
    """Reports each job's outcome as soon as it ends, and determines the exit code of the run."""

    def __init__(self, args: argparse.Namespace, single: bool) -> None:
        self.args, self.single, self.failed = args, single, 0

    def attempt(self, output: Path, make: Callable[[], VideoJob]) -> VideoJob | None:
        """Create a job; return None if it is already complete or cannot be run."""
        try:
            job = make()
            if not self.single and not job.overwrite and job.output.exists() and not begun(job):
                log.info("%s already exists; skipping this input", job.output)
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
    """Run the jobs in this process."""
    for job in jobs:
        try:
            with contextlib.closing(run_job(pipe, prepare(job))) as steps:
                run_to_end(steps, results.args.progress)
            results.told(job.output, None)
        except (StreamDiffVSRError, OSError) as error:
            results.told(job.output, error)


def by_workers(
    args: argparse.Namespace, devices: Devices, jobs: Sequence[VideoJob], results: Results
) -> None:
    """Run the jobs on several workers, started here or in a cluster."""
    for job in jobs if results.single else ():
        prepare(job)  # check before starting workers, which takes a minute
    names = ("dtype", "flow", "quantize", "runtime", "provider", "attention")
    source = Path(args.model).absolute() if Path(args.model).exists() else args.model
    loras = [(str(Path(path).absolute()), strength) for path, strength in args.loras]
    model = {"source": str(source), "loras": loras, **{name: getattr(args, name) for name in names}}
    split = Split(args.split_scenes or 0, args.warm_up)
    with workers(model, devices, args.ray, args.threads or 0) as pool:
        driver = Spread(jobs, pool, split)
        with contextlib.closing(driver.steps()) as steps:
            told = 0
            for _ in with_progress(steps, args.progress, len(jobs)):
                for outcome in driver.outcomes[told:]:
                    results.told(outcome.job.output, outcome.error)
                told = len(driver.outcomes)


def with_progress(steps: Iterator[SpreadProgress], progress: str, count: int) -> Iterator[SpreadProgress]:
    """Yield the steps while showing one progress bar for all workers, or printing lines of JSON."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    if progress != "bar":
        for step in steps:
            if progress == "json":
                print(json.dumps(progress_fields(step)), flush=True)
            yield step
        return
    with logging_redirect_tqdm(), tqdm(unit="frame", dynamic_ncols=True) as bar:
        for step in steps:
            bar.total = step.total
            bar.update(step.done - bar.n)
            at = ", ".join(f"{worker} {scene}" for worker, scene in sorted(step.scenes.items())[:4])
            files = f"file {min(step.files + 1, count)}/{count}; " if count > 1 else ""
            bar.set_postfix_str(f"{files}{at}", refresh=True)
            yield step


def progress_fields(step: SpreadProgress) -> dict[str, object]:
    left = step.seconds_left
    return {
        "done": step.done,
        "total": step.total,
        "fps": round(step.fps, 3),
        "seconds_left": None if left is None else round(left, 1),
        "files": step.files,
        "workers": dict(step.scenes),
    }
