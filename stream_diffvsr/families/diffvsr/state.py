"""The state that one frame of Stream-DiffVSR passes to the next."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...errors import IncompatibleInputError
from ...tensors import SCALE, check_finite, check_shape
from ...upscaler import Provenance, State

FAMILY = "diffvsr"


class StreamDiffVSRState(State):
    """The `State` of Stream-DiffVSR, which has both tensors `previous_hq` and `previous_lq`, or neither.

    A state without previous frames starts a sequence at `frame_index`.
    """

    def __init__(
        self,
        *,
        previous_hq: Tensor | None = None,
        previous_lq: Tensor | None = None,
        frame_index: int | None = None,
        metadata: Mapping[str, str] | None = None,
        family: str = "",
        index: int = 0,
        tensors: Mapping[str, Tensor] | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        """Create a state; the first four arguments are aliases for parts of the others and override them.

        Raises `IncompatibleInputError` for a state that no frame can have produced.
        """
        given = {"previous_hq": previous_hq, "previous_lq": previous_lq}
        held = {**(tensors or {}), **{name: x for name, x in given.items() if x is not None}}
        if metadata is not None:
            try:
                provenance = Provenance.from_texts(metadata)
            except ValueError as error:
                raise IncompatibleInputError(f"the state's metadata is invalid: {error}") from error
        super().__init__(
            FAMILY, index if frame_index is None else frame_index, held, provenance or Provenance()
        )
        if family not in ("", FAMILY):
            raise IncompatibleInputError(f"the state belongs to {family}, not to diffvsr")
        if held and held.keys() != given.keys():
            raise IncompatibleInputError(
                f"pass both previous_hq and previous_lq, or neither; got only {', '.join(held)}"
            )
        if held:
            _check_pair(held["previous_hq"], held["previous_lq"])

    @classmethod
    def of(cls, state: State | None) -> StreamDiffVSRState:
        """Convert any state to one of this family; None starts a sequence at frame 0."""
        if state is None:
            return cls()
        return state if isinstance(state, cls) else cls(**vars(state))

    @property
    def previous_hq(self) -> Tensor | None:
        """The last result, (1, 3, 4h, 4w) float32 in model range, not clamped."""
        return self.tensors.get("previous_hq")

    @property
    def previous_lq(self) -> Tensor | None:
        """The last input, (1, 3, h, w) float32 in model range."""
        return self.tensors.get("previous_lq")

    @property
    def frame_index(self) -> int:
        """Number of frames finished so far in the whole video; the next frame's noise depends on it."""
        return self.index

    @property
    def metadata(self) -> dict[str, str]:
        """The fingerprint of the weights (`model`), the settings and the memory plan, as strings."""
        return self.provenance.to_texts()

    def check_fits(self, lq: Tensor, model: str) -> None:
        """Raise `IncompatibleInputError` if the state is for another model or another frame size."""
        mine = self.provenance.model or model
        if mine != model:
            raise IncompatibleInputError(f"the state belongs to model {mine}, not to this one ({model})")
        if self.previous_lq is not None and self.previous_lq.shape != lq.shape:
            height, width = self.previous_lq.shape[-2:]
            raise IncompatibleInputError(
                f"the state is for frames of {width}x{height}, not {lq.shape[-1]}x{lq.shape[-2]}; create a "
                "new state for another size",
            )


def _check_pair(hq: Tensor, lq: Tensor) -> None:
    if lq.ndim != 4 or lq.shape[:2] != (1, 3) or str(lq.dtype) != "torch.float32":
        raise IncompatibleInputError(
            f"previous_lq must be float32 with shape (1, 3, h, w), not {lq.dtype} with shape "
            f"{tuple(lq.shape)}"
        )
    height, width = lq.shape[-2:]
    check_shape(hq, (1, 3, height * SCALE, width * SCALE), "previous_hq")
    check_finite(lq, "previous_lq")
