"""What LoftQ leaves on the disk: a mark in ``adapter_config.json``, and what was subtracted before a matrix was stored.

    "loftq": {"format": "bcq", "bits": 3, "double_quant": false, "rounds": 2}

The adapter corrects the base's matrices as training stored them: in that format, and from the second round on not of the
checkpoint's values but of these less ``B·A``, the *shift* (:mod:`sparselora_dist.method.loftq`). The file
``loftq.safetensors`` beside the adapter has it, ``<module>.a`` (r, in) and ``<module>.b`` (out, r) in fp32, so that resuming
and merging store the same matrices without decomposing any. PEFT knows neither: it warns of the key by name, and leaves it
out.

A folder that ``sparselora-dist quantize --loftq`` made needs none of this: its base is on the disk as it is computed with,
and the adapter to start from lies beside it, in ``loftq_init``. That one's config says ``loftq_rounds``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config.quantization import BITS, Format, QuantizationSection
from ..method.loftq import Pair, less
from .manifest import CorruptFileError, read_safetensors, share
from .shard_files import TensorFiles, digest, weight_key

KEY = "loftq"
FILE = "loftq.safetensors"
START = "loftq_init"
"""In the folder of a quantised model: the adapter that starts over it."""
ROUNDS, CODE_BITS = "loftq_rounds", "loftq_bits"
"""In its ``adapter_config.json``: after how many rounds, and of how many bits the codes are."""
SHIFT = "loftq_shift"
"""Attribute of a PEFT model: its :class:`Shift`, for whoever saves the adapter."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How the base was stored that an adapter was trained on."""

    format: Format
    bits: int
    double_quant: bool
    """Of nf4."""
    rounds: int

    @classmethod
    def of(cls, quantization: QuantizationSection, rounds: int) -> Mark:
        name = quantization.stored
        assert name is not None
        return cls(name, quantization.width, name == "nf4" and quantization.bnb_4bit_use_double_quant, rounds)

    @classmethod
    def read(cls, config: Mapping[str, Any], source: Path) -> Mark | None:
        """What ``adapter_config.json`` at ``source`` says; None of an adapter that LoftQ did not start.

        Raises:
            ValueError: the mark is not one.
        """
        said = config.get(KEY)
        if not said:
            return None
        kinds = {"format": str, "bits": int, "double_quant": bool, "rounds": int}
        if not isinstance(said, dict) or {key: type(value) for key, value in said.items()} != kinds:
            raise ValueError(f"{source}: {KEY!r} is {said!r}: expected {', '.join(kinds)} of a base that LoftQ stored")
        mark = cls(**said)
        if mark.bits not in BITS.get(mark.format, ()) or mark.rounds < 1:
            raise ValueError(f"{source}: {KEY!r} is {said!r}, which this version does not know: use a newer one")
        return mark

    def __str__(self) -> str:
        return f"{self.format} of {self.bits} bits"

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format, "bits": self.bits, "double_quant": self.double_quant, "rounds": self.rounds}


@dataclass(frozen=True, slots=True)
class Shift:
    """What is subtracted from a checkpoint's matrices before they are stored; of most runs nothing."""

    pairs: Mapping[str, Pair] = field(default_factory=dict)
    """By the module in the causal LM: ``model.layers.0.self_attn.q_proj``."""

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def by_key(self, files: TensorFiles) -> KeyedShift:
        """By the keys of a checkpoint's files.

        Raises:
            CorruptFileError: it has no such matrix, or one of another shape.
        """
        found = {}
        for module, (a, b) in self.pairs.items():
            key = weight_key(files, f"{module}.weight")
            shape = files.tensors[key].shape
            if shape != (b.shape[0], a.shape[1]):
                raise CorruptFileError(
                    f"{FILE} is of another model: its {module!r} is {(b.shape[0], a.shape[1])}, but {key} of {files.folder} "
                    f"is {shape}"
                )
            found[key] = (a, b)
        return KeyedShift(found)

    def save(self, folder: Path) -> None:
        """Beside an adapter; nothing where there is nothing."""
        if self.pairs:
            sides = {f"{name}.{side}": value for name, pair in self.pairs.items() for side, value in zip("ab", pair)}
            save_file({name: value.cpu().contiguous() for name, value in sides.items()}, folder / FILE)
            share(folder / FILE)

    @classmethod
    def read(cls, folder: Path, mark: Mark) -> Shift:
        """Of the adapter in a folder.

        Raises:
            CorruptFileError: the file is missing, damaged, or not what its name says.
        """
        if mark.rounds == 1:
            return cls()
        if not (folder / FILE).is_file():
            raise CorruptFileError(
                f"{folder} lacks {FILE}: its adapter started after {mark.rounds} rounds of LoftQ, and the base that it was "
                "trained on cannot be stored without that file"
            )
        tensors = read_safetensors(folder / FILE)[0]
        names = {name.rpartition(".")[0] for name in tensors}
        pairs = {}
        for name in names:
            a, b = (tensors.pop(f"{name}.{side}", None) for side in "ab")
            if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise CorruptFileError(f"{folder / FILE}: {name!r} has no two factors that fit together")
            if not all(bool(torch.isfinite(side).all()) for side in (a, b)):
                raise CorruptFileError(f"{folder / FILE}: {name!r} holds NaN or Inf")
            pairs[name] = (a.float(), b.float())
        if tensors or not pairs:
            raise CorruptFileError(f"{folder / FILE} holds {sorted(tensors)[:1]}: expected pairs of factors")
        return cls(pairs)


@dataclass(frozen=True, slots=True)
class KeyedShift:
    """A :class:`Shift` by the keys of a checkpoint's files."""

    pairs: Mapping[str, Pair] = field(default_factory=dict)

    def rows(self, key: str, values: Tensor, start: int = 0, transposed: bool = False) -> Tensor:
        """Rows of a matrix less what is subtracted of it, in fp32; as they are where there is nothing.

        Args:
            key: of the matrix (out, in).
            values: (n, in), or (n, out) of the matrix transposed.
            start: number of the first of them.
            transposed: which of the two.
        """
        if key not in self.pairs:
            return values
        a, b = (side.to(values.device) for side in self.pairs[key])
        if transposed:
            a, b = b.t(), a.t()
        return less(values, a, b[start : start + values.shape[0]])

    def mark(self, key: str) -> str:
        """What tells the matrix from the checkpoint's, in a fingerprint."""
        if key not in self.pairs:
            return ""
        a, b = self.pairs[key]
        return f"loftq-{digest(torch.cat([a.flatten(), b.flatten()]), tuple(a.shape))[:16]}:"


def loftq_sentence(mark: Mark) -> str:
    """What a reader of the adapter's card must know."""
    return (
        f"This adapter was started by LoftQ: it makes up for what storing the base in {mark} takes away. Over the base in "
        "full precision it is another model. Merge it with `sparselora-dist merge`, which stores the base as training did."
    )
