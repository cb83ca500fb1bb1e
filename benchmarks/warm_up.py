"""Make the table of docs/cluster.md that shows the effect of --split-scenes for several --warm-up lengths.

    uv run python benchmarks/warm_up.py CLIP [CLIP ...]

Each clip, reduced to a width of 160 pixels, is upscaled as a whole, and again from K frames before frame 30.
From frame 30 on, the second run is compared with the first by PSNR; the mean step that a viewer sees where
the two parts meet is shown beside the step that the first run has there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from stream_diffvsr import StreamDiffVSRState, from_pixels, load_pipeline, to_pixels
from stream_diffvsr.media.read import open_source
from stream_diffvsr.media.sizes import resize
from stream_diffvsr.media.span import Span

CUT, SHOWN, WIDTH = 30, 5, 160
WARM_UPS = (0, 2, 8, 24)


def frames_of(path: Path) -> list[Tensor]:
    """Return a clip's first frames, reduced to LQ size, in model range."""
    found = []
    for frame in open_source(path).frames(Span(end=CUT + SHOWN - 1)):
        height = round(frame.rgb.shape[-2] * WIDTH / frame.rgb.shape[-1] / 2) * 2
        found.append(from_pixels(resize(frame.rgb, (height, WIDTH))))
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR of two pictures in [0, 1], in dB."""
    return float(-10 * torch.log10((a - b).square().mean()))


def main(paths: list[str]) -> None:
    pipe = load_pipeline("nano", device="cpu")
    print("| clip | warm-up | PSNR to the whole run at the cut, +1, +4 | step at the cut, whole run's |")
    print("|---|---|---|---|")
    for path in map(Path, paths):
        lq = frames_of(path)
        whole = [to_pixels(each.hq) for each in pipe.stream(lq)]
        for warm_up in WARM_UPS:
            first = CUT - warm_up
            begin = StreamDiffVSRState(frame_index=first)
            part = [to_pixels(each.hq) for each in pipe.stream(lq[first:], state=begin)][warm_up:]
            near = [f"{psnr(part[at], whole[CUT + at]):.1f}" for at in (0, 1, 4)]
            steps = [float((there - whole[CUT - 1]).abs().mean()) * 255 for there in (part[0], whole[CUT])]
            print(
                f"| {path.stem} | {warm_up} | {', '.join(near)} dB | {steps[0]:.2f}, {steps[1]:.2f} of 255 |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
