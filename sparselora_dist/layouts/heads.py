"""Where queries, keys and values are in the outputs of an attention's matrices: seen in the family's own attention.

Every matrix is replaced by one whose outputs are their own numbers, and the attention runs for one token, unrotated, until
it has heads: at Transformers' attention interface, or in the method that splits a matrix of all three. What arrives there
says which row of which matrix it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .names import Rows, shape

_PROBE = "sparselora_probe"
_SPLITS = ("_split_heads", "_reshape")
_HIDDEN = 4
_THREE = ("q_proj", "k_proj", "v_proj")


class _Heads(Exception):
    """What the attention interface was given; ends the forward."""

    def __init__(self, *states: Tensor) -> None:
        super().__init__()
        self.states = states


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise _Heads(query, key, value)


class _Numbers(nn.Module):
    """Its outputs are ``first``, ``first + 1``, ..."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.numbers = torch.arange(first, first + count, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.numbers.view(1, 1, -1)


def find_heads(module: Any, names: Mapping[str, str], dim: int) -> dict[str, tuple[str, Rows | None]] | None:
    """The rows of ``q_proj``, ``k_proj`` and ``v_proj``, head after head, in the stored matrices ``names``.

    Args:
        module: the attention.
        names: stored matrix -> its own name, without the output's.
        dim: width of a head.

    Returns:
        For each of the three the stored matrix and the rows there; ``None`` where they are not found: heads are mixed
        before they are split, or lie otherwise than whole.
    """
    firsts, stubs, total = {}, {}, 0
    for name, own in names.items():
        count, _ = shape(getattr(module, own))
        firsts[name], stubs[own], total = total, _Numbers(total, count), total + count
    ends = [*list(firsts.values())[1:], total]
    for states in _states(module, stubs, dim):
        found = {}
        for what, state in zip(_THREE, states):
            numbers = _whole_heads(state, dim)
            if numbers is None:
                break
            inside = [n for n, end in zip(firsts, ends) if firsts[n] <= int(numbers.min()) and int(numbers.max()) < end]
            if len(inside) != 1:
                break
            rows = numbers - firsts[inside[0]]
            whole = len(rows) == shape(getattr(module, names[inside[0]]))[0]
            found[what] = (inside[0], None if whole and bool((rows == torch.arange(len(rows))).all()) else rows)
        if len(found) == len(_THREE):
            return found
    return None


@torch.no_grad()
def _states(module: Any, stubs: Mapping[str, nn.Module], dim: int) -> Iterator[tuple[Any, ...]]:
    """Queries, keys and values of one token, in every way in which they are to be had."""
    if len(stubs) == 1:
        for split in filter(None, (getattr(type(module), name, None) for name in _SPLITS)):
            try:
                yield split(module, next(iter(stubs.values()))(torch.empty(0)))
            except Exception:
                continue
    AttentionInterface.register(_PROBE, _probe)
    children = {n: nn.Identity() for n, child in module.named_children() if "Norm" in type(child).__name__}
    stand_in = copy.copy(module)
    stand_in.__dict__ = {**module.__dict__, "_modules": {**module._modules, **children, **stubs}}
    if getattr(module, "config", None) is None:
        return
    config = copy.copy(module.config)
    config.__dict__["_attn_implementation_internal"] = _PROBE
    stand_in.__dict__["config"] = config
    x = torch.zeros(1, 1, _HIDDEN, dtype=torch.float64)
    # An angle for each rotated dimension, or for each two; of all of a head, or of a part.
    for width in sorted(
        {width for part in range(1, 5) for width in (dim * part // 4, dim * part // 8)} - {0}, reverse=True
    ):
        angles = torch.ones(1, 1, width, dtype=torch.float64), torch.zeros(1, 1, width, dtype=torch.float64)
        try:
            type(module).forward(stand_in, x, position_embeddings=angles, attention_mask=None)
        except _Heads as heads:
            yield heads.states
        except Exception:
            continue


def _whole_heads(state: Any, dim: int) -> Tensor | None:
    """The numbers in ``state`` (..., D), heads that stand for several queries once; ``None`` where they are none."""
    if not isinstance(state, Tensor) or not state.numel() or state.shape[-1] != dim:
        return None
    heads = state.reshape(-1, dim)
    numbers = heads.round().long()
    if not torch.equal(numbers.to(heads.dtype), heads):
        return None
    # Expanded for the queries of a group, one after the other.
    unique = torch.unique_consecutive(numbers, dim=0)
    if len(numbers) % len(unique) or not torch.equal(unique.repeat_interleave(len(numbers) // len(unique), 0), numbers):
        return None
    flat = unique.flatten()
    return flat if flat.unique().numel() == flat.numel() else None
