"""Fine-tune Stream-DiffVSR on your own footage; the result is a LoRA for --lora, or a checkpoint folder."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import IncompatibleInputError, VRAMError
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..load import load_pipeline, resolve
from ..memory import free_memory, is_out_of_memory
from ..options import add_flags, given_options
from ..tensors import SCALE, to_pixels
from ..training.clips import Footage, read_clips
from ..training.degrade import Recipe, open_recipe
from ..training.loop import Run, window
from ..training.options import TrainOptions
from ..training.report import stack_rows, write_picture

LICENCE = "The base model's licence also covers works derived from it, and you need the rights to the clips."
MEGABYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "clips",
        nargs="+",
        type=Path,
        help="Good-quality videos or folders of pictures, or folders that contain several of these.",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="Name of the result. Default: the first clip's name, followed by _lora.safetensors or, with "
        "--what full, by _full.",
    )
    parser.add_argument(
        "--base", default="nano", help="nano, v1, mix, or a Stream-DiffVSR folder. Default: nano."
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1. Default: auto.")
    parser.add_argument("--resume", action="store_true", help="Resume an interrupted run.")
    parser.add_argument(
        "--show-degradation",
        type=Path,
        metavar="PNG",
        help="Write a picture that shows how your clips are degraded, then exit.",
    )
    add_flags(parser, TrainOptions, titles=())


def run(args: argparse.Namespace) -> int:
    options = TrainOptions(**given_options(args, TrainOptions))
    recipe = open_recipe(options.degradation)
    output = None if args.show_degradation else output_of(args, options)
    footage = read_clips(args.clips, options.size, options.frames)
    for line in footage.told:
        print_note(line)
    if output is None:
        show_degradation(args.show_degradation, footage, recipe, options)
        return 0
    return train(args, options, footage, recipe, output)


def is_first() -> bool:
    """Whether this is the first (or the only) process of a run."""
    return os.environ.get("RANK", "0") == "0"


def print_note(line: str) -> None:
    """Print a line for human readers to standard error, separate from the output that scripts read.

    The line is printed only once, however many processes share the run.
    """
    if is_first():
        print(line, file=sys.stderr, flush=True)


def show_degradation(path: Path, footage: Footage, recipe: Recipe, options: TrainOptions) -> None:
    """Write a picture of four sequences: for each, the original frame next to the enlarged LQ frame."""
    rows = []
    for index in range(4):
        lqs, truths = window(footage, recipe, options, np.random.default_rng((options.seed, 2, index)))
        large = F.interpolate(to_pixels(lqs[-1:]), scale_factor=SCALE, mode="nearest")
        rows.append(torch.cat([to_pixels(truths[-1:]), large], dim=3))
    write_picture(path, stack_rows(rows))
    print(path)


def output_of(args: argparse.Namespace, options: TrainOptions) -> Path:
    """Return the result's path.

    Raises `IncompatibleInputError` if it is taken, or if there is no run to resume.
    """
    own: Path = args.output or args.clips[0].with_name(f"{args.clips[0].stem}_{options.what}")
    named = options.what == "full" or own.suffix == ".safetensors"
    output = own if named else own.with_name(f"{own.name}.safetensors")
    if not is_first():  # the first process checks, and may already have begun
        return output
    begun = run_folder(output).exists()
    if begun and not args.resume:
        raise IncompatibleInputError(
            f"{output} belongs to a run that has already begun: add --resume, or choose a new --output"
        )
    if args.resume and not begun:
        raise IncompatibleInputError(
            f"there is no run to resume for {output}: check --output, or omit --resume"
        )
    if output.exists() and not begun:
        raise IncompatibleInputError(f"{output} exists: choose a new --output")
    return output


def run_folder(output: Path) -> Path:
    """Return the folder next to the result for the run's state, figures and pictures."""
    return output.with_name(f"{output.stem}.run")


def train(
    args: argparse.Namespace, options: TrainOptions, footage: Footage, recipe: Recipe, output: Path
) -> int:
    base = load_pipeline(args.base, device=args.device, dtype=torch.float32)
    if not isinstance(base, StreamDiffVSRPipeline):
        raise IncompatibleInputError(f"--base must be a Stream-DiffVSR model, not {base.info.family}")
    told = {"base_name": str(args.base), "settings": repr(options), "licence": LICENCE}
    run_folder(output).mkdir(parents=True, exist_ok=True)
    run = Run(base, footage, recipe, options, output, run_folder(output), told)
    if args.resume and run.state_file.exists():
        run.resume(run.state_file)
    tell_costs(run)
    for progress in run:
        if progress.figures is not None:
            gain = f"{progress.figures.psnr - run.begun.psnr:+.3f} dB"
            print_note(f"step {progress.step} of {progress.steps}: {progress.figures}, {gain} over the base")
    if not is_first():
        return 0
    if options.what == "full":
        run.tuned.save_folder(output, run.best_file, resolve(args.base) or Path(args.base), told)
    print_note(f"the base: {run.begun}")
    gain = run.best.psnr - run.begun.psnr
    said = "best step" if gain > 0 else "no step was better than the base; best step"
    print_note(f"{said} {run.best_step}: {run.best}, {gain:+.3f} dB")
    print(output)
    return 0


def tell_costs(run: Run) -> None:
    """Print the memory, disk space and time that the run needs.

    These are measured by running trial steps that change nothing. With --minutes, also set the number of
    steps.
    """
    options, device = run.options, run.base.device
    try:
        seconds = run.rehearse()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        remedy = "use a smaller --size, or --checkpointing"
        used = memory_used(device) // MEGABYTE
        raise VRAMError(used, free_memory(device) // MEGABYTE, remedy) from error
    learning = sum(weight.numel() for weight in run.parameters.values())
    files = 4 * learning * 5 + (options.steps // options.every + 1) * MEGABYTE
    free = shutil.disk_usage(run.report.folder).free
    if files > free:
        raise IncompatibleInputError(
            f"the run needs {files // MEGABYTE} MB of disk space next to the output, but "
            f"only {free // MEGABYTE} MB are free"
        )
    if options.minutes is not None and run.step == 0:
        run.agree_on(max(1, min(options.steps, int(60 * options.minutes / seconds))))
    left, trained, held = run.steps - run.step, run.footage.train, run.footage.held
    print_note(
        f"{learning:,} parameters are trained on {sum(map(len, trained))} frames; "
        f"{sum(map(len, held))} are held out\n"
        f"{left} steps of {seconds:.2f} s: about {left * seconds / 60:.1f} minutes; "
        f"{memory_used(device) // MEGABYTE} MB of memory, {files // MEGABYTE} MB of disk"
    )


def memory_used(device: torch.device) -> int:
    """Return the peak GPU memory allocated so far, in bytes; on other devices, what this process uses."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
