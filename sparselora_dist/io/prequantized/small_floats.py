"""A matrix of fp8 or fp4 numbers in a checkpoint, whoever wrote it, as :class:`FloatsCodec` stores it.

Codes and scales stay what they are. Where the matrix is stored transposed (o and down), its codes are turned, and the block
of a scale with them: 16 values of a row become one value of 16 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, nonzero
from sparselora_kernels.floats import E4M3, E4M3_OVER, E8M0, FP32
from sparselora_kernels.stored import unpack

from ...codecs import Codec, FloatsCodec
from ..manifest import CorruptFileError
from ..shard_files import TensorFiles, digest, is_finite
from .matrix import REMEDY, PrequantizedError, StoredMatrix

_NUMBERS = ("F32", "BF16", "F16")
_POWERS = ("U8", "F8_E8M0")
_NAN = {E4M3: 0x7F, E4M3_OVER: 0x7F, E8M0: 0xFF}
"""The bits of a scale's byte that are all set in NaN."""


class Grain(NamedTuple):
    """How far a scale reaches; 0 is all the way."""

    rows: int
    columns: int

    def counts(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many scales a matrix (out, in) has, down and across."""
        down, across = (-(-size // step) if step else 1 for size, step in zip(shape, self))
        return down, across

    def __str__(self) -> str:
        return " x ".join(str(step) if step else "all" for step in self)


class SmallFloats(StoredMatrix):
    """One matrix (out, in) of such a checkpoint.

    Args:
        checkpoint, key: what the family calls the matrix' weight.
        codes: the tensor of its codes: a byte a value (e4m3), or two values a byte (e2m1), the first in the low half.
        scales: the tensor of scales.
        grains: how far one of them may reach; their shape tells which it is.
        whole: a tensor of one number besides, which all scales of nvfp4 are multiplied with.
        over: they are divided by it.

    Raises:
        CorruptFileError: a tensor is missing, or not as many as the shape needs; a scale is no number.
        PrequantizedError: codes or scales of a kind that is not read.
    """

    def __init__(
        self,
        checkpoint: TensorFiles,
        key: str,
        codes: str,
        scales: str,
        grains: Sequence[Grain],
        whole: str | None = None,
        over: bool = False,
    ) -> None:
        self._checkpoint, self._key = checkpoint, key
        self._codes, self._scales, self._whole = codes, scales, whole
        held = checkpoint.tensors[codes]
        if held.dtype not in ("F8_E4M3", "U8") or len(held.shape) != 2:
            raise PrequantizedError(
                f"{codes} of {checkpoint.folder} is {held.dtype} of shape {held.shape}: read are matrices of F8_E4M3, and "
                f"of U8 with two 4-bit numbers a byte. {REMEDY}"
            )
        self._bits = 8 if held.dtype == "F8_E4M3" else 4
        self.shape = (held.shape[0], held.shape[1] * 8 // self._bits)
        self.least_zeros = (
            0.01 if self._bits == 8 else 0.16
        )  # Of Gaussian weights nvfp4 has 7 % of zeros, mxfp4 up to 11 %.
        for name in (scales, whole):
            if name is not None and name not in checkpoint.tensors:
                raise CorruptFileError(f"{checkpoint.folder} has {codes!r}, but no {name!r}: its scales are missing")
        self._kind = self._kind_of_scales(over)
        self._grain = self._grain_of(grains)
        self._whole_bytes = self._read_whole(whole) if whole else None

    def _kind_of_scales(self, over: bool) -> int:
        dtype = self._checkpoint.tensors[self._scales].dtype
        if self._whole is not None:
            known = {"F8_E4M3": E4M3_OVER if over else E4M3}
        else:
            known = dict.fromkeys(_POWERS, E8M0) | (dict.fromkeys(_NUMBERS, FP32) if self._bits == 8 else {})
        if dtype not in known:
            raise PrequantizedError(
                f"{self._scales} of {self._checkpoint.folder} is {dtype}: of {self._bits}-bit codes"
                f"{' with a scale over all' if self._whole else ''}, scales are read in {', '.join(known)}. {REMEDY}"
            )
        return known[dtype]

    def _grain_of(self, grains: Sequence[Grain]) -> Grain:
        shape = self._checkpoint.tensors[self._scales].shape
        for grain in grains:
            # One per tensor is written as () or (1,), one per channel as (out,) or (out, 1), blocks also as (n, 1, m, 1).
            if [size for size in shape if size > 1] == [size for size in grain.counts(self.shape) if size > 1]:
                return grain
        expected = " or ".join(f"{grain.counts(self.shape)} (one of {grain} values)" for grain in grains)
        raise CorruptFileError(
            f"{self._scales} of {self._checkpoint.folder} has shape {shape}, but the scales of a matrix of shape "
            f"{self.shape} have {expected}"
        )

    def _read_whole(self, name: str) -> Tensor:
        value = self._checkpoint.get(name).reshape(-1).float()
        if value.numel() != 1 or not is_finite(value) or not value.item():
            raise CorruptFileError(
                f"{name} of {self._checkpoint.folder} is {value.tolist()[:4]}: expected one number that is not zero"
            )
        return value.view(1, 1).clone().view(torch.uint8)

    @property
    def format(self) -> str:
        """What ``quantization.format`` calls it."""
        return self._codec(FloatsCodec(), False).name

    def codec(self, asked: Codec, transposed: bool) -> FloatsCodec:
        """See :meth:`StoredMatrix.codec`."""
        if not isinstance(asked, FloatsCodec) or asked.name != self.format:
            raise PrequantizedError(
                f'{self._key} of {self._checkpoint.folder} is {self.format}: set quantization.format "{self.format}"'
            )
        return self._codec(asked, transposed)

    def _codec(self, like: FloatsCodec, transposed: bool) -> FloatsCodec:
        every, block = self._grain[:: -1 if transposed else 1]
        return replace(like, bits=self._bits, scale=self._kind, block=block, every=every)

    def part(self, name: str, start: int, stop: int, transposed: bool) -> Tensor:
        """See :meth:`StoredMatrix.part`; everything is in the files."""
        if name == "whole":
            assert self._whole_bytes is not None
            return self._whole_bytes[start:stop]
        return (
            self._read_codes(start, stop, transposed) if name == "rows" else self._read_scales(start, stop, transposed)
        )

    def _read_codes(self, start: int, stop: int, transposed: bool) -> Tensor:
        if self._bits == 8:
            span = slice(start, stop)
            read = self._checkpoint.read_columns if transposed else self._checkpoint.read
            return self._numbers(self._codes, read(self._codes, span), 0x7F)
        if not transposed:
            return self._checkpoint.read(self._codes, slice(start, stop))
        first = start // 2
        packed = self._checkpoint.read_columns(self._codes, slice(first, -(-stop // 2)))
        codes = torch.stack((packed & 15, packed >> 4), 1).view(-1, self.shape[0])[start - 2 * first : stop - 2 * first]
        codes = torch.nn.functional.pad(codes, (0, self.shape[0] % 2))
        return codes[:, 1::2] << 4 | codes[:, ::2]

    def _read_scales(self, start: int, stop: int, transposed: bool) -> Tensor:
        """(stop - start, bytes of a row of them)."""
        name, span, counts = self._scales, slice(start, stop), self._grain.counts(self.shape)
        if self._checkpoint.tensors[name].shape == counts:
            read = self._checkpoint.read_columns if transposed else self._checkpoint.read
            scales = read(name, span)
        else:
            scales = self._checkpoint.get(name).reshape(counts)
            scales = (scales.t() if transposed else scales)[span].contiguous()
        if self._kind != FP32:
            return self._numbers(name, scales, _NAN[self._kind])
        self._checkpoint.check_finite(name, scales)
        return scales.float().view(torch.uint8)

    def _numbers(self, name: str, codes: Tensor, nan: int) -> Tensor:
        """The same codes, of which none is NaN."""
        if bool((codes & nan == nan).any()):
            where = self._checkpoint.folder / self._checkpoint.tensors[name].file
            raise CorruptFileError(f"{where}: {name!r} holds NaN: the file is damaged")
        return codes

    def rows(self, start: int, stop: int) -> Tensor:
        """See :meth:`StoredMatrix.rows`."""
        return self._part_of(start, stop).decode(None, torch.float32)

    def kept(self, start: int, stop: int) -> Tensor:
        """See :meth:`StoredMatrix.kept`."""
        return nonzero(self._part_of(start, stop))

    def _part_of(self, start: int, stop: int) -> EncodedWeight:
        codec, length = self._codec(FloatsCodec(), False), self.shape[1]
        parts = tuple(
            self.part(name, *((start, stop) if part.every == 1 else (0, part.rows(self.shape[0]))), False)
            for name, part in codec.parts(length).items()
        )
        layout = unpack(codec.stored(parts, length)).layout
        return EncodedWeight(parts, layout, start)

    def mark(self) -> str:
        """See :meth:`StoredMatrix.mark`."""
        names = [name for name in (self._codes, self._scales, self._whole) if name is not None]
        sample = torch.cat([self._checkpoint.sample(name).float() for name in names])
        return f"{self.format}:{digest(sample, self.shape)}"
