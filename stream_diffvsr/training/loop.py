"""The training loop: runs the engine's frame code with gradients, on the model's own previous results.

A step's data depend only on its number, the seed and the device, so a run that is killed and resumed ends
with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..families.diffvsr.method import Frame, upscale
from ..families.diffvsr.networks import TorchCalls
from ..families.diffvsr.options import UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..families.diffvsr.plan import Plan
from ..families.diffvsr.state import StreamDiffVSRState
from ..tensors import SCALE, from_pixels
from ..upscaler import FixedPlacement
from .clips import Footage, Window, crop
from .degrade import Recipe, degrade
from .options import TrainOptions
from .perceptual import Perceptual
from .report import Figures, Report, measured
from .trainer import Trainer
from .tuned import Tuned

log = logging.getLogger(__name__)

MARGIN = 64
"""Width, in true pixels, of the border around a crop that codecs and filters also see as they degrade it."""
HELD_SCENES, HELD_FRAMES, HELD_SIDE = 4, 8, 256
"""The number of held-out scenes to measure, the frames per scene, and the side of the crops in pixels."""
SAVED_SECONDS = 60.0
"""Seconds after which the state of a run is saved again."""


@dataclass(frozen=True)
class Progress:
    """The progress after a step."""

    step: int
    steps: int
    loss: float
    figures: Figures | None = None
    """The measured quality; None if the step was not measured."""


def window(footage: Footage, recipe: Recipe, options: TrainOptions, rng: np.random.Generator) -> Window:
    """Draw a random sequence to train on; long scenes are chosen more often."""
    lengths = np.array([len(scene) for scene in footage.train], float)
    scene = footage.train[rng.choice(len(lengths), p=lengths / lengths.sum())]
    truth = crop(scene, rng, options.size + 2 * MARGIN, options.frames)
    truth = truth.flip(-1) if rng.random() < 0.5 else truth
    return centre_crop(degrade(truth, recipe, rng), truth, options.size)


def held_windows(footage: Footage, recipe: Recipe, seed: int) -> list[Window]:
    """Return sequences from the held-out footage; every call returns the same ones."""
    found = []
    for index, scene in enumerate(footage.held[:HELD_SCENES]):
        rng = np.random.default_rng((seed, 1, index))
        truth = crop(scene, rng, HELD_SIDE, min(HELD_FRAMES, len(scene)))
        found.append(centre_crop(degrade(truth, recipe, rng), truth, HELD_SIDE))
    return found


def centre_crop(lq: Tensor, truth: Tensor, side: int) -> Window:
    """Crop degraded and original frames to their centre, and convert them to model range."""
    top, left = (max(0, (length - side // SCALE) // 2) for length in lq.shape[-2:])
    small = side // SCALE
    lq = lq[..., top : top + small, left : left + small]
    top, left = top * SCALE, left * SCALE
    return from_pixels(lq), from_pixels(truth[..., top : top + small * SCALE, left : left + small * SCALE])


def distance(difference: Tensor, kind: str) -> Tensor:
    """Return the L1 distance, smoothed at zero, or 10 times the L2 distance, which is of similar scale."""
    return 10 * difference.square().mean() if kind == "l2" else (difference.square() + 1e-6).sqrt().mean()


class Run(Trainer):
    """A fine-tuning run, which keeps its best step so far."""

    def __init__(
        self,
        base: StreamDiffVSRPipeline,
        footage: Footage,
        recipe: Recipe,
        options: TrainOptions,
        output: Path,
        folder: Path,
        told: Mapping[str, str],
    ) -> None:
        """Prepare a run that writes a LoRA to `output`, and its state, figures and pictures to `folder`."""
        self.base, self.footage, self.recipe = base, footage, recipe
        self.options, self.told = options, dict(told)
        self.tuned = Tuned(base, options)
        super().__init__(
            self.tuned.parameters,
            steps=options.steps,
            rate=options.learning_rate,
            cpu=base.device.type == "cpu",
            precision="bf16" if options.precision == "bfloat16" else "no",
        )
        seen = None if options.perceptual is None else Perceptual(Path(options.perceptual))
        self.perceptual = None if seen is None else seen.to(base.device)
        self.best_step = 0
        self.begun, self.best = Figures(-math.inf, 0, 0), Figures(-math.inf, 0, 0)
        self.report = Report(folder)
        self.best_file = output if options.what == "lora" else folder / "best.safetensors"
        self.held = held_windows(footage, recipe, options.seed)

    # One step

    def sequences(self, step: int) -> Iterator[Window]:
        """Yield the sequences that this device trains on in one step."""
        for index in range(self.options.batch):
            seed = (self.options.seed, 0, step, self.accelerator.process_index, index)
            yield window(self.footage, self.recipe, self.options, np.random.default_rng(seed))

    def gradients(self, step: int) -> float:
        """Accumulate the gradients of a step, and return its loss."""
        losses = [
            self._sequence(lqs.to(self.base.device), truths.to(self.base.device), step)
            for lqs, truths in self.sequences(step)
        ]
        return sum(losses) / len(losses)

    def _sequence(self, lqs: Tensor, truths: Tensor, step: int) -> float:
        """Accumulate a sequence's gradients, which never flow through the previous frame; return its loss."""
        options, pipe, state, total = UpscaleOptions(seed=step * 1000), self.base, StreamDiffVSRState(), 0.0
        masked = pipe.traits.occlusion == "mask"
        schedule, prompts = pipe.prepared(options, torch.float32)
        whole = FixedPlacement(pipe.device)
        low_rank = self.options.what == "lora"
        for index, (lq, truth) in enumerate(zip(lqs.split(1), truths.split(1), strict=True)):
            calls = TorchCalls(self.tuned.networks, Plan(), torch.float32, whole, _nothing)
            calls.latent_channels = pipe.vae.latent_channels
            frame = Frame(lq, state, options, Plan(), estimates=pipe.flow.estimates, masked=masked)
            with parametrize.cached() if low_rank else nullcontext():
                self.tuned.fill_cache()
                with self.accelerator.autocast():
                    hq = upscale(frame, calls, schedule, prompts)
                loss = distance(hq - truth, self.options.loss)
                if (compare := self.perceptual) is not None:
                    loss = loss + self.options.perceptual_weight * compare(hq, truth)
                if state.previous_hq is not None and self.options.steadiness:
                    change = (hq - state.previous_hq) - (truth - truths[index - 1])
                    loss = loss + self.options.steadiness * distance(change, self.options.loss)
                (loss / (len(lqs) * self.options.batch)).backward()
            total += float(loss.detach()) / len(lqs)
            state = StreamDiffVSRState(previous_hq=hq.detach(), previous_lq=lq, frame_index=index + 1)
        return total

    # The whole run

    def rehearse(self) -> float:
        """Run trial steps that change nothing; return the time per step in seconds, including measuring."""
        if self.step == 0 and self.accelerator.is_main_process:
            self._measure_base()
        seconds = 0.0
        for _ in range(2):  # the first one fills caches
            started = time.perf_counter()
            self.gradients(self.step)
            seconds = time.perf_counter() - started
        self.optimiser.zero_grad()
        return seconds + self.report.seconds_of_measuring / self.options.every

    def _measure_base(self) -> None:
        if not math.isfinite(self.begun.psnr):
            self.begun = self._measure(self.base)
            self.keep(self.state_file)

    def _measure(self, pipe: StreamDiffVSRPipeline) -> Figures:
        started = time.perf_counter()
        figures, frames = measured(pipe, self.held)
        self.report.add(self.step, figures, frames, self.held)
        self.report.seconds_of_measuring = time.perf_counter() - started
        return figures

    def __iter__(self) -> Iterator[Progress]:
        """Train to the last step or the time limit, yielding progress; keep the best step in `best_file`."""
        main, started = self.accelerator.is_main_process, time.monotonic()
        kept, end = started, 60 * (self.options.minutes or math.inf)
        if main and self.step == 0:
            self._measure_base()
        while self.step < self.steps:
            loss, figures = self.update(), None
            if end < math.inf:
                self.agree_on(self.step if time.monotonic() - started > end else self.steps)
            due = self.step % self.options.every == 0 or self.step == self.steps
            if main:
                self.report.log(self.step, loss, self.rate_now())
                figures = self._judge() if due else None
                if due or time.monotonic() - kept > SAVED_SECONDS:
                    self.keep(self.state_file)
                    kept = time.monotonic()
            self.accelerator.wait_for_everyone()
            yield Progress(self.step, self.steps, loss, figures)

    def _judge(self) -> Figures:
        """Measure the current weights as they would be loaded, and keep them if they are the best so far."""
        now = self.report.folder / "now.safetensors"
        self.tuned.save(now, {**self.told, "step": str(self.step)})
        figures = self._measure(self.tuned.pipe(now))
        if figures.psnr > self.best.psnr:
            self.best, self.best_step = figures, self.step
            now.replace(self.best_file)
        now.unlink(missing_ok=True)
        return figures

    # Saving and resuming

    @property
    def state_file(self) -> Path:
        return self.report.folder / "state.safetensors"

    def settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the original one."""
        own = {name: value for name, value in asdict(self.options).items() if name != "every"}
        return {**own, "base": self.base.model, "clips": self.footage.identity, "recipe": repr(self.recipe)}

    def facts(self) -> dict[str, Any]:
        best = {"best_step": self.best_step, "best": asdict(self.best), "begun": asdict(self.begun)}
        return {**super().facts(), **best}

    def resume(self, path: Path) -> dict[str, Any]:
        """Resume as `Trainer.resume` does, and remove later rows from the run's files."""
        facts = super().resume(path)
        self.best_step = facts["best_step"]
        self.best, self.begun = Figures(**facts["best"]), Figures(**facts["begun"])
        self.report.back_to(self.step)
        return facts


def _nothing(stage: str) -> int:
    return 0
