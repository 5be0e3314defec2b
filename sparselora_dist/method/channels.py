"""Attention channels under grouped-query attention: which rows and columns of q, k, v, o one channel owns.

One order, used everywhere. Query head ``g`` reads key/value head ``g // G``, ``G = heads // kv_heads``.

    qk channel  c = h * (D/2) + p    rotary pair p of key/value head h: rows {p, p + D/2} of k's head h, and the same
                                     two rows of every query head in group h of q
    vo channel  c = h * D + d        row d of v's head h, and column d of o for every query head in group h

The pair is (p, p + D/2) because rotate-half RoPE mixes exactly these two; where a family's RoPE mixes others, the pairs
are those (``HeadGeometry.pairs``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# The frozen matrices of a decoder layer, by the names that they have here, whatever their family calls them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("experts.gate_proj", "experts.up_proj")
"""Of the routed experts, what is scored: rows of all experts, one after another, (E·W, H)."""
TRANSPOSED = ("o_proj", "down_proj")
"""Those whose channel is their input: stored as (in, out)."""
SCORED = {"ffn": ("gate_proj", "up_proj"), "qk": ("q_proj", "k_proj"), "vo": ("v_proj",), "experts": EXPERTS}
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
    pairs: tuple[tuple[int, int], ...] | None = None
    """The D/2 rotary pairs of a head; ``None`` is (p, p + D/2)."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary pairs need an even width")

    @classmethod
    def of_pairs(
        cls, heads: int, kv_heads: int, head_dim: int, pairs: tuple[tuple[int, int], ...] | None
    ) -> HeadGeometry:
        """With ``pairs`` left out where they are the usual ones."""
        usual = tuple((p, p + head_dim // 2) for p in range(head_dim // 2))
        return cls(heads=heads, kv_heads=kv_heads, head_dim=head_dim, pairs=None if pairs == usual else pairs)

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

    def owned(self, role: str) -> int:
        """How many rows of q, k or v, or columns of o, one channel owns."""
        return {"q": 2 * self.group, "k": 2, "v": 1, "o": self.group}[role]

    def k_rows(self, channels: Tensor) -> Tensor:
        """Rows of k (kv_heads * D) that the qk ``channels`` own, ascending."""
        return self._owned("k", channels)

    def q_rows(self, channels: Tensor) -> Tensor:
        """Rows of q (heads * D) that the qk ``channels`` own, ascending."""
        return self._owned("q", channels)

    def v_rows(self, channels: Tensor) -> Tensor:
        """Rows of v (kv_heads * D) that the vo ``channels`` own: the channels themselves."""
        return channels

    def o_columns(self, channels: Tensor) -> Tensor:
        """Columns of o (heads * D) that the vo ``channels`` own, ascending."""
        return self._owned("o", channels)

    def _owned(self, role: str, channels: Tensor) -> Tensor:
        return _table(self, role, channels.device).index_select(0, channels).flatten().sort().values

    def k_pair_sums(self, scores: Tensor) -> Tensor:
        """Σ over the two rows of a pair: (kv_heads * D,) -> (kv_heads * D/2,)."""
        return self._by_pairs(scores).view(self.kv_heads, 2, self.head_dim // 2).sum(1).flatten()

    def q_pair_sums(self, scores: Tensor) -> Tensor:
        """Σ over the query heads of a group and the two rows of a pair: (heads * D,) -> (kv_heads * D/2,)."""
        return self._by_pairs(scores).view(self.kv_heads, self.group, 2, self.head_dim // 2).sum((1, 2)).flatten()

    def _by_pairs(self, scores: Tensor) -> Tensor:
        """Each head's scores with the first of every pair before the second of every pair."""
        if self.pairs is None:
            return scores
        return scores.view(-1, self.head_dim).index_select(1, _order(self, scores.device))


@cache
def _table(geometry: HeadGeometry, role: str, device: torch.device) -> Tensor:
    """What every channel owns of ``role`` (q, k, o): (channels, owned) int64. Once: two launches a list instead of ten."""
    d, group = geometry.head_dim, geometry.group
    pairs = role != "o"
    channels = torch.arange(geometry.qk_channels if pairs else geometry.vo_channels, device=device)
    width = d // 2 if pairs else d
    head, place = channels[:, None] // width, channels[:, None] % width
    if role != "k":
        head = head * group + torch.arange(group, device=device)
    if not pairs:
        return head * d + place
    first, second = _order(geometry, device).view(2, -1)
    return torch.cat([head * d + first[place], head * d + second[place]], 1)


@cache
def _order(geometry: HeadGeometry, device: torch.device) -> Tensor:
    """(D,) int64: the first dimension of every pair, then the second of every pair."""
    if geometry.pairs is None:
        return torch.arange(geometry.head_dim, device=device)
    return torch.tensor(geometry.pairs, device=device).t().flatten()
