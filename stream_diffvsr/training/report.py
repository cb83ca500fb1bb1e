"""Reports of a run: losses and quality figures as CSV, a chart, and pictures before and after training."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..families.diffvsr.options import UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..quality.measures import measure
from ..quality.report import means
from ..tensors import to_pixels, upsample
from .clips import Window

LOG, MEASURES, CHART = "log.csv", "measures.csv", "chart.png"


@dataclass(frozen=True)
class Figures:
    """Mean quality on the held-out sequences."""

    psnr: float
    """PSNR of the luminance in dB."""
    ssim: float
    warping_error: float

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.3f} dB, SSIM {self.ssim:.4f}, warping error {1e4 * self.warping_error:.3f}e-4"
        )


def measured(pipe: StreamDiffVSRPipeline, held: Sequence[Window]) -> tuple[Figures, list[Tensor]]:
    """Return a model's figures, and the last frame of each sequence, (1, 3, H, W) in [0, 1]."""
    every, last = [], []
    options = UpscaleOptions(memory_plan="whole")  # training itself needs more memory
    for lqs, truths in held:
        results = [to_pixels(each.hq).cpu() for each in pipe.stream(lqs.split(1), options)]
        every += measure(zip(results, to_pixels(truths).split(1), strict=True))
        last.append(results[-1])
    mean = means(every)
    return Figures(mean["psnr_y"], mean["ssim_y"], mean["warping_error"]), last


class Report:
    """Writes the report files of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, time.monotonic()
        self.before: list[Tensor] = []
        self.seconds_of_measuring = 0.0

    def log(self, step: int, loss: float, rate: float) -> None:
        """Append a row for a step to the log."""
        row = {"step": step, "loss": f"{loss:.6f}", "rate": f"{rate:.3e}"}
        self._append(LOG, {**row, "seconds": f"{time.monotonic() - self.started:.1f}"})

    def add(self, step: int, figures: Figures, frames: list[Tensor], held: Sequence[Window]) -> None:
        """Add the figures and pictures of a step; those of step 0 belong to the base model."""
        self._append(MEASURES, {"step": step, **asdict(figures)})
        self.before = frames if step == 0 else self.before
        if step:
            self._pictures(step, frames, held)
            self._chart()

    def back_to(self, step: int) -> None:
        """Delete the rows after the step from which a run is resumed."""
        for name in (LOG, MEASURES):
            rows = [row for row in self._rows(name) if int(row["step"]) <= step]
            (self.folder / name).unlink(missing_ok=True)
            for row in rows:
                self._append(name, row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.folder / name
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _rows(self, name: str) -> list[dict[str, str]]:
        if not (self.folder / name).exists():
            return []
        with (self.folder / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _pictures(self, step: int, frames: list[Tensor], held: Sequence[Window]) -> None:
        """Write a picture with columns for bicubic, the base model, the current model and the truth."""
        before = self.before or [torch.zeros_like(frame) for frame in frames]
        rows = [
            torch.cat([to_pixels(upsample(lqs[-1:])), base, now, to_pixels(truths[-1:])], dim=3)
            for (lqs, truths), base, now in zip(held, before, frames, strict=True)
        ]
        write_picture(self.folder / f"step_{step:06}.png", stack_rows(rows))

    def _chart(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        rows, losses = self._rows(MEASURES), self._rows(LOG)
        figure = Figure(figsize=(7, 8), layout="constrained")
        for axes, name in zip(
            figure.subplots(4, sharex=True), ("loss", *asdict(Figures(0, 0, 0))), strict=True
        ):
            table = losses if name == "loss" else rows
            axes.plot([int(row["step"]) for row in table], [float(row[name]) for row in table], linewidth=1)
            axes.set_ylabel(name.replace("_", " "))
            axes.grid(alpha=0.3)
        axes.set_xlabel("step (0 is the base)")  # pyright: ignore[reportPossiblyUnboundVariable]
        figure.savefig(self.folder / CHART, dpi=100)


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Stack pictures, (1, 3, ., .), vertically, padded with black on the right."""
    width = max(row.shape[-1] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[-1], 0, 0)) for row in rows], dim=2)


def write_picture(path: Path, picture: Tensor) -> None:
    """Write a picture, (1, 3, H, W) in [0, 1], as a PNG."""
    from PIL import Image

    array = (picture[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path)
