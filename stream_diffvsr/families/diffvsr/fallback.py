"""Memory that runs out all the same: the frame is repeated with less of it at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from ...errors import VRAMError
from ...memory import free_memory, is_out_of_memory, release_caches
from .plan import Plan

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MEGABYTE = 2**20

REMEDIES = {
    "flow": "set flow_scale to 0.5 or 0.25, or choose flow 'dis'",
    "unet": "use smaller frames, a smaller tile_size or dtype float16",
    "vae": "use smaller frames or dtype float16",
}


class RanOutError(Exception):
    """Memory ran out in a stage; caught by `within_memory` and never seen outside."""

    def __init__(self, stage: str, message: str) -> None:
        self.stage = stage
        self.message = message
        super().__init__(stage, message)


@contextmanager
def memory_of(stage: str) -> Iterator[None]:
    """Name the stage in which memory ran out; every other error, an interrupt too, passes as it is."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RanOutError(stage, str(error).strip().partition("\n")[0]) from None


def within_memory(
    compute: Callable[[Plan], Result],
    plan: Plan,
    *,
    lower: Callable[[Plan, str], Plan | None],
    device: torch.device,
    need: Callable[[Plan], int],
) -> tuple[Result, Plan]:
    """The result of `compute`, and the plan with which memory sufficed.

    `lower` gives the plan to try next when one ran out in a stage; `need` predicts the bytes of a plan, for
    the message of the `VRAMError` that is raised when no plan is left.
    """
    tried = []
    while True:
        try:
            return compute(plan), plan
        except RanOutError as error:
            stage, message = error.stage, error.message
        # Here the error is gone, and with it the tensors that its traceback held.
        release_caches(device)
        tried.append(str(plan))
        following = lower(plan, stage)
        if following is None:
            raise _no_plan_left(stage, tried, need(plan), free_memory(device))
        log.warning(
            "out of memory (%s: %s); this frame again, and all later ones: %s", stage, message, following
        )
        plan = following


def beside_stages(compute: Callable[[], Result], *, device: torch.device, need: Callable[[], int]) -> Result:
    """The result of `compute`; memory that runs out outside of the stages is a `VRAMError`, as no plan helps.

    That is while frames come to the device, and while a result is looked at and kept for the next one.
    """
    try:
        with memory_of("frame"):
            return compute()
    except RanOutError as error:
        message = error.message
    # Here the error is gone, as above.
    release_caches(device)
    raise VRAMError(
        need() // MEGABYTE,
        free_memory(device) // MEGABYTE,
        f"it ran out beside the networks ({message}), where no memory_plan takes less; "
        "use smaller frames, or end what else holds memory",
    )


def _no_plan_left(stage: str, tried: Sequence[str], needed: int, free: int) -> VRAMError:
    return VRAMError(
        needed // MEGABYTE,
        free // MEGABYTE,
        f"it ran out in {stage}, tried: {'; '.join(tried)}; {REMEDIES[stage]}, or memory_plan 'auto'",
    )
