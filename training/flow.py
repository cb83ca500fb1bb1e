"""Trains nano's own flow network on pairs of frames with known motion:

    python -m training.flow --steps 6000
    python -m training.flow_evaluate training/runs/flow.pt
    python -m training.flow_export training/runs/flow.pt

One thread, no GPU needed. Started again, it continues where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from stream_diffvsr.flow.bundled import FlowNetwork
from training.data import Pictures
from training.flow_data import Pool, pair_batch

RUNS = Path(__file__).parent / "runs"
LOG = Path(__file__).parent / "flow_log.csv"

CONFIG = {"features": 24, "radius": 3, "widths": [48, 40, 32], "refinement": [24, 24], "hidden": 16}

HIDDEN_WEIGHT = 0.4
"""Of what only the current frame shows; what both show counts 1."""

LEVEL_WEIGHTS = (1.0, 0.5, 0.2, 0.12, 0.08, 0.06, 0.05)
"""From the LQ size downwards."""

LARGE_SHARE = 0.25
"""Of batches at the full size; the others are three quarters as wide."""

POWER, OFFSET = 0.7, 0.01
"""The loss is (end-point error in LQ pixels + OFFSET) ** POWER: small motions count beside large ones."""


def level_loss(flow: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """One level against the truth at its size; `flow` in the level's pixels."""
    scale = truth.shape[-1] / flow.shape[-1]
    size = flow.shape[-2:]
    truth, weight = F.adaptive_avg_pool2d(truth, size), F.adaptive_avg_pool2d(weight, size)
    error = ((flow * scale - truth).square().sum(1, True) + 1e-8).sqrt()
    mean = ((error + OFFSET) ** POWER * weight).sum() / weight.sum()
    return LEVEL_WEIGHTS[round(math.log2(scale))] * mean


def flow_loss(network: FlowNetwork, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
    """-> the loss over all levels, and the finest flow's end-point error in LQ pixels."""
    current, previous, truth, seen = batch
    weight = HIDDEN_WEIGHT + (1 - HIDDEN_WEIGHT) * seen
    flows = network.flows(current, previous)
    losses = [level_loss(flow, truth, weight) for flow in flows]
    error = (flows[-1].detach() - truth).square().sum(1).sqrt().mean()
    return torch.stack(losses).sum(), float(error)


class Run:
    """Network, moving average, optimiser and learning rate, kept in a file."""

    def __init__(self, path: Path, steps: int, rate: float, start: Path | None) -> None:
        self.path, self.steps, self.rate, self.step = path, steps, rate, 0
        self.network = FlowNetwork(**CONFIG)
        if start:
            self.network.load_state_dict({k: v.float() for k, v in load_file(start).items()})
        self.average = copy.deepcopy(self.network)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=rate, weight_decay=1e-4)
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.network.load_state_dict(saved["network"])
            self.average.load_state_dict(saved["average"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step = saved["step"]

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save({"network": self.network.state_dict(), "average": self.average.state_dict(),
                    "optimiser": self.optimiser.state_dict(), "step": self.step}, partial)  # fmt: skip
        partial.replace(self.path)

    def rate_now(self) -> float:
        warm = min(1.0, (self.step + 1) / 100)
        return (
            self.rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, self.step / self.steps))))
        )

    def update(self, loss: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_now()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(0.996, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.network.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)


def fit(run: Run, pool: Pool, args: argparse.Namespace) -> None:
    rng = np.random.default_rng((args.seed, run.step))
    started, figures = time.time(), []
    while run.step < run.steps:
        short = args.size if rng.random() < LARGE_SHARE else args.size * 3 // 4
        size = (short, short * 4 // 3)
        batch = pair_batch(pool, rng, args.batch, *(size if rng.random() < 0.7 else size[::-1]))
        loss, error = flow_loss(run.network, batch)
        run.update(loss)
        figures.append((loss.item(), error))
        if run.step % 50 == 0:
            means = [f"{value:.4f}" for value in np.mean(figures, 0)]
            row = [run.path.stem, run.step, *means, f"{run.rate_now():.2e}", f"{time.time() - started:.0f}"]
            print(*row, flush=True)
            with LOG.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            figures.clear()
        if run.step % 100 == 0 or run.step == run.steps:
            run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="shorter side of the largest LQ frames")
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="flow", help="of the run")
    parser.add_argument("--start", type=Path, help="weights that flow_export wrote, to begin with")
    args = parser.parse_args()
    RUNS.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    pool = Pool(Pictures(args.seed, args.scenes, RUNS / f"scenes-{args.seed}-{args.scenes}.npy"))
    fit(Run(RUNS / f"{args.name}.pt", args.steps, args.rate, args.start), pool, args)


if __name__ == "__main__":
    main()
