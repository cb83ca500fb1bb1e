"""Which plan to begin with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ..options import UpscaleOptions
from .available import free_memory
from .plan import Plan

log = logging.getLogger(__name__)

SHARE = 0.9
"""How much of what is free a plan may take: the rest is for what no estimate knows."""

GIGABYTE = 2**30


def choose(
    need: Callable[[Plan], int], options: UpscaleOptions, methods: Sequence[str], device: torch.device
) -> Plan:
    """The cheapest plan that fits what is free, said in one line of the log.

    `need` is the bytes of a plan. Exact plans only: an accelerator refuses what does not fit, and then
    the next level is taken. A CPU's system ends programs instead, so there U-Net tiles are taken
    beforehand when nothing exact fits.
    """
    free = free_memory(device)
    plans = list(candidates(options, methods, beyond_exact=device.type == "cpu"))
    plan = next((plan for plan in plans if need(plan) <= SHARE * free), plans[-1])
    level = logging.INFO if plan.exact else logging.WARNING
    log.log(
        level,
        "memory plan: %s (about %.1f GB of %.1f GB free)%s",
        plan,
        need(plan) / GIGABYTE,
        free / GIGABYTE,
        "" if plan.exact else "; nothing exact fits, so results differ slightly from the whole frame's",
    )
    return plan


def candidates(options: UpscaleOptions, methods: Sequence[str], *, beyond_exact: bool) -> Iterator[Plan]:
    """Plans from the cheapest in time to the cheapest in memory."""
    plan: Plan | None = Plan(overlap=options.tile_overlap)
    last = plan
    while plan is not None and (plan.exact or beyond_exact):
        yield plan
        last, plan = plan, plan.lower("unet", methods, options.tile_size)
    if beyond_exact and "tiled" in methods:
        yield replace(last, flow="tiled")
