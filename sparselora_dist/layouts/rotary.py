"""Which two dimensions of a head rotary embedding mixes: asked of the family's own function, not of its name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Pairs = tuple[tuple[int, int], ...]


def rotary_pairs(attention: nn.Module, config: Any, head_dim: int) -> Pairs | str:
    """The ``head_dim / 2`` pairs of one head, or why they are not known.

    Dimensions that are not rotated (partial rotary embedding, or none) are paired among themselves, first half with
    second: their pairing is free.
    """
    modelling = sys.modules[type(attention).__module__]
    rotate = getattr(modelling, "apply_rotary_pos_emb", None)
    if rotate is None:
        others = [name for name in vars(modelling) if "rotary" in name.lower() or "rope" in name.lower()]
        if others:
            return f"its rotary embedding ({', '.join(others)}) is not known"
        return _completed({}, head_dim)
    rotated = getattr(attention, "rotary_dim", None) or int(head_dim * _partial_factor(attention, config))
    # Either the function is given whole heads and cuts by the width of the angles, or the attention cuts before.
    # There is an angle for each of the rotated dimensions, or one for each two.
    for width in dict.fromkeys((head_dim, rotated)):
        for angles in (rotated, rotated // 2):
            mixed = _mixed(rotate, width, angles)
            if mixed is not None:
                return _completed(mixed, head_dim)
    return "its rotary embedding does not mix dimensions two by two"


def _partial_factor(attention: Any, config: Any) -> float:
    found = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in found.values()):  # By kind of layer.
        kinds = getattr(config, "layer_types", None) or []
        index = getattr(attention, "layer_idx", None)
        kind = kinds[index] if isinstance(index, int) and index < len(kinds) else None
        found = found.get(kind) or next(value for value in found.values() if isinstance(value, dict))
    factor = found.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return 1.0 if factor is None else float(factor)


@torch.no_grad()
def _mixed(rotate: Callable[..., Any], width: int, angles: int) -> dict[int, int] | None:
    """Rotate every unit vector of a head by one angle and see where it goes; ``None`` unless all go to two places."""
    vectors = torch.eye(width).view(1, 1, width, width)
    ones = torch.ones(1, width, angles)
    names = list(inspect.signature(rotate).parameters)
    arguments = (vectors,) if names[:2] == ["x", "cos"] else (vectors, vectors)
    turns = 0.6 * ones, 0.8 * ones
    if names[1:] == ["sin", "cos"]:  # One tensor, (B, S, heads, D).
        arguments, turns = (vectors.transpose(1, 2),), turns[::-1]
    try:
        out = rotate(*arguments, *turns)
    except Exception:
        return None
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, torch.Tensor) or out.numel() != width * width:
        return None
    partners: dict[int, int] = {}
    for i, row in enumerate(out.view(width, width)):
        others = [j for j in row.nonzero().flatten().tolist() if j != i]
        if len(others) > 1:
            return None
        if others:
            partners[i] = others[0]
    return partners if all(partners.get(j) == i for i, j in partners.items()) else None


def _completed(partners: dict[int, int], head_dim: int) -> Pairs:
    free = [i for i in range(head_dim) if i not in partners]
    half = len(free) // 2
    pairs = [(i, j) for i, j in partners.items() if i < j] + list(zip(free[:half], free[half:]))
    return tuple(sorted(pairs))
