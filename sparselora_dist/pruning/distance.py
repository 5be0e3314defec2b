"""How far the outputs of a layer are from those that the layers of another model have: LoSA's reconstruction error.

e = (1/d) · Σ_c (‖Y[:, c] − Y'[:, c]‖ / ‖Y[:, c]‖)²        over all tokens, of the d channels c
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..io.shard_files import TensorFiles
from ..layerwise.layer_stream import Call, LayerStream
from ..layerwise.statistics import add_parts
from ..layouts import DecoderLayer


class Reference:
    """The model that outputs are compared with, one layer at a time in the place of the pruned one.

    Args:
        stream: of the pruned model, whose layers are borrowed.
        files: the reference's tensors, by the same names.
        hidden: what its first layer is given of each of this rank's sequences.
    """

    def __init__(self, stream: LayerStream, files: TensorFiles, hidden: list[Tensor]) -> None:
        self.stream, self.files, self.hidden = stream, files, list(hidden)

    def advance(self, layer: DecoderLayer, call: Call) -> None:
        """Its outputs of the layer, which must not be filled."""
        values = {key: self.files.read(key) for key in self.stream.keys(layer).values()}
        with self.stream.filled(layer, values):
            for place, hidden in enumerate(self.hidden):
                self.hidden[place] = self.stream.run(layer, hidden, call)

    def error(self, hidden: list[Tensor], parts: list[range], owner: int) -> float | None:
        """Of this rank's sequences' outputs ``hidden``; on rank ``owner``, ``None`` on the others. A collective."""
        sums: list[Tensor] = []
        place = 0
        for part in parts:
            both = []
            for _ in part:
                mine, other = hidden[place][0].float(), self.hidden[place][0].float()
                both.append(torch.stack([(other - mine).square().sum(0), other.square().sum(0)]).double())
                place += 1
            sums.append(torch.stack(both).sum(0))
        total = add_parts(sums, owner)
        if total is None:
            return None
        # A channel without values is as it was, or there is nothing to measure it by.
        return (total[0] / total[1].clamp_min(1e-30))[total[1] > 0].sum().item() / total.shape[1]
