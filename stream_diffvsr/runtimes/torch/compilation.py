"""Use torch.compile on the blocks that make up the networks; blocks that fail to compile run uncompiled.

Blocks are compiled instead of whole networks. All blocks of a kind share code that works for any size, so
there are only a few kinds to compile, and a new picture size requires no recompilation. torch stores the
compiled code on disk for later runs.
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
"""Names of the classes whose `forward` is compiled, because it has sums, norms and activations to fuse."""

CPU_BLOCKS = ("BasicTransformerBlock",)
"""Names of the classes compiled on a CPU. In the others, convolutions are so slow on a CPU that compiling
gains almost nothing.

Compiling whole levels of the networks would gain a little more, but their code depends on which frame came
first, so a video processed in parts by several processes would differ by rounding.
"""

MODES = {"auto": None, "max": "max-autotune-no-cudagraphs"}
"""torch's name for each mode. With a CUDA graph per block, the next step would overwrite a block's result."""

LIMIT_NAMES = ("recompile_limit", "cache_size_limit")
"""Name of the limit on compiled variants of one function, in newer and in older torch versions."""

FORMS = 64
"""The limit on compiled variants, which exist because blocks of a kind differ in width and in arguments."""

_found: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], list[nn.Module]]] = WeakKeyDictionary()

_failed: set[tuple[type[nn.Module], str]] = set()


@lru_cache
def compile_problem(device: str) -> str | None:
    """Return why torch.compile fails on a device type, or None; the first call takes a few seconds."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:
        return _first_line(error)
    return None


def effective_mode(mode: str, device: torch.device) -> str:
    """Return the `compile_mode` that works here; if it is not the requested mode, log this once."""
    if mode == OFF or compile_problem(device.type) is None:
        return mode
    _say_once(
        f"compile_mode {mode!r} has no effect here because torch.compile fails: "
        f"{compile_problem(device.type)}"
    )
    return OFF


@contextmanager
def compiled(networks: Iterable[nn.Module], mode: str) -> Generator[None, None, None]:
    """Compile these networks' blocks for the duration of the context; mode 'off' changes nothing."""
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
    """Return the blocks to compile; each network is searched for them only once."""
    weight = next(network.parameters(), None)
    kinds = CPU_BLOCKS if weight is None or weight.device.type == "cpu" else BLOCKS
    known = _found.setdefault(network, {})
    if kinds not in known:
        known[kinds] = [block for block in network.modules() if type(block).__name__ in kinds]
    return known[kinds]


def _run(kind: type[nn.Module], mode: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return a block's result; if blocks of its kind failed to compile, run its uncompiled code."""
    failure = None
    if (kind, mode) not in _failed:
        try:
            return _compile(kind, mode)(block, *args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error) or _is_capturing():
                raise
            failure = _first_line(error)
    result = kind.forward(block, *args, **kwargs)
    if failure is not None:  # an error of the block itself would have been raised again
        _failed.add((kind, mode))
        log.warning("%s is not compiled: %s", kind.__name__, failure)
    return result


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which case no block can be compiled."""
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
