"""Checkpoints in NF4 by bitsandbytes: their codes and scales, by row."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from sparselora_kernels import nf4_rows
from sparselora_kernels.nf4 import BLOCK, NESTED_BLOCK, absmax_map

from ...codecs import Codec, NF4Codec
from ...codecs.nf4 import pack_scales
from ...codecs.nf4_files import STATE
from ..manifest import CorruptFileError
from ..shard_files import TensorFiles, digest
from .matrix import PrequantizedError, StoredMatrix


class BitsAndBytesMatrix(StoredMatrix):
    """One matrix (out, in) of such a checkpoint.

    Raises:
        PrequantizedError: another block size, or another 8-bit map than bitsandbytes' own.
        CorruptFileError: codes or scales are missing, or not as many as the shape needs.
    """

    def __init__(self, checkpoint: TensorFiles, key: str) -> None:
        self._checkpoint, self._key = checkpoint, key
        state: dict[str, Any] = json.loads(bytes(checkpoint.read(key + STATE).tolist()))
        self.shape: tuple[int, int] = tuple(state["shape"])
        self.double_quant = "nested_offset" in state
        self._offset = torch.tensor(state.get("nested_offset", 0.0))
        sizes = (state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK))
        if sizes != (BLOCK, NESTED_BLOCK) or self.shape[1] % BLOCK:
            raise PrequantizedError(
                f"{key} of {checkpoint.folder} has block sizes {sizes} and rows of {self.shape[1]} values: only "
                f"{(BLOCK, NESTED_BLOCK)} and rows of a multiple of {BLOCK} are read. Quantise the bf16 checkpoint instead"
            )
        self._check_sizes()
        if self.double_quant:
            stored = checkpoint.read(f"{key}.nested_quant_map")
            if not torch.equal(stored.float(), absmax_map(torch.device("cpu"))):
                raise PrequantizedError(f"{key} of {checkpoint.folder} has another 8-bit map than bitsandbytes'")

    def _check_sizes(self) -> None:
        """Slices past the end of a tensor are cut short without a word, so the headers are looked at."""
        values = self.shape[0] * self.shape[1]
        absmax = values // BLOCK
        sizes = {self._key: values // 2, f"{self._key}.absmax": absmax}
        if self.double_quant:
            sizes |= {f"{self._key}.nested_absmax": -(-absmax // NESTED_BLOCK), f"{self._key}.nested_quant_map": 256}
        for name, want in sizes.items():
            have = math.prod(self._checkpoint.tensors[name].shape) if name in self._checkpoint.tensors else 0
            if have != want:
                raise CorruptFileError(
                    f"{name} of {self._checkpoint.folder} has {have} values, but a 4-bit matrix of shape {self.shape} needs "
                    f"{want}"
                )

    def codec(self, asked: Codec, transposed: bool) -> Codec:
        """See :meth:`StoredMatrix.codec`."""
        at = f"{self._key} of {self._checkpoint.folder}"
        if not isinstance(asked, NF4Codec):
            raise PrequantizedError(f"{at} is 4-bit: set quantization.load_in_4bit true")
        if asked.double_quant != self.double_quant:
            raise PrequantizedError(
                f"{at} was quantised with bnb_4bit_use_double_quant {self.double_quant}: set the same in 'quantization'"
            )
        return asked

    def part(self, name: str, start: int, stop: int, transposed: bool) -> Tensor | None:
        """See :meth:`StoredMatrix.part`. Blocks run along the stored rows: down and o are quantised again in the other
        direction."""
        if transposed:
            return None
        return self._codes(start, stop) if name == "codes" else self._scales(start, stop)

    def _codes(self, start: int, stop: int) -> Tensor:
        width = self.shape[1] // 2
        return self._checkpoint.read(self._key, slice(start * width, stop * width)).view(stop - start, width)

    def _scales(self, start: int, stop: int) -> Tensor:
        count = self.shape[1] // BLOCK
        begin, end = start * count, stop * count
        absmax = self._checkpoint.read(f"{self._key}.absmax", slice(begin, end)).view(stop - start, count)
        if not self.double_quant:
            return absmax.float().contiguous().view(torch.uint8)
        nested = slice(begin // NESTED_BLOCK, -(-end // NESTED_BLOCK))
        scales = self._checkpoint.read(f"{self._key}.nested_absmax", nested).float()
        return pack_scales(absmax, scales, self._offset, start)

    def rows(self, start: int, stop: int) -> Tensor:
        """See :meth:`StoredMatrix.rows`."""
        return nf4_rows(
            self._codes(start, stop),
            self._scales(start, stop),
            None,
            torch.float32,
            length=self.shape[1],
            double_quant=self.double_quant,
            first=start,
        )

    def mark(self) -> str:
        """See :meth:`StoredMatrix.mark`."""
        return f"bitsandbytes:{digest(self._checkpoint.sample(self._key), self._checkpoint.tensors[self._key].shape)}"


def find(checkpoint: TensorFiles, key: str) -> BitsAndBytesMatrix | None:
    """The matrix, if bitsandbytes quantised it."""
    return BitsAndBytesMatrix(checkpoint, key) if key + STATE in checkpoint.tensors else None


def is_quantised(checkpoint: TensorFiles) -> bool:
    """Whether bitsandbytes quantised any of its matrices."""
    return any(".quant_state." in name for name in checkpoint.tensors)


def check_config(settings: dict[str, Any], codec: Codec, at: str) -> bool:
    """Whether a ``quantization_config`` is of NF4 by bitsandbytes.

    Raises:
        PrequantizedError: it is, in a form that is not read, or not what the run's ``codec`` is.
    """
    if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_4bit"):
        return False
    for key, want in (("bnb_4bit_quant_type", "nf4"), ("bnb_4bit_quant_storage", "uint8")):
        if settings.get(key, want) != want:
            raise PrequantizedError(
                f"{at} has {key} {settings[key]!r}: only {want!r} is read. Other storage dtypes regroup the codes as "
                "floats, which engines cast; use the bf16 checkpoint with quantization.load_in_4bit true"
            )
    if not isinstance(codec, NF4Codec):
        raise PrequantizedError(f"{at} is 4-bit: set quantization.load_in_4bit true")
    double = bool(settings.get("bnb_4bit_use_double_quant"))
    if codec.double_quant != double:
        raise PrequantizedError(f"{at} has bnb_4bit_use_double_quant {double}: set the same in 'quantization'")
    return True
