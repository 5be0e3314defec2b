"""The routed experts of a layer in a checkpoint: rows of channels of all experts, read one expert at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Codec
from ..layouts import DecoderLayer, Experts
from ..method.channels import EXPERTS
from .shard_files import TensorFiles, spaced, weight_key

MATRICES = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class BankFiles:
    """Where the two matrices of a layer's experts are: each one tensor in the files, or one or two an expert."""

    files: TensorFiles
    layout: Experts
    path: str
    """The experts' name in the causal LM, ``model.layers.3.mlp.experts``."""

    @classmethod
    def of(cls, files: TensorFiles, layer: DecoderLayer) -> BankFiles:
        assert layer.experts is not None
        return cls(files, layer.experts, f"{layer.path}.{layer.experts.path}")

    def channels(self, name: str) -> int:
        """Rows of ``gate_up_proj`` (E·2W) or ``down_proj`` (E·W), as they are stored here."""
        return self.layout.count * self._of_one(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start, H), in the dtype of the files and memory of their own."""
        each = self._of_one(name)
        found = []
        for expert in range(start // each, -(-stop // each)):
            of_one = self._one(name, expert)
            found.append(of_one[max(start - expert * each, 0) : stop - expert * each])
        return torch.cat(found) if found else torch.empty(0, self.layout.hidden)

    def scored(self, name: str, codec: Codec, dtype: torch.dtype) -> Tensor:
        """Gate or up (``experts.gate_proj``) of all experts, (E·W, H), as ``codec`` stores the two."""
        stored = codec.roundtrip(self.rows("gate_up_proj", 0, self.channels("gate_up_proj")).to(dtype))
        both = stored.view(self.layout.count, 2, self.layout.width, self.layout.hidden)
        return both[:, EXPERTS.index(name)].flatten(0, 1)

    def sample(self) -> Tensor:
        """Evenly spaced values of every expert's gate and up, of the files that hold them."""
        return torch.cat([spaced(self._one("gate_up_proj", e))[::8] for e in range(self.layout.count)])

    def key(self, name: str) -> str:
        """Of the tensor in the files that is read first, for messages."""
        whole = f"{self.path}.{name}"
        return self.files.stacks[whole].keys[0][0] if whole in self.files.stacks else weight_key(self.files, whole)

    def _of_one(self, name: str) -> int:
        return self.layout.width * (2 if name == "gate_up_proj" else 1)

    def _one(self, name: str, expert: int) -> Tensor:
        """The rows of one expert."""
        whole, one = f"{self.path}.{name}", slice(expert, expert + 1)
        if stack := self.files.stacks.get(whole):
            own = stack.read(self.files, one)
        else:
            own = self.files.read(weight_key(self.files, whole), one)
        return self.layout.gate_up_rows(own) if name == "gate_up_proj" else self.layout.down_rows(own)
