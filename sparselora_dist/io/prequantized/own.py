"""Checkpoints that ``sparselora-dist quantize`` has made: matrices by stored row, as a run keeps them.

Under a matrix' own name stands its first part, the others under the name and theirs, ``X.weight.params``. o and down are
transposed. What a matrix is says ``X.weight.stored``, JSON in bytes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from sparselora_kernels.stored import unpack

from ...codecs import Codec, FloatsCodec, LevelsCodec, codec_named
from ...config.quantization import BITS, Format, QuantizationSection
from ..manifest import CorruptFileError
from ..shard_files import TensorFiles, digest
from .matrix import PrequantizedError, StoredMatrix, columns_of

METHOD = "sparselora"
"""``quant_method`` in config.json."""
VERSION = 1
"""Of what stands in the files."""
STATE = ".stored"
FORMATS = ("fp8", "hqq", "bcq", "shiftadd", "billm")
"""What the command makes."""


def config_section(name: str, bits: int) -> dict[str, Any]:
    """``quantization_config`` of such a checkpoint."""
    return {"quant_method": METHOD, "format": name, "bits": bits, "version": VERSION}


def tensors_of(
    key: str, codec: Codec, parts: dict[str, Tensor], shape: tuple[int, int], transposed: bool
) -> dict[str, Tensor]:
    """A matrix (out, in) as the files hold it, by name.

    Args:
        key: its name.
        codec: that ``parts`` are of.
        parts: of all its stored rows.
        shape: (out, in).
        transposed: whether a stored row is an input.
    """
    name, bits = kind_of(codec)
    state = {"format": name, "bits": bits, "shape": list(shape), "transposed": transposed, "version": VERSION}
    names = part_keys(key, codec, shape[0 if transposed else 1])
    tensors = {names[part]: value for part, value in parts.items()}
    return tensors | {key + STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def kind_of(codec: Codec) -> tuple[str, int]:
    """Format and bits of a codec as they are written here; no format that this knows has 0 bits."""
    if isinstance(codec, LevelsCodec):
        return codec.format, codec.bits
    return codec.name, codec.bits if isinstance(codec, FloatsCodec) else 0


def part_keys(key: str, codec: Codec, length: int) -> dict[str, str]:
    """The files' name of each part of a matrix with rows of ``length`` values."""
    first, *others = codec.parts(length)
    return {first: key} | {name: f"{key}.{name}" for name in others}


class OwnMatrix(StoredMatrix):
    """One matrix (out, in) of such a checkpoint.

    Raises:
        PrequantizedError: another version of the files.
        CorruptFileError: a part is missing, or not of the size that the shape needs.
    """

    def __init__(self, checkpoint: TensorFiles, key: str) -> None:
        self._checkpoint, self._key = checkpoint, key
        self._at = f"{key} of {checkpoint.folder}"
        state = self._state()
        self.shape: tuple[int, int] = state["shape"]
        self.transposed: bool = state["transposed"]
        self._codec = codec_named(state["format"], state["bits"])
        self._kind: tuple[str, int] = state["format"], state["bits"]
        self._channels, self._length = self.shape[::-1] if self.transposed else self.shape
        self.keys = part_keys(key, self._codec, self._length)
        """Of each part, its name in the files."""
        for name, part in self._codec.parts(self._length).items():
            want = (part.rows(self._channels), part.width)
            info = checkpoint.tensors.get(self.keys[name])
            if info is None or info.dtype != "U8" or info.shape != want:
                have = f"{info.dtype} {info.shape}" if info else "missing"
                raise CorruptFileError(
                    f"{self.keys[name]} of {checkpoint.folder} is {have}, but {name} of a {self._kind[0]} matrix of shape "
                    f"{self.shape} is U8 {want}"
                )

    def _state(self) -> dict[str, Any]:
        where = f"{self._key}{STATE} of {self._checkpoint.folder}"
        try:
            state = json.loads(bytes(self._checkpoint.read(self._key + STATE).tolist()))
            version = state["version"]
            state["shape"] = out, width = tuple(map(int, state["shape"]))
            known = state["format"] in FORMATS and state["bits"] in BITS[state["format"]]
            good = known and min(out, width) > 0 and isinstance(state["transposed"], bool)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{where} does not describe a matrix ({error!r})") from error
        _check_version(version, where)
        if not good:
            raise CorruptFileError(f"{where} does not describe a matrix: {state}")
        return cast("dict[str, Any]", state)

    def codec(self, asked: Codec, transposed: bool) -> Codec:
        """See :meth:`StoredMatrix.codec`."""
        _check_kind(asked, *self._kind, self._at)
        if transposed != self.transposed:
            raise CorruptFileError(
                f"{self._at} is {'' if self.transposed else 'not '}stored transposed, but this model's is"
                f"{'' if transposed else ' not'}: the files belong to different models"
            )
        return asked

    def part(self, name: str, start: int, stop: int, transposed: bool) -> Tensor | None:
        """See :meth:`StoredMatrix.part`."""
        return self._checkpoint.read(self.keys[name], slice(start, stop))

    def _stored_rows(self, start: int, stop: int) -> Tensor:
        """Stored rows, decoded, fp32."""
        every = [part.every for part in self._codec.parts(self._length).values()]
        rows = [slice(start, stop) if one == 1 else slice(None) for one in every]
        parts = tuple(self._checkpoint.read(key, row) for key, row in zip(self.keys.values(), rows))
        return unpack(self._codec.stored(parts, self._length))._replace(first=start).decode(None, torch.float32)

    def rows(self, start: int, stop: int) -> Tensor:
        """See :meth:`StoredMatrix.rows`."""
        if not self.transposed:
            return self._stored_rows(start, stop)
        return columns_of(self._stored_rows, self._channels, start, stop)

    def columns(self, start: int, stop: int) -> Tensor:
        """See :meth:`StoredMatrix.columns`."""
        return self._stored_rows(start, stop) if self.transposed else super().columns(start, stop)

    def mark(self) -> str:
        """See :meth:`StoredMatrix.mark`."""
        samples = torch.cat([self._checkpoint.sample(key) for key in self.keys.values()])
        return f"{self._kind[0]}{self._kind[1]}:{digest(samples, self.shape)}"


def find(checkpoint: TensorFiles, key: str) -> OwnMatrix | None:
    """The matrix, if it was quantised here."""
    return OwnMatrix(checkpoint, key) if key + STATE in checkpoint.tensors else None


def is_quantised(checkpoint: TensorFiles) -> bool:
    """Whether any matrix was quantised here."""
    return any(name.endswith(STATE) for name in checkpoint.tensors)


def check_config(settings: dict[str, Any], codec: Codec, at: str) -> bool:
    """Whether a ``quantization_config`` is of this.

    Raises:
        PrequantizedError: another version, or not what the run's ``codec`` is.
    """
    if settings.get("quant_method") != METHOD:
        return False
    _check_version(settings.get("version"), at)
    name, bits = settings.get("format"), settings.get("bits")
    if name not in FORMATS or bits not in BITS[cast("Format", name)]:
        raise PrequantizedError(f"{at} has format {name!r} of {bits!r} bits: read are {', '.join(FORMATS)}")
    _check_kind(codec, name, bits, at)
    return True


def with_stored_bits(asked: QuantizationSection, settings: Any) -> QuantizationSection:
    """What a run asks for, with as many bits as its model's files have where it does not say how many.

    Args:
        asked: by the run.
        settings: the model's ``quantization_config``, if it has one.
    """
    if asked.bits is not None or not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return asked
    bits = settings.get("bits")
    same = asked.stored == settings.get("format") and bits in BITS.get(asked.stored or "", ())
    return replace(asked, bits=bits) if same else asked


def _check_version(version: Any, at: str) -> None:
    if version != VERSION:
        raise PrequantizedError(
            f"{at} has version {version!r}: only {VERSION} is read. Quantise again with this sparselora-dist, or use the "
            "one that made it"
        )


def _check_kind(asked: Codec, name: str, bits: int, at: str) -> None:
    have, width = kind_of(asked)
    if have != name:
        raise PrequantizedError(f'{at} is stored as {name}: set quantization.format "{name}"')
    if width != bits:
        raise PrequantizedError(f"{at} has codes of {bits} bits: set quantization.bits {bits}, or leave it out")
