"""Train nano, with one command per stage:

    python -m training.train autoencoder --steps 4500
    python -m training.train temporal --steps 1200 --start training/runs/autoencoder.safetensors
    python -m training.export training/runs/temporal.safetensors

`torchrun --nproc_per_node 2 -m training.train ...` splits each batch between two processes. On a machine with
other load, two processes of one thread each are faster than one process with two threads, which would wait
for each other in every layer. A run that is started again resumes where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from stream_diffvsr.training.trainer import Trainer, of_state
from training.data import Pictures, still_batch
from training.export import WEIGHTS
from training.losses import fidelity
from training.networks import Nano
from training.sequences import sequence_batch
from training.temporal import control_loss, temporal_loss

RUNS = Path(__file__).parent / "runs"
LOG = Path(__file__).parent / "log.csv"
HASTE = 2.0
"""Factor on the learning rate of weights that use the previous frame, whose gradients are small at first."""


def plain_latents(lq: Tensor) -> Tensor:
    """Return the latents that the U-Net outputs at first: the LQ picture and an empty fourth channel."""
    return torch.cat([lq, torch.zeros_like(lq[:, :1])], 1)


def haste(name: str) -> float:
    late = name.startswith("controlnet.") or "temporal_processor" in name or name.endswith("alpha")
    return HASTE if late else 1.0


class Stage(Trainer):
    """One stage of nano's training, with a moving average of the weights."""

    warm, clip = 30, 0.5

    def __init__(self, args: argparse.Namespace, pool: Pictures) -> None:
        torch.manual_seed(args.seed)
        self.args, self.pool = args, pool
        self.model = Nano().to(memory_format=torch.channels_last)
        if args.start:
            start_from(self.model, args.start, args.fresh_control)
        super().__init__(
            dict(self.model.named_parameters()),
            steps=args.steps,
            rate=args.rate,
            cpu=True,
            betas=(0.9, 0.98),
            weight_decay=1e-4,
            haste=haste,
            average=0.998,
        )

    def fall(self) -> float:
        fade = self.steps if self.args.fade is None else self.args.fade
        return min(1.0, (self.steps - self.step) / max(fade, 1))

    def settings(self) -> dict[str, Any]:
        shared = ("stage", "steps", "fade", "rate", "batch", "frames", "size", "scenes", "steadiness", "seed")
        return {name: getattr(self.args, name) for name in shared}

    def gradients(self, step: int) -> float:
        args, rank = self.args, self.accelerator.process_index
        torch.manual_seed(hash((args.seed, step, rank)))
        rng = np.random.default_rng((args.seed, step, rank))
        count = max(1, args.batch // self.accelerator.num_processes)
        if args.stage == "autoencoder":
            lq, truth = still_batch(self.pool, rng, count, args.size)
            loss = fidelity(self.model.vae.decode(plain_latents(lq)), truth)
        else:
            # All processes make the same choices, so that none waits for one with more to compute.
            choices = np.random.default_rng((args.seed, step))
            frames = 2 if args.stage == "control" else args.frames
            batch = sequence_batch(self.pool, rng, count, frames, args.size)
            if args.stage == "control":
                loss = control_loss(self.model, batch, choices)
            else:
                loss = temporal_loss(self.model, batch, choices, args.steadiness)
        loss.backward()
        return float(loss.detach())


def fit(run: Trainer, path: Path, log: Path, every: int = 50) -> None:
    """Train to the last step; every `every` steps, append a row to the log and save the state."""
    if path.exists():
        run.resume(path)
    losses, started = [], time.time()
    while run.step < run.steps:
        losses.append(run.update())
        if run.step % every and run.step != run.steps:
            continue
        if run.accelerator.is_main_process:
            seconds = f"{time.time() - started:.0f}"
            row = [path.stem, run.step, f"{np.mean(losses):.5f}", f"{run.rate_now():.2e}", seconds]
            print(*row, flush=True)
            with log.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            run.keep(path)
        losses.clear()


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=("autoencoder", "control", "temporal"))
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--fade", type=int, help="steps at the end with a falling rate; default: all")
    parser.add_argument("--fresh-control", action="store_true", help="begin with a new ControlNet")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=5, help="length of the temporal stage's sequences")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--name", help="of the run; default: the stage")
    parser.add_argument("--steadiness", type=float, default=0.6, help="weight of the loss against flicker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="what the stage before kept, or a checkpoint folder")
    return parser.parse_args(given)


def exported(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint folder, named as in `Nano`."""
    weights = {f"{part}.{name}": value.float() for part in ("unet", "controlnet", "vae")
               for name, value in load_file(folder / part / WEIGHTS).items()}  # fmt: skip
    prompt = load_file(folder / "prompt_embeddings.safetensors")
    return {**weights, "prompt": next(iter(prompt.values()))}


def start_from(model: Nano, checkpoint: Path, fresh_control: bool) -> None:
    """Load the weights of an earlier run; from the autoencoder stage, use only the autoencoder's."""
    weights = exported(checkpoint) if checkpoint.is_dir() else of_state(checkpoint, "average")
    if checkpoint.stem == "autoencoder":
        weights = {k: v for k, v in weights.items() if k.startswith("vae.")}
    if fresh_control:
        weights = {k: v for k, v in weights.items() if not k.startswith("controlnet.")}
    model.load_state_dict({**model.state_dict(), **weights})


def main() -> None:
    args = arguments()
    RUNS.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pool = Pictures(args.seed, args.scenes, RUNS / f"scenes-{args.seed}-{args.scenes}.npy")
    fit(Stage(args, pool), RUNS / f"{args.name or args.stage}.safetensors", LOG)


if __name__ == "__main__":
    main()
