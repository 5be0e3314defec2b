"""The routed experts of a layer in a checkpoint: rows of channels of all experts, read one expert at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Codec, PlainCodec
from ..layouts import DecoderLayer, Experts
from ..method.channels import EXPERTS
from .prequantized import PrequantizedError, StoredBank, all_as_they_are, stored_matrix
from .prequantized.matrix import REMEDY
from .shard_files import Stack, TensorFiles, digest, spaced, weight_key

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

    def stored(self, name: str) -> StoredBank | None:
        """The matrices that the files hold encoded, if they do.

        Raises:
            PrequantizedError: they do, in a form that is not read.
        """
        stack = self.files.stacks.get(f"{self.path}.{name}")
        alone = stack or Stack(((self.key(name),),), ())  # All of them in one tensor.
        if not (coded := alone.coded(self.files)):
            return None
        if stack is None or self.layout.transposed or self.layout.interleaved:
            raise PrequantizedError(
                f"{coded[0]} of {self.files.folder} is quantised: routed experts are read in fp8 where each has matrices of "
                f"its own in the files, with gate and up apart. {REMEDY}"
            )
        keys = [key for of_one in stack.keys for key in of_one]
        if len(coded) < len(keys):
            plain = next(key for key in keys if key not in coded)
            raise PrequantizedError(
                f"{plain} of {self.files.folder} is not quantised, and {coded[0]} is: routed experts of a layer are read "
                f"if all are, or none. {REMEDY}"
            )
        found = [matrix for key in keys if (matrix := stored_matrix(self.files, key))]
        return StoredBank(found, keys[0], transposed=name == "down_proj")

    def codec(self, stored: StoredBank | None, asked: Codec, dtype: torch.dtype) -> Codec:
        """How a run that asks for the codec ``asked`` stores a matrix that is :meth:`stored` so.

        Raises:
            PrequantizedError: see :meth:`StoredBank.codec`.
        """
        if stored:
            return stored.codec(asked)
        return PlainCodec(dtype) if all_as_they_are(self.files, asked) else asked

    def rows(self, name: str, start: int, stop: int, stored: StoredBank | None = None) -> Tensor:
        """(stop - start, H) in values: in the dtype of the files, or fp32 of ``stored`` ones, and memory of their own."""
        each, found = self._of_one(name), []
        with self.files.opened():
            for expert in range(start // each, -(-stop // each)):
                of_one = self._one(name, expert, stored)
                found.append(of_one[max(start - expert * each, 0) : stop - expert * each])
        return torch.cat(found) if found else torch.empty(0, self.layout.hidden)

    def scored(self, name: str, codec: Codec, dtype: torch.dtype) -> Tensor:
        """Gate or up (``experts.gate_proj``) of all experts, (E·W, H), as ``codec`` stores the two."""
        stored = self.stored("gate_up_proj")
        rows = self.rows("gate_up_proj", 0, self.channels("gate_up_proj"), stored).to(dtype)
        if stored is None:
            rows = self.codec(None, codec, dtype).roundtrip(rows)
        both = rows.view(self.layout.count, 2, self.layout.width, self.layout.hidden)
        return both[:, EXPERTS.index(name)].flatten(0, 1)

    def mark(self, name: str, codec: Codec, dtype: torch.dtype) -> str:
        """A short name of what gate or up of every expert are as ``codec`` stores them: of evenly spaced values."""
        with self.files.opened():
            if found := self.stored("gate_up_proj"):
                return f"{name}:{found.mark()}"
            sample = torch.cat([spaced(self._one("gate_up_proj", e))[::8] for e in range(self.layout.count)])
        shape = self.layout.count * self.layout.width, self.layout.hidden
        return f"{self.codec(None, codec, dtype).mark}{name}:{digest(sample.to(dtype), shape)}"

    def key(self, name: str) -> str:
        """Of the tensor in the files that is read first, for messages."""
        whole = f"{self.path}.{name}"
        return self.files.stacks[whole].keys[0][0] if whole in self.files.stacks else weight_key(self.files, whole)

    def _of_one(self, name: str) -> int:
        return self.layout.width * (2 if name == "gate_up_proj" else 1)

    def _one(self, name: str, expert: int, stored: StoredBank | None = None) -> Tensor:
        """The rows of one expert."""
        whole, one = f"{self.path}.{name}", slice(expert, expert + 1)
        if stored:
            count = len(stored.matrices) // self.layout.count
            of_one = stored.matrices[expert * count : (expert + 1) * count]
            own = torch.cat([matrix.rows(0, matrix.shape[0]) for matrix in of_one])[None]
        elif stack := self.files.stacks.get(whole):
            own = stack.read(self.files, one)
        else:
            own = self.files.read(weight_key(self.files, whole), one)
        return self.layout.gate_up_rows(own) if name == "gate_up_proj" else self.layout.down_rows(own)
