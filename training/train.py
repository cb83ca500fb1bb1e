"""Trains nano, one command per stage:

    python -m training.train autoencoder --steps 4500
    python -m training.train temporal --steps 1200 --start training/runs/autoencoder.pt
    python -m training.export training/runs/temporal.pt

Each of the `--workers` processes computes with one thread on its share of the batch: on a machine that does
other work besides, threads that wait for one another at every layer would mostly wait.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, multiprocessing, nn

from training.data import Pictures, still_batch
from training.export import WEIGHTS
from training.losses import fidelity
from training.networks import Nano
from training.sequences import sequence_batch
from training.temporal import control_loss, temporal_loss

RUNS = Path(__file__).parent / "runs"
LOG = Path(__file__).parent / "log.csv"
HASTE = 2.0


def ahead(make: Callable[[], Any], depth: int = 3) -> Iterator[Any]:
    """Batches made by a thread while the networks compute."""
    queue: Queue[Any] = Queue(depth)

    def work() -> None:
        while True:
            queue.put(make())

    Thread(target=work, daemon=True).start()
    while True:
        yield queue.get()


def plain_latents(lq: Tensor) -> Tensor:
    """What the U-Net starts with: the LQ picture and an empty fourth channel."""
    return torch.cat([lq, torch.zeros_like(lq[:, :1])], 1)


def autoencoder_loss(model: Nano, batch: tuple[Tensor, Tensor]) -> Tensor:
    lq, truth = batch
    return fidelity(model.vae.decode(plain_latents(lq)), truth)


def average_into(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)


def share_gradients(model: nn.Module) -> None:
    """Average over the workers, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    pieces = (flat / distributed.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """What brings the previous frame in learns faster: it starts late, behind weights that are small."""
    late, rest = [], []
    for name, weight in model.named_parameters():
        hasty = name.startswith("controlnet.") or "temporal_processor" in name or name.endswith("alpha")
        (late if hasty else rest).append(weight)
    return [{"params": rest, "haste": 1.0}, {"params": late, "haste": HASTE}]


class Run:
    """One stage: optimiser, moving average, learning rate, checkpoints, log."""

    def __init__(self, name: str, model: Nano, steps: int, fade: int, rate: float) -> None:
        self.name, self.model, self.steps, self.fade, self.rate = name, model, steps, fade, rate
        self.average = copy.deepcopy(model)
        self.optimiser = torch.optim.AdamW(groups(model), lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)
        self.step, self.losses, self.started = 0, [], time.time()
        self.path = RUNS / f"{name}.pt"

    def resume(self) -> None:
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step = saved["step"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(),
                 "optimiser": self.optimiser.state_dict(), "step": self.step}  # fmt: skip
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def rate_now(self) -> float:
        warm = min(1.0, (self.step + 1) / 30)
        return self.rate * warm * min(1.0, (self.steps - self.step) / max(self.fade, 1))

    def update(self, loss: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_now() * group["haste"]
        self.optimiser.zero_grad()
        loss.backward()
        share_gradients(self.model)
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 0.5)
        self.optimiser.step()
        self.step += 1
        average_into(self.average, self.model, min(0.998, (1 + self.step) / (10 + self.step)))
        self.losses.append(loss.item())

    def report(self) -> None:
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        seconds = f"{time.time() - self.started:.0f}"
        row = [self.name, self.step, f"{mean:.5f}", f"{self.rate_now():.2e}", seconds]
        print(*row, flush=True)
        with LOG.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def fit(run: Run, batches: Iterator[Any], loss: Callable[[Nano, Any], Tensor]) -> None:
    while run.step < run.steps:
        run.update(loss(run.model, next(batches)))
        first = distributed.get_rank() == 0
        if first and run.step % 25 == 0:
            run.report()
        if first and (run.step % 50 == 0 or run.step == run.steps):
            run.save()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("autoencoder", "control", "temporal"))
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--fade", type=int, help="so many steps at the end with falling rate; default: all")
    parser.add_argument("--fresh-control", action="store_true", help="begin with a new ControlNet")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=5, help="length of the sequences of the temporal stage")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--name", help="of the run, if not that of the stage")
    parser.add_argument("--steadiness", type=float, default=0.6, help="weight of the loss against flicker")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="what the stage before saved, or a checkpoint folder")
    return parser.parse_args()


def exported(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder, named as in `Nano`."""
    weights = {f"{part}.{name}": value.float() for part in ("unet", "controlnet", "vae")
               for name, value in load_file(folder / part / WEIGHTS).items()}  # fmt: skip
    prompt = load_file(folder / "prompt_embeddings.safetensors")
    return {**weights, "prompt": next(iter(prompt.values()))}


def start_from(model: Nano, checkpoint: Path, fresh_control: bool) -> None:
    """Take over what an earlier run has trained; the autoencoder's stage left the rest as it began."""
    if checkpoint.is_dir():
        weights = exported(checkpoint)
    else:
        weights = torch.load(checkpoint, weights_only=True)["average"]
    if checkpoint.stem == "autoencoder":
        weights = {k: v for k, v in weights.items() if k.startswith("vae.")}
    if fresh_control:
        weights = {k: v for k, v in weights.items() if not k.startswith("controlnet.")}
    model.load_state_dict({**model.state_dict(), **weights})


def pictures(args: argparse.Namespace) -> Pictures:
    return Pictures(args.seed, args.scenes, RUNS / f"scenes-{args.seed}-{args.scenes}.npy")


def work(rank: int, args: argparse.Namespace) -> None:
    """One worker: the same weights everywhere, other data in each."""
    pool = pictures(args)
    meeting = f"file://{args.meeting}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model = Nano().to(memory_format=torch.channels_last)
    if args.start:
        start_from(model, args.start, args.fresh_control)
    fade = args.steps if args.fade is None else args.fade
    run = Run(args.name or args.stage, model, args.steps, fade, args.rate)
    run.resume()
    torch.manual_seed(args.seed + 1000 * rank + run.step)
    rng = np.random.default_rng((args.seed, run.step, rank))
    count = args.batch // args.workers
    if args.stage == "autoencoder":
        fit(run, ahead(lambda: still_batch(pool, rng, count, args.size)), autoencoder_loss)
        return
    # The same choices in all workers, so that none waits for one that does more steps.
    choices = np.random.default_rng((args.seed, run.step))
    frames = 2 if args.stage == "control" else args.frames
    batches = iter(lambda: sequence_batch(pool, rng, count, frames, args.size), None)
    if args.stage == "control":
        fit(run, batches, lambda model, batch: control_loss(model, batch, choices))
    else:
        fit(run, batches, lambda model, batch: temporal_loss(model, batch, choices, args.steadiness))


def main() -> None:
    args = arguments()
    RUNS.mkdir(exist_ok=True)
    args.meeting = RUNS / f"{args.name or args.stage}.meeting"
    args.meeting.unlink(missing_ok=True)
    pictures(args)  # drawn once, read from the file by the workers
    multiprocessing.spawn(work, (args,), args.workers)


if __name__ == "__main__":
    main()
