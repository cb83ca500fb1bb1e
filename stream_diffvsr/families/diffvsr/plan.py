"""What of a frame is computed in parts. A plan is recorded in the state, and later frames keep to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ...errors import IncompatibleInputError
from ...memory import free_memory
from .options import UpscaleOptions

log = logging.getLogger(__name__)

BAND_ROWS = 128
"""Rows of a band: few against a large picture, many against the rows that are computed twice."""

TILE_SIZE = 512
"""HQ pixels along the side of a U-Net tile where the options name none."""

LEAST_ROWS, LEAST_TILE = 4, 64
"""The smallest parts that options and records may name: smaller ones would make a frame take for ever."""

SMALLEST_TILE = 256
"""Below it the U-Net sees too little of the picture around."""


@dataclass(frozen=True)
class Plan:
    """How one frame is computed. The result is exactly that of the whole frame, but for tiles."""

    flow: str = "whole"
    """One of the estimator's `methods`: 'whole', 'linear' (RAFT without its volume) or 'tiled'."""
    rows: int | None = None
    """Rows per band of decoder, features and control embedding; None: the whole frame at once."""
    tile: int | None = None
    """Side of the U-Net's tiles in HQ pixels; None: the whole frame."""
    overlap: int = 64
    """Overlap of the tiles in HQ pixels, below half of `tile`."""

    @property
    def exact(self) -> bool:
        """Whether the numbers are those of the whole frame, up to rounding."""
        return self.tile is None and self.flow != "tiled"

    def next_plan(self, stage: str, methods: Sequence[str], tile: int | None = None) -> Plan | None:
        """The next plan with less memory, exact ones first; None if there is none.

        `stage` is where memory ran out: only for flow does tiled flow help. `tile` is the size that U-Net
        tiles begin with.
        """
        if self.flow == "whole" and "linear" in methods:
            return replace(self, flow="linear")
        if self.rows is None:
            return replace(self, rows=BAND_ROWS)
        if stage == "flow" and "tiled" in methods and self.flow != "tiled":
            return replace(self, flow="tiled")
        if stage == "flow" or (self.tile is not None and self.tile <= SMALLEST_TILE):
            return None
        return self.tiled(tile or TILE_SIZE if self.tile is None else max(self.tile // 2, SMALLEST_TILE))

    def tiled(self, tile: int) -> Plan:
        """The same with U-Net tiles of that size."""
        return replace(self, tile=tile, overlap=min(self.overlap, (tile - 1) // 2))

    def __str__(self) -> str:
        parts = {
            "linear": "flow without its correlation volume",
            "tiled": "flow in tiles",
            "whole": "" if self.rows or self.tile else "whole frames",
        }[self.flow]
        bands = f"convolutions in bands of {self.rows} rows" if self.rows else ""
        tiles = f"U-Net in tiles of {self.tile} (overlap {self.overlap})" if self.tile else ""
        return ", ".join(part for part in (parts, bands, tiles) if part)

    def to_json(self) -> str:
        """One line of JSON for a state's metadata."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; raises `IncompatibleInputError`."""
        try:
            plan = cls(**json.loads(text))
            plan._check()
        except (TypeError, ValueError) as error:
            raise IncompatibleInputError(
                f"the state has a memory plan that this program does not write: {text!r}"
            ) from error
        return plan

    def _check(self) -> None:
        whole = [value for value in (self.rows, self.tile, self.overlap) if value is not None]
        if self.flow not in ("whole", "linear", "tiled") or any(type(value) is not int for value in whole):
            raise ValueError("no such plan")
        rows = BAND_ROWS if self.rows is None else self.rows
        if rows < LEAST_ROWS or rows % LEAST_ROWS or self.overlap < 0:
            raise ValueError("no such plan")
        if self.tile is not None and (self.tile < LEAST_TILE or self.overlap * 2 >= self.tile):
            raise ValueError("no such plan")


def requested_plan(options: UpscaleOptions, methods: Sequence[str]) -> Plan:
    """The plan that the options name; for 'auto' the one to begin with, nothing split."""
    if options.memory_plan in ("auto", "whole"):
        return Plan(overlap=options.tile_overlap)
    plan = Plan(nearest_method("linear", methods), BAND_ROWS, overlap=options.tile_overlap)
    if options.memory_plan == "banded":
        return plan
    return plan.tiled(options.tile_size or TILE_SIZE)


def nearest_method(method: str, methods: Sequence[str]) -> str:
    """The estimator's own method in place of one that it lacks."""
    return method if method in methods else methods[0]


SHARE, CPU_SHARE = 0.9, 0.5
"""How much of what is free a plan may take: the rest is for what no estimate knows.

On a CPU that is what the C library keeps of freed memory: with glibc, a process was measured to take 1.1 to
1.9 times what is in use, and up to 2.2 times with the settings of our commands, which are faster so.
"""

GIGABYTE = 2**30

PLAN, SIZE = "plan", "size"
"""Keys of a state's details: its memory plan, and the LQ size for which that was chosen."""


@dataclass(frozen=True, eq=False)
class Planner:
    """Finds memory plans for one pipe."""

    needs: Callable[[Sequence[int], UpscaleOptions, Plan], dict[str, int]]
    """Bytes by stage, `weights` and `peak` among them: `counted.Needs`."""
    most: Callable[[Sequence[int]], int]
    """More bytes than a frame of a size can need, told at once: where they fit, nothing is counted."""
    methods: Sequence[str]
    """Of its flow estimator."""
    device: torch.device

    def plan(self, size: Sequence[int], details: Mapping[str, str], options: UpscaleOptions) -> Plan:
        """For an LQ size (height, width): what the options name; for 'auto' what a state's details say.

        Where nothing is recorded for this size, it is the cheapest plan that fits what is free, said in one
        line of the log. Exact plans only: an accelerator refuses what does not fit, and then the next
        level is taken. A CPU's system ends programs instead, so there U-Net tiles are taken beforehand
        when nothing exact fits.
        """
        if options.memory_plan != "auto":
            return requested_plan(options, self.methods)
        if PLAN in details and details.get(SIZE) == size_text(size):
            plan = Plan.from_json(details[PLAN])
            return replace(plan, flow=nearest_method(plan.flow, self.methods))
        return self.first_plan(size, options)

    def first_plan(self, size: Sequence[int], options: UpscaleOptions) -> Plan:
        """The plan to begin with."""
        free = free_memory(self.device)
        if self.most(size) <= self.share * free:
            return Plan(overlap=options.tile_overlap)
        plans = list(candidates(options, self.methods, beyond_exact=self.device.type == "cpu"))
        plan = next(
            (plan for plan in plans if self.bytes_needed(size, options, plan) <= self.share * free), plans[-1]
        )
        log.log(
            logging.INFO if plan.exact else logging.WARNING,
            "memory plan: %s (about %.1f GB of %.1f GB free)%s",
            plan,
            self.bytes_needed(size, options, plan) / GIGABYTE,
            free / GIGABYTE,
            ""
            if plan.exact
            else "; no exact plan fits, so results differ slightly from those for the whole frame",
        )
        return plan

    @property
    def share(self) -> float:
        """Of free memory, for a plan."""
        return CPU_SHARE if self.device.type == "cpu" else SHARE

    def minimum_bytes(self, size: Sequence[int], options: UpscaleOptions) -> int:
        """Bytes besides the weights by the plan that takes the least, or by the one that the options name."""
        if options.memory_plan != "auto":
            return self.bytes_needed(size, options, requested_plan(options, self.methods))
        plans = candidates(options, self.methods, beyond_exact=True)
        return min(self.bytes_needed(size, options, plan) for plan in plans)

    def bytes_needed(self, size: Sequence[int], options: UpscaleOptions, plan: Plan) -> int:
        """Bytes that a frame takes besides the weights."""
        needs = self.needs(size, options, plan)
        return needs["peak"] - needs["weights"]

    def next_plan(self, plan: Plan, stage: str, options: UpscaleOptions) -> Plan | None:
        """What to try when memory ran out in a stage; a plan that the options name is not left."""
        if options.memory_plan != "auto":
            return None
        return plan.next_plan(stage, self.methods, options.tile_size)


def plan_details(plan: Plan, size: Sequence[int]) -> dict[str, str]:
    """A plan as details of a state's provenance."""
    return {PLAN: plan.to_json(), SIZE: size_text(size)}


def size_text(size: Sequence[int]) -> str:
    """(height, width) as people write it."""
    return f"{size[1]}x{size[0]}"


def candidates(options: UpscaleOptions, methods: Sequence[str], *, beyond_exact: bool) -> Iterator[Plan]:
    """Plans from the cheapest in time to the cheapest in memory."""
    plan: Plan | None = Plan(overlap=options.tile_overlap)
    last = plan
    while plan is not None and (plan.exact or beyond_exact):
        yield plan
        last, plan = plan, plan.next_plan("unet", methods, options.tile_size)
    if beyond_exact and "tiled" in methods:
        yield replace(last, flow="tiled")
