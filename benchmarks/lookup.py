"""Time RAFT's correlation lookups on the motion of a real clip: in the volume, and in two ways without it.

    python benchmarks/lookup.py CLIP --frames 2

The positions follow the motion of the clip's first frames, found by DIS, at an eighth of 1280x720, RAFT's
resolution: once along the whole flow, and once along half of it, as during RAFT's updates. Features are
random, with 256 channels. Times are processor seconds of this process, averaged over all lookups.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.optical_flow.raft import CorrBlock

from stream_diffvsr.flow.correlation import LinearCorrelation
from stream_diffvsr.flow.estimators import DisFlow

WIDTH, HEIGHT, CHANNELS, LEVELS, RADIUS = 1280 // 8, 720 // 8, 256, 4, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--frames", type=int, default=2)
    args = parser.parse_args()
    recorded = list(recorded_places(args.clip, args.frames))
    features = torch.randn(2, 1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    blocks = {
        "volume": CorrBlock(num_levels=LEVELS, radius=RADIUS),
        "shared windows": LinearCorrelation(LEVELS, RADIUS),
        "a window per pixel": Gather(LEVELS, RADIUS),
    }
    expected = None
    print("| lookup | s per lookup | largest difference to the volume |\n|---|---|---|")
    for name, block in blocks.items():
        block.build_pyramid(*features)
        begin = time.process_time()
        found = [block.index_pyramid(centroids_coords=places) for places in recorded]
        seconds = (time.process_time() - begin) / len(recorded)
        expected = expected or found
        difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        print(f"| {name} | {seconds:.3f} | {difference:.1e} |", flush=True)
    return 0


def recorded_places(clip: Path, count: int) -> Any:
    """Yield the positions (1, 2, h, w), x first, in the previous frame of the current frame's pixels."""
    import av

    with av.open(str(clip)) as container:
        pictures = [
            frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), count + 1)
        ]
    frames = [torch.from_numpy(p).permute(2, 0, 1)[None] / 127.5 - 1 for p in pictures]
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    for previous, current in pairwise(frames):
        flow = DisFlow()(current, previous)
        scale = torch.tensor([WIDTH / flow.shape[-1], HEIGHT / flow.shape[-2]])[:, None, None]
        small = F.interpolate(flow, size=(HEIGHT, WIDTH), mode="area") * scale
        yield from (torch.stack([x, y]) + share * small for share in (0.5, 1))


class Gather(LinearCorrelation):
    """The straightforward implementation, with a separate window for every pixel."""

    def _squares(self, corner: Tensor) -> Any:
        numbers = torch.arange(len(corner), device=corner.device)
        yield from self._batches(1, numbers, corner.new_full((len(corner), 2), self.side + 1))


if __name__ == "__main__":
    sys.exit(main())
