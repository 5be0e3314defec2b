"""How much of its own a layer contributes, seen from its hidden states alone: the idea of LoSA (ICLR 2025).

LoSA prunes layers the more, the more their representations share with the other layers'. The measure here is linear CKA
(normalised HSIC with a linear kernel) between the outputs of two layers, X and Y, over the same context tokens:

    CKA(X, Y) = <K, L> / (|K| |L|),   K, L = centred X Xᵀ, Y Yᵀ,   importance of X = mean over the other Y of 1 - CKA(X, Y)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..layouts import decoder_layers
from .probe import Prober
from .sample import context_mask

# Layers are compared on so many rows, and evenly spaced context tokens of a row.
_ROWS, _TOKENS = 32, 8


def layer_importance(prober: Prober) -> list[float]:
    """Per layer, in [0, 1]. Dense forwards of a part of the sample. Every rank must call it."""
    sample, layers = prober.sample, decoder_layers(prober.engine.module)
    batches = min(len(sample.batches), -(-_ROWS // sample.batch_size))
    states: list[list[Tensor]] = [[] for _ in layers]
    is_context = context_mask(prober.dataset)
    for number in range(batches):
        inputs = prober.inputs(number)
        places, positions, filled = _pick(prober, number, is_context, inputs["input_ids"].shape[1])
        hooks = [
            layer.module.register_forward_hook(_Collect(states[layer.index], places, positions, filled, prober))
            for layer in layers
        ]
        try:
            prober.forward(inputs, {})
        finally:
            for hook in hooks:
                hook.remove()
    return importance_of([torch.cat(parts) for parts in states])


def importance_of(states: Sequence[Tensor]) -> list[float]:
    """The formula above; ``states`` are (tokens, hidden) per layer, the same tokens in the same order."""
    kernels = []
    for hidden in states:
        x = hidden.double() - hidden.double().mean(0)
        kernel = (x @ x.T).flatten()
        kernels.append(kernel / kernel.norm().clamp_min(torch.finfo(torch.float64).tiny))
    stacked = torch.stack(kernels)
    distance = (1 - stacked @ stacked.T).clamp(0, 1).fill_diagonal_(0)
    return (distance.sum(1) / max(len(states) - 1, 1)).tolist()


def _pick(prober: Prober, number: int, is_context: np.ndarray, length: int) -> tuple[list[int], list[int], list[int]]:
    """Places of this rank's tokens among all ranks', their flat positions in its batch, and all places that are filled.

    Args:
        length: of this rank's padded rows.
    """
    places: list[int] = []
    positions: list[int] = []
    filled: list[int] = []
    ranks, offsets = prober.engine.ranks, prober.dataset.offsets
    for slot, row in enumerate(prober.sample.batches[number]):
        if row < 0:
            continue
        context = np.flatnonzero(is_context[offsets[row] : offsets[row + 1]])
        chosen = context[np.linspace(0, len(context) - 1, min(len(context), _TOKENS)).astype(np.int64)]
        taken = [slot * _TOKENS + i for i in range(len(chosen))]
        filled += taken
        if slot % ranks.world_size == ranks.rank:
            places += taken
            positions += [slot // ranks.world_size * length + int(position) for position in chosen]
    return places, positions, filled


class _Collect:
    """Forward hook of a decoder layer: the chosen tokens of all ranks, in one order at any number of ranks."""

    def __init__(
        self, kept: list[Tensor], places: list[int], positions: list[int], filled: list[int], prober: Prober
    ) -> None:
        self.kept, self.filled = kept, filled
        self.places, self.positions = (torch.tensor(i, dtype=torch.int64) for i in (places, positions))
        self.size = prober.sample.batch_size * _TOKENS

    def __call__(self, module: object, args: object, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        mine = hidden.flatten(0, 1).index_select(0, self.positions.to(hidden.device)).float()
        everyone = mine.new_zeros(self.size, mine.shape[1])
        everyone[self.places.to(hidden.device)] = mine
        if dist.is_initialized():
            dist.all_reduce(everyone)
        self.kept.append(everyone.cpu()[self.filled])
