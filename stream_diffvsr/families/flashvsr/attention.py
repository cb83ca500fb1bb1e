"""Block-sparse self-attention between windows of tokens, with a memory of earlier keys and values.

A window is 2 latents x 8 rows x 8 columns = 128 tokens. Inside the transformer, tokens are ordered by window,
so each window is a contiguous slice. A pair consists of all windows of two consecutive latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..wan.transformer import queries_keys_values

log = logging.getLogger(__name__)

LATENTS, SIDE = 2, 8
TOKENS = LATENTS * SIDE * SIDE
"""Tokens per window."""

Pair = tuple[Tensor, Tensor]
"""Rotated keys and values of a pair, each (heads, windows, 128, head size)."""

TRAINED_AREA = (768, 1280)
"""Picture height and width for which `sparse_ratio` is defined; the ratio is rescaled for other sizes."""


@dataclass(frozen=True)
class Selection:
    """The windows that may attend to each other in pictures of a given size."""

    near: Tensor
    """(n, n) bool: whether each key window is within reach of each query window."""
    count: int
    """Approximate number of entries to select from the map of a pair's query windows and all key windows."""

    @classmethod
    def of(cls, height: int, width: int, sparse_ratio: float, local_range: int) -> Selection:
        """Return the selection for a picture whose sides are multiples of 128."""
        rows, columns = height // 128, width // 128
        windows = rows * columns
        ratio = sparse_ratio * TRAINED_AREA[0] * TRAINED_AREA[1] / (height * width)
        return cls(neighbours(rows, columns, local_range), int((windows * windows) * ratio) - 1)


@dataclass(frozen=True)
class Reach:
    """Additional inputs to one block's self-attention, passed in place of the rotary embedding."""

    cos: Tensor
    sin: Tensor
    """`cos` and `sin` are (tokens, 1, half of the head size), float32."""
    selection: Selection
    past: tuple[Pair, ...]
    offload: bool = False
    """Whether pairs are kept in system memory between uses."""
    own: list[Pair] = field(default_factory=list)
    """Filled by the block with the pairs of its current tokens."""


def to_windows(x: Tensor) -> Tensor:
    """Reorder (latents, rows, columns, ...) to (tokens, ...), grouped by windows of 2 x 8 x 8 tokens."""
    return rearrange(x, "(p t) (r a) (c b) ... -> (p r c t a b) ...", t=LATENTS, a=SIDE, b=SIDE)


def from_windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_windows` for latents of `rows` x `columns` tokens."""
    sizes = {"r": rows // SIDE, "c": columns // SIDE, "t": LATENTS, "a": SIDE, "b": SIDE}
    return rearrange(x, "(p r c t a b) ... -> (p t) (r a) (c b) ...", **sizes)


def neighbours(rows: int, columns: int, local_range: int) -> Tensor:
    """Return (n, n) bool: whether key window (axis 1) is within `local_range` of query window (axis 0)."""
    row = torch.arange(rows * columns) // columns
    column = torch.arange(rows * columns) % columns
    low = -(local_range // 2)
    near = [(low <= d) & (d < low + local_range) for d in (x[None] - x[:, None] for x in (row, column))]
    return near[0] & near[1]


def select(q: Tensor, k: Tensor, selection: Selection) -> Tensor:
    """Select the key windows whose mean keys get the most attention.

    `q` and `k` are (heads, windows, 128, head size); the result is (heads, query windows, key windows) bool.
    For each head and each query pair, a single threshold applies to the whole map, so a query window may get
    many key windows, or none.
    """
    n = len(selection.near)
    means = q.mean(2, dtype=torch.float32), k.mean(2, dtype=torch.float32)
    scores = means[0] @ means[1].transpose(1, 2) / q.shape[-1] ** 0.5
    scores = rearrange(scores, "h (p q) (j k) -> h p q j k", q=n, k=n)
    far = ~selection.near.to(q.device)[:, None]
    chances = scores.masked_fill(far, -torch.inf).flatten(3).softmax(-1).flatten(2)
    count = min(max(selection.count, 0), chances.shape[-1] - 1)
    threshold = chances.topk(count + 1, -1).values[..., -1:]
    return (chances > threshold).reshape(len(q), q.shape[1], k.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
    """Compute each window's exact attention to its selected windows; if it has none, the result is 0.

    `q`, `k` and `v` are (heads, windows, 128, head size); `selected` is the result of `select`.
    """
    flex = _flex(q.device, q.dtype, q.shape[-1]) if q.is_cuda else None
    if flex is not None:
        return _by_blocks(flex, q, k, v, selected)
    return gathered(q, k, v, selected)


def gathered(q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
    """Compute `attend` one query window at a time, from copies of that window's keys and values."""
    if q.is_meta:  # the selection is unknown, so assume all windows, as an upper bound on memory
        copies = k.clone(), v.clone()
        return torch.empty_like(q) if copies else q
    counts = selected.sum(-1)
    most = counts.amax(0).tolist()
    order = selected.byte().sort(dim=-1, descending=True, stable=True).indices
    heads = torch.arange(len(q), device=q.device)[:, None]
    result = torch.zeros_like(q)
    for window, longest in enumerate(most):
        if longest == 0:
            continue
        chosen = order[:, window, :longest]
        keys, values = (x[heads, chosen].flatten(1, 2) for x in (k, v))
        mine = torch.arange(longest, device=q.device) < counts[:, window, None]
        mask = mine.repeat_interleave(TOKENS, 1)[:, None]
        found = F.scaled_dot_product_attention(q[:, window], keys, values, mask)
        result[:, window] = found.masked_fill(counts[:, window, None, None] == 0, 0)
    return result


def _by_blocks(attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
    """Compute the result of `attend` with FlexAttention, using the windows as its blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    counts = selected.sum(-1, dtype=torch.int32)[None]
    order = selected.byte().sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)[None]

    def among(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether a query may attend to a key.

        FlexAttention calls this only if it is not compiled, since it cannot skip blocks then.
        """
        return selected[head, query // TOKENS, key // TOKENS]

    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=TOKENS, mask_mod=among)
    found = attention(*(x.flatten(1, 2)[None] for x in (q, k, v)), block_mask=mask)
    return found[0].view_as(q).masked_fill(counts[0, ..., None, None] == 0, 0)


@cache
def _flex(device: torch.device, dtype: torch.dtype, head: int) -> Callable[..., Any] | None:
    """Return FlexAttention compiled for a device (cached), or None if it is missing or does not compile."""
    try:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        x = torch.zeros(1, 2, TOKENS, head, device=device, dtype=dtype)
        _by_blocks(compiled, x, x, x, torch.ones(1, 2, 2, dtype=torch.bool, device=device))
    except Exception as error:  # compilers fail with all kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "FlexAttention cannot be compiled here (%s), so copies of the selected windows are used instead",
            reason,
        )
        return None
    return compiled


def away(x: Tensor) -> Tensor:
    """Move `x` to system memory; on the meta device, return a stand-in that needs no memory."""
    return x.new_empty(()).expand(x.shape) if x.is_meta else x.cpu()


def back(x: Tensor, device: torch.device) -> Tensor:
    """Move a tensor returned by `away` back to `device`."""
    return x.contiguous() if x.is_meta else x.to(device)


class SparseAttention:
    """Replacement for a Wan block's self-attention; stores only the function that computes it."""

    def __init__(self) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Reach | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        reach, x = rotary_emb, hidden_states[0]
        q, k, v = queries_keys_values(attn, x, reach.cos, reach.sin)
        q, k, v = (rearrange(each, "(w t) h d -> h w t d", t=TOKENS).contiguous() for each in (q, k, v))
        n = len(reach.selection.near)
        # Copy each pair, so that its memory can be freed separately.
        own = ((a.contiguous(), b.contiguous()) for a, b in zip(k.split(n, 1), v.split(n, 1), strict=True))
        reach.own.extend((away(a), away(b)) if reach.offload else (a, b) for a, b in own)
        if reach.past:
            k, v = (
                torch.cat([*(back(pair[i], x.device) for pair in reach.past), x], 1)
                for i, x in enumerate((k, v))
            )
        found = self.attend(q, k, v, select(q, k, reach.selection))
        found = rearrange(found, "h w t d -> 1 (w t) (h d)")
        return attn.to_out[1](attn.to_out[0](found))
