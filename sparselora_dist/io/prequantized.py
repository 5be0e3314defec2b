"""Checkpoints that bitsandbytes has quantised already: their codes and scales, by row."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparselora_kernels import nf4_rows
from sparselora_kernels.nf4 import BLOCK, NESTED_BLOCK, absmax_map

from ..codecs import Codec, NF4Codec, PlainCodec
from ..codecs.nf4 import pack_scales
from ..codecs.nf4_files import STATE
from .manifest import CorruptFileError
from .shard_files import TensorFiles


class PrequantizedError(ValueError):
    """A quantised checkpoint in a form that is not read."""


class Prequantized:
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

    def check_codec(self, codec: Codec) -> None:
        """Refuse a run that stores its matrices in another way.

        Raises:
            PrequantizedError: the key of the run is named.
        """
        at = f"{self._key} of {self._checkpoint.folder}"
        if not isinstance(codec, NF4Codec):
            raise PrequantizedError(f"{at} is 4-bit: set quantization.load_in_4bit true")
        if codec.double_quant != self.double_quant:
            raise PrequantizedError(
                f"{at} was quantised with bnb_4bit_use_double_quant {self.double_quant}: set the same in 'quantization'"
            )

    def encoded(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows ``start`` ... ``stop - 1`` as :class:`NF4Codec` stores them, nothing quantised anew."""
        count = self.shape[1] // BLOCK
        begin, end = start * count, stop * count
        codes = self._checkpoint.read(self._key, slice(begin * BLOCK // 2, end * BLOCK // 2)).view(
            stop - start, self.shape[1] // 2
        )
        absmax = self._checkpoint.read(f"{self._key}.absmax", slice(begin, end)).view(stop - start, count)
        if not self.double_quant:
            return {"codes": codes, "scales": absmax.float().contiguous().view(torch.uint8)}
        nested = slice(begin // NESTED_BLOCK, -(-end // NESTED_BLOCK))
        scales = self._checkpoint.read(f"{self._key}.nested_absmax", nested).float()
        return {"codes": codes, "scales": pack_scales(absmax, scales, self._offset, start)}

    def rows(self, start: int, stop: int) -> Tensor:
        """The same rows, decoded, in fp32."""
        parts = self.encoded(start, stop)
        return nf4_rows(
            parts["codes"],
            parts["scales"],
            None,
            torch.float32,
            length=self.shape[1],
            double_quant=self.double_quant,
            first=start,
        )

    def columns(self, start: int, stop: int, block: int = 1024) -> Tensor:
        """Columns ``start`` ... ``stop - 1`` of all rows, (stop - start, out) fp32; a few rows at a time are decoded."""
        result = torch.empty(stop - start, self.shape[0])
        if start == stop:
            return result
        for row in range(0, self.shape[0], block):
            last = min(row + block, self.shape[0])
            result[:, row:last] = self.rows(row, last)[:, start:stop].t()
        return result


@lru_cache(maxsize=8)
def prequantized(checkpoint: TensorFiles, key: str) -> Prequantized | None:
    """The matrix, if it is quantised."""
    return Prequantized(checkpoint, key) if key + STATE in checkpoint.tensors else None


def stored_codec(checkpoint: TensorFiles, key: str, codec: Codec, dtype: torch.dtype) -> Codec:
    """How a matrix is stored: by the run's codec, but plain where a quantised checkpoint left it as it was.

    Raises:
        PrequantizedError: it is quantised in another way than the run asks for.
    """
    if found := prequantized(checkpoint, key):
        found.check_codec(codec)
        return codec
    return PlainCodec(dtype) if _is_quantised(checkpoint) else codec


@lru_cache(maxsize=8)
def _is_quantised(checkpoint: TensorFiles) -> bool:
    return any(".quant_state." in name for name in checkpoint.tensors)


def check_quantization_config(config: Any, codec: Codec, name: str) -> None:
    """Refuse quantised checkpoints that are not read, or that the run did not ask for.

    Raises:
        PrequantizedError: the key of the checkpoint's config is named.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    at = f"the checkpoint {name} (quantization_config in its config.json)"
    if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_4bit"):
        raise PrequantizedError(
            f"{at} is quantised by {settings.get('quant_method')!r}: only bitsandbytes' 4-bit NF4 is read. Use the bf16 "
            "checkpoint with quantization.load_in_4bit true"
        )
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
