"""Which plan to begin with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...memory import free_memory
from .estimate import FLOW_METHODS, RELEASED, Widths, estimate
from .options import UpscaleOptions
from .plan import Plan, asked_for, fitting

log = logging.getLogger(__name__)

SHARE, CPU_SHARE = 0.9, 0.5
"""How much of what is free a plan may take: the rest is for what no estimate knows.

On a CPU that is what the C library keeps of freed memory: with glibc, a process was measured to take 1.1 to
1.9 times what is in use, and up to 2.2 times with the settings of our commands, which are faster so.
"""

GIGABYTE = 2**30

PLAN, SIZE = "plan", "size"
"""In a state's metadata: the plan in force, and the LQ size that it was chosen for."""


@dataclass(frozen=True, eq=False)
class Planner:
    """Finds plans for one pipe."""

    widths: Widths
    methods: Sequence[str]
    """Of its flow estimator."""
    dtype: torch.dtype
    device: torch.device

    def plan(self, size: Sequence[int], metadata: Mapping[str, str], options: UpscaleOptions) -> Plan:
        """For an LQ size (height, width): what the options name; for 'auto' what a state's metadata says.

        Where nothing is recorded for this size, it is the cheapest plan that fits what is free, said in one
        line of the log. Exact plans only: an accelerator refuses what does not fit, and then the next
        level is taken. A CPU's system ends programs instead, so there U-Net tiles are taken beforehand
        when nothing exact fits.
        """
        if options.memory_plan != "auto":
            return asked_for(options, self.methods)
        if PLAN in metadata and metadata.get(SIZE) == size_text(size):
            plan = Plan.from_json(metadata[PLAN])
            return replace(plan, flow=fitting(plan.flow, self.methods))
        return self.choose(size, options)

    def choose(self, size: Sequence[int], options: UpscaleOptions) -> Plan:
        """The plan to begin with."""
        free = free_memory(self.device)
        plans = list(candidates(options, self.methods, beyond_exact=self.device.type == "cpu"))
        plan = next(
            (plan for plan in plans if self.need(size, options, plan) <= self.share * free), plans[-1]
        )
        log.log(
            logging.INFO if plan.exact else logging.WARNING,
            "memory plan: %s (about %.1f GB of %.1f GB free)%s",
            plan,
            self.need(size, options, plan) / GIGABYTE,
            free / GIGABYTE,
            "" if plan.exact else "; nothing exact fits, so results differ slightly from the whole frame's",
        )
        return plan

    @property
    def share(self) -> float:
        """Of free memory, for a plan."""
        return CPU_SHARE if self.device.type == "cpu" else SHARE

    def least(self, size: Sequence[int], options: UpscaleOptions) -> int:
        """Bytes beside the weights by the plan that takes the least, or by the one that the options name."""
        if options.memory_plan != "auto":
            return self.need(size, options, asked_for(options, self.methods))
        plans = candidates(options, self.methods, beyond_exact=True)
        return min(self.need(size, options, plan) for plan in plans)

    def need(self, size: Sequence[int], options: UpscaleOptions, plan: Plan) -> int:
        """Bytes that a frame takes beside the weights."""
        needs = estimate(self.widths, size, options, self.dtype, plan)
        return needs["peak"] - needs["weights"]

    def has_room(self, size: Sequence[int], options: UpscaleOptions, plan: Plan, *stages: str) -> bool:
        """Whether the activations of stages could be held beside a whole frame, as things are now."""
        needs = estimate(self.widths, size, options, self.dtype, plan)
        more = sum(needs[stage] for stage in stages)
        return self.need(size, options, plan) + more <= self.share * free_memory(self.device)

    def lower(self, plan: Plan, stage: str, options: UpscaleOptions) -> Plan | None:
        """What to try when memory ran out in a stage; a plan that the options name is not left."""
        if options.memory_plan != "auto":
            return None
        return plan.lower(stage, self.methods, options.tile_size)


def released_planner(flow: str, dtype: torch.dtype, device: torch.device) -> Planner:
    """For the released networks before they are there; `flow` 'auto' is theirs."""
    widths = RELEASED if flow == "auto" else replace(RELEASED, flow=flow)
    return Planner(widths, FLOW_METHODS.get(widths.flow, ("whole",)), dtype, device)


def record(plan: Plan, size: Sequence[int]) -> dict[str, str]:
    """A plan for a state's metadata."""
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
        last, plan = plan, plan.lower("unet", methods, options.tile_size)
    if beyond_exact and "tiled" in methods:
        yield replace(last, flow="tiled")
