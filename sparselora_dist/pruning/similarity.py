"""How alike the layers' inputs are: linear CKA between sequences.

A sequence is one example, its hidden states (length · H) laid in a row are its features. So a layer is known by a Gram
matrix of n × n numbers, whatever the model's size: features of all pairs of layers (H × H each) are never formed. With X
(n, length · H) and its mean over the sequences taken off,

    G = X·Xᵀ        CKA(i, j) = ⟨G_i, G_j⟩ / (‖G_i‖·‖G_j‖)

That is CKA of the whole features and no estimate of it: ‖X_iᵀ·X_j‖² = ⟨G_i, G_j⟩. Taking the mean off before the product
keeps what the sequences have in common, such as the huge values of a first token, out of the sums.

The positions are dealt in parts, a part to a rank, which is given the part of every sequence; parts are added in their
order, so that G is the same to the bit at any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..config import ConfigError
from ..layerwise.statistics import PARTS, add_parts, parts_of, sharers
from .source import Source


@dataclass(frozen=True, slots=True)
class Similarity:
    """Of every layer."""

    layers: list[str]
    """Their paths."""
    weights: list[int]
    """The weights of their linears."""
    grams: list[Tensor]
    """(n, n) fp64 of its inputs; on rank 0, elsewhere none."""

    def cka(self) -> Tensor:
        """(L, L) fp64.

        Raises:
            ConfigError: a layer is given the same by all sequences.
        """
        for path, gram in zip(self.layers, self.grams):
            if not gram.norm() > 0:
                raise ConfigError(f"{path} is given the same by all {len(gram)} calibration sequences: give other data")
        flat = torch.stack([gram.flatten() / gram.norm() for gram in self.grams])
        return flat @ flat.t()

    def alike(self) -> list[float]:
        """c_i, the sum of the CKA of each layer's inputs with the others'."""
        cka = self.cka()
        return (cka.sum(1) - cka.diagonal()).tolist()


@torch.no_grad()
def layer_similarity(
    model: str, adapter: Path | None, data: str, sequences: int, length: int | None, device: torch.device
) -> Similarity:
    """How alike the layers' inputs are in a model with an adapter on it. A collective of all ranks.

    Raises:
        ConfigError: see :meth:`Source.of` and :meth:`Source.sequences`.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = Source.of(model, adapter, device)
    tokens = source.sequences(data, sequences, length).sequences
    numbers = [number for part in parts_of(len(tokens), rank, ranks) for number in part]
    hidden, calls = source.stream.embed(tokens[numbers or [0]])
    shape, hidden = hidden[0].shape, hidden[: len(numbers)]
    likeness = Likeness(len(tokens), rank, ranks)
    layers = source.stream.layers
    for layer in tqdm(layers, "comparing", unit="layer", disable=None if rank == 0 else True):
        likeness.add(hidden, *shape[1:])
        if layer is layers[-1]:
            break
        with source.merged(layer):
            for place, states in enumerate(hidden):
                hidden[place] = source.stream.run(layer, states, calls[layer.index])
    weights = [sum(linear.weight.numel() for linear in source.stream.linears(layer).values()) for layer in layers]
    return Similarity([layer.path for layer in layers], weights, likeness.grams)


class Likeness:
    """Gram matrices of the inputs of one layer after the other.

    Args:
        sequences: n, of all ranks together, from 2.
        rank, ranks: who this is; sequences lie as :func:`.statistics.parts_of` deals them.
    """

    def __init__(self, sequences: int, rank: int, ranks: int) -> None:
        self.sequences, self.rank, self.ranks = sequences, rank, ranks
        self.owners = sharers(sequences, ranks)
        """How many ranks have sequences, the first ones."""
        self.grams: list[Tensor] = []
        """(n, n) fp64 of each layer; on rank 0 only."""

    def add(self, hidden: list[Tensor], length: int, width: int) -> None:
        """The next layer's inputs, (1, length, width) of each sequence of this rank. A collective."""
        parts = min(PARTS, length)
        bounds = [length * part // parts for part in range(parts + 1)]
        mine: list[Tensor] = []
        for part in range(parts):
            # As many in a row on each rank, so that parts are added in their order.
            owner = part * self.owners // parts
            rows = self._gathered(hidden, slice(bounds[part], bounds[part + 1]), owner, width)
            if rows is not None:
                mine.append(_gram(rows))
        total = add_parts(mine, 0)
        if self.rank == 0:
            assert total is not None
            self.grams.append(total.cpu())

    def _gathered(self, hidden: list[Tensor], part: slice, owner: int, width: int) -> Tensor | None:
        """(n, positions · width) of some positions of all sequences, on ``owner``."""
        own = torch.cat([states[:, part] for states in hidden]).contiguous() if hidden else None
        blocks: list[Tensor] = []
        for source in range(self.owners):
            count = sum(len(numbers) for numbers in parts_of(self.sequences, source, self.ranks))
            if self.rank == owner:
                if source == owner:
                    assert own is not None
                    blocks.append(own)
                    continue
                assert own is not None
                block = torch.empty((count, part.stop - part.start, width), dtype=own.dtype, device=own.device)
                dist.recv(block, source)
                blocks.append(block)
            elif self.rank == source:
                assert own is not None
                dist.send(own, owner)
        return torch.cat(blocks).flatten(1) if self.rank == owner else None


def _gram(rows: Tensor) -> Tensor:
    """(n, features) -> (n, n) fp64, the mean over n taken off."""
    rows = rows.float()
    rows = rows - rows.mean(0)
    return (rows @ rows.t()).double()
