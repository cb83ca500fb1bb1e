"""The types that every model family implements; read this file first.

    upscaler = load_pipeline("nano")                          # an Upscaler
    for result in upscaler.stream(frames, options):           # frames: (1, 3, h, w) float32 in [-1, 1]
        show(result.index, result.hq)                         # (1, 3, H, W), model range, not clamped

A family computes frames but never loops over a sequence: `stream` below is the only loop. The layers above
the families (jobs, nodes, command line, service) use only the types in this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .errors import CheckpointError, IncompatibleInputError, ModelNotFoundError

if TYPE_CHECKING:
    from typing_extensions import Self

OnStep = Callable[[str, int, int], None]
"""Called between a frame's parts with (stage, parts done, total parts).

It may raise an exception to cancel the work.
"""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Do nothing; used if the caller passes no `on_step`."""


@dataclass(frozen=True)
class Info:
    """Properties of a loaded model."""

    family: str
    model: str
    """Fingerprint of the weights."""
    number_format: str
    runtime: str = "torch"
    scales: tuple[float, ...] | None = (4.0,)
    """Supported scales; None means any scale from 1 to 4."""
    minimum: int = 8
    """Minimum side of an LQ frame in pixels."""
    first: int = 1
    """Number of frames needed before the first results are returned."""
    chunk: int = 1
    """Number of further frames needed for each later set of results."""
    look_ahead: int = 0
    """Number of later frames that a frame's result may depend on."""

    @property
    def frame_by_frame(self) -> bool:
        """Whether each frame's result is returned immediately.

        If so, a sequence can resume after any frame.
        """
        return self.first == 1 and self.chunk == 1


@dataclass(frozen=True)
class Provenance:
    """Record of how the frames up to a state were made; an exact continuation needs the same values."""

    model: str = ""
    """Fingerprint of the weights, or '' if unknown."""
    number_format: str = ""
    runtime: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The family's options, as JSON values."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Further facts recorded by the family, such as the memory plan."""
    parts: str = field(default="", compare=False)
    """Readable description of how a frame is split into parts, or '' if it is not split; never saved."""

    def differences(self, now: Provenance) -> str:
        """Describe which values differ between this record and `now`; return '' if none do."""
        names = {"number_format": "dtype", "runtime": "runtime"}
        pairs = [(name, getattr(self, key), getattr(now, key)) for key, name in names.items()]
        pairs += [(key, value, now.options[key]) for key, value in self.options.items() if key in now.options]
        pairs += [(key, value, now.details[key]) for key, value in self.details.items() if key in now.details]
        return ", ".join(f"{name}: {old} -> {new}" for name, old, new in pairs if old not in ("", new))

    def to_texts(self) -> dict[str, str]:
        """Return the values as strings by name, for a file's metadata."""
        facts = {"model": self.model, "dtype": self.number_format, "runtime": self.runtime}
        options = {"options": json.dumps(dict(self.options), sort_keys=True)} if self.options else {}
        return {**self.details, **options, **{name: text for name, text in facts.items() if text}}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Provenance:
        """Parse the output of `to_texts`; raise `ValueError` if it is invalid."""
        options = json.loads(texts.get("options", "{}"))
        if not isinstance(options, dict):
            raise ValueError("its options are not a JSON object")
        model, number_format, runtime = (texts.get(name, "") for name in ("model", "dtype", "runtime"))
        known = ("options", "model", "dtype", "runtime")
        details = {name: text for name, text in texts.items() if name not in known}
        return cls(model, number_format, runtime, options, details)


@dataclass(frozen=True, eq=False)
class State:
    """The memory of a sequence: a frozen value that can be kept, branched, saved and loaded.

    A state without tensors starts a new sequence at frame `index` of the video.
    """

    family: str = ""
    """The family that created the state; '' for an empty state, which every family accepts."""
    index: int = 0
    """Number of frames finished so far, counted from the start of the video."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise IncompatibleInputError(
                f"frame_index must be a whole number, 0 or greater, not {self.index!r}"
            )

    @property
    def has_previous(self) -> bool:
        """Whether the state contains data about previous frames."""
        return bool(self.tensors)

    @property
    def nbytes(self) -> int:
        """Total size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> Self:
        """Return the same state with its tensors on `device`."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, which appears under its name only once it is complete."""
        from .files import save_tensors

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        facts = {"format": FORMATS[0], "family": self.family, "frame_index": str(self.index)}
        save_tensors(Path(path), tensors, {**self.provenance.to_texts(), **facts})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a file written by `save`, with its tensors in newly allocated CPU memory.

        Raises `ModelNotFoundError` if the file is missing, and `CheckpointError` if it is not a saved state.
        """
        from .files import read_tensors

        path = Path(path)
        if not path.is_file():
            raise ModelNotFoundError("saved state", path, "Check the path.")
        tensors, texts = read_tensors(path)
        kind, index = texts.pop("format", ""), texts.pop("frame_index", "")
        if kind not in FORMATS or not (index.isdecimal() and len(index) < 19):
            raise CheckpointError(f"{path} is not a saved state: create one with state.save().")
        family = texts.pop("family", "diffvsr" if tensors else "")
        # Cloned, since a newer state could not replace the file while this one kept it memory-mapped.
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        if kind == FORMATS[1]:
            own.pop("flow", None)
        try:
            return cls(family=family, index=int(index), tensors=own, provenance=Provenance.from_texts(texts))
        except ValueError as error:
            raise CheckpointError(f"{path} contains an invalid state: {error}.") from error


FORMATS = ("stream-diffvsr-state-2", "stream-diffvsr-state-1")
"""Format names in saved states; files in the second, older format may contain a `flow`, which is ignored."""


@dataclass(frozen=True, eq=False)
class Upscaled:
    """One finished frame."""

    index: int
    """Number of the frame in the whole video, counted from 0."""
    hq: Tensor
    """(1, 3, H, W) float32 in model range, not clamped; `to_pixels` converts it to a picture."""


class Session(Protocol):
    """One sequence that a model is processing; only one thread at a time may use it.

    Several sessions of one upscaler may be interleaved, since they share only the weights.
    """

    def push(self, lq: Tensor) -> list[Upscaled]:
        """Process the next frame, (1, 3, h, w) float32 in model range, and return any finished results."""
        ...

    def finish(self) -> list[Upscaled]:
        """Return the remaining results, so that N frames yield N results. Do not push frames afterwards."""
        ...

    def state(self) -> State | None:
        """Return the state after the results so far, or None if it does not allow an exact continuation."""
        ...


class Placement(Protocol):
    """A policy that decides where each network runs; it is consulted before every stage."""

    @property
    def fixed(self) -> bool:
        """Whether the weights always stay on the same device."""
        ...

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        """Move a stage's network to a device with enough memory for its activations; return the device."""
        ...


@dataclass(frozen=True)
class FixedPlacement:
    """A placement that keeps everything on one device."""

    device: torch.device
    fixed: bool = True

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        return self.device


class Upscaler(Protocol):
    """A loaded model, which keeps no data about any video and serves one thread at a time."""

    Options: type
    """The family's frozen dataclass of options; see `options.option`."""
    placement: Placement
    device: torch.device
    dtype: torch.dtype

    @property
    def info(self) -> Info: ...

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks by stage, for a host program that controls their placement."""
        ...

    def session(
        self,
        options: Any = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> Session:
        """Start a sequence, or continue the one that `state` belongs to."""
        ...

    def stream(
        self,
        frames: Iterable[Tensor],
        options: Any = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Upscaled]:
        """Upscale frames one after another; shorthand for `stream(self.session(...), frames)`."""
        ...

    def provenance(self, size: tuple[int, int], options: Any = None) -> Provenance:
        """Describe how frames of a given LQ size (height, width) would be produced with the current settings.

        This includes the memory plan. A job calls this only once; it then starts every sequence from a state
        that has this provenance but no tensors.
        """
        ...

    def bytes_needed(self, size: tuple[int, int], options: Any = None) -> int:
        """Return how many bytes an LQ frame of `size` (height, width) needs in addition to the weights."""
        ...


def stream(session: Session, frames: Iterable[Tensor], finish: bool = True) -> Iterator[Upscaled]:
    """Push frames to a session and yield its results; this is the only loop over frames.

    Evaluation is lazy: frame n + 1 is requested only after the results of frame n have been consumed. Pass
    `finish=False` if more frames will follow; results that need those frames are then held back.
    """
    for lq in frames:
        yield from session.push(lq)
    if finish:
        yield from session.finish()
