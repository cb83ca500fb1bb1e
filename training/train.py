"""Trains nano, one command per stage:

    python -m training.train autoencoder --steps 4500
    python -m training.train temporal --steps 1200 --start training/runs/autoencoder.pt
    python -m training.export training/runs/temporal.pt
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.data import Pictures, still_batch
from training.networks import Nano

RUNS = Path(__file__).parent / "runs"
LOG = Path(__file__).parent / "log.csv"
LUMA = (0.299, 0.587, 0.114)


def charbonnier(difference: Tensor) -> Tensor:
    return (difference.square() + 1e-6).sqrt().mean()


def fidelity(result: Tensor, truth: Tensor) -> Tensor:
    """Charbonnier distance of colours and, once more, of luminance, which the eye weighs most."""
    difference = result - truth
    luma = (difference * difference.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)
    return charbonnier(difference) + charbonnier(luma)


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


def autoencoder_step(model: Nano, batch: tuple[Tensor, Tensor]) -> Tensor:
    lq, truth = batch
    return fidelity(model.vae.decode(plain_latents(lq)), truth)


def average_into(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)


class Run:
    """One stage: optimiser, moving average, learning rate, checkpoints, log."""

    def __init__(self, name: str, model: Nano, steps: int, rate: float) -> None:
        self.name, self.model, self.steps, self.rate = name, model, steps, rate
        self.average = copy.deepcopy(model)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)
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
        warm = min(1.0, (self.step + 1) / 100)
        return self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))

    def update(self, loss: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_now()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 0.5)
        self.optimiser.step()
        self.step += 1
        average_into(self.average, self.model, min(0.998, (1 + self.step) / (10 + self.step)))
        self.losses.append(loss.item())

    def report(self) -> None:
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        row = [self.name, self.step, f"{mean:.5f}", f"{self.rate_now():.2e}", f"{time.time() - self.started:.0f}"]
        print(*row, flush=True)
        with LOG.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def fit(run: Run, batches: Iterator[Any], loss: Callable[[Nano, Any], Tensor]) -> None:
    while run.step < run.steps:
        run.update(loss(run.model, next(batches)))
        if run.step % 100 == 0:
            run.report()
        if run.step % 250 == 0 or run.step == run.steps:
            run.save()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("autoencoder", "temporal"))
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="checkpoint of the stage before")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    RUNS.mkdir(exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    model = Nano().to(memory_format=torch.channels_last)
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True)["average"])
    pool = Pictures(args.seed, args.scenes, RUNS / f"scenes-{args.seed}-{args.scenes}.npy")
    run = Run(args.stage, model, args.steps, args.rate)
    run.resume()
    rng = np.random.default_rng((args.seed, run.step))
    if args.stage == "autoencoder":
        fit(run, ahead(lambda: still_batch(pool, rng, args.batch, args.size)), autoencoder_step)


if __name__ == "__main__":
    main()
