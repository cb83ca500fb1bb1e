"""Choice of the library that computes dense self-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...errors import IncompatibleInputError

ATTENTIONS = ("auto", "sdpa", "sage", "flash")
"""auto and sdpa use PyTorch's attention; sage is an 8-bit approximation; flash differs only by rounding."""

PACKAGES = {"sage": "sageattention", "flash": "flash-attn"}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from queries, keys and values, each (1, heads, tokens, head size), to a result of that shape."""


class FusedAttention(TorchFunctionMode):
    """Prevents attention from allocating a query-by-key map on the meta device.

    On CPUs and CUDA devices, attention does not allocate this map either.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else (kwargs or {})["query"])
        return func(*args, **(kwargs or {}))


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that an attention implementation can be used here.

    Raises `IncompatibleInputError` for an unknown name or an unsupported device or number format, and
    `ModuleNotFoundError` if the package is missing.
    """
    if name not in ATTENTIONS:
        raise IncompatibleInputError(f"attention must be one of {', '.join(ATTENTIONS)}, not {name!r}")
    if name not in PACKAGES:
        return
    if device.type != "cuda" or dtype == torch.float32:
        number = str(dtype).removeprefix("torch.")
        raise IncompatibleInputError(
            f"attention {name!r} needs a CUDA device and dtype float16 or bfloat16, not {device} with "
            f"{number}"
        )
    try:
        from diffusers.models.attention_dispatch import attention_backend

        with attention_backend(name):
            pass
    except (ImportError, RuntimeError, ValueError) as error:
        raise ModuleNotFoundError(
            f"attention {name!r} needs diffusers 0.35 or newer and {PACKAGES[name]}: "
            f"run pip install -U diffusers {PACKAGES[name]}, or leave attention at 'auto'"
        ) from error


def attention(name: str) -> Attend:
    """Return the implementation for a name that `check_attention` accepted."""
    return partial(_dispatched, name) if name in PACKAGES else F.scaled_dot_product_attention


def _dispatched(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # diffusers has tokens before heads
    return dispatch_attention_fn(q, k, v, backend=backend).transpose(1, 2)  # type: ignore[arg-type]
