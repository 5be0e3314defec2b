"""Attention channels under grouped-query attention: which rows and columns of q, k, v, o one channel owns.

One order, used everywhere. Query head ``g`` reads key/value head ``g // G``, ``G = heads // kv_heads``.

    qk channel  c = h * (D/2) + p    rotary pair p of key/value head h: rows {p, p + D/2} of k's head h, and the same
                                     two rows of every query head in group h of q
    vo channel  c = h * D + d        row d of v's head h, and column d of o for every query head in group h

The pair is (p, p + D/2) because rotate-half RoPE mixes exactly these two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The frozen matrices of a decoder layer, by the names that all supported families give them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
TRANSPOSED = ("o_proj", "down_proj")
"""Those whose channel is their input: stored as (in, out)."""
SCORED = {"ffn": ("gate_proj", "up_proj"), "qk": ("q_proj", "k_proj"), "vo": ("v_proj",)}
"""Whose factors a group's scores need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadGeometry:
    """Shape of a layer's attention."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; divides ``heads``."""
    head_dim: int
    """Width of one head, even."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary pairs need an even width")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def qk_channels(self) -> int:
        return self.kv_heads * self.head_dim // 2

    @property
    def vo_channels(self) -> int:
        return self.kv_heads * self.head_dim

    def channel_counts(self, width: int) -> dict[str, int]:
        """Channels of a layer by group; ``width`` is the FFN's."""
        return {"ffn": width, "qk": self.qk_channels, "vo": self.vo_channels}

    def _query_heads(self, kv_head: Tensor) -> Tensor:
        """(k,) key/value heads -> (k, G) query heads of their groups."""
        return kv_head[:, None] * self.group + torch.arange(self.group, device=kv_head.device)

    def _pairs(self, head: Tensor, pair: Tensor) -> Tensor:
        """(..., ) heads and pairs -> sorted flat rows of both halves."""
        first = head * self.head_dim + pair
        return torch.cat([first.flatten(), (first + self.head_dim // 2).flatten()]).sort().values

    def k_rows(self, channels: Tensor) -> Tensor:
        """Rows of k (kv_heads * D) that the qk ``channels`` own, ascending."""
        half = self.head_dim // 2
        return self._pairs(channels // half, channels % half)

    def q_rows(self, channels: Tensor) -> Tensor:
        """Rows of q (heads * D) that the qk ``channels`` own, ascending."""
        half = self.head_dim // 2
        return self._pairs(self._query_heads(channels // half), (channels % half)[:, None])

    def v_rows(self, channels: Tensor) -> Tensor:
        """Rows of v (kv_heads * D) that the vo ``channels`` own: the channels themselves."""
        return channels

    def o_columns(self, channels: Tensor) -> Tensor:
        """Columns of o (heads * D) that the vo ``channels`` own, ascending."""
        head = self._query_heads(channels // self.head_dim)
        return (head * self.head_dim + (channels % self.head_dim)[:, None]).flatten().sort().values

    def k_pair_sums(self, scores: Tensor) -> Tensor:
        """Σ over the two rows of a pair: (kv_heads * D,) -> (kv_heads * D/2,)."""
        return scores.view(self.kv_heads, 2, self.head_dim // 2).sum(1).flatten()

    def q_pair_sums(self, scores: Tensor) -> Tensor:
        """Σ over the query heads of a group and the two rows of a pair: (heads * D,) -> (kv_heads * D/2,)."""
        return scores.view(self.kv_heads, self.group, 2, self.head_dim // 2).sum((1, 2)).flatten()
