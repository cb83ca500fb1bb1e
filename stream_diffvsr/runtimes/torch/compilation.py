"""torch.compile for the blocks that the networks are made of; without it where it does not work.

Blocks, not networks: all blocks of a kind share their code, with sizes left open, so that it is compiled
once for a handful of kinds and not anew for another picture. torch keeps the code on the disk for later runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...memory import is_out_of_memory

log = logging.getLogger(__name__)

OFF = "off"

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "TemporalBlock", "ControlNetConditioningEmbedding")
"""Names of the classes whose `forward` is compiled: where sums, norms and activations can be fused."""

CPU_BLOCKS = ("BasicTransformerBlock",)
"""Those of them that gain on a CPU, where the convolutions of the others hide what fusing saves.

Whole levels of the networks gain a little more, but their code depends on which frame came first, so that a
video done in parts by several processes would differ by rounding.
"""

MODES = {"auto": None, "max": "max-autotune-no-cudagraphs"}
"""What torch calls each. With graphs per block, the next step would overwrite what a block gave."""

LIMIT_NAMES = ("recompile_limit", "cache_size_limit")
"""What newer and older torch versions call the number of forms in which one function is compiled."""

FORMS = 64
"""Blocks of a kind differ in width and in what they are given."""

_found: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], list[nn.Module]]] = WeakKeyDictionary()

_failed: set[tuple[type[nn.Module], str]] = set()


@lru_cache
def compile_problem(device: str) -> str | None:
    """Why nothing can be compiled for this type of device; None where it works. Takes seconds, once."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:
        return _first_line(error)
    return None


def effective_mode(mode: str, device: torch.device) -> str:
    """The `compile_mode` that works here; logs once if it is not the requested one."""
    if mode == OFF or compile_problem(device.type) is None:
        return mode
    _say_once(
        f"compile_mode {mode!r} has no effect here, torch.compile fails: {compile_problem(device.type)}"
    )
    return OFF


@contextmanager
def compiled(networks: Iterable[nn.Module], mode: str) -> Generator[None, None, None]:
    """Run the blocks of these networks compiled while the context lasts; 'off' leaves them alone."""
    if mode == OFF:
        yield
        return
    blocks = [block for network in networks for block in _blocks(network)]
    dynamo = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
    limit = next(name for name in LIMIT_NAMES if hasattr(dynamo, name))
    try:
        for block in blocks:
            block.forward = partial(_run, type(block), mode, block)
        with dynamo.patch({limit: FORMS}):
            yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Those to compile; looked for once per network."""
    weight = next(network.parameters(), None)
    kinds = CPU_BLOCKS if weight is None or weight.device.type == "cpu" else BLOCKS
    known = _found.setdefault(network, {})
    if kinds not in known:
        known[kinds] = [block for block in network.modules() if type(block).__name__ in kinds]
    return known[kinds]


def _run(kind: type[nn.Module], mode: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's result; by its own code where compiling its kind failed."""
    failure = None
    if (kind, mode) not in _failed:
        try:
            return _compile(kind, mode)(block, *args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error) or _is_capturing():
                raise
            failure = _first_line(error)
    result = kind.forward(block, *args, **kwargs)
    if failure is not None:  # and not the block's own, which would have been raised again
        _failed.add((kind, mode))
        log.warning("%s is not compiled: %s", kind.__name__, failure)
    return result


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded: nothing compiles then, which is not the block's fault."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@lru_cache
def _compile(kind: type[nn.Module], mode: str) -> Callable[..., Any]:
    return torch.compile(kind.forward, dynamic=True, mode=MODES[mode])


@lru_cache
def _say_once(message: str) -> None:
    log.warning(message)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
