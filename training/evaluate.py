"""Measure nano on clips that were not used in training.

python -m training.evaluate CHECKPOINT.safetensors CLIP... [--frames 12] [--crf 28] [--sheet OUT.png]
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr.training.trainer import of_state
from training.data import to_model
from training.networks import Nano, scheduler
from training.rollout import dis_flow, lq_up, true_warp, upscale
from training.sequences import h264

LUMA = torch.tensor([65.481, 128.553, 24.966]) / 255


def read(path: Path, frames: int, first: int = 0) -> Tensor:
    """Return frames of the largest stream, (T, 3, H, W) in 0..1, cropped to multiples of 4."""
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda s: s.width * s.height)
        pictures = islice(container.decode(stream), first, first + frames)
        arrays = [picture.to_ndarray(format="rgb24") for picture in pictures]
    if not arrays:
        raise ValueError(f"{path} has no frame {first}; its first one is 0")
    video = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return video[..., : video.shape[-2] // 4 * 4, : video.shape[-1] // 4 * 4]


def reduced(truth: Tensor) -> Tensor:
    size = (truth.shape[-2] // 4, truth.shape[-1] // 4)
    small = F.interpolate(truth, size=size, mode="bicubic", antialias=True)
    return (small.clamp(0, 1) * 255).round() / 255


def compressed(lq: Tensor, crf: int) -> Tensor:
    """Return the frames after compression with H.264."""
    height, width = lq.shape[-2:]
    even = F.pad(lq, (0, width % 2, 0, height % 2), mode="replicate")
    return h264(even, crf, preset="medium")[..., :height, :width]


def eight_bit(hq: Tensor) -> Tensor:
    return ((hq / 2 + 0.5).clamp(0, 1) * 255).round() / 255


def luma(picture: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nhw", picture, LUMA)


def psnr(result: Tensor, truth: Tensor) -> float:
    """Return the luminance PSNR, averaged over the frames; both inputs are in 0..1."""
    error = (luma(result) - luma(truth)).square().mean((1, 2))
    return float((-10 * torch.log10(error)).mean())


def lanczos(lq: Tensor) -> Tensor:
    arrays = (lq * 255).round().byte().permute(0, 2, 3, 1).numpy()
    size = (lq.shape[-1] * 4, lq.shape[-2] * 4)
    big = [np.asarray(Image.fromarray(a).resize(size, Image.Resampling.LANCZOS)) for a in arrays]
    return torch.from_numpy(np.stack(big)).permute(0, 3, 1, 2).float() / 255


def warping_error(result: Tensor, truth: Tensor) -> float:
    """Return the mean absolute difference, x255, of frames to previous ones moved along the truth's flow."""
    flow = dis_flow(to_model(truth[1:]), to_model(truth[:-1]))
    moved, inside = true_warp(result[:-1], flow)
    reference, _ = true_warp(truth[:-1], flow)
    seen = inside & ((reference - truth[1:]).abs().amax(1, keepdim=True) < 0.05)
    return float(((moved - result[1:]).abs() * seen).sum() / (3 * seen.sum()) * 255)


def load(path: Path) -> Nano:
    model = Nano()
    model.load_state_dict(of_state(path, "average"))
    return model.eval().to(memory_format=torch.channels_last)


def four_steps():
    schedule = scheduler()
    schedule.set_timesteps(4)
    return schedule


def sheet(pictures: list[Tensor], path: Path) -> None:
    """Write a picture with details of all pictures side by side, enlarged by 2."""
    rows = []
    height, width = pictures[0].shape[-2:]
    side = min(128, height // 2)
    for top, left in ((height // 4, width // 3), (height // 2, width // 2)):
        cut = [p[:, top : top + side, left : left + side] for p in pictures]
        rows.append(np.hstack([(c.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for c in cut]))
    big = cv2.resize(np.vstack(rows), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(path), big[..., ::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--crf", type=int)
    parser.add_argument("--guided", type=int, default=1)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model = load(args.checkpoint)
    gains = []
    for clip in args.clips:
        truth = read(clip, args.frames)
        lq = reduced(truth)
        lq = lq if args.crf is None else compressed(lq, args.crf)
        ours = eight_bit(upscale(model, four_steps(), to_model(lq), guided=bool(args.guided)))
        bicubic = eight_bit(lq_up(to_model(lq)))
        values = [psnr(p, truth) for p in (ours, bicubic, lanczos(lq))]
        flicker = [warping_error(p, truth) for p in (ours, bicubic, truth)]
        gains.append(values[0] - max(values[1:]))
        print(clip.stem, f"{truth.shape[-1]}x{truth.shape[-2]}",
              "PSNR ours/bicubic/lanczos", *(f"{v:.2f}" for v in values), f"gain {gains[-1]:.2f}",
              "warping error ours/bicubic/truth", *(f"{v:.3f}" for v in flicker), flush=True)  # fmt: skip
        if args.sheet:
            nearest = F.interpolate(lq[-1:], scale_factor=4)[0]
            path = args.sheet.with_name(f"{args.sheet.stem}-{clip.stem}.png")
            sheet([nearest, bicubic[-1], ours[-1], truth[-1]], path)
    print(f"mean gain over the better of the two: {sum(gains) / len(gains):.3f}")


if __name__ == "__main__":
    main()
