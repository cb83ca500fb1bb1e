"""Compare nano's own flow network with OpenCV's DIS on motion and pictures not used in training.

python -m training.flow_evaluate [CHECKPOINT.safetensors] [--clips CLIP.mp4 ...] [--pairs 60]

Without a checkpoint, the bundled network is measured. Errors are in pixels of the 4x frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr import load_pipeline
from stream_diffvsr.flow import BundledFlow, DisFlow, FlowEstimator
from stream_diffvsr.flow.bundled import REDUCTION, FlowNetwork
from stream_diffvsr.flow.open import open_bundled
from stream_diffvsr.training.trainer import of_state
from training.data import Pictures, reduce, spoil, to_model
from training.evaluate import eight_bit, psnr, read, reduced, warping_error
from training.flow import CONFIG, RUNS
from training.flow_data import UNSEEN, Pool, pair_batch
from training.rollout import lq_up, true_warp
from training.sequences import h264, moving_clip

SEED, SCENES = 977, 30
"""Seed and number of the scenes for evaluation; training uses other scenes."""

SPEEDS = {"still": 0.0, "below 1": 1.0, "1 to 5": 5.0, "above 5": float("inf")}
"""Classes of speed, with the highest mean motion of each in LQ pixels."""


def load(checkpoint: Path | None) -> FlowNetwork:
    if checkpoint is None:
        return open_bundled()
    network = FlowNetwork(**CONFIG)
    network.load_state_dict(of_state(checkpoint, "average"))
    # Round to half precision, in which the network is exported.
    return network.half().float().requires_grad_(False)


def motions(pool: Pool, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield pairs of independently moving layers: LQ frames, true flow at 4x, mask of pixels seen in both."""
    rng = np.random.default_rng((SEED, 1))
    for _ in range(count):
        current, previous, flow, seen = pair_batch(pool, rng, 1, 90, 160)
        flow = F.interpolate(flow, scale_factor=REDUCTION, mode="bilinear") * REDUCTION
        yield current, previous, flow, F.interpolate(seen, scale_factor=REDUCTION)


def clips(pictures: Pictures, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield the same for sequences like those on which nano's other networks are trained."""
    rng = np.random.default_rng((SEED, 2))
    for _ in range(count):
        frames, flows = moving_clip(pictures, rng, 2, 384)
        truth = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        lq = reduce(truth, rng)
        lq = h264(lq, int(rng.integers(18, 30))) if rng.random() < 0.2 else spoil(lq, rng, 0.15)
        flow = torch.from_numpy(flows)
        moved, inside = true_warp(truth[:1], flow)
        seen = inside & ((moved - truth[1:]).abs().amax(1, keepdim=True) < 0.1)
        if float(seen.float().mean()) > 0.5:  # not a cut
            yield to_model(lq[1:]), to_model(lq[:1]), flow, seen.float()


def mean_over(values: Tensor, weight: Tensor) -> float:
    return float((values * weight).sum() / weight.sum().clamp(min=1))


def end_point_errors(
    estimators: dict[str, FlowEstimator], pairs: Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> None:
    """Print the mean end-point error over all pixels, over those visible in both frames, and by speed."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in estimators}
    speeds = []
    for current, previous, truth, seen in pairs:
        speeds.append(float(truth.norm(dim=1).mean()) / REDUCTION)
        for name, estimator in estimators.items():
            flow = estimator(lq_up(current), lq_up(previous))
            error = (flow - truth).norm(dim=1, keepdim=True)
            rows[name].append((float(error.mean()), mean_over(error, seen)))
    speed, slowest = np.array(speeds), -1.0
    for name, values in rows.items():
        print(f"  {name:8} all {np.mean(values, 0)[0]:.3f}  seen {np.mean(values, 0)[1]:.3f}", end="")
        print(f"  median of pairs {np.median(values, 0)[0]:.3f}", end="")
        slowest = -1.0
        for label, fastest in SPEEDS.items():
            here = (speed > slowest) & (speed <= fastest)
            slowest = fastest
            if here.any():
                print(f"  {label} ({here.sum()}) {np.array(values)[here, 0].mean():.3f}", end="")
        print(flush=True)


def picture_errors(estimators: dict[str, FlowEstimator], clip: Path, frames: int) -> None:
    """Print the mean difference between true frames and previous ones moved along the LQ frames' flow."""
    truth = read(clip, frames)
    lq = to_model(reduced(truth))
    figures: dict[str, list[float]] = {"standing": [], **{name: [] for name in estimators}}
    for index in range(1, len(truth)):
        figures["standing"].append(float((truth[index] - truth[index - 1]).abs().mean()) * 255)
        current, previous = lq_up(lq[index : index + 1]), lq_up(lq[index - 1 : index])
        for name, estimator in estimators.items():
            moved, inside = true_warp(truth[index - 1 : index], estimator(current, previous))
            error = (moved - truth[index : index + 1]).abs().mean(1, keepdim=True)
            figures[name].append(mean_over(error, inside.float()) * 255)
    means = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in figures.items())
    print(f"  {clip.stem}: {means}", flush=True)


def stills(estimators: dict[str, FlowEstimator], pool: Pool, count: int) -> None:
    """Print the mean length of the flow between a frame and itself with different grain, up to 2 in 255."""
    rng = np.random.default_rng((SEED, 3))
    lengths: dict[str, list[float]] = {name: [] for name in estimators}
    for _ in range(count):
        frame = pair_batch(pool, rng, 1, 90, 160)[0]
        grain = rng.normal(0, rng.uniform(0, 2) / 127.5, (2, *frame.shape)).astype(np.float32)
        current, previous = (lq_up(frame + torch.from_numpy(part)) for part in grain)
        for name, estimator in estimators.items():
            lengths[name].append(float(estimator(current, previous).norm(dim=1).mean()))
    print("  " + "  ".join(f"{name} {np.mean(values):.3f}" for name, values in lengths.items()))


def end_use(estimators: dict[str, FlowEstimator], clip: Path, frames: int, side: int = 256) -> None:
    """Print PSNR and warping error (x255) of nano's results with each flow, in the middle of a clip."""
    truth = read(clip, frames)
    top, left = (max(0, (length - side) // 8 * 4) for length in truth.shape[-2:])
    truth = truth[..., top : top + side, left : left + side]
    lq = to_model(reduced(truth))
    parts = []
    for name, estimator in estimators.items():
        pipe = load_pipeline("nano", device="cpu", flow=estimator)
        result = eight_bit(pipe(lq)[0])
        parts.append(f"{name} {psnr(result, truth):.3f} dB, {warping_error(result, truth):.3f}")
    print(f"  {clip.stem}: {'  '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--clips", type=Path, nargs="*", default=[])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--frames", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(exist_ok=True)
    pictures = Pictures(SEED, SCENES, RUNS / f"scenes-{SEED}-{SCENES}.npy")
    pool = Pool(pictures, measuring=True)
    pictures.keep(UNSEEN)
    estimators: dict[str, FlowEstimator] = {"bundled": BundledFlow(load(args.checkpoint)), "dis": DisFlow()}
    with torch.no_grad():
        print("layers that move each on its own, 160x90: end-point error")
        end_point_errors(estimators, motions(pool, args.pairs))
        print("sequences as for the other stages, 96x96, of pictures it never saw: end-point error")
        end_point_errors(estimators, clips(pictures, args.pairs))
        print("a still frame under changing grain: mean length")
        stills(estimators, pool, args.pairs // 3)
        print("the truth's frames moved by the LQ frames' flow: mean difference of 255")
        for clip in args.clips:
            picture_errors(estimators, clip, args.frames)
        print("nano's results with either flow: luminance PSNR, warping error")
        for clip in args.clips:
            end_use(estimators, clip, args.frames)


if __name__ == "__main__":
    main()
