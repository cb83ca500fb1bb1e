"""Train nano's own flow network on pairs of frames with known motion:

    python -m training.flow --steps 6000
    python -m training.flow_evaluate training/runs/flow.safetensors
    python -m training.flow_export training/runs/flow.safetensors

Uses one thread and needs no GPU. When started again, it resumes where it stopped.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr.flow.bundled import FlowNetwork
from stream_diffvsr.training.trainer import Trainer
from training.data import Pictures
from training.flow_data import Pool, pair_batch
from training.train import fit

RUNS = Path(__file__).parent / "runs"
LOG = Path(__file__).parent / "flow_log.csv"

CONFIG = {"features": 24, "radius": 3, "widths": [48, 40, 32], "refinement": [24, 24], "hidden": 16}

HIDDEN_WEIGHT = 0.4
"""Weight of pixels visible only in the current frame; pixels visible in both have weight 1."""

LEVEL_WEIGHTS = (1.0, 0.5, 0.2, 0.12, 0.08, 0.06, 0.05)
"""Weights of the levels, from LQ size downwards."""

LARGE_SHARE = 0.25
"""Share of batches with frames of full size; in the others, both sides are three quarters as long."""

POWER, OFFSET = 0.7, 0.01
"""The loss is (end-point error in LQ pixels + OFFSET) ** POWER, so that small motions matter too."""


def level_loss(flow: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return the loss of one level's flow, in the level's pixels, against the truth reduced to its size."""
    scale = truth.shape[-1] / flow.shape[-1]
    size = flow.shape[-2:]
    truth, weight = F.adaptive_avg_pool2d(truth, size), F.adaptive_avg_pool2d(weight, size)
    error = ((flow * scale - truth).square().sum(1, True) + 1e-8).sqrt()
    mean = ((error + OFFSET) ** POWER * weight).sum() / weight.sum()
    return LEVEL_WEIGHTS[round(math.log2(scale))] * mean


def flow_loss(network: FlowNetwork, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the loss summed over all levels."""
    current, previous, truth, seen = batch
    weight = HIDDEN_WEIGHT + (1 - HIDDEN_WEIGHT) * seen
    flows = network.flows(current, previous)
    losses = [level_loss(flow, truth, weight) for flow in flows]
    return torch.stack(losses).sum()


class Run(Trainer):
    """Training of the flow network, with a moving average of its weights."""

    warm = 100

    def __init__(self, args: argparse.Namespace, pool: Pool) -> None:
        torch.manual_seed(args.seed)
        self.args, self.pool, self.network = args, pool, FlowNetwork(**CONFIG)
        if args.start:
            self.network.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
        super().__init__(
            dict(self.network.named_parameters()),
            steps=args.steps,
            rate=args.rate,
            cpu=True,
            weight_decay=1e-4,
            average=0.996,
        )

    def fall(self) -> float:
        return 0.01 + 0.99 * super().fall()

    def settings(self) -> dict[str, Any]:
        return {
            name: getattr(self.args, name) for name in ("steps", "rate", "batch", "size", "scenes", "seed")
        }

    def gradients(self, step: int) -> float:
        args, rng = self.args, np.random.default_rng((self.args.seed, step))
        torch.manual_seed(hash((args.seed, step)))
        short = args.size if rng.random() < LARGE_SHARE else args.size * 3 // 4
        size = (short, short * 4 // 3)
        batch = pair_batch(self.pool, rng, args.batch, *(size if rng.random() < 0.7 else size[::-1]))
        loss = flow_loss(self.network, batch)
        loss.backward()
        return float(loss.detach())


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
    pool = Pool(Pictures(args.seed, args.scenes, RUNS / f"scenes-{args.seed}-{args.scenes}.npy"))
    fit(Run(args, pool), RUNS / f"{args.name}.safetensors", LOG)


if __name__ == "__main__":
    main()
