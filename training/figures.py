"""Measure nano, and make the tables and pictures of its results:

    python -m training.figures [CLIP_OR_FOLDER ...] [--frames 8] [--write]

Generated scenes are always measured, along their true motion; clips given as arguments are also measured,
along the DIS flow of the truth. With --write, the results go into docs/; otherwise, they are only printed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr import StreamDiffVSRPipeline, UpscaleOptions, from_pixels, load_pipeline
from stream_diffvsr.cli.demo import FRAMES, draw
from stream_diffvsr.quality.measures import (
    estimate,
    picture_measures,
    sample_zero_outside,
    visible,
    warping_error,
)
from training.data import Pictures
from training.evaluate import compressed, eight_bit, lanczos, read, reduced
from training.rollout import lq_up
from training.sequences import moving_clip

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs" / "nano.md", ROOT / "docs"
BEGIN, END = "<!-- nano's figures: python -m training.figures --write -->", "<!-- end of nano's figures -->"

SEED, SCENES, GENERATED, SIDE = 2026, 8, 3, 256
"""Settings of the generated clips; training uses other scenes."""
SLOWEST = 0.25
"""Minimum mean flow in pixels: if nothing moves, bicubic's warping error is too small for a comparison."""
UNGUIDED = UpscaleOptions(controlnet_conditioning_scale=0.0, use_tpm=False)
CRF = 28
SAME = 0.06
"""Maximum difference of the truth along its motion at which two frames are taken to show the same thing."""

Method = Callable[[Tensor], Tensor]
Figures = dict[str, dict[str, float]]
"""Values by method, then by measure."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames (T, 3, H, W) in 0..1, their backward flow, and masks of the pixels where it is valid."""

    name: str
    truth: Tensor
    flows: list[Tensor]
    seen: list[Tensor]


def generated() -> Iterator[Clip]:
    """Yield moving scenes, not used in training, with zoom and occlusion; `stability` tests still ones."""
    rng, pool = np.random.default_rng(SEED), Pictures(SEED, SCENES)
    pool.photographs, pool.weights = pool.scenes, np.full(len(pool.scenes), 1 / len(pool.scenes))
    drawn = (moving_clip(pool, rng, FRAMES, SIDE) for _ in count())
    moving = (each for each in drawn if np.abs(each[1]).mean() > SLOWEST)
    for index, (pictures, flows) in enumerate(islice(moving, GENERATED)):
        truth = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
        flow = list(torch.from_numpy(flows).split(1))
        seen = [same(now, before, each) for now, before, each in
                zip(truth[1:].split(1), truth[:-1].split(1), flow, strict=True)]  # fmt: skip
        yield Clip(f"generated {index + 1}", truth, flow, seen)


def same(now: Tensor, before: Tensor, flow: Tensor) -> Tensor:
    inside = sample_zero_outside(torch.ones_like(now[:, :1]), flow) > 0.999
    return (inside & ((sample_zero_outside(before, flow) - now).abs().amax(1, keepdim=True) < SAME)).float()


def named(paths: list[Path], frames: int) -> Iterator[Clip]:
    """Yield the clips that the user names, as files or in folders."""
    for path in (each for name in paths for each in (sorted(name.iterdir()) if name.is_dir() else [name])):
        if path.is_dir():
            continue
        truth = read(path, frames)
        flows, seen = [], []
        for now, before in zip(truth[1:].split(1), truth[:-1].split(1), strict=True):
            flows.append(estimate(now, before))
            seen.append(visible(flows[-1], estimate(before, now)))
        yield Clip(path.stem, truth, flows, seen)


def methods(pipe: StreamDiffVSRPipeline) -> dict[str, Method]:
    """Return methods by name, each from LQ frames (T, 3, h, w) to 8-bit ones (T, 3, 4h, 4w), both in 0..1."""

    def ours(options: UpscaleOptions) -> Method:
        return lambda lq: eight_bit(
            torch.cat([result.hq for result in pipe.stream(from_pixels(lq).split(1), options)])
        )

    return {
        "bicubic": lambda lq: eight_bit(lq_up(from_pixels(lq))),
        "Lanczos": lanczos,
        "unguided": ours(UNGUIDED),
        "nano": ours(UpscaleOptions()),
    }


def measured(result: Tensor, clip: Clip) -> dict[str, float]:
    """Return means over the frames; the warping error is in squared grey levels of 255."""
    frames = [picture_measures(a, b, 0) for a, b in zip(result.split(1), clip.truth.split(1), strict=True)]
    means = {name: mean(each[name] for each in frames) for name in frames[0]}
    pairs = zip(result[1:].split(1), result[:-1].split(1), clip.flows, clip.seen, strict=True)
    errors = [warping_error(*pair) * 255**2 for pair in pairs]
    return {**means, "warping": mean(errors)}


COLUMNS = {
    "PSNR-Y, dB": ("psnr_y", "{:.2f}", ("bicubic", "Lanczos", "unguided", "nano")),
    "SSIM-Y": ("ssim_y", "{:.3f}", ("bicubic", "Lanczos", "nano")),
    "GMSD": ("gmsd", "{:.3f}", ("bicubic", "Lanczos", "nano")),
    "VIF": ("vif", "{:.3f}", ("bicubic", "Lanczos", "nano")),
    "warping error": ("warping", "{:.3f}", ("bicubic", "unguided", "nano")),
}


def mean_figures(rows: dict[str, Figures]) -> Figures:
    """Return the means over the clips."""
    every = list(rows.values())
    return {
        who: {key: mean(figures[who][key] for figures in every) for key in every[0][who]} for who in every[0]
    }


def table(rows: dict[str, Figures]) -> str:
    """Return a Markdown table; each cell has one figure per method, in the order given in its heading."""
    rows = {**rows, "mean": mean_figures(rows)}
    heads = [f"{name}: {', '.join(who)}" for name, (_, _, who) in COLUMNS.items()]
    lines = ["| clip | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, figures in rows.items():
        cells = [" / ".join(form.format(figures[each][key]) for each in who)
                 for key, form, who in COLUMNS.values()]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(rows: dict[str, Figures]) -> str:
    """Return two sentences that summarise the rows."""
    by_clip = [f["nano"]["psnr_y"] - max(f["bicubic"]["psnr_y"], f["Lanczos"]["psnr_y"])
               for f in rows.values()]  # fmt: skip
    steady = [f["nano"]["warping"] / f["unguided"]["warping"] - 1 for f in rows.values()]
    classic = [f["nano"]["warping"] / f["bicubic"]["warping"] - 1 for f in rows.values()]
    return (
        f"PSNR-Y over the better of bicubic and Lanczos: {mean(by_clip):+.2f} dB on average, "
        f"{min(by_clip):+.2f} dB at least. Warping error "
        f"compared with nano without guidance: {mean(steady):+.0%} "
        f"on average, {max(steady):+.0%} at worst; compared with bicubic: {mean(classic):+.0%} on average, "
        f"{max(classic):+.0%} at worst."
    )


def rows_of(pipe: StreamDiffVSRPipeline, clips: list[Clip], crf: int | None) -> dict[str, Figures]:
    """Return the figures by clip; with `crf` None, without H.264."""
    rows: dict[str, Figures] = {}
    for clip in clips:
        lq = reduced(clip.truth) if crf is None else compressed(reduced(clip.truth), crf)
        rows[clip.name] = {name: measured(method(lq), clip) for name, method in methods(pipe).items()}
        logging.info("crf %s, %s: %s", crf, clip.name, gains({clip.name: rows[clip.name]}))
    return rows


def report(pipe: StreamDiffVSRPipeline, groups: dict[str, list[Clip]]) -> str:
    """Return a summary of each group of clips and a table of all clips, clean and compressed."""
    parts = []
    for title, crf in (("Clean", None), (f"Through H.264 at crf {CRF}", CRF)):
        rows = {group: rows_of(pipe, clips, crf) for group, clips in groups.items() if clips}
        parts.append(f"**{title}.**")
        parts += [f"{group}: {gains(each)}" for group, each in rows.items()]
        parts.append(table({name: figures for each in rows.values() for name, figures in each.items()}))
    return "\n\n".join(parts)


def labelled(picture: Tensor, words: str) -> Image.Image:
    """Return a picture (3, H, W) in 0..1 as an image with a line of text in a corner."""
    image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    box = pen.textbbox((8, 6), words, font=font)
    pen.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill="black")
    pen.text((8, 6), words, font=font, fill="white")
    return image


def beside(images: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (sum(each.width for each in images) + 4 * (len(images) - 1), images[0].height))
    left = 0
    for each in images:
        whole.paste(each, (left, 0))
        left += each.width + 4
    return whole


def still(pipe: StreamDiffVSRPipeline, clips: list[Clip], path: Path) -> None:
    """Write a picture of the last frames of generated clips, enlarged by 2: bicubic, nano, truth."""
    rows = []
    for clip in clips:
        lq = reduced(clip.truth)
        every = {
            name: method(lq)[-1] for name, method in methods(pipe).items() if name in ("bicubic", "nano")
        }
        every["truth"] = clip.truth[-1]
        cuts = {name: picture[:, 64:192, 48:208] for name, picture in every.items()}
        large = {name: F.interpolate(cut[None], scale_factor=2)[0] for name, cut in cuts.items()}
        rows.append(beside([labelled(cut, name) for name, cut in large.items()]))
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for index, row in enumerate(rows):
        whole.paste(row, (0, index * row.height))
    whole.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def loop(pipe: StreamDiffVSRPipeline, path: Path) -> None:
    """Write an animation of the demo's clip, forwards and backwards: bicubic and nano."""
    lq = reduced(torch.cat([draw(index / FRAMES) for index in range(FRAMES)]))
    shown = {name: methods(pipe)[name](lq)[..., 60:360, 20:420] for name in ("bicubic", "nano")}
    frames = [beside([labelled(pictures[index], name) for name, pictures in shown.items()])
              for index in [*range(FRAMES), *range(FRAMES - 2, 0, -1)]]  # fmt: skip
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=90, loop=0, quality=55, method=6)


def insert(text: str, path: Path) -> None:
    """Replace the text between the marks of a file."""
    content = path.read_text(encoding="utf-8")
    head, _, rest = content.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise ValueError(f"{path} has no place for figures: it needs the lines {BEGIN!r} and {END!r}.")
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, nargs="*", help="videos, or folders of them")
    parser.add_argument("--frames", type=int, default=8, help="of each named clip")
    parser.add_argument("--source", default="nano", help="checkpoint folder")
    parser.add_argument("--write", action="store_true", help="into docs/")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = load_pipeline(args.source, device="cpu")
    scenes = list(generated())
    text = report(pipe, {"Generated scenes": scenes, "Named clips": list(named(args.clips, args.frames))})
    print(text)
    if args.write:
        PICTURES.mkdir(exist_ok=True)
        still(pipe, scenes[:2], PICTURES / "nano-still.png")
        loop(pipe, PICTURES / "nano-loop.webp")
        insert(text, PAGE)


if __name__ == "__main__":
    main()
