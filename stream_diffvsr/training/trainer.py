"""The training loop shared by fine-tuning, nano, and nano's flow network.

A step's training data and random draws must depend only on its number, the seed and the process, so that a
run that is killed and resumed ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..errors import IncompatibleInputError
from ..files import read_tensors, save_tensors

MOMENTS = "step", "exp_avg", "exp_avg_sq"
"""Tensors that the optimiser keeps for each parameter."""


class Trainer(ABC):
    """Parameters, their optimiser, and the number of steps done; subclasses compute the gradients.

    Under `accelerate launch`, each process computes gradients for its own data; the gradients are averaged.
    """

    warm = 10
    """Number of steps at the start during which the learning rate rises."""
    clip = 1.0
    """The norm to which a step's gradients are clipped."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        steps: int,
        rate: float,
        cpu: bool,
        precision: str = "no",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        haste: Callable[[str], float] = lambda name: 1.0,
        average: float | None = None,
    ) -> None:
        """`haste` returns, for a parameter's name, the factor that multiplies its learning rate.

        `average` is the decay of a moving average, if one is kept; `precision` is accelerate's
        `mixed_precision`.
        """
        from accelerate import Accelerator

        self.accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
        self.parameters, self.steps, self.rate, self.step = dict(parameters), steps, rate, 0
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.parameters.items():
            groups.setdefault(haste(name), []).append(weight)
        self.optimiser = torch.optim.AdamW(
            [{"params": weights, "haste": factor} for factor, weights in groups.items()],
            lr=rate,
            betas=betas,
            weight_decay=weight_decay,
        )
        self.decay = average
        copied = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self.average = {} if average is None else copied

    @abstractmethod
    def gradients(self, step: int) -> float:
        """Accumulate the gradients of a step in this process, and return its loss."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the original one, as JSON values."""

    def facts(self) -> dict[str, Any]:
        """Return any other values to save with a run, as JSON values."""
        return {"step": self.step, "steps": self.steps}

    def fall(self) -> float:
        """Return the learning rate's current factor, which falls from 1 to 0 (along a cosine by default)."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.steps)))

    def rate_now(self) -> float:
        """Return the learning rate at this step."""
        return self.rate * min(1.0, (self.step + 1) / self.warm) * self.fall()

    def update(self) -> float:
        """Train for one step, and return its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_now() * group["haste"]
        self.optimiser.zero_grad()
        loss = self.gradients(self.step)
        if self.accelerator.num_processes > 1:
            for weight in self.parameters.values():
                if weight.grad is not None:
                    mean: Any = self.accelerator.reduce(weight.grad, "mean")
                    weight.grad.copy_(mean)
        clip_grad_norm_([w for w in self.parameters.values() if w.grad is not None], self.clip)
        self.optimiser.step()
        self.step += 1
        if self.decay is not None:
            share = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, weight in self.parameters.items():
                    self.average[name].lerp_(weight, share)
        return loss

    def agree_on(self, steps: int) -> None:
        """Set `steps` to the first process's value, so that all processes stop after the same step."""
        from accelerate.utils import broadcast_object_list

        self.steps = broadcast_object_list([steps])[0]

    def keep(self, path: Path) -> None:
        """Atomically save everything that the following steps depend on."""
        tensors = {f"weights.{name}": weight for name, weight in self.parameters.items()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        for name, weight in self.parameters.items():
            moments = self.optimiser.state.get(weight, {})
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
        plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_tensors(path, plain, {"run": json.dumps({**self.facts(), "settings": self.settings()})})

    def resume(self, path: Path) -> dict[str, Any]:
        """Restore the state that `keep` saved, and return the other values saved with it.

        Raises `IncompatibleInputError` if the state belongs to a run with different settings.
        """
        tensors, texts = read_tensors(path)
        facts: dict[str, Any] = json.loads(texts["run"])
        now = json.loads(json.dumps(self.settings()))
        changed = [
            f"{name} was {value!r} and is now {now.get(name)!r}"
            for name, value in facts["settings"].items()
            if now.get(name) != value
        ]
        if changed:
            raise IncompatibleInputError(f"this run began with different settings: {', '.join(changed)}")
        self.step, self.steps = facts["step"], facts["steps"]
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(tensors[f"weights.{name}"])
                keys = [key for key in MOMENTS if f"{key}.{name}" in tensors]
                moments = {key: tensors[f"{key}.{name}"].clone() for key in keys}
                # torch keeps the step counter on the CPU, whatever the device.
                moments = {key: x if key == "step" else x.to(weight.device) for key, x in moments.items()}
                if moments:
                    self.optimiser.state[weight] = moments
            for name, weight in self.average.items():
                weight.copy_(tensors[f"average.{name}"])
        return facts


def of_state(path: Path, kind: str) -> dict[str, Tensor]:
    """Return the tensors of one kind ('weights' or 'average') that `Trainer.keep` saved, keyed by name."""
    tensors, _ = read_tensors(path)
    return {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{kind}.")}
