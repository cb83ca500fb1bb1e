"""Plans for computing a frame in parts. A plan is recorded in the state, and later frames reuse it."""

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
"""Rows per band: few compared with a large picture, but many compared with the rows computed twice."""

TILE_SIZE = 512
"""Side of a U-Net tile in HQ pixels if the options set none."""

LEAST_ROWS, LEAST_TILE = 4, 64
"""Smallest parts that options and recorded plans may set; smaller parts would make a frame far too slow."""

SMALLEST_TILE = 256
"""Smallest tile side chosen automatically; in a smaller tile, the U-Net sees too little of the picture."""


@dataclass(frozen=True)
class Plan:
    """A way to compute one frame. Without tiles, the result is exactly the same as without splitting."""

    flow: str = "whole"
    """One of the estimator's `methods`: 'whole', 'linear' (RAFT without a correlation volume) or 'tiled'."""
    rows: int | None = None
    """Rows per band in the decoder, its features and the control embedding; None means no bands."""
    tile: int | None = None
    """Side of the U-Net's tiles in HQ pixels; None means no tiles."""
    overlap: int = 64
    """Overlap of the tiles in HQ pixels, less than half of `tile`."""

    @property
    def exact(self) -> bool:
        """Whether the result is the same as without splitting the frame, up to rounding."""
        return self.tile is None and self.flow != "tiled"

    def next_plan(self, stage: str, methods: Sequence[str], tile: int | None = None) -> Plan | None:
        """Return the next plan that needs less memory, or None if there is none; exact plans come first.

        `stage` is where memory ran out; tiled flow helps only in the flow stage. `tile` is the size of the
        first U-Net tiles to try.
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
        """Return the same plan with U-Net tiles of the given size."""
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
        """Return the plan as one line of JSON for a state's metadata."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse the output of `to_json`; raise `IncompatibleInputError` if it is invalid."""
        try:
            plan = cls(**json.loads(text))
            plan._check()
        except (TypeError, ValueError) as error:
            raise IncompatibleInputError(f"the state contains an invalid memory plan: {text!r}") from error
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
    """Return the plan that the options ask for; for 'auto', the unsplit plan, which is tried first."""
    if options.memory_plan in ("auto", "whole"):
        return Plan(overlap=options.tile_overlap)
    plan = Plan(nearest_method("linear", methods), BAND_ROWS, overlap=options.tile_overlap)
    if options.memory_plan == "banded":
        return plan
    return plan.tiled(options.tile_size or TILE_SIZE)


def nearest_method(method: str, methods: Sequence[str]) -> str:
    """Return `method` if the estimator supports it; otherwise, return the estimator's first method."""
    return method if method in methods else methods[0]


SHARE, CPU_SHARE = 0.9, 0.5
"""Share of the free memory that a plan may use; the remainder is for memory that cannot be estimated.

On a CPU, that is freed memory that the C library keeps: in measurements with glibc, processes occupied
1.1 to 1.9 times the memory in use, and up to 2.2 times with the faster settings that our commands use.
"""

GIGABYTE = 2**30

PLAN, SIZE = "plan", "size"
"""Keys in a state's details for the memory plan and the LQ size for which it was chosen."""


@dataclass(frozen=True, eq=False)
class Planner:
    """Chooses memory plans for one pipeline."""

    needs: Callable[[Sequence[int], UpscaleOptions, Plan], dict[str, int]]
    """Function that returns the bytes by stage, including `weights` and `peak`; see `counted.Needs`."""
    most: Callable[[Sequence[int]], int]
    """Function that quickly returns an upper bound on a frame's bytes; if they fit, nothing is counted."""
    methods: Sequence[str]
    """Methods of the flow estimator."""
    device: torch.device

    def plan(self, size: Sequence[int], details: Mapping[str, str], options: UpscaleOptions) -> Plan:
        """Return the plan for an LQ size (height, width), from the options or, for 'auto', from `details`.

        If no plan is recorded for this size, the fastest plan that fits the free memory is chosen and logged.
        On an accelerator, only exact plans are considered: if the chosen plan does not fit after all, an
        error is raised and the next plan is tried. On a CPU, running out of memory would kill the
        program, so U-Net tiles are chosen in advance if no exact plan fits.
        """
        if options.memory_plan != "auto":
            return requested_plan(options, self.methods)
        if PLAN in details and details.get(SIZE) == size_text(size):
            plan = Plan.from_json(details[PLAN])
            return replace(plan, flow=nearest_method(plan.flow, self.methods))
        return self.first_plan(size, options)

    def first_plan(self, size: Sequence[int], options: UpscaleOptions) -> Plan:
        """Return the first plan to try: the fastest one that fits the free memory."""
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
            else "; no exact plan fits, so results differ slightly from those of an unsplit frame",
        )
        return plan

    @property
    def share(self) -> float:
        """Share of the free memory that a plan may use."""
        return CPU_SHARE if self.device.type == "cpu" else SHARE

    def minimum_bytes(self, size: Sequence[int], options: UpscaleOptions) -> int:
        """Return how many bytes the plan (for 'auto', the smallest one) needs in addition to the weights."""
        if options.memory_plan != "auto":
            return self.bytes_needed(size, options, requested_plan(options, self.methods))
        plans = candidates(options, self.methods, beyond_exact=True)
        return min(self.bytes_needed(size, options, plan) for plan in plans)

    def bytes_needed(self, size: Sequence[int], options: UpscaleOptions, plan: Plan) -> int:
        """Return how many bytes a frame needs in addition to the weights."""
        needs = self.needs(size, options, plan)
        return needs["peak"] - needs["weights"]

    def next_plan(self, plan: Plan, stage: str, options: UpscaleOptions) -> Plan | None:
        """Return the next plan to try after memory ran out in a stage, or None; only 'auto' has fallbacks."""
        if options.memory_plan != "auto":
            return None
        return plan.next_plan(stage, self.methods, options.tile_size)


def plan_details(plan: Plan, size: Sequence[int]) -> dict[str, str]:
    """Return a plan and its frame size as entries for `details` in a state's provenance."""
    return {PLAN: plan.to_json(), SIZE: size_text(size)}


def size_text(size: Sequence[int]) -> str:
    """Format (height, width) as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def candidates(options: UpscaleOptions, methods: Sequence[str], *, beyond_exact: bool) -> Iterator[Plan]:
    """Yield plans from the fastest to the one that needs the least memory."""
    plan: Plan | None = Plan(overlap=options.tile_overlap)
    last = plan
    while plan is not None and (plan.exact or beyond_exact):
        yield plan
        last, plan = plan, plan.next_plan("unet", methods, options.tile_size)
    if beyond_exact and "tiled" in methods:
        yield replace(last, flow="tiled")
