"""Attention over rows that are laid one after another in one line: each row sees itself alone.

Transformers' own SDPA attention would build a block-diagonal mask of all tokens squared, which no flash kernel takes.
Here every row is a causal product of its own: one variable-length kernel on a GPU, one product a row elsewhere (on a CPU
3 to 5 times as fast as the mask). The implementation is registered with Transformers by the interface that it has for
that; without ``packed_rows`` it is SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..method.tokens import send

IMPLEMENTATION = "sparselora_rows"
"""Of Transformers' ``attn_implementation``."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Where rows begin and end in a line of T tokens."""

    lengths: tuple[int, ...]
    ends: Tensor
    """(rows + 1,) int32 cumulative lengths from 0, on the device."""

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> PackedRows:
        """From ``lengths`` (rows,) int64 on the host; does not wait for the device."""
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(tuple(lengths.tolist()), send(ends, device))

    def arguments(self, implementation: str) -> dict[str, Any]:
        """What the model is called with beside tokens and positions, for an ``attn_implementation``."""
        if implementation == IMPLEMENTATION:
            # A mask of four dimensions is handed through as it is: none is built, and nothing waits for the positions.
            return {"packed_rows": self, "attention_mask": self.ends.new_ones((1, 1, 1, 1), dtype=torch.bool)}
        longest = max(self.lengths)
        ends = {"cu_seq_lens_q": self.ends, "cu_seq_lens_k": self.ends}
        return ends | {"max_length_q": longest, "max_length_k": longest} if "flash" in implementation else {}


def use_packed_attention(model: Any, instead_of: tuple[str, ...] = ("sdpa",)) -> None:
    """Give a model that runs SDPA this implementation, itself alone; others keep theirs."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    if model.config._attn_implementation in instead_of:
        model.set_attn_implementation(IMPLEMENTATION)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_rows: PackedRows | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: ``query`` (B, Hq, T, D), ``key`` and ``value`` (B, Hkv, T, D) -> (B, T, Hq, D).

    With ``packed_rows``, B is 1. ``softcap`` bounds the scores, ``s_aux`` (Hq,) are attention sinks: no fused kernel has
    both, so rows of such a family are computed with their scores.
    """
    dropout = dropout if module.training else 0.0
    if packed_rows is None and softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if softcap is not None or s_aux is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if packed_rows is None:
            mask = _causal(query, sliding_window) if attention_mask is None else attention_mask
            return _scored(query, key, value, mask, dropout, scaling, softcap, s_aux).transpose(1, 2), None
        parts = (x.split(packed_rows.lengths, dim=2) for x in (query, key, value))
        scored = [
            _scored(q, k, v, _causal(q, sliding_window), dropout, scaling, softcap, s_aux) for q, k, v in zip(*parts)
        ]
        return torch.cat(scored, dim=2).transpose(1, 2), None
    assert packed_rows is not None
    if varlen := _varlen_kernel(query, dropout):
        longest, window = max(packed_rows.lengths), (-1 if sliding_window is None else sliding_window - 1, 0)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        ends = packed_rows.ends
        y = varlen(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=True)
        return y.unsqueeze(0), None
    parts = (x.split(packed_rows.lengths, dim=2) for x in (query, key, value))
    rows = [_row(q, k, v, dropout, scaling, sliding_window) for q, k, v in zip(*parts)]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def _row(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    mask = _causal(q, window) if window is not None and q.shape[2] > window else None
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _causal(q: Tensor, window: int | None) -> Tensor:
    """(T, T) bool: what each position of a row sees."""
    at = torch.arange(q.shape[2], device=q.device)
    seen = at[:, None] >= at
    return seen if window is None else seen & (at[:, None] - at < window)


def _scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(B, Hq, T, D) by its definition, softmax in fp32; ``mask`` is bool, or added."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scaling).float()
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    shares = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    return torch.nn.functional.dropout(shares, dropout) @ v


def _varlen_kernel(query: Tensor, dropout: float) -> Any:
    """PyTorch's variable-length flash kernel where it takes these tensors, else ``None``."""
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return _varlen_of(query.device) if query.device.type == "cuda" and fits and not dropout else None


@cache
def _varlen_of(device: torch.device) -> Any:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from inspect import signature

    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if {"enable_gqa", "window_size"} <= set(signature(varlen_attn).parameters) else None
