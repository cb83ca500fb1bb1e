"""What one frame hands to the next."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, IncompatibleInputError, ModelNotFoundError
from ...tensors import SCALE, check_finite, check_shape

FORMAT = "stream-diffvsr-state-1"
INDEX_KEY = "frame_index"
FORMAT_KEY = "format"
TENSORS = ("previous_hq", "previous_lq", "flow")


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamDiffVSRState:
    """The memory of a sequence: a frozen value that can be kept, branched, saved and loaded.

    A state without previous frames starts a sequence at `frame_index`.
    """

    previous_hq: Tensor | None = None
    """Last result, (1, 3, 4h, 4w) float32, model range, unclamped."""
    previous_lq: Tensor | None = None
    """Last input, (1, 3, h, w) float32, model range."""
    flow: Tensor | None = None
    """The motion that the next frame takes again, (1, 2, 4h, 4w) float32 pixels; None: it has its own."""
    frame_index: int = 0
    """Frames done so far, counted in the whole video: the next frame's noise depends on it."""
    metadata: dict[str, str] = field(default_factory=dict)
    """`model` (fingerprint of the weights), and the settings and plan in force."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", dict(self.metadata))
        if (
            isinstance(self.frame_index, bool)
            or not isinstance(self.frame_index, int)
            or self.frame_index < 0
        ):
            raise IncompatibleInputError(
                "frame_index as a whole number of at least 0", repr(self.frame_index)
            )
        if (self.previous_hq is None) != (self.previous_lq is None):
            raise IncompatibleInputError("both previous_hq and previous_lq, or neither", "only one of them")
        if self.previous_hq is not None and self.previous_lq is not None:
            _check_pair(self.previous_hq, self.previous_lq)
        if self.flow is not None:
            if self.previous_hq is None:
                raise IncompatibleInputError("previous_hq together with flow", "flow alone")
            check_shape(self.flow, (1, 2, *self.previous_hq.shape[-2:]), "flow")

    @property
    def has_previous(self) -> bool:
        """Whether there is a frame to continue from."""
        return self.previous_hq is not None

    def to(self, device: torch.device | str) -> StreamDiffVSRState:
        """The same state with its tensors on `device`."""
        if self.previous_hq is None or self.previous_lq is None:
            return self
        return replace(
            self,
            previous_hq=self.previous_hq.to(device),
            previous_lq=self.previous_lq.to(device),
            flow=None if self.flow is None else self.flow.to(device),
        )

    def check_fits(self, lq: Tensor, model: str) -> None:
        """Refuse to continue with another model or another size; raises `IncompatibleInputError`."""
        mine = self.metadata.get("model", model)
        if mine != model:
            raise IncompatibleInputError(f"a state of model {model}", f"one of model {mine}")
        if self.previous_lq is not None and self.previous_lq.shape != lq.shape:
            height, width = self.previous_lq.shape[-2:]
            got = f"one of {lq.shape[-1]}x{lq.shape[-2]}; start a new state for another size"
            raise IncompatibleInputError(f"a frame of {width}x{height}, as the state has,", got)

    def differences(self, settings: dict[str, str]) -> str:
        """In words, which of `settings` the frames so far were not made with; '' where all agree."""
        if not self.has_previous:
            return ""
        before = {key: self.metadata[key] for key in settings if key in self.metadata}
        now = {key: settings[key] for key in before}
        if "options" in before:
            old, new = json.loads(before.pop("options")), json.loads(now.pop("options"))
            before |= {key: str(old.get(key)) for key in new}
            now |= {key: str(value) for key, value in new.items()}
        return ", ".join(f"{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears under its name only when it is whole."""
        from ...files import save_tensors

        named = {name: getattr(self, name) for name in TENSORS}
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None
        }
        save_tensors(
            Path(path), tensors, {**self.metadata, FORMAT_KEY: FORMAT, INDEX_KEY: str(self.frame_index)}
        )

    @classmethod
    def load(cls, path: str | Path) -> StreamDiffVSRState:
        """Read what `save` wrote, onto the CPU.

        Raises `ModelNotFoundError` for a missing file and `CheckpointError` for anything else that is
        no such file.
        """
        from ...files import read_tensors

        path = Path(path)
        if not path.is_file():
            raise ModelNotFoundError("saved state", path, "Check the path.")
        tensors, metadata = read_tensors(path)
        if metadata.pop(FORMAT_KEY, None) != FORMAT or not metadata.get(INDEX_KEY, "").isdecimal():
            raise CheckpointError(f"{path} is no saved Stream-DiffVSR state: save one with state.save().")
        index = int(metadata.pop(INDEX_KEY))
        try:
            return cls(**{name: tensors.get(name) for name in TENSORS}, frame_index=index, metadata=metadata)
        except IncompatibleInputError as error:
            raise CheckpointError(f"{path} holds a state that cannot be: {error}.") from error


def _check_pair(hq: Tensor, lq: Tensor) -> None:
    if lq.ndim != 4 or lq.shape[:2] != (1, 3) or lq.dtype != torch.float32:
        raise IncompatibleInputError(
            "previous_lq (1, 3, h, w) of float32", f"{tuple(lq.shape)} of {lq.dtype}"
        )
    height, width = lq.shape[-2:]
    check_shape(hq, (1, 3, height * SCALE, width * SCALE), "previous_hq")
    check_finite(lq, "previous_lq")
